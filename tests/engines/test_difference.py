"""The adapter of a difference between weights: that of the full SVD, found without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toolkit.engines import EngineError
from toolkit.engines.adapter import LARGEST, _factors

SHAPE = (200, 160)


def of_rank(rank: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall from ``scale`` to a tenth of it."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q for n in SHAPE)
    return scale * U @ torch.diag(torch.linspace(1, 0.1, rank)) @ V.T


def by_full_svd(change: Tensor, missed: float) -> tuple[int, Tensor]:
    """Smallest rank at which at most a share is missed, and the best matrix of this rank."""
    U, S, V = torch.linalg.svd(change.double(), full_matrices=False)
    left = S.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int((left > missed * left[0]).sum())
    return rank, (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 40, LARGEST])
def test_the_adapter_of_a_low_rank_change_is_that_of_the_full_svd_which_is_not_computed(rank, transposed, monkeypatch):
    change = of_rank(rank, scale=0.01).T if transposed else of_rank(rank, scale=0.01)
    expected, best = by_full_svd(change, 1e-3)
    svd, shapes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **k: shapes.append(tuple(matrix.shape)) or svd(matrix, **k))
    A, B = _factors(change, "w", torch.float32)
    assert len(A) == expected == rank and A.device.type == "cpu"
    assert torch.allclose((B @ A).double(), best, atol=1e-5 * float(best.abs().max()))
    assert shapes and all(min(shape) < min(SHAPE) for shape in shapes)


@pytest.mark.parametrize("rank", [1, 16])
def test_rounding_to_half_precision_does_not_raise_the_rank(rank):
    before = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    after = (before.float() + of_rank(rank, scale=10.0)).bfloat16()
    change = after.float() - before.float()
    A, B = _factors(change, "w", torch.bfloat16)
    expected, _ = by_full_svd(change, 0.2)
    assert len(A) == expected <= rank
    assert (change - B @ A).norm() <= 0.2 * change.norm()


@pytest.mark.parametrize("rank", [LARGEST + 1, LARGEST + 20, min(SHAPE)])
def test_a_change_of_a_higher_rank_is_refused_with_its_rank(rank):
    with pytest.raises(EngineError, match=rf"The change of w has rank {rank}, more than the 64"):
        _factors(of_rank(rank), "w", torch.float32)


def test_the_random_numbers_of_others_are_not_used():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    _factors(of_rank(2), "w", torch.float32)
    assert torch.equal(torch.rand(2), expected)
