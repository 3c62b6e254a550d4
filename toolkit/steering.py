"""Steering: interventions that add a direction to activations, remove their component along it (ablate), or set that component (clamp)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import hooks, identity, phases
from toolkit.lm import LM
from toolkit.phases import EVERYWHERE, Scope
from toolkit.sites import Site
from toolkit.store import WrongModelError
from toolkit.types import Direction

OPS = ("add", "ablate", "clamp")


@dataclass(frozen=True)
class Steering:
    """An intervention along a direction of the residual stream, made by the function ``steering``.

    Attributes:
        direction: The direction, one vector per layer; adding it lengthens thinking.
        strength: For ``add``, the number that multiplies the direction. For ``ablate`` and ``clamp``, the share of the change to make: 1
            changes the component along the direction fully.
        layers: Layers to act at; ``None`` means all.
        where: Site in each layer to act at, such as ``"resid_post"`` (after the block). ``None`` means the site at which the direction was
            measured.
        during: Positions to act at, as a ``phases.Scope``. The default is all positions.
        op: ``"add"`` (add the direction), ``"ablate"`` (remove the component along it) or ``"clamp"`` (set this component to ``value``).
            See the function ``steering`` for the formulas.
        value: For ``clamp``: value to which the component along the unit direction is set.
    """

    direction: Direction
    strength: float
    layers: tuple[int, ...] | None = None
    where: str | None = None
    during: Scope = EVERYWHERE
    op: str = "add"
    value: float = 0.0
    recordable: ClassVar[bool] = True  # see lm.Intervention

    def __str__(self) -> str:
        layers = "all layers" if self.layers is None else f"layers {self.layers}"
        act = {"add": "steering", "ablate": "ablating", "clamp": f"clamping to {identity.format_exact(self.value)}"}[self.op]
        return (
            f"{act} {identity.format_exact(self.strength, '+')} x {in_words(self.direction)}, {self.site}, {layers}, {self.during}"
        )

    @property
    def site(self) -> str:
        """Site in each layer at which the intervention acts, such as ``"resid_mid"``: ``where`` if set, else that of the direction."""
        return self.where or self.direction.kind

    def __call__(self, lm: LM) -> AbstractContextManager[None]:
        """Return a context manager inside which ``lm`` is steered.

        Raises:
            WrongModelError: the direction differs from ``lm`` in width or number of layers, or it was computed from the activations of
                another model. One exception: if ``lm`` was edited or trained, directions of the model before that change are accepted.
            NoThinkTagsError: the intervention acts only during thinking, and ``lm`` has no think tags.
        """
        check_direction(self.direction, lm)
        phases.check_tags(self.during, lm)
        return self._acting(lm) if self.strength else nullcontext()

    @contextmanager
    def _acting(self, lm: LM) -> Iterator[None]:
        layers = range(lm.layout.n_layers) if self.layers is None else self.layers
        vector = self.direction.vector.float()
        # All vectors go to the model's device at once: each copy to a GPU waits for it.
        unit, strong = torch.stack([torch.stack([_unit(v) for v in vector]), self.strength * vector]).to(lm.device)
        with ExitStack() as stack:
            now = None if self.during.everywhere else stack.enter_context(phases.track(lm))  # follows the phase of each position
            # Component to reach: 0 for ablate, and where the direction is 0, so that nothing changes there.
            aims = [self.value if self.op == "clamp" and v.norm() > 0 else 0.0 for v in vector]
            rewrites = {Site(self.site, layer): self._rewrite(unit[layer], strong[layer], aims[layer], now) for layer in layers}
            stack.enter_context(hooks.rewrite(lm.layout, rewrites))
            yield

    def _rewrite(
        self, u: Float[Tensor, " d_model"], strong: Float[Tensor, " d_model"], aim: float, tracker: phases.Tracker | None
    ) -> hooks.Rewrite:
        """Return the hook of one layer.

        Args:
            u: Direction of the layer, scaled to norm 1; 0 if the direction is 0.
            strong: Direction of the layer times the strength.
            aim: Component along ``u`` after a full change: 0 for ``ablate``, ``value`` for ``clamp``. Not used for ``add``.
            tracker: Gives the phase of every position; ``None`` if the intervention acts at all positions.
        """

        def fn(value: Tensor, inputs: Tensor) -> Tensor:
            nonlocal u, strong
            if u.device != value.device:  # at the first call only, if the layer is not on the model's first device
                u, strong = u.to(value.device), strong.to(value.device)
            # Factor per position, 0 to 1. Without a tracker it is 1 everywhere; with one, None means that no position is in scope.
            weight = None if tracker is None else tracker.weight(self.during, value.device)
            if tracker is not None and weight is None:
                return value
            if self.op == "add":
                return (value + (strong if weight is None else weight[..., None] * strong)).to(value.dtype)
            dose = self.strength if weight is None else self.strength * weight[..., None]
            change = aim - value.float() @ u  # per position: wanted minus present component along u
            return (value + dose * change[..., None] * u).to(value.dtype)

        return fn

    def relative_dose(self, scale: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
        """Return the norm of the added vector divided by the typical norm of the activations, per layer. Only for the operation ``add``.

        The value is given for every layer of the model, also for layers that are not steered.

        Args:
            scale: Typical norm (root mean square) of the activations per layer at the site that is steered, from ``collect.typical_norm``.
        """
        return abs(self.strength) * self.direction.norms / scale


def _unit(v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    norm = v.norm()
    return v / norm if norm > 0 else v


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
    """Return an intervention along a direction. Example, for a direction ``v``: ``Condition(lm, (steering(v, 0.5, during="think"),))``.

    With ``op="add"``, a positive strength lengthens thinking and a negative strength shortens it. The operations, for each layer, with h
    the activation at a position, v the direction and u = v / |v|::

        add     h <- h + strength * v
        ablate  h <- h - strength * <h, u> u              strength 1 projects u out
        clamp   h <- h + strength * (value - <h, u>) u    strength 1 sets the component along u to ``value``

    ``during`` selects positions; at all others nothing changes. It may also be a ``phases.Scope`` with a ramp. The strength is then
    multiplied by a factor that rises from 0 to 1, or falls from 1 to 0, over the first think tokens.

    With strength 0 the outputs equal those of the base model bit for bit. The effect at a position does not depend on KV cache, left
    padding, batching or beam search.

    Useful strengths depend on the direction's norm and on the number of layers. ThinkEdit (arXiv:2503.22048) steers all layers along a
    difference of means that is not normalised, with strengths from -0.08 to 0.08.

    Args:
        direction: Direction v, one vector per layer.
        strength: Factor in the formulas above.
        layers: Layers to act at; ``None`` means all.
        where: Site in each layer to act at, such as ``"resid_mid"`` (after attention) or ``"resid_post"`` (after the block). ``None`` means
            the site at which the direction was measured.
        during: Positions to act at: ``"all"``, ``"newest"`` (the prompt's last position and every response token), phases such as
            ``"think"`` or ``"think+answer"``, or a ``Scope``.
        op: ``"add"``, ``"ablate"`` or ``"clamp"``.
        value: For ``clamp``: value to which the component along u is set, in units of the activations.

    Raises:
        ValueError: the direction, strength or value is not finite; the operation, phase or site is unknown; ``layers`` is empty; or the
            site is ``z`` (head outputs before W_O), whose width is not that of the residual stream.
        IndexError: the direction does not have one of the layers.
    """
    if not torch.isfinite(direction.vector).all() or not all(map(math.isfinite, (strength, value))):
        raise ValueError(f"The direction, strength={strength} or value={value} is not finite: use finite numbers.")
    if op not in OPS:
        raise ValueError(f"op={op!r}: choose one of {', '.join(OPS)}.")
    chosen = None if layers is None else tuple(layers)
    if chosen == ():
        raise ValueError("layers is empty, so nothing would be steered: give at least one layer, or None for all.")
    for layer in chosen or ():
        if not 0 <= layer < len(direction.vector):
            raise IndexError(f"Layer {layer} does not exist: the direction has layers 0..{len(direction.vector) - 1}.")
    if (where or direction.kind) == "z":
        raise ValueError(
            "A direction has the width of the residual stream (d_model), but z has that of all heads: choose another site."
        )
    return Steering(direction, strength, chosen, Site(where, 0).kind if where else None, Scope.parse(during), op, value)


def check_direction(direction: Direction, lm: LM) -> None:
    """Raise WrongModelError unless a direction has the shape of ``lm`` and was computed from activations of ``lm`` or its parent.

    If ``lm`` was edited or trained in memory, its parent is the model before this change. A model loaded from disk has no parent.
    """
    check_shape(direction, lm)
    if direction.provenance.fingerprint not in (lm.fingerprint, lm.parent):
        raise WrongModelError(
            f"The direction was made from {direction.provenance.model}, whose weights differ from those of "
            f"{lm.name} and of its parent. Make one from this model, or allow this one explicitly: "
            "edits.transfer(direction, lm)."
        )


def check_shape(direction: Direction, lm: LM) -> None:
    """Raise WrongModelError unless a direction has the number of layers and the width of ``lm``."""
    shape = (lm.layout.n_layers, lm.layout.d_model)
    if direction.vector.shape != shape:
        raise WrongModelError(
            f"The direction is {tuple(direction.vector.shape)}, {lm.name} has {shape[0]} layers of width {shape[1]}."
        )


def transfer(direction: Direction, lm: LM) -> Direction:
    """Copy a direction of another model, and return the copy, which steering accepts for ``lm``.

    Steering refuses a direction that was computed from another model's activations (see ``check_direction``). The copy is recorded as a
    direction of ``lm``, so it is accepted. For example, a direction from a model before training can then steer the model after training.
    The vectors stay the same. The field ``estimator`` of the copy also names the original model.
    """
    origin = f"{direction.estimator} from {direction.provenance.model}"
    about = lm.provenance(direction.provenance.seed)
    notes = {k: v for k, v in direction.provenance.notes.items() if k != "template"}  # a switch of the other model
    return replace(direction, estimator=origin, provenance=replace(about, notes={**notes, **about.notes}))


def in_words(direction: Direction | None) -> str:
    """Return text that identifies a direction; ``"no direction"`` for ``None``.

    The text holds the estimator, the site and the positions at which the direction was measured, and a hash of its vectors.
    """
    if direction is None:
        return "no direction"
    return f"{direction.estimator} {direction.kind} {direction.positions} {identity.hash_of(direction.vector)}"
