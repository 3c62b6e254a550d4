"""Update-selective merging: part of what training changed is put back into the base model. DLER, arXiv:2510.15110.

Equation (over the entries of all weights):

    D = theta_trained - theta_base
    theta = theta_base + scale * D where |D| is among the largest ``keep`` of all entries, theta_base elsewhere

with keep = 25 % and scale = 0.7 in the paper, where it gave back the accuracy that DLER had lost on an 8B model and kept most of
its shortness.

Deviations: whether "the largest 25 %" is within each tensor or over all of them was not found: ``scope`` (``assumed_scope``).
Entries that tie with the last one kept are kept too.

Cost: one copy of the weights; the threshold is found by counting, exactly, without sorting or holding all entries at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.rounding import rounding

PUBLISHED_KEEP = 0.25
PUBLISHED_SCALE = 0.7
SCOPES = ("tensor", "global")
assumed_scope = "tensor"  # ours


class DifferentModelsError(ValueError):
    """Two models do not have the same weights by name and shape."""


@torch.no_grad()
def selective_merge(
    base: LM,
    trained: LM,
    *,
    keep: float = PUBLISHED_KEEP,
    scale: float = PUBLISHED_SCALE,
    scope: str = assumed_scope,
    dtype: torch.dtype = torch.float32,
) -> LM:
    """The base model with the largest of the trained model's changes, scaled; a new model.

    Differences and sums are taken in fp32. ``keep=1, scale=1`` is the trained model, ``scale=0`` is the base, up to their number type.

    Args:
        keep: Share of entries whose change is kept.
        scale: Factor on the changes kept.
        scope: ``"tensor"``: the share of each weight tensor; ``"global"``: of all of them together.
        dtype: Number type of the new model. A narrower one than fp32 rounds part of the changes away; the model's name says how much.

    Raises:
        DifferentModelsError: the models differ in weights by name or shape.
        ValueError: keep outside (0, 1], an unknown scope, or a weight that is not finite.
    """
    if not 0 < keep <= 1 or scope not in SCOPES:
        raise ValueError(f"keep={keep}, scope={scope!r}: need 0 < keep <= 1 and a scope of {' or '.join(SCOPES)}.")
    ours, theirs = dict(base.model.named_parameters()), dict(trained.model.named_parameters())
    check_same(ours, theirs)

    def change(name: str) -> Tensor:
        found = theirs[name].to(ours[name].device).float() - ours[name].float()
        if not torch.isfinite(found).all():
            raise ValueError(f"The change of {name} is not finite: one of the models has a weight that is NaN or infinite.")
        return found

    def least(names: Sequence[str]) -> float:
        return threshold(lambda: map(change, names), keep)

    shared = least(list(ours)) if scope == "global" else 0.0
    merged = lms.as_type(copy.deepcopy(base.model), torch.float32)
    for name, weight in merged.named_parameters():
        delta = change(name)
        kept = delta.abs() >= (shared if scope == "global" else least([name]))
        weight[kept] = ours[name][kept].float() + scale * delta[kept]
    what = f"{scale:g} x the largest {keep:.0%} ({scope}) of what {trained.name} changed"
    if dtype != torch.float32:
        what += f"; {rounding(ours, dict(merged.named_parameters()), dtype)}"
    return lms.child(base, lms.as_type(merged, dtype), f"{base.name} + {what}", made_from=trained.made_from)


def check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise DifferentModelsError unless two models have the same weights by name and shape."""
    shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (ours, theirs)]
    if different := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
        first = different[0]
        raise DifferentModelsError(
            f"{len(different)} weights differ in name or shape, e.g. {first}: {shapes[0].get(first, 'none')} in the base, "
            f"{shapes[1].get(first, 'none')} in the trained model. Merge a model with one trained from it."
        )


def threshold(changes: Callable[[], Iterable[Tensor]], keep: float) -> float:
    """The k-th largest |entry| over some fp32 tensors, k = ``round(keep * entries)`` and at least 1.

    Non-negative floats order like their bit patterns, so two counts of 16 bits each find it exactly.

    Args:
        changes: Goes through the tensors; called twice.
    """
    upper = torch.zeros(2**15, dtype=torch.int64)
    for delta in changes():
        upper += torch.bincount(_bits(delta) >> 16, minlength=2**15).cpu()
    k = max(1, round(keep * int(upper.sum())))
    top = _bin_of(upper, k)
    k -= int(upper[top + 1 :].sum())
    lower = torch.zeros(2**16, dtype=torch.int64)
    for delta in changes():
        bits = _bits(delta)
        lower += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=2**16).cpu()
    return torch.tensor((top << 16) | _bin_of(lower, k), dtype=torch.int32).view(torch.float32).item()


def _bits(delta: Tensor) -> Tensor:
    return delta.float().abs().flatten().view(torch.int32)


def _bin_of(counts: Tensor, k: int) -> int:
    """The bin of the k-th entry from the top."""
    from_top = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int((from_top < k).sum())
