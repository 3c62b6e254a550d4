"""The widgets: what they show is what was generated and measured, and steering has something to show without widgets."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from toolkit import attention, edits, hooks, one_head, tasks, widgets
from toolkit.directions import random_like
from toolkit.edits import steering
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.sites import Site
from toolkit.spans import Reader
from toolkit.types import Direction, HeadScores, Problem, Span
from toolkit.widgets.heads import masked as heads_off


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
    assert "random direction, strength +1, cut: it repeats itself: " in shown.value
    assert noise[:16] in shown.value and noise[:100] not in shown.value


def test_a_response_is_shown_while_it_is_decoded_and_is_the_same(tiny, v):
    told: list[str] = []
    problem = Problem("p", ({"role": "user", "content": "17+5-9+23=?"},), "")
    response, cut = widgets.streamed(tiny, (), problem, Sampling(temperature=0.0, max_new_tokens=400), told.append)
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


def test_tool_results_have_no_share_in_the_common_scale(tiny, rollout_of):
    """The model did not write them, so their entropies say nothing."""
    r = rollout_of(12)
    mask = np.zeros(r.response_tokens, bool)
    mask[4:8] = True
    given = (Span(r.prompt_len + 4, r.prompt_len + 8),)
    called = replace(r, entropies=tuple(np.where(mask, 50.0, 0.5).tolist()), results=given)
    plain = replace(rollout_of(9), entropies=(0.75,) * rollout_of(9).response_tokens)
    shown = widgets.compared_html(tiny, tasks.load("arithmetic", "test", 1)[0], {"tool": called, "none": plain})
    assert shown.count("0.75 nats</span>") == 2 and "50.00" not in shown


def test_without_ipywidgets_the_same_is_shown_as_a_picture(tiny, v, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = widgets.steer(tiny, v, "7+8-3=?").data
    assert shown.count("think tokens") == 3
    assert greedy(tiny, "7+8-3=?").split("\n")[0] in shown


# --- the map of heads -------------------------------------------------------------------------------------------


def scored(lm: LM) -> HeadScores:
    score = torch.randn(lm.layout.n_layers, lm.layout.n_heads, generator=torch.Generator().manual_seed(3)).double()
    score[0, 0] = 9.0  # without it, responses change
    return HeadScores(score, "by_hand", "units", lm.provenance())


def without(lm: LM, problem: Problem, heads, seed: int = 0) -> str:
    """Sample the response with the output of some heads set to zero, by a hook on the input of ``W_O``."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def zeroed(layer):
        def fn(value, inputs):
            value = value.clone()
            for head in by_layer[layer]:
                value[..., lm.layout.head(layer, head)] = 0.0
            return value

        return fn

    def act(lm):
        return hooks.rewrite(lm.layout, {Site("z", layer): zeroed(layer) for layer in by_layer})

    (r,) = rollouts(Condition(lm, (act,) if heads else ()), [problem], Sampling(max_new_tokens=80, seed=seed), progress=False)
    return html.escape(lm.text(r.token_ids[r.think.start : r.think.stop]))


def test_the_map_shows_the_response_without_a_head_beside_the_unchanged_one(tiny, v):
    problems = tasks.load("arithmetic", "test", 2)
    box = widgets.head_map(tiny, scored(tiny), v, problems, max_new_tokens=80)
    _, (head, off, control), (problem, seed), busy, output, _, _, _ = (
        getattr(child, "children", child) if not hasattr(child, "data") else child for child in box.children
    )
    assert head.value == (0, 0) and len(head.options) == len(tiny.layout.all_heads)
    base = without(tiny, problems[0], [])
    assert base in output.value and output.value.count("think tokens") == 1
    off.value = True
    removed = without(tiny, problems[0], [(0, 0)])
    assert removed != base and base in output.value and removed in output.value
    assert "head 0.0 off" in output.value and busy.value == "ready" and "decoding" not in output.value
    # Another head: the first one stays off, and the switch is that of the chosen head.
    head.value = (2, 4)
    assert not off.value and removed in output.value
    off.value = True
    both = without(tiny, problems[0], [(0, 0), (2, 4)])
    assert "heads 0.0, 2.4 off" in output.value and both[:30] in output.value
    off.value, control.value = False, True
    (other,) = edits.random_heads(heads_off(tiny, [(0, 0)]), tiny.layout, seed=0).heads
    assert other[0] == 0 and other[1] != 0
    assert f"control, head 0.{other[1]} off" in output.value and without(tiny, problems[0], [other])[:30] in output.value
    # Another problem, another seed: all is sampled again.
    problem.value, seed.value = problems[1], 5
    assert without(tiny, problems[1], [], seed=5) in output.value
    assert without(tiny, problems[1], [(0, 0)], seed=5)[:30] in output.value


def test_the_map_shows_what_a_head_writes_and_attends_to(tiny, v):
    problems = tasks.load("arithmetic", "test", 1)
    box = widgets.head_map(tiny, scored(tiny), v, problems, temperature=0.0, max_new_tokens=80)
    head, written, token, attended = box.children[1].children[0], box.children[5], box.children[6], box.children[7]
    (r,) = rollouts(tiny, problems, Sampling(temperature=0.0, max_new_tokens=80), progress=False)
    added = one_head.contribution(tiny, r.token_ids, 0, 0)
    mean = added[r.think.start - 1 : r.think.stop - 1].mean(dim=0)
    (text, change), *_ = one_head.token_effects(tiny, mean)[0]
    assert f"<code>{html.escape(text)}</code> {change:+.2f}" in written.value
    unit = v.unit()[0].float()
    assert f"of layer 0: {float(mean @ unit):+.3f}" in written.value
    first, last = added[r.prompt_len - 1] @ unit, added[-2] @ unit
    hovers = re.findall(r"data-t='[^']*?([+-][0-9.]+) along the length direction'", written.value)
    assert [float(hovers[0]), float(hovers[-1])] == pytest.approx([float(first), float(last)], abs=6e-4)
    assert len(hovers) == len(r.token_ids) - r.prompt_len
    # The token slider ends at the response's last token; at a number, it shows the row that predicts this token.
    assert token.max == len(r.token_ids) - r.prompt_len and token.value == r.think.start - r.prompt_len + 1
    token.value = 9
    at = r.prompt_len + 9 - 2
    row = attention.rows(tiny, r.token_ids, Span(at, at + 1))[0, 0, 0]
    shares = [float(x) for x in re.findall(r"data-t='[^']*?([0-9.]+) of its attention'", attended.value)]
    assert shares == pytest.approx(row.tolist(), abs=6e-4) and len(shares) == at + 1
    before = written.value, attended.value
    head.value = (2, 4)
    assert written.value != before[0] and attended.value != before[1] and "of layer 2:" in written.value
