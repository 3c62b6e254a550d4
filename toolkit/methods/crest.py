"""CREST: cognitive-head steering (Zhang et al., 2025), arXiv:2512.24574. Some heads are turned away from re-checking.

Offline, a linear probe per head separates steps that re-check or turn back from the others, on the head's output z_h where the step begins.
The heads with the most accurate probes are chosen, the best 38 % in the paper. Online, at the ends of steps of thinking, with the unit vector
v of a chosen head::

    u = z_h - (z_h . v) v,        z_h <- u |z_h| / |u|        unchanged where |u| < 1e-6 |z_h|

So the component along v is removed and the norm stays: a rotation.

Sources: the abstract and notes on the README of the code; neither paper nor code could be read. The exact intervention is not known: the
formula above is our reading.

Deviations: v is the difference of the class means of z_h (steps of re-checking minus others); the file of the code holds a vector of its
own per head. The paper's coefficient -4 has no place in a rotation; ``share`` turns part of the way, u = z_h - share (z_h . v) v. The
rotation acts before ``W_O`` (the mode ``before_o_proj`` of the code), since heads are mixed after it. Accuracies are balanced, with folds
by problem.

Units and signs: share 1 removes the component, 0 changes nothing. The method does not say whether thinking gets longer or shorter: measure
it. Random control: ``random_turns``, as many other heads, from all layers, along directions from
shuffled classes. Cost: one probe per head and fold; at run time next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import hooks, identity, phases, probes
from toolkit.collect import States
from toolkit.lm import LM
from toolkit.phases import THINKING, Scope
from toolkit.probes import Protocol
from toolkit.sites import Layout, Site
from toolkit.step_states import OTHER, RECHECK, ends_step
from toolkit.store import WrongModelError
from toolkit.types import HeadScores, Provenance

SHARE_OF_HEADS = 0.38  # published: about the best 38 % by the probe's accuracy
TINY = 1e-6  # an output whose part across v is a smaller share of its norm than this is not turned: ours


@dataclass(frozen=True)
class Turn:
    """A head, and the unit vector that its output is turned away from.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        vector: Unit vector of the head's output space, ``head_dim`` numbers.
    """

    layer: int
    head: int
    vector: Float[Tensor, " head_dim"]


@dataclass(frozen=True)
class HeadRotation:
    """Intervention that turns the outputs of some heads: their component along a vector is removed, their norm stays. Use ``Condition.during``.

    Attributes:
        turns: The heads and their vectors.
        provenance: Model and settings that the vectors are from.
        share: Share of the component that is removed, 0 to 1.
        ends: Text with which a step ends: only tokens that end with it are acted on. ``""``: every position in scope.
        during: Positions at which the heads are turned, among those that end a step.
    """

    turns: tuple[Turn, ...]
    provenance: Provenance
    share: float = 1.0
    ends: str = "\n\n"
    during: Scope = THINKING

    def __post_init__(self) -> None:
        if not self.turns or not 0 <= self.share <= 1:
            raise ValueError(f"{len(self.turns)} heads, share={self.share}: need at least one head, and a share from 0 to 1.")
        if len({(t.layer, t.head) for t in self.turns}) < len(self.turns):
            raise ValueError("A head is listed twice: give each head once.")
        if wrong := [t for t in self.turns if not abs(float(t.vector.norm()) - 1) < 1e-4]:
            raise ValueError(
                f"Head {wrong[0].layer}.{wrong[0].head}: its vector has norm {float(wrong[0].vector.norm()):g}, expected 1."
            )

    def __str__(self) -> str:
        heads = [(t.layer, t.head) for t in self.turns]
        vectors = identity.hash_of(torch.cat([t.vector for t in self.turns]))
        return (
            f"rotation of heads {heads} ({vectors}), share {identity.format_exact(self.share)}, after {self.ends!r}, {self.during}"
        )

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager in which the heads of ``lm`` are turned.

        Raises:
            WrongModelError: the vectors are from another model, or do not fit the heads of ``lm``.
            NoThinkTagsError: the heads are turned only during thinking, and ``lm`` has no think tags.
        """
        phases.check_tags(self.during, lm)
        if self.provenance.fingerprint not in (lm.fingerprint, lm.parent):
            raise WrongModelError(f"The rotations were made from {self.provenance.model}, not from {lm.name}: make them again.")
        for t in self.turns:
            if not (0 <= t.layer < lm.layout.n_layers and 0 <= t.head < lm.layout.heads[t.layer]):
                raise WrongModelError(f"{lm.name} has no head {t.layer}.{t.head}.")
            if len(t.vector) != lm.layout.head_dims[t.layer]:
                raise WrongModelError(
                    f"Head {t.layer}.{t.head} of {lm.name} writes {lm.layout.head_dims[t.layer]} numbers, its vector has {len(t.vector)}."
                )
        return self._acting(lm)

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        # The token of each position says whether it ends a step.
        ended, now = ends_step(lm, self.ends), list[Tensor]()

        def before(ids: Tensor | None, cache: Any) -> None:
            if ids is None:
                raise ValueError("Steps are read off token ids: pass input_ids, not inputs_embeds.")
            now[:] = [ids]

        with ExitStack() as stack:
            stack.enter_context(hooks.around_passes(lm.body, before, lambda ids, cache: None))
            tracker = stack.enter_context(phases.track(lm))
            by_layer: dict[int, list[Turn]] = {}
            for turn in self.turns:
                by_layer.setdefault(turn.layer, []).append(turn)

            def rewrite(layer: int) -> hooks.Rewrite:
                heads, size = torch.tensor([t.head for t in by_layer[layer]]), lm.layout.head_dims[layer]
                vectors = torch.stack([t.vector for t in by_layer[layer]]).float()

                def fn(value: Tensor, inputs: Tensor) -> Tensor:
                    weight = tracker.weight(self.during, value.device)
                    if weight is None:
                        return value
                    weight = weight * ended.to(value.device)[now[0].to(value.device)]
                    z = value[..., : lm.layout.heads[layer] * size].unflatten(-1, (-1, size))
                    place = heads.to(value.device)
                    old = z[..., place, :].float()
                    new = rotated(old, vectors.to(value.device), self.share * weight[..., None, None])
                    z = z.index_copy(-2, place, torch.where(weight[..., None, None] > 0, new, old).to(value.dtype))
                    return z.flatten(-2)

                return fn

            stack.enter_context(hooks.rewrite(lm.layout, {Site("z", layer): rewrite(layer) for layer in by_layer}))
            yield


def rotated(z: Float[Tensor, "... size"], v: Float[Tensor, "... size"], share: Float[Tensor, "... 1"] | float = 1.0) -> Tensor:
    """Return z without its component along the unit vector v, rescaled to the norm of z.

    >>> rotated(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])).tolist()
    [0.0, 5.0]

    Args:
        z: Outputs of heads.
        v: Unit vector of each head.
        share: Share of the component that is removed.
    """
    u = z - share * (z * v).sum(dim=-1, keepdim=True) * v
    norm, left = z.norm(dim=-1, keepdim=True), u.norm(dim=-1, keepdim=True)
    return torch.where(left > TINY * norm, u * norm / left.clamp(min=1e-30), z)


def scores(states: States, layout: Layout, protocol: Protocol = Protocol()) -> HeadScores:
    """Return the balanced accuracy of each head's probe, re-checks against other steps, on held-out problems.

    Args:
        states: Outputs of heads where steps begin, from ``step_states(lm, rollouts, "z", label)``.
        layout: ``lm.layout``.
        protocol: Settings of the cross-validation.

    Raises:
        KeyError, ValueError, TooFewProblemsError: as in ``probes.classify_heads``.
    """
    return probes.classify_heads(states, layout, RECHECK, protocol=protocol)[0]


def rotation(
    states: States, layout: Layout, scored: HeadScores, count: int, *, share: float = 1.0, ends: str = "\n\n"
) -> HeadRotation:
    """Return the rotation of the heads with the most accurate probes.

    Args:
        states: Outputs of heads where steps begin, as in ``scores``.
        layout: ``lm.layout``.
        scored: Accuracy per head, from ``scores``.
        count: Number of heads.
        share: Share of the component that is removed.
        ends: Text with which a step ends.

    Raises:
        ValueError: the model has fewer heads, or a chosen head has the same mean in both classes.
    """
    if not 1 <= count <= len(layout.all_heads):
        raise ValueError(f"count={count}: the model has {len(layout.all_heads)} heads, choose 1 to that many.")
    best = sorted(layout.all_heads, key=lambda at: (-float(scored.score[at]), at))[:count]
    return HeadRotation(_turns(states, layout, sorted(best)), states.provenance, share, ends)


def _turns(states: States, layout: Layout, heads: Sequence[tuple[int, int]]) -> tuple[Turn, ...]:
    """Return a turn per head, along the difference of the head's class means."""
    gap = states.values[states.of(RECHECK)].double().mean(dim=0) - states.values[states.of(OTHER)].double().mean(dim=0)
    turns = []
    for layer, head in heads:
        vector = layout.by_head(layer, gap[layer])[head]
        if not vector.norm() > 0:
            raise ValueError(f"Head {layer}.{head} has the same mean output in both classes: choose fewer heads.")
        turns.append(Turn(layer, head, (vector / vector.norm()).float()))
    return tuple(turns)


def random_turns(like: HeadRotation, layout: Layout, states: States, *, seed: int) -> HeadRotation:
    """Return a random control: as many other heads, drawn from all layers, each along a direction from shuffled classes.

    They are not drawn layer by layer: where a layer's heads are mostly taken, every draw would then have the same few others.

    Their directions are differences of class means after the classes of the steps were shuffled (see ``States.shuffled``), since a random
    vector of the head's whole space would have far less of the head's output along it.

    Args:
        like: The rotation for which a control is wanted.
        layout: ``lm.layout``.
        states: Outputs of heads where steps begin, as in ``rotation``.
        seed: Random seed.

    Raises:
        ValueError: more than half of all heads are turned, so there are not enough others.
    """
    taken = {(t.layer, t.head) for t in like.turns}
    free = [at for at in layout.all_heads if at not in taken]
    if len(free) < len(taken):
        raise ValueError(
            f"{len(taken)} of {len(layout.all_heads)} heads are turned: a control needs as many others. Turn fewer heads."
        )
    drawn = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[: len(taken)].tolist()
    heads = sorted(free[i] for i in drawn)
    return replace(like, turns=_turns(states.shuffled((RECHECK, OTHER), seed=seed), layout, heads))
