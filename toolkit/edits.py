"""Changing a model: a plan of head edits written into weights or applied at run time (the two agree), and steering.

``selective_merge``, which puts part of what training changed back into a base model, is the one of ``merging``.

Everything is computed in fp32 and cast to the model's own type. Applying never modifies its argument: :func:`apply`
returns a new LM that shares every untouched weight with the old one.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import hooks, identity, origins, phases
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.merging import selective_merge as selective_merge
from toolkit.phases import EVERYWHERE, Scope
from toolkit.sites import Layout, Site
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, HeadScores, Plan


def plan(
    scores: HeadScores,
    direction: Direction,
    *,
    fraction: float | None = 0.04,
    count: int | None = None,
    strength: float = 1.0,
) -> Plan:
    """Project the direction out of the highest-scoring heads.

    Args:
        fraction: Share of all heads, rounded to at least one; ignored if ``count`` is given.
        count: Number of heads.
        strength: lambda; 1 removes the component, 0 changes nothing.

    Raises:
        ValueError: fraction outside (0, 1], more heads than the model has, or scores that are not finite.
    """
    if not torch.isfinite(scores.score).all():
        raise ValueError(f"The scores of {scores.method!r} hold NaN or infinity: heads cannot be ranked by them.")
    ranked = scores.ranked()
    if count is None:
        if fraction is None or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: need 0 < fraction <= 1 (or give count).")
        count = max(1, round(fraction * len(ranked)))
    if not 1 <= count <= len(ranked):
        raise ValueError(f"count={count}: the model has {len(ranked)} heads.")
    chosen = tuple(HeadEdit(layer, head, "project_out", strength) for layer, head in ranked[:count])
    return Plan(chosen, direction, f"top {count} of {len(ranked)} heads, {direction.estimator}", scores.provenance)


def random_heads(like: Plan, layout: Layout, *, seed: int) -> Plan:
    """The control of a plan: as many heads *of the same layers*, none of them a target, same operation and strength.

    Where more than half of a layer's heads are targets, those that it cannot match come from the nearest layer that has others left.

    Raises:
        ValueError: more than half of all heads are targets.
    """
    if 2 * len(like.edits) > layout.n_layers * layout.n_heads:
        raise ValueError(
            f"{len(like.edits)} of {layout.n_layers * layout.n_heads} heads are edited, too many for a control of others."
        )
    generator = torch.Generator().manual_seed(seed)
    targets = {*like.heads}
    free = {layer: [h for h in range(layout.n_heads) if (layer, h) not in targets] for layer in range(layout.n_layers)}
    by_layer: dict[int, list[HeadEdit]] = defaultdict(list)
    for edit in like.edits:
        by_layer[edit.layer].append(edit)
    chosen: list[HeadEdit] = []
    unmatched: list[HeadEdit] = []

    def draw(layer: int, edits: Sequence[HeadEdit]) -> None:
        drawn = torch.randperm(len(free[layer]), generator=generator)[: len(edits)].tolist()
        heads = [free[layer][i] for i in drawn]
        free[layer] = [h for h in free[layer] if h not in heads]
        chosen.extend(HeadEdit(layer, head, edit.op, edit.strength) for head, edit in zip(heads, edits, strict=True))

    for layer, edits in sorted(by_layer.items()):
        matched = min(len(edits), len(free[layer]))
        draw(layer, edits[:matched])
        unmatched += edits[matched:]
    for edit in unmatched:  # after all others, so that it takes no head that a layer needs for its own
        draw(min((layer for layer in free if free[layer]), key=lambda layer: (abs(layer - edit.layer), layer)), [edit])
    return Plan(tuple(chosen), like.direction, f"random heads (seed {seed}) for: {like.name}", like.provenance)


def random_written(like: Plan, layout: Layout, *, seed: int) -> Direction:
    """A random direction among those the plan's heads can write, at ``attn_out``: the control of the direction they lose.

    An isotropic random direction is almost orthogonal to the ``head_dim`` directions that a head can write at all, so that
    removing it would do nothing whatever the head does.
    """
    if like.direction is None:
        raise ValueError("This plan has no direction, so there is nothing to control for.")
    generator = torch.Generator().manual_seed(seed)
    vector = torch.zeros(layout.n_layers, layout.d_model, dtype=torch.float64)
    for layer, head in like.heads:
        W_h = layout.W_O(layer).detach()[:, layout.head(head)].cpu().double()
        vector[layer] += W_h @ torch.randn(layout.head_dim, generator=generator, dtype=torch.float64)
    return replace(like.direction, vector=vector, kind="attn_out", estimator=f"random_written(seed={seed})")


def with_direction(like: Plan, direction: Direction) -> Plan:
    """The same heads and strengths with another direction, such as the random control."""
    return Plan(like.edits, direction, f"{direction.estimator} direction for: {like.name}", like.provenance)


def plan_origins(planned: Plan) -> tuple[origins.Record, ...]:
    """The problems that a plan and its direction were made from, as records of ``origins``."""
    parts = [planned.provenance, *([planned.direction.provenance] if planned.direction else [])]
    return origins.distinct(origins.of(part.notes) for part in parts)


@torch.no_grad()
def apply(lm: LM, planned: Plan) -> LM:
    """Write a plan into the weights: ``W_h <- (I - lambda v v^T) W_h`` (arXiv 2503.22048) or ``W_h <- (1 - lambda) W_h``.

    Only the edited layers' output projections are copied; every other weight is shared with ``lm``.

    Raises:
        WrongModelError: the plan was made from other weights.
    """
    check_plan(lm, planned)
    touched = sorted({edit.layer for edit in planned.edits})
    own = {id(lm.layout.blocks[layer].out.weight) for layer in touched}
    shared = [*lm.model.parameters(), *lm.model.buffers()]
    model = _copied(lm.model, {id(p): p for p in shared if id(p) not in own})
    edited = lms.child(lm, model, f"{lm.name} + {planned.name}", made_from=plan_origins(planned))
    for edit in planned.edits:
        columns = edited.layout.head(edit.head)
        W = edited.layout.W_O(edit.layer)
        W[:, columns] = _edited(W[:, columns].float(), edit, unit_at(lm.layout, planned, edit.layer, W.device)).to(W.dtype)
    return edited


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(module, memo)``; most of its time would go into the dozen dictionaries of every module, most of them empty."""
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = new = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        kind = type(value)
        if name == "_modules":
            value = {key: part if part is None else _copied(part, memo) for key, part in value.items()}
        elif name in ("_parameters", "_buffers"):
            value = {key: memo[id(part)] if id(part) in memo else copy.deepcopy(part, memo) for key, part in value.items()}
        elif kind in (dict, OrderedDict, set) and not value:
            value = kind()
        elif kind not in (bool, int, float, str, NoneType):
            value = copy.deepcopy(value, memo)
        new.__dict__[name] = value
    return new


def _edited(W: Float[Tensor, "d_model head_dim"], edit: HeadEdit, v: Float[Tensor, " d_model"] | None) -> Tensor:
    if v is None or edit.op == "scale":
        return (1 - edit.strength) * W
    return W - edit.strength * torch.outer(v, v @ W)


def unit_at(layout: Layout, planned: Plan, layer: int, device: torch.device) -> Float[Tensor, " d_model"] | None:
    """The plan's unit direction at a layer, as a functional of ``attn_out``; ``None`` if the plan has no direction.

    Where a norm with gain g follows, v leaves the residual stream only if ``g * v`` is projected out before the norm. A direction
    at ``attn_out`` is taken as it is: it lives before the norm.
    """
    if planned.direction is None:
        return None
    v = planned.direction.vector[layer].to(device, torch.float32)
    if planned.direction.kind != "attn_out":
        v = layout.to_attn_out(layer, v)
    norm = v.norm()
    return v / norm if norm > 0 else v


def _digest(direction: Direction | None) -> str:
    """What a direction is, and a hash of its numbers."""
    if direction is None:
        return "no direction"
    return f"{direction.estimator} {direction.kind} {direction.positions} {identity.hash_of(direction.vector)}"


def check_plan(lm: LM, planned: Plan) -> None:
    """Raise WrongModelError if a plan was made from other weights or for another shape, IndexError if it edits a head that is not there.

    ValueError if its direction is not finite: the edit would write NaN into the weights.
    """
    if planned.provenance.fingerprint != lm.fingerprint:
        raise WrongModelError(
            f"The plan {planned.name!r} was made from {planned.provenance.model} (weights {planned.provenance.fingerprint[:12]}), "
            f"not from {lm.name} (weights {lm.fingerprint[:12]}). Make it again from this model's rollouts."
        )
    for edit in planned.edits:
        lm.layout.check(Site("z", edit.layer))
        lm.layout.head(edit.head)
    if planned.direction is not None:
        _check_shape(planned.direction, lm)
        if not torch.isfinite(planned.direction.vector).all():
            raise ValueError(
                f"The direction of the plan {planned.name!r} holds NaN or infinity: nothing sound can be edited with it."
            )


@dataclass(frozen=True)
class RuntimeEdit:
    """A plan applied while the model runs; equals :func:`apply` up to rounding. An intervention: ``with RuntimeEdit(plan)(lm)``."""

    plan: Plan

    def __str__(self) -> str:
        chosen = [(e.layer, e.head, e.op, e.strength) for e in self.plan.edits]
        return f"edit at run time: {chosen}, {_digest(self.plan.direction)}"

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        check_plan(lm, self.plan)
        by_layer: dict[int, list[HeadEdit]] = defaultdict(list)
        for edit in self.plan.edits:
            by_layer[edit.layer].append(edit)
        return hooks.rewrite(
            lm.layout, {Site("attn_out", layer): self._rewrite(lm.layout, layer, found) for layer, found in by_layer.items()}
        )

    def _rewrite(self, layout: Layout, layer: int, edits: Sequence[HeadEdit]) -> hooks.Rewrite:
        W = layout.W_O(layer).detach().float()
        v = unit_at(layout, self.plan, layer, W.device)
        new = W.clone()
        for edit in edits:
            columns = layout.head(edit.head)
            new[:, columns] = _edited(new[:, columns], edit, v)
        change = new - W
        return lambda attn_out, z: (attn_out.float() + z.float() @ change.T).to(attn_out.dtype)


OPS = ("add", "ablate", "clamp")


@dataclass(frozen=True)
class Steering:
    """A direction acting on the residual stream while the model runs; made by :func:`steering`."""

    direction: Direction
    strength: float
    layers: tuple[int, ...] | None = None
    where: str | None = None
    during: Scope = EVERYWHERE
    op: str = "add"
    value: float = 0.0

    def __str__(self) -> str:
        layers = "all layers" if self.layers is None else f"layers {self.layers}"
        act = {"add": "steering", "ablate": "ablating", "clamp": f"clamping to {identity.exact(self.value)}"}[self.op]
        return f"{act} {identity.exact(self.strength, '+')} x {_digest(self.direction)}, {self.site}, {layers}, {self.during}"

    @property
    def site(self) -> str:
        """Site kind it acts at."""
        return self.where or self.direction.kind

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Act on ``lm`` inside the context.

        Raises:
            WrongModelError: another width or depth, or a direction of other weights (neither of ``lm`` nor of the model it was
                made from).
        """
        check_direction(self.direction, lm)
        return self._acting(lm) if self.strength else nullcontext()

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        layers = range(lm.layout.n_layers) if self.layers is None else self.layers
        vector = self.direction.vector.float()
        with ExitStack() as stack:
            now = None if self.during.everywhere else stack.enter_context(phases.track(lm))
            stack.enter_context(
                hooks.rewrite(lm.layout, {Site(self.site, layer): self._rewrite(vector[layer], now) for layer in layers})
            )
            yield

    def _rewrite(self, v: Float[Tensor, " d_model"], tracker: phases.Tracker | None) -> hooks.Rewrite:
        norm = v.norm()
        u = v / norm if norm > 0 else v
        aim = self.value * bool(norm > 0) if self.op == "clamp" else 0.0
        strong = self.strength * v

        def fn(value: Tensor, inputs: Tensor) -> Tensor:
            nonlocal v, u, strong
            if v.device != value.device:  # once
                v, u, strong = (x.to(value.device) for x in (v, u, strong))
            weight = None if tracker is None else tracker.weight(self.during, value.device)
            if tracker is not None and weight is None:
                return value
            if self.op == "add":
                return (value + (strong if weight is None else weight[..., None] * strong)).to(value.dtype)
            dose = self.strength if weight is None else self.strength * weight[..., None]
            change = aim - value.float() @ u
            return (value + dose * change[..., None] * u).to(value.dtype)

        return fn

    def relative_dose(self, scale: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
        """``|strength * v| / scale`` per layer, with ``scale`` the typical norm of the activations there."""
        return abs(self.strength) * self.direction.norms / scale


def steering(
    direction: Direction,
    strength: float,
    *,
    layers: Sequence[int] | None = None,
    where: str | None = None,
    during: str | Scope = "all",
    op: str = "add",
    value: float = 0.0,
) -> Steering:
    """An intervention along a direction: ``Condition(lm, (steering(v, 0.5, during="think"),))``. + is longer, - is shorter.

    Per layer, with u = v / |v| and every position weighted by its scope::

        add     h <- h + strength * v
        ablate  h <- h - strength * <h, u> u          1 projects out
        clamp   h <- h + strength * (value - <h, u>) u    1 sets the component to ``value``

    Strength 0 is bitwise the base model. With the un-normalised direction of ThinkEdit and all layers at once, strengths are
    small (published grid: -0.08 ... 0.08). Exact under KV cache, left padding, batches, beams, greedy decoding and sampling.

    Args:
        layers: Layers to act at; ``None`` is all.
        where: Site kind; ``None`` is the direction's own.
        during: ``"all"``, ``"newest"``, phases such as ``"think"`` or ``"think+answer"``, or a :class:`~toolkit.phases.Scope`.
        value: What ``clamp`` sets the component to, in units of the residual stream.

    Raises:
        ValueError: NaN in the direction or the numbers, an unknown operation, phase or site.
        IndexError: a layer that the direction does not have.
    """
    if not torch.isfinite(direction.vector).all() or not all(map(math.isfinite, (strength, value))):
        raise ValueError(f"The direction, strength={strength} or value={value} is not finite: nothing sound can be added.")
    if op not in OPS:
        raise ValueError(f"op={op!r}: choose one of {', '.join(OPS)}.")
    chosen = None if layers is None else tuple(layers)
    for layer in chosen or ():
        if not 0 <= layer < len(direction.vector):
            raise IndexError(f"Layer {layer} does not exist: the direction has layers 0..{len(direction.vector) - 1}.")
    if (where or direction.kind) == "z":
        raise ValueError("A direction lives in the residual stream (width d_model), not at z: choose another site.")
    return Steering(direction, strength, chosen, Site(where, 0).kind if where else None, Scope.parse(during), op, value)


def check_direction(direction: Direction, lm: LM) -> None:
    """Raise WrongModelError if a direction has another width or depth than ``lm``, or is of neither its weights nor its parent's."""
    _check_shape(direction, lm)
    if direction.provenance.fingerprint not in (lm.fingerprint, lm.parent):
        raise WrongModelError(
            f"The direction was made from {direction.provenance.model} (weights {direction.provenance.fingerprint[:12]}), not from "
            f"{lm.name} (weights {lm.fingerprint[:12]}) or its parent. Make it again, or say that you mean it: edits.transferred(direction, lm)."
        )


def _check_shape(direction: Direction, lm: LM) -> None:
    shape = (lm.layout.n_layers, lm.layout.d_model)
    if direction.vector.shape != shape:
        raise WrongModelError(
            f"The direction is {tuple(direction.vector.shape)}, {lm.name} has {shape[0]} layers of width {shape[1]}."
        )


def transferred(direction: Direction, lm: LM) -> Direction:
    """The same numbers, declared to be meant for ``lm``: for a model trained further, say. Its estimator says where it came from."""
    origin = f"{direction.estimator} from {direction.provenance.model}"
    about = lm.provenance(direction.provenance.seed)
    notes = {k: v for k, v in direction.provenance.notes.items() if k != "template"}  # a switch of the other model
    return replace(direction, estimator=origin, provenance=replace(about, notes={**notes, **about.notes}))


def column_norms(before: LM, after: LM, planned: Plan) -> list[dict[str, int | float]]:
    """Frobenius norm of each edited head's slice of ``W_O`` before and after."""
    rows = []
    for edit in planned.edits:
        columns = before.layout.head(edit.head)
        norms = [m.layout.W_O(edit.layer)[:, columns].float().norm().item() for m in (before, after)]
        rows.append({"layer": edit.layer, "head": edit.head, "before": norms[0], "after": norms[1]})
    return rows
