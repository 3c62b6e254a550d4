"""How much of a trained vector's effect a found direction explains: exact where the answer is known, and a control where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from toolkit import directions, tasks
from toolkit.generate import Sampling
from toolkit.jobs import trained_vector
from toolkit.steering import steering
from toolkit.types import Direction


def direction_of(lm, seed: int, scale: float = 1.0) -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(scale * vector, "resid_post", "all", f"direction {seed}", 0, 0, lm.provenance())


@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_a_direction_add_up_and_are_orthogonal(tiny, seed):
    a, b = direction_of(tiny, seed), direction_of(tiny, seed + 10)
    b = replace(b, vector=b.vector * torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None])  # zero in one layer
    part, rest = directions.split(a, b)
    assert torch.allclose(part.vector + rest.vector, a.vector) and not part.vector[1].any()
    assert torch.allclose((rest.vector * b.vector).sum(dim=-1), torch.zeros(4), atol=1e-4)
    again, nothing = directions.split(part, b)
    assert torch.allclose(again.vector, part.vector, atol=1e-5) and nothing.vector.norm() < 1e-4


def test_a_parallel_direction_explains_all_and_random_ones_little(tiny):
    trained = steering(direction_of(tiny, 5, 4.0), -1.0)
    found = replace(trained.direction, vector=3 * trained.direction.vector, estimator="found")
    problems = tasks.load("arithmetic", "dev", 24)
    table = trained_vector.explained(tiny, trained, found, problems, Sampling(n=2, max_new_tokens=80), draws=1)
    table = table.set_index(["whole", "part"])
    for whole in ("trained", "found"):
        rows = table.loc[whole]
        assert rows.loc["along the other", "cosine"] == pytest.approx(1, abs=1e-5)
        assert 0 < rows.loc["along random 0", "cosine"] < 0.3  # about 1 / sqrt(128)
        assert rows.loc["without the other", "effect"] == pytest.approx(0, abs=1e-9)
        assert rows.loc["along the other", "effect"] == pytest.approx(rows.loc["whole", "effect"], abs=1.0)
        assert rows.loc["whole", "share"] == 1 and abs(rows.loc["without the other", "share"]) < 1e-9


def test_a_direction_of_another_site_is_refused(tiny):
    trained = steering(direction_of(tiny, 0), 1.0)
    with pytest.raises(ValueError, match="made at resid_mid, the trained vector acts at resid_post"):
        trained_vector.explained(tiny, trained, replace(trained.direction, kind="resid_mid"), [])
