"""Measure how much of a weight change survives when the weights are stored in a narrower dtype.

bfloat16 has 8 significant bits, so neighbouring bfloat16 numbers near a weight w are ``|w| / 256`` to ``|w| / 128`` apart. Training often
changes a weight by less than half of that. If the weight is a bfloat16 number before training, storing the trained weight in bfloat16 then
rounds it back to the old value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

assumed_tolerance = 0.1  # largest ``Rounding.error`` without a warning: our choice


@dataclass(frozen=True)
class Rounding:
    """The share of a weight change that survives when the weights are rounded to a dtype, and the size of the rounding error.

    In the formulas, s is the vector of all weights before the change, c the vector after the change, and w is c after rounding. ``<a, b>``
    is the inner product, ``|a|`` the Euclidean norm.

    Attributes:
        dtype: Name of the dtype, such as ``"bfloat16"``.
        kept: Share of the change that survives: ``<w - s, c - s> / |c - s|^2``. This is the component of the stored change ``w - s`` along
            the true change ``c - s``, divided by the size of the true change. 1 means that all of it survives.
        error: Rounding error divided by the size of the change: ``|w - c| / |c - s|``. 0 means that nothing is lost; 1 means that the error
            is as large as the change.
    """

    dtype: str
    kept: float
    error: float

    @property
    def small(self) -> bool:
        """True if the rounding error is at most a tenth of the change (``assumed_tolerance``), so that no warning is needed."""
        return self.error <= assumed_tolerance

    def __str__(self) -> str:
        return f"{self.dtype} keeps {self.kept:.1%} of the change, with an error of {self.error:.1%} of its size"


@torch.no_grad()
def rounding(start: Mapping[str, Tensor], changed: Mapping[str, Tensor], dtype: torch.dtype) -> Rounding:
    """Return how much of the change ``changed - start`` survives when ``changed`` is stored in ``dtype``.

    Differences are computed in fp32 and summed in fp64, one weight tensor at a time. If nothing changed, ``kept`` is 1 and ``error`` is 0.

    Args:
        start: Weights before the change, by name.
        changed: Weights after the change; same names and shapes.
        dtype: Dtype in which ``changed`` is stored.

    >>> before, after = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0015])}
    >>> print(rounding(before, after, torch.bfloat16))  # the nearest bfloat16 numbers are 1 and 1.0078
    bfloat16 keeps 0.0% of the change, with an error of 100.0% of its size
    """
    # Sums over all weights. With e = w - c, the rounding error: <w - s, c - s> = |c - s|^2 + <e, c - s>, hence ``1 + along / size`` below.
    along = size = lost = 0.0
    for name, weight in changed.items():
        change = weight.float() - start[name].to(weight.device).float()
        error = weight.to(dtype).float() - weight.float()
        size += float(change.square().sum(dtype=torch.float64))
        along += float((change * error).sum(dtype=torch.float64))
        lost += float(error.square().sum(dtype=torch.float64))
    name = str(dtype).removeprefix("torch.")
    return Rounding(name, 1 + along / size, math.sqrt(lost / size)) if size else Rounding(name, 1.0, 0.0)
