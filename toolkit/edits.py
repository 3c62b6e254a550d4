"""Plans of head edits (``Plan``): make a plan and its random controls, and apply it, either in the weights or at run time.

``apply`` writes a plan into the weights. It does not modify its argument, but returns a new LM that shares all unedited weights with the
old one. ``RuntimeEdit`` gives the same outputs, up to rounding, without a change of weights. Edits are computed in fp32 and cast to the
model's dtype. ``steering`` is re-exported from ``toolkit.steering``, ``selective_merge`` from ``toolkit.merging``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import hooks, identity, origins
from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.merging import selective_merge
from toolkit.sites import Layout, Site
from toolkit.steering import OPS, Steering, check_direction, check_shape, in_words, steering, transfer
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, HeadScores, Plan

__all__ = [
    "OPS", "RuntimeEdit", "Steering", "apply", "check_direction", "check_plan", "column_norms", "different_draws", "plan", "plan_origins",
    "random_heads", "random_written", "selective_merge", "steering", "transfer", "unit_at", "with_direction",
]  # fmt: skip


def plan(
    scores: HeadScores,
    direction: Direction,
    *,
    fraction: float | None = 0.04,
    count: int | None = None,
    strength: float = 1.0,
) -> Plan:
    """Return a plan that projects a direction out of the output of the highest-scoring heads.

    Args:
        scores: Score of each head.
        direction: Direction to project out.
        fraction: Share of all heads to edit. The resulting number of heads is rounded, and at least 1. Ignored if ``count`` is given.
        count: Number of heads to edit; ``None`` takes it from ``fraction``.
        strength: Strength of the edit. 1 removes the component of a head's output along the direction, 2 reverses it, 0 changes nothing.

    Raises:
        ValueError: ``fraction`` is outside (0, 1], ``count`` is not between 1 and the number of heads, or a score is not finite.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> scores = HeadScores(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), "short_thinking", "residual-stream units", made)
    >>> direction = Direction(torch.ones(2, 4), "resid_mid", "think", "mean_difference", 10, 10, made)
    >>> example = plan(scores, direction, fraction=0.5)
    >>> example.name, example.heads
    ('top 2 of 4 heads, mean_difference', [(0, 1), (1, 1)])
    """
    scores.check()
    ranked = scores.ranked()
    if count is None:
        if fraction is None or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: need 0 < fraction <= 1, or count.")
        count = max(1, round(fraction * len(ranked)))
    if not 1 <= count <= len(ranked):
        raise ValueError(f"count={count}: the model has {len(ranked)} heads.")
    chosen = tuple(HeadEdit(layer, head, "project_out", strength) for layer, head in ranked[:count])
    of = f"{len(ranked)} heads" + (f" ({scores.headless})" if scores.headless else "")
    return Plan(chosen, direction, f"top {count} of {of}, {direction.estimator}", scores.provenance)


def random_heads(like: Plan, layout: Layout, *, seed: int) -> Plan:
    """Return a control for the plan ``like``: the same operations and strengths on random other heads *of the same layers*.

    If the plan removes a direction that its own heads write, the other heads have next to nothing along it. The control is then too weak:
    use ``jobs.random_heads``.

    If ``like`` edits more than half of a layer's heads, that layer has too few unedited heads. The missing control heads are then drawn
    from the nearest layer with free heads. A head is free if ``like`` does not edit it and the control does not edit it yet.

    Args:
        like: The plan for which a control is wanted.
        layout: Layout of the model: ``lm.layout``.
        seed: Seed of the random choice.

    Raises:
        ValueError: the plan edits more than half of all heads.

    >>> from toolkit.sites import ROWS, Block
    >>> from toolkit.types import Provenance
    >>> like = Plan((HeadEdit(1, 0, "scale", 1.0),), None, "one head", Provenance("example", None, "0", "0", "0.1.0"))
    >>> block = Block(*[torch.nn.Identity()] * 4, None, None)
    >>> layout = Layout(ROWS[0], (block, block), heads=(4, 4), head_dims=(8, 8), d_model=32)  # in practice: model.layout
    >>> control = random_heads(like, layout, seed=0)
    >>> control.name, control.heads
    ('random heads (seed 0) for: one head', [(1, 3)])
    """
    if 2 * len(like.edits) > len(layout.all_heads):
        raise ValueError(
            f"{len(like.edits)} of {len(layout.all_heads)} heads are edited: a control needs as many others. Edit fewer heads."
        )
    generator = torch.Generator().manual_seed(seed)
    targets = {*like.heads}
    # Layer -> heads that the plan does not edit and that have not been drawn yet.
    free = {layer: [h for h in range(layout.heads[layer]) if (layer, h) not in targets] for layer in range(layout.n_layers)}
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
    for edit in unmatched:  # after all others, so that no layer loses a head that it needs for its own edits
        # Of two equally near layers, take the lower one.
        draw(min((layer for layer in free if free[layer]), key=lambda layer: (abs(layer - edit.layer), layer)), [edit])
    return Plan(tuple(chosen), like.direction, f"random heads (seed {seed}) for: {like.name}", like.provenance)


assumed_tries = 20  # random draws per control before fewer controls are taken: ours


def different_draws(draw: Callable[[int], Plan], draws: int, *, seed: int) -> list[Plan]:
    """Return up to ``draws`` random controls that differ in their heads or in their direction.

    A small model has few sets of other heads, so equal draws are frequent. There are fewer controls only if ``assumed_tries`` draws per
    control gave no more different ones.

    Args:
        draw: Function from a seed to a control, such as ``lambda seed: random_heads(plan, lm.layout, seed=seed)``.
        draws: Number of controls.
        seed: Seed of the first draw; it rises by 1 with each further one.
    """
    found: dict[Any, Plan] = {}
    for at in range(seed, seed + assumed_tries * draws):
        plan = draw(at)
        found.setdefault((frozenset(plan.heads), plan.direction and identity.hash_of(plan.direction.vector)), plan)
        if len(found) == draws:
            break
    return list(found.values())


def random_written(like: Plan, layout: Layout, *, seed: int) -> Direction:
    """Return a random direction, at site ``attn_out``, that the heads of the plan ``like`` can write to.

    Pass it to ``with_direction``. In each layer with edited heads, it is a random combination of their columns of ``W_O``. In other layers
    it is zero.

    As a control for the plan's own direction it is too weak: the outputs of a head vary little along most directions that the head can
    write, so the edit would remove a fraction of what the plan removes. Use ``jobs.random_groups``.

    Args:
        like: The plan for which a control is wanted.
        layout: Layout of the model: ``lm.layout``.
        seed: Seed of the random direction.

    Raises:
        ValueError: the plan has no direction.
    """
    if like.direction is None:
        raise ValueError("This plan has no direction, so a random direction is no control for it: use random_heads.")
    generator = torch.Generator().manual_seed(seed)
    vector = torch.zeros(layout.n_layers, layout.d_model, dtype=torch.float64)
    for layer, head in like.heads:
        W_h = layout.W_O(layer).detach()[:, layout.head(layer, head)].cpu().double()
        vector[layer] += W_h @ torch.randn(layout.head_dims[layer], generator=generator, dtype=torch.float64)
    return replace(like.direction, vector=vector, kind="attn_out", estimator=f"random_written(seed={seed})")


def with_direction(like: Plan, direction: Direction) -> Plan:
    """Return a copy of the plan ``like`` that projects out another direction, such as a random one, with the same heads and strengths."""
    return Plan(like.edits, direction, f"{direction.estimator} direction for: {like.name}", like.provenance)


def plan_origins(planned: Plan) -> tuple[origins.Record, ...]:
    """Return records of the problems that were used to make a plan and its direction. ``origins.record`` describes a record."""
    parts = [planned.provenance, *([planned.direction.provenance] if planned.direction else [])]
    return origins.distinct(origins.record_in(part.notes) for part in parts)


@torch.no_grad()
def apply(lm: LM, planned: Plan) -> LM:
    """Return a new LM with a plan written into its weights.

    An edit changes the columns ``W_h`` of ``W_O`` that belong to its head. With s the strength of the edit, and v the plan's unit direction
    at the layer (see ``unit_at``)::

        project_out   W_h <- (I - s v v^T) W_h        (arXiv:2503.22048)
        scale         W_h <- (1 - s) W_h

    Only the output projections of the edited layers are copied. All other weights are shared with ``lm``.

    Raises:
        WrongModelError: the plan was made from other weights, or the shape of its direction does not fit the model.
        UnsupportedModelError: the weights are quantised or offloaded. Use ``RuntimeEdit``, or ``vectors.save_adapter``.
        IndexError: the plan edits a head that does not exist.
        ValueError: the plan's direction is not finite.
    """
    check_plan(lm, planned)
    lms.check_plain(
        lm,
        "editing the weights of heads",
        "Edit at run time (edits.RuntimeEdit(plan)), or write the edit as an adapter (vectors.save_adapter).",
    )
    outs: list[Any] = [lm.layout.blocks[edit.layer].out for edit in planned.edits]
    changed = {id(out.weight) for out in outs}
    # A tensor that the memo maps to itself is shared, not copied.
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    model = _copy(lm.model, {id(t): t for t in tensors if id(t) not in changed})
    edited = lms.child(lm, model, f"{lm.name} + {planned.name}", made_from=plan_origins(planned))
    for edit in planned.edits:
        columns = edited.layout.head(edit.layer, edit.head)
        W = edited.layout.W_O(edit.layer)
        W[:, columns] = _edited(W[:, columns].float(), edit, unit_at(lm.layout, planned, edit.layer, W.device)).to(W.dtype)
    return edited


def _copy(module: Any, memo: dict[int, Any]) -> Any:
    """Return the same as ``copy.deepcopy(module, memo)``, but faster.

    ``deepcopy`` spends most of its time on empty dictionaries, of which a module has about a dozen. Here they are replaced by new ones, and
    numbers and texts are reused.

    Args:
        module: The module to copy.
        memo: Dict from the id of an object to its copy. A tensor that is listed as its own copy is shared, not copied.
    """
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = new = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        kind = type(value)
        if name == "_modules":
            value = {key: part if part is None else _copy(part, memo) for key, part in value.items()}
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
    return W - edit.strength * torch.outer(v, v @ W)  # v v^T W without the matrix v v^T


def unit_at(layout: Layout, planned: Plan, layer: int, device: torch.device) -> Float[Tensor, " d_model"] | None:
    """Return the plan's direction at a layer as a unit vector at ``attn_out``; ``None`` if the plan has no direction.

    Let v be the plan's direction at the layer. In most families the result is v, scaled to norm 1. A zero vector stays zero.

    In post-norm families a norm with gain g stands between ``attn_out`` and the residual stream. If v was measured in the stream, the
    result is ``g * v`` (elementwise), scaled to norm 1. The reason: the norm multiplies by g, so the component along v in the stream is
    proportional to the component along ``g * v`` before the norm. If v was measured at ``attn_out`` itself, the result is v, scaled to
    norm 1.
    """
    if planned.direction is None:
        return None
    v = planned.direction.vector[layer].to(device, torch.float32)
    if planned.direction.kind != "attn_out":
        v = layout.to_attn_out(layer, v)
    norm = v.norm()
    return v / norm if norm > 0 else v  # a zero vector stays zero, and the edit changes nothing


def check_plan(lm: LM, planned: Plan) -> None:
    """Raise an error if a plan cannot be applied to a model.

    Raises:
        WrongModelError: the plan was made from other weights, or the shape of its direction does not fit the model.
        IndexError: the plan edits a head that does not exist.
        ValueError: the plan's direction is not finite.
    """
    if planned.provenance.fingerprint != lm.fingerprint:
        raise WrongModelError(
            f"The plan {planned.name!r} was made from {planned.provenance.model}, whose weights differ from "
            f"those of {lm.name}. Make a plan from this model's rollouts."
        )
    for edit in planned.edits:
        lm.layout.head(edit.layer, edit.head)  # raises IndexError
    if planned.direction is not None:
        check_shape(planned.direction, lm)
        if not torch.isfinite(planned.direction.vector).all():
            raise ValueError(f"The direction of the plan {planned.name!r} holds NaN or infinity: the edited weights would, too.")


@dataclass(frozen=True)
class RuntimeEdit:
    """An intervention that applies a plan while the model runs: ``with RuntimeEdit(plan)(lm): ...``.

    Up to rounding, the outputs equal those of the model that ``apply`` returns. Unlike ``apply``, it also works with quantised and
    offloaded weights.
    """

    plan: Plan
    recordable: ClassVar[bool] = True  # see lm.Intervention

    def __str__(self) -> str:
        chosen = [(e.layer, e.head, e.op, e.strength) for e in self.plan.edits]
        return f"edit at run time: {chosen}, {in_words(self.plan.direction)}"

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        check_plan(lm, self.plan)
        by_layer: dict[int, list[HeadEdit]] = defaultdict(list)
        for edit in self.plan.edits:
            by_layer[edit.layer].append(edit)
        return hooks.rewrite(
            lm.layout,
            {Site("attn_out", layer): self._rewrite(lm.layout, layer, head_edits) for layer, head_edits in by_layer.items()},
        )

    def _rewrite(self, layout: Layout, layer: int, edits: Sequence[HeadEdit]) -> hooks.Rewrite:
        # Add what the edit changes, (W_edited - W) z, to the output of the unedited projection.
        W = layout.W_O(layer).detach().float()
        v = unit_at(layout, self.plan, layer, W.device)
        new = W.clone()
        for edit in edits:
            columns = layout.head(edit.layer, edit.head)
            new[:, columns] = _edited(new[:, columns], edit, v)
        change = new - W
        return lambda attn_out, z: (attn_out.float() + z.float() @ change.T).to(attn_out.dtype)


def column_norms(before: LM, after: LM, planned: Plan) -> list[dict[str, int | float]]:
    """Return the Frobenius norm of each edited head's columns of ``W_O``, before and after the edit.

    Args:
        before: The model before the edit.
        after: The edited model.
        planned: The plan that was applied.

    Returns:
        One dict per edited head, with the keys ``layer, head, before, after``.
    """
    rows = []
    for edit in planned.edits:
        columns = before.layout.head(edit.layer, edit.head)
        norms = [m.layout.W_O(edit.layer)[:, columns].float().norm().item() for m in (before, after)]
        rows.append({"layer": edit.layer, "head": edit.head, "before": norms[0], "after": norms[1]})
    return rows
