"""The steering widget: what it shows is what was generated, and it has something to show without widgets."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from toolkit import tasks, widgets
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.spans import Reader
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
    *controls, busy, shown = box.children
    prompt, strength, layers, during, _, control = controls
    assert greedy(tiny, "7+8-3=?") in shown.value
    prompt.value, layers.value, during.value = "9+4=?", (1, 2), "think"
    strength.value = 1.0
    steered = greedy(tiny, "9+4=?", steering(v, 1.0, layers=(1, 2), during="think"))
    assert steered != greedy(tiny, "9+4=?")
    assert steered[:20] in shown.value  # a response that repeats itself is cut
    assert "strength +1" in shown.value and "strength +0" in shown.value
    assert busy.value == "ready" and "decoding" not in shown.value
    assert "random direction" not in shown.value
    control.value = True
    noise = greedy(tiny, "9+4=?", steering(random_like(v, seed=0), 1.0, layers=(1, 2), during="think"))
    # Along this random direction the response repeats itself, and is cut.
    assert "random direction, cut: it repeats itself, strength +1" in shown.value
    assert noise[:16] in shown.value and noise[:100] not in shown.value


def test_a_response_is_shown_while_it_is_decoded_and_is_the_same(tiny, v):
    told: list[str] = []
    response, cut = widgets.streamed(
        tiny, steering(v, 0.0), "17+5-9+23=?", Sampling(temperature=0.0, max_new_tokens=400), told.append
    )
    whole = tiny.text(response.token_ids[response.prompt_len :])
    assert not cut and len(told) >= 2 and all(whole.startswith(text) for text in told)
    assert [len(text) for text in told] == sorted(len(text) for text in told)
    assert greedy(tiny, "17+5-9+23=?") in whole


def test_only_a_response_that_repeats_itself_is_cut(tiny):
    rule, reader = widgets.Stream(lambda text: None), Reader(tiny, [])
    for token in [7, 8, *range(40)]:
        assert rule(tiny, reader, token) is None
    assert not rule.cut
    for token in [1, 2, 3] * 6:
        rule(tiny, reader, token)
    (end,) = rule(tiny, reader, 1)
    assert rule.cut and end in tiny.eos_ids


def test_a_partial_response_is_never_read_as_html():
    shown = widgets.partial_html("strength +1", "<think>1<2")
    assert "&lt;think&gt;1&lt;2" in shown and "decoding" in shown


def test_two_conditions_are_shown_side_by_side_on_one_scale_of_entropy(tiny, v):
    problems = tasks.load("arithmetic", "test", 2)
    sampling = Sampling(temperature=1.0, max_new_tokens=100, details=True)
    conditions = {"base": Condition(tiny), "steered <b>": Condition(tiny, (steering(v, 0.05),))}
    sampled = {name: rollouts(c, problems, sampling, progress=False) for name, c in conditions.items()}
    box = widgets.transcripts(tiny, problems, sampled)
    problem, pair, shown = box.children
    assert shown.value.count("class='rl-t'") == 2 and "steered &lt;b&gt;" in shown.value and "steered <b>" not in shown.value
    scales = re.findall(r"</span>([0-9.]+) nats</span>", shown.value)
    assert len(scales) == 2 and len(set(scales)) == 1
    assert problems[0].answer in shown.value
    problem.value = problems[1]
    expected = widgets.compared_html(tiny, problems[1], {name: sampled[name][1] for name in conditions})
    assert shown.value == expected
    pair.children[1].value = "base"
    assert shown.value.count("class='rl-t'") == 1


def test_without_ipywidgets_the_same_is_shown_as_a_picture(tiny, v, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = widgets.steer(tiny, v, "7+8-3=?").data
    assert shown.count("think tokens") == 3
    assert greedy(tiny, "7+8-3=?").split("\n")[0] in shown
