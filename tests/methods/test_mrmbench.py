"""MRMBench: probes find a dimension that is there and none in shuffled labels; distances against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from toolkit.methods import mrmbench


def responses(n: int, seed: int, classes: int = 2):
    """Features in which dimension 0 is a direction and dimension 1 is absent; labels; problems of two responses each."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, (n, 2))
    x = rng.normal(size=(n, 8)) * np.linspace(1, 5, 8) + 20
    x[:, 0] += 4 * y[:, 0]
    return x, y, np.arange(n) // 2


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_finds_the_dimension_that_is_there_and_not_the_one_that_is_absent(classes):
    (x, y, _), (held_x, held_y, problems) = responses(300, 0, classes), responses(400, 1, classes)
    there, absent = mrmbench.probe_dimensions((x, y), (held_x, held_y), problems, ["there", "absent"]).itertuples()
    # Without a bias, three classes along one direction cannot all be told apart: the middle one has the least extreme scores.
    assert there.low > there.control_high and there.mean > {2: 0.9, 3: 0.65}[classes]
    assert absent.low < 1 / classes + 0.03 and absent.mean < absent.control_high + 0.03
    assert abs(there.control - 1 / classes) < 0.06


def test_the_probe_has_no_bias_and_minimises_the_penalised_loss():
    x, y, _ = responses(80, 2)
    fitted = mrmbench.probe(x, y[:, 0], penalty=0.5)
    z, w = (x - x.mean(axis=0)) / x.std(axis=0), fitted[-1].coef_[0]
    slope = (special.expit(z @ w) - y[:, 0]) @ z / len(z) + 0.5 * w
    assert fitted[-1].intercept_ == 0 and np.abs(slope).max() < 1e-3
    with pytest.raises(ValueError, match="needs responses of two classes"):
        mrmbench.probe(x, np.zeros(80, int))


def test_distances_are_those_of_a_loop_and_a_far_response_is_left_out():
    x, y, _ = responses(60, 3)
    far = np.vstack([x, x[:1] + 100])
    centres = mrmbench.centroids(x, y[:, 0])
    by_hand = []
    for h in far:
        to = []
        for value in (0, 1):
            members = [a for a, label in zip(x, y[:, 0], strict=True) if label == value]
            c = [sum(a[i] for a in members) / len(members) for i in range(8)]
            to.append(math.sqrt(sum((h[i] - c[i]) ** 2 for i in range(8))))
        by_hand.append(min(to))
    distances = mrmbench.centroid_distance(far, centres)
    assert distances == pytest.approx(by_hand)
    kept = mrmbench.within_quantile(distances, 0.9)
    assert kept.sum() == 55 and not kept[-1]
    assert mrmbench.within_quantile(distances, 1.0).all()
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        mrmbench.within_quantile(distances, 0.0)
