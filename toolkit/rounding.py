"""What is left of a change of weights when they are written in a narrower number type.

bfloat16 has 8 significant bits, so a weight w can only move by steps of about ``|w| / 256``. A training run moves most weights by less:
written in bfloat16 they are the weights it began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

assumed_tolerance = 0.1  # ours: a larger error is worth a word


@dataclass(frozen=True)
class Rounding:
    """How much of a change of weights a number type keeps. With start s, changed c and written w, over the entries of all weights:

    Attributes:
        dtype: Name of the number type, such as ``"bfloat16"``.
        kept: ``<w - s, c - s> / |c - s|^2``, the share of the change that survives along its own direction; 1 is all of it.
        error: ``|w - c| / |c - s|``; 0 is exact, 1 an error as large as the change.
    """

    dtype: str
    kept: float
    error: float

    @property
    def small(self) -> bool:
        """Whether the error is not worth a word."""
        return self.error <= assumed_tolerance

    def __str__(self) -> str:
        return f"{self.dtype} keeps {self.kept:.1%} of the change, with an error of {self.error:.1%} of its size"


@torch.no_grad()
def rounding(start: Mapping[str, Tensor], changed: Mapping[str, Tensor], dtype: torch.dtype) -> Rounding:
    """Measure what writing ``changed`` in ``dtype`` keeps of its difference to ``start``; both hold the same names and shapes.

    Differences are taken in fp32 and summed in fp64, one weight at a time. Without any change nothing is lost: 1 and 0.
    """
    along = size = lost = 0.0
    for name, weight in changed.items():
        change = weight.float() - start[name].to(weight.device).float()
        error = weight.to(dtype).float() - weight.float()
        size += float(change.square().sum(dtype=torch.float64))
        along += float((change * error).sum(dtype=torch.float64))
        lost += float(error.square().sum(dtype=torch.float64))
    name = str(dtype).removeprefix("torch.")
    return Rounding(name, 1 + along / size, math.sqrt(lost / size)) if size else Rounding(name, 1.0, 0.0)
