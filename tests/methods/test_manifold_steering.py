"""Manifold Steering: the projection equals PCA of scikit-learn, and random subspaces hold the share that chance gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from zoo import model_of_type

from toolkit import collect
from toolkit.collect import States
from toolkit.edits import steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import manifold_steering


def made(lm, seed=0, rows=60, width=16):
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=(rows, 2, width)) * np.linspace(3, 0.2, width), dtype=torch.float32)
    table = pd.DataFrame({"problem_id": [f"p{i}" for i in range(rows)], "label": np.resize(["long", "short", "none"], rows)})
    values[torch.arange(rows) % 3 == 0] += torch.tensor(rng.normal(size=(1, 2, width)), dtype=torch.float32)
    return States(values, table, "resid_post", "think", lm.provenance())


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_direction_is_the_difference_of_means_within_the_first_components(tiny, k):
    states = made(tiny)
    v = manifold_steering.direction(states, k).vector.numpy()
    label = states.rows["label"].to_numpy()
    for layer in range(2):
        x = states.values[:, layer].double().numpy()
        u = PCA(k, svd_solver="full").fit(x[np.isin(label, ["long", "short"])]).components_
        r = x[label == "long"].mean(0) - x[label == "short"].mean(0)
        assert v[layer] == pytest.approx(sum((r @ c) * c for c in u), abs=1e-6)


def test_all_components_together_hold_the_whole_difference(tiny):
    assert manifold_steering.share_inside(made(tiny), 16).tolist() == pytest.approx([1.0, 1.0])


def test_a_random_subspace_holds_the_share_that_chance_gives(tiny):
    shares = torch.stack([manifold_steering.random_share(made(tiny), 4, seed=seed) for seed in range(200)])
    assert float((shares**2).mean()) == pytest.approx(4 / 16, abs=0.02)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_ablating_the_direction_of_a_model_leaves_nothing_along_it(model_type, problems_of):
    lm = model_of_type(model_type)
    found = rollouts(Condition(lm), problems_of(8), Sampling(n=2, max_new_tokens=12), progress=False)
    states = collect.states(lm, found, "resid_post", by=lambda r: "long" if r.sample else "short", positions=response())
    v = manifold_steering.direction(states, 3)
    with steering(v, 1.0, op="ablate")(lm):
        after = collect.states(lm, found, "resid_post", positions=response())
    along = (after.values * v.unit()).sum(-1)
    assert float(along.abs().max()) < 1e-3 and float((states.values * v.unit()).sum(-1).abs().max()) > 0.05


def response():
    return collect.Positions("response", lambda r: range(r.prompt_len, len(r.token_ids)))


def test_bad_input_is_refused(tiny):
    with pytest.raises(ValueError, match="Choose a smaller k"):
        manifold_steering.components(made(tiny), 17)
    with pytest.raises(KeyError, match="No class"):
        manifold_steering.direction(made(tiny), 2, pos="longest")
