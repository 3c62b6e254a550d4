"""Mask (ablate) attention heads while a model runs, with one of three operations: zero, mean or uniform ablation.

A *plan* lists the heads to mask, each with a strength from 0 to 1. z_h is the output of head h at a position, before ``W_O``. z, without an
index, is the concatenated outputs of all heads of a layer. w is the strength of masking. At the positions to mask (argument ``during``), w
is the head's strength in the plan. At all other positions it is 0::

    zero     z_h <- (1 - w) z_h
    mean     z_h <- (1 - w) z_h + w m_h       m_h: mean of z_h over the reference rollouts (argument ``reference``)
    uniform  q_h <- (1 - w) q_h               q_h: the head's query vector, after any norm and the rotary embedding

At w = 1, ``zero`` and ``mean`` remove everything that a head computes at the position; ``mean`` puts a constant in its place. ``uniform``
removes only the head's choice of keys: all keys that it can see get the same attention.

The released code of arXiv:2404.15574 uses ``uniform``, and masks only during decoding: at the prompt's last token and at all response
tokens. At the earlier prompt tokens it does not mask. In this module the arguments ``op`` (the operation) and ``during`` have no defaults,
because results depend on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import edits, hooks, identity, phases
from toolkit.lm import LM
from toolkit.phases import Scope
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import Moments, Plan

Ablation = Literal["zero", "mean", "uniform"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)
DECODE = Scope(newest=True)  # the prompt's last position and all later positions, as in arXiv:2404.15574


@dataclass(frozen=True)
class Masking:
    """An intervention that masks (ablates) attention heads, made by ``masking``. Use it in ``Condition(lm, (masking(...),))``.

    Attributes:
        plan: Heads to mask, with strengths in [0, 1]; 1 masks a head fully.
        op: At strength 1, ``"zero"`` sets a head's output to 0, ``"mean"`` replaces it by its mean over ``reference``, and ``"uniform"``
            spreads the head's attention evenly over the keys that it can see.
        during: Positions at which the heads are masked, as a ``phases.Scope``. ``masking`` makes it from a text such as ``"newest"``.
        reference: For ``"mean"``, the ``Moments`` that ``collect.moments`` returned for the reference rollouts; the means are computed from
            them. ``None`` for the other operations.
    """

    plan: Plan
    op: str
    during: Scope
    reference: Moments | None = None
    recordable: ClassVar[bool] = True  # see lm.Intervention

    def __str__(self) -> str:
        chosen = sorted((e.layer, e.head, e.strength) for e in self.plan.edits)  # their order has no effect
        moments = self.reference
        means = f" over {moments.positions} ({sum(moments.n)} examples, {identity.hash_of(_means(moments))})" if moments else ""
        return f"{self.op} ablation{means} of heads {chosen}, {self.during}"

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager in which the heads of ``lm`` are masked.

        Raises:
            WrongModelError: the plan or the reference was computed with other weights than those of ``lm``. It is raised by this call,
                before the context is entered.
            NoThinkTagsError: the heads are masked only during thinking, and ``lm`` has no think tags. It is raised by this call too.
        """
        edits.check_plan(lm, self.plan)
        phases.check_tags(self.during, lm)
        if self.reference is not None and self.reference.provenance.fingerprint != lm.fingerprint:
            raise WrongModelError(
                f"The reference means were collected from {self.reference.provenance.model}, not from {lm.name}: collect them again."
            )
        return self._acting(lm) if self.plan.edits else nullcontext()

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        """Mask the heads inside the context, by hooks on the attention function (``uniform``) or on ``z`` (``zero``, ``mean``)."""
        strengths: dict[int, Tensor] = {}  # layer -> strength of every head of the layer, 0 for heads that are not masked
        for edit in self.plan.edits:
            strengths.setdefault(edit.layer, torch.zeros(lm.layout.heads[edit.layer]))[edit.head] = edit.strength
        with ExitStack() as stack:
            # The tracker knows the phase of every position. Without it, all positions are masked.
            tracker = None if self.during.everywhere else stack.enter_context(phases.track(lm))
            if self.op == "uniform":
                stack.enter_context(hooks.wrap_attention(lm.layout, self._uniform(strengths, tracker)))
            else:
                replaced = {Site("z", layer): self._replaced(strength, layer, tracker) for layer, strength in strengths.items()}
                stack.enter_context(hooks.rewrite(lm.layout, replaced))
            yield

    def _weight(self, strength: Float[Tensor, " entries"], tracker: phases.Tracker | None) -> Float[Tensor, "_ _ entries"] | None:
        """Return the strength of masking at each position, ``[batch, seq, entries]``, or ``None`` if no position is masked.

        It is ``strength`` at the positions to mask, and 0 at all others. If ``during`` has a ramp (see ``phases.Scope``), the strength
        rises or falls gradually over the first think tokens. If all positions are masked, ``batch`` and ``seq`` are 1.

        Args:
            strength: Full strength of each entry. The entries are the heads of a layer (``uniform``) or the entries of its ``z``.
            tracker: Object that knows the phase of every position, from ``phases.track``. ``None`` masks all positions.
        """
        if tracker is None:
            return strength[None, None]
        # weight: 1 at the positions to mask, 0 elsewhere, between them on a ramp.
        weight = tracker.weight(self.during, strength.device)
        return None if weight is None else weight[..., None] * strength

    def _replaced(self, strength: Tensor, layer: int, tracker: phases.Tracker | None) -> hooks.Rewrite:
        """Return the hook that moves a layer's ``z`` towards 0 (``zero``) or towards its mean over the reference rollouts (``mean``).

        Args:
            strength: Strength of masking of each head of the layer.
            layer: Index of the layer.
            tracker: As in ``_weight``.
        """
        # target: mean of z in this layer. If other layers have more or larger heads, zeros follow at its end; they are cut off below.
        target = torch.zeros(1) if self.reference is None else _means(self.reference)[layer]
        # The strength and the target of each entry of z, on the device of z. Set in the first pass: a copy to a GPU waits for it.
        wide: Tensor | None = None
        aim: Tensor | None = None

        def fn(value: Tensor, inputs: Tensor) -> Tensor:
            nonlocal wide, aim
            if wide is None or aim is None:
                wide = strength.repeat_interleave(value.shape[-1] // len(strength)).to(value.device)
                aim = target[: value.shape[-1]].to(value.device, torch.float32)
            weight = self._weight(wide, tracker)
            if weight is None:
                return value
            # Computed in fp32. Entries of weight 0 are copied from value, so that rounding does not change them.
            return torch.where(weight > 0, value + weight * (aim - value.float()), value).to(value.dtype)

        return fn

    def _uniform(self, strengths: dict[int, Tensor], tracker: phases.Tracker | None):
        """Return a wrapper of the attention function (see ``hooks.AttentionWrapper``) that scales down the queries of masked heads.

        Args:
            strengths: Index of a layer -> strength of masking of each of its heads. Other layers are left unchanged.
            tracker: As in ``_weight``.
        """
        layers = dict(strengths)

        def fn(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
            if layer not in layers:
                return attend(query, key, value)
            layers[layer] = layers[layer].to(query.device)  # copied in the first pass only
            weight = self._weight(layers[layer], tracker)
            if weight is None:
                return attend(query, key, value)
            # At w = 1 the query is 0, so all logits of the head are equal and its attention is uniform. The weight gets the axes of the
            # query: [batch or 1, heads, seq or 1, 1].
            return attend((query * (1 - weight.mT[..., None])).to(query.dtype), key, value)

        return fn


def _means(reference: Moments) -> Float[Tensor, "layers width"]:
    """Return the mean of ``z`` (concatenated outputs of a layer's heads) over all rollouts of the reference, each with equal weight."""
    return reference.sums["z"].sum(dim=0) / sum(reference.n)


def masking(plan: Plan, op: str, *, during: str | Scope, reference: Moments | None = None) -> Masking:
    """Return an intervention that masks (ablates) the heads of a plan.

    As a control, mask the heads of ``edits.random_heads(plan, layout, seed=0)``.

    Args:
        plan: Heads to mask, such as ``retrieval_heads.mask_plan(scores, count)``. Each edit of the plan is a ``HeadEdit`` whose own ``op``
            is ``"scale"``. Its strength, in [0, 1], is the strength of masking; 1 masks the head fully.
        op: At strength 1, ``"zero"`` sets a head's output to 0, ``"mean"`` replaces it by its mean over ``reference``, and ``"uniform"``
            spreads the head's attention evenly over the keys that it can see.
        during: Positions at which the heads are masked. ``"newest"``: the prompt's last token and all response tokens, as in
            arXiv:2404.15574. ``"all"``: the whole prompt too. Phases such as ``"think+answer"`` or a ``Scope`` choose other positions.
        reference: For ``"mean"``, activations of the rollouts over which each head's output is averaged, from ``collect.moments``. They
            must include the heads' outputs, ``"z"``. All rollouts have equal weight. ``None`` for the other operations.

    Raises:
        ValueError: ``op`` is unknown; an edit of the plan is not a ``scale`` edit, or has a strength outside [0, 1]; ``op`` is ``"mean"``
            but ``reference`` is missing or has no rollouts; or ``op`` is not ``"mean"`` but there is a ``reference``.
        KeyError: the reference has no ``z``.
    """
    if op not in ABLATIONS:
        raise ValueError(f"op={op!r}: choose one of {', '.join(ABLATIONS)}.")
    if wrong := [e for e in plan.edits if e.op != "scale" or not 0 <= e.strength <= 1]:
        raise ValueError(
            f"{wrong[0]} cannot be used as a mask: expected an edit of the plan with op='scale' and a strength in [0, 1]."
        )
    if (op == "mean") != (reference is not None):
        raise ValueError(
            f"op={op!r} with reference={'moments' if reference else None}: pass reference=moments with 'mean', and only with it."
        )
    if reference is not None:
        if "z" not in reference.sums:
            raise KeyError(f"Site 'z' was not collected: the reference has {', '.join(reference.sums)}.")
        if not sum(reference.n):
            raise ValueError("The reference holds no example: its mean is undefined.")
    return Masking(plan, op, Scope.parse(during), reference)
