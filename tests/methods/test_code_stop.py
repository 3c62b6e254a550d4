"""CoDE-Stop: its formulas equal a naive version, and a forced answer equals greedy decoding without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import Steps
from zoo import model_of_type

from toolkit import exits
from toolkit.exits import EarlyExit
from toolkit.generate import Sampling, rollouts
from toolkit.lm import Condition
from toolkit.methods import code_stop
from toolkit.methods.code_stop import CodeStop, Probe
from toolkit.spans import Reader

LOGPS = st.lists(st.floats(-8, 0), min_size=1, max_size=12)


@given(LOGPS)
def test_confidence_leaves_out_both_ends_but_divides_by_all_but_one(logps):
    n, total = len(logps), 0.0
    for i in range(2, n):  # i = 2 .. n - 1, counted from 1
        total += logps[i - 1]
    conf = code_stop.confidence(logps)
    assert conf is None if n < 3 else conf == pytest.approx(math.exp(total / (n - 1)))
    assert code_stop.confidence(logps, (0, 0)) == pytest.approx(math.exp(sum(logps) / n))


@given(st.lists(st.integers(1, 100).map(lambda n: n / 100), min_size=0, max_size=8))
def test_decline_counts_each_fall_more_the_longer_ago_it_was(confs):
    observed = [(c, 10 * (i + 1)) for i, c in enumerate(confs)]
    total = 0.0
    for i in range(1, len(confs)):
        if math.log(confs[i]) < math.log(confs[i - 1]):
            total += 1 + math.log(10 * len(confs) / (10 * (i + 1)))
    assert code_stop.decline(observed) == pytest.approx(total if len(confs) >= 3 else 0.0)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_a_forced_answer_is_decoded_greedily_from_the_closed_thought(model_type, problems_of):
    lm = model_of_type(model_type)
    (r,) = rollouts(Condition(lm, rules=(Steps(),)), problems_of(1), Sampling(max_new_tokens=12), progress=False)
    reader = Reader(lm, r.token_ids[: r.prompt_len])
    for token in r.token_ids[r.prompt_len : r.prompt_len + 6]:
        reader.push(token)
    tokens, logps = Probe(tokens=5)(lm, reader)
    ids, expected = [*reader.ids, lm.token_id("</think>")], []
    for _ in range(5):
        logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].detach()
        ids.append(int(logits.argmax()))
        expected.append(float(logits.log_softmax(-1).max()))
        if ids[-1] in lm.eos_ids:
            break
    assert tokens == ids[-len(expected) :]
    assert logps == pytest.approx(expected, abs=1e-4)


def test_thinking_stops_exactly_where_the_forced_answer_is_confident_or_confidence_has_declined(tiny, problems_of):
    check = CodeStop(low=0.9999, high=0.99995, limit=3.0, skip=(0, 0), probe=Probe(tokens=4))
    rule = EarlyExit(check, "\n")
    sampled = rollouts(Condition(tiny, rules=(rule,)), problems_of(8), Sampling(n=3, max_new_tokens=80), progress=False)
    outcomes = set()
    for r in sampled:
        observed = []
        for j, (at, reader) in enumerate(exits.candidates(tiny, rule, r, closed=True), start=1):
            _, logps = check.probe(tiny, reader)
            observed.append((math.exp(sum(logps) / len(logps)), reader.written))
            limit = 0.9999 + 0.00005 * min(1.0, (j - 1) / 2)
            stops = observed[-1][0] > limit or code_stop.decline(observed) > 3.0
            close = r.token_ids[at] == tiny.token_id("</think>")
            assert close or not stops  # where the check does not stop, the model may
            outcomes.add((stops, close))
    assert {(True, True), (False, False)} <= outcomes


@pytest.mark.parametrize("cues", [(), ("w",)])
def test_with_a_text_before_the_tag_the_probes_that_were_made_are_counted_exactly(tiny, problems_of, monkeypatch, cues):
    made = []
    probe, check = Probe.__call__, CodeStop(low=0.99, high=0.999, limit=3.0, skip=(0, 0), probe=Probe(tokens=2))
    monkeypatch.setattr(Probe, "__call__", lambda self, lm, reader: made.append(1) or probe(self, lm, reader))
    rule = EarlyExit(check, "\n", cues=cues, before="=")
    sampled = rollouts(Condition(tiny, rules=(rule,)), problems_of(8), Sampling(n=3, max_new_tokens=80), progress=False)
    taken = 2 * len(made)
    assert taken > 10 and sum(code_stop.probe_tokens(tiny, rule, r) for r in sampled) == taken


def test_probe_tokens_are_those_of_the_candidates_up_to_the_exit(tiny, problems_of):
    rule = EarlyExit(CodeStop(low=1.0, high=1.0, limit=math.inf, skip=(0, 0), probe=Probe(tokens=2)), "\n")  # never stops
    ended = 0
    for r in rollouts(tiny, problems_of(5), Sampling(max_new_tokens=80), progress=False):
        thinking = tiny.text(r.token_ids[r.think.start : r.think.stop])
        by_itself = r.closed and thinking.endswith("\n")  # where the model closes its thinking, nothing is probed
        assert code_stop.probe_tokens(tiny, rule, r) == 2 * (thinking.count("\n") - by_itself)
        ended += by_itself
        assert (
            code_stop.probe_tokens(tiny, EarlyExit(CodeStop(low=0.0, high=0.0, skip=(0, 0), probe=Probe(tokens=2)), "\n"), r) == 2
        )
    assert ended > 1


def test_bad_thresholds_are_refused():
    for wrong in ({"low": 0.9, "high": 0.8}, {"ramp": -1}, {"limit": 0.0}, {"skip": (-1, 0)}, {"high": 1.5}):
        with pytest.raises(ValueError, match="need 0 <= low <= high <= 1"):
            CodeStop(**wrong)
    with pytest.raises(ValueError, match="at least one token"):
        Probe(tokens=0)
