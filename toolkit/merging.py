"""Update-selective merging: add the largest weight changes of a trained model to its base model.

The method is from the paper on DLER, which trains models to respond with fewer tokens: arXiv:2510.15110.

Equation (over the entries of all weights):

    D = theta_trained - theta_base
    theta = theta_base + scale * D    at the entries with the largest |D|; ``keep`` is their share of all entries
    theta = theta_base                at all other entries

where theta_base and theta_trained are the weights of the two models, and theta those of the result. The paper uses keep = 25 % and
scale = 0.7. In the paper, an 8B model lost accuracy in DLER training. The merged model regained this accuracy, and its responses were
almost as short as those of the trained model.

Our choices: the paper does not say whether the largest 25 % are taken within each weight tensor or over all tensors. The argument ``scope``
sets this; the default is within each tensor. All entries that tie at the threshold are kept.

Merging takes the memory of one more copy of the weights. The threshold is exact, but needs neither sorting nor all entries in memory: see
``threshold``.
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
assumed_scope = "tensor"  # our choice: the paper does not say


class DifferentModelsError(ValueError):
    """Two models differ in the names or shapes of their weights."""


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
    """Return a new model: the weights of ``base`` plus ``scale`` times the largest entries of the change ``trained - base``.

    Changes and sums are computed in fp32. ``keep=1, scale=1`` gives the trained model and ``scale=0`` the base model, up to rounding to
    ``dtype``.

    Args:
        keep: Share of the entries to change, above 0 and at most 1. These are the entries with the largest absolute change. Default: 0.25,
            as in the paper.
        scale: Factor on the added changes. Default: 0.7, as in the paper.
        scope: ``"tensor"`` (the default) takes the share ``keep`` within each weight tensor, ``"global"`` over all weights together.
        dtype: Dtype of the new model. If it is narrower than fp32, rounding loses part of the change. The name of the new model then says
            how much.

    Raises:
        DifferentModelsError: the models differ in the names or shapes of their weights.
        UnsupportedModelError: the weights of a model are quantised or offloaded.
        ValueError: ``keep`` is outside (0, 1], ``scope`` is unknown, or a weight is not finite.
    """
    if not 0 < keep <= 1 or scope not in SCOPES:
        raise ValueError(f"keep={keep}, scope={scope!r}: need 0 < keep <= 1, and scope {' or '.join(map(repr, SCOPES))}.")
    for lm in (base, trained):
        lms.check_plain(lm, "merging", "Load it without quantization and device_map.")
    before, after = dict(base.model.named_parameters()), dict(trained.model.named_parameters())
    check_same(before, after)

    def change(name: str) -> Tensor:
        delta = after[name].to(before[name].device).float() - before[name].float()
        if not torch.isfinite(delta).all():
            raise ValueError(f"The change of {name} is not finite: one of the models has a weight that is NaN or infinite.")
        return delta

    def smallest_kept(names: Sequence[str]) -> float:
        return threshold(lambda: map(change, names), keep)

    shared = smallest_kept(list(before)) if scope == "global" else 0.0  # threshold for all weights; not used with scope "tensor"
    merged = lms.as_type(copy.deepcopy(base.model), torch.float32)
    for name, weight in merged.named_parameters():
        delta = change(name)
        kept = delta.abs() >= (shared if scope == "global" else smallest_kept([name]))
        weight[kept] = before[name][kept].float() + scale * delta[kept]
    note = f"{scale:g} x the largest {keep:.0%} ({scope}) of the changes of {trained.name}"
    if dtype != torch.float32:
        note += f"; {rounding(before, dict(merged.named_parameters()), dtype)}"
    return lms.child(base, lms.as_type(merged, dtype), f"{base.name} + {note}", made_from=trained.made_from)


def check_same(base: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Raise DifferentModelsError unless the weights of two models have the same names and shapes."""
    shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (base, trained)]
    if different := sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)):
        first = different[0]
        raise DifferentModelsError(
            f"{len(different)} weights differ in name or shape, e.g. {first}: {shapes[0].get(first, 'none')} in the base, "
            f"{shapes[1].get(first, 'none')} in the trained model. Give a model and its base."
        )


def threshold(changes: Callable[[], Iterable[Tensor]], keep: float) -> float:
    """Return the k-th largest absolute value, t, of all entries of some tensors, in fp32.

    k is the share ``keep`` of the number of entries, rounded, and at least 1. If entries tie at t, more than k entries have ``|entry| >= t``.

    Two histograms of bit patterns give t exactly, since non-negative floats have the same order as their bit patterns. The first histogram
    is over the upper 16 bits of all entries, and gives the upper 16 bits of t. The second is over the lower 16 bits of the entries with
    these upper bits, and gives the lower 16 bits of t.

    Args:
        changes: Function that returns an iterator over the tensors. It is called twice, once per histogram.
        keep: Share of the entries, 0 to 1.

    >>> threshold(lambda: [torch.tensor([0.1, -0.4]), torch.tensor([0.3, 0.2])], 0.5)  # the second largest of four
    0.30000001192092896
    """
    upper = torch.zeros(2**15, dtype=torch.int64)  # 15 bits: the sign bit of an absolute value is 0
    for delta in changes():
        upper += torch.bincount(_bits(delta) >> 16, minlength=2**15).cpu()
    k = max(1, round(keep * int(upper.sum())))
    top = _bin_of(upper, k)
    k -= int(upper[top + 1 :].sum())  # rank within the bin
    lower = torch.zeros(2**16, dtype=torch.int64)
    for delta in changes():
        bits = _bits(delta)
        lower += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=2**16).cpu()
    return torch.tensor((top << 16) | _bin_of(lower, k), dtype=torch.int32).view(torch.float32).item()


def _bits(delta: Tensor) -> Tensor:
    # Bit patterns of the absolute values, as whole numbers; they have the order of the values.
    return delta.float().abs().flatten().view(torch.int32)


def _bin_of(counts: Tensor, k: int) -> int:
    """Return the index of the histogram bin that holds the k-th largest entry. ``counts``: entries per bin, from the lowest bin up."""
    from_top = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int((from_top < k).sum())


def in_type_of(base: LM, policy: LM) -> LM:
    """Return a trained model converted to the dtype of its base model. Then a comparison of the two does not depend on their dtypes.

    A trained model is usually saved in fp32. If ``base`` has a narrower dtype, rounding loses part of the change that training made. The
    name of the returned model says how much.

    Args:
        base: The model before training.
        policy: The trained model. Its weights are converted in place. It is returned unchanged if it has the dtype of ``base`` already.
    """
    dtype = base.model.dtype
    if policy.model.dtype == dtype:
        return policy
    before, after = (dict(lm.model.named_parameters()) for lm in (base, policy))
    name = f"{policy.name}; {rounding(before, after, dtype)}"
    return lms.child(base, lms.as_type(policy.model, dtype), name, made_from=policy.made_from)
