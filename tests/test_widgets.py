"""The steering widget: what it shows is what was generated, and it has something to show without widgets."""

from __future__ import annotations

import sys

import pytest
import torch

from toolkit import widgets
from toolkit.edits import steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.types import Direction, Problem


@pytest.fixture
def v(tiny: LM) -> Direction:
    vector = 20.0 * torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(vector, "resid_post", "think", "by hand", 1, 1, tiny.provenance())


def greedy(lm: LM, prompt: str, *acts) -> str:
    problem = Problem("p", ({"role": "user", "content": prompt},), "")
    (r,) = rollouts(Condition(lm, acts), [problem], Sampling(temperature=0.0, max_new_tokens=400), progress=False)
    return lm.text(r.token_ids[r.think.start : r.think.stop]) if r.think else ""


def test_moving_the_controls_generates_what_steering_generates(tiny, v):
    box = widgets.steer(tiny, v, "7+8-3=?", most=1.5)
    *controls, shown = box.children
    prompt, strength, layers, during, _ = controls
    assert greedy(tiny, "7+8-3=?") in shown.value
    prompt.value, layers.value, during.value = "9+4=?", (1, 2), "think"
    strength.value = 1.0
    steered = greedy(tiny, "9+4=?", steering(v, 1.0, layers=(1, 2), during="think"))
    assert steered != greedy(tiny, "9+4=?")
    assert steered.split("\n")[0] in shown.value
    assert "strength +1" in shown.value and "strength +0" in shown.value


def test_without_ipywidgets_the_same_is_shown_as_a_picture(tiny, v, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = widgets.steer(tiny, v, "7+8-3=?").data
    assert shown.count("think tokens") == 3
    assert greedy(tiny, "7+8-3=?").split("\n")[0] in shown
