"""SLAQ on a model: answers and attributions per pair, kept for the next call, and a summary that recounts them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from toolkit import store
from toolkit.generate import Sampling
from toolkit.jobs import slaq as job
from toolkit.methods import slaq as method
from toolkit.probes import Protocol
from toolkit.tasks import slaq

GREEDY = Sampling(temperature=0.0, max_new_tokens=6)
PAIRS = slaq.draw_pairs("dev", 2, 0, m=2, noise=1)


@pytest.fixture(scope="module")
def plain(llama):
    """A tiny random model without think tags."""
    return replace(llama, tags=None)


def test_the_right_response_has_each_answer_at_its_span(plain):
    for problem in PAIRS[0].problems:
        ids, spans = job.right_response(plain, problem)
        assert ids[: len(plain.prompt_ids(problem.messages))] == plain.prompt_ids(problem.messages)
        assert [plain.text(ids[s.start : s.stop]) for s in spans] == list(problem.meta["golds"])
    long = PAIRS[0].long
    lines = plain.text(job.right_response(plain, long)[0]).split("\n")[-2:]
    owners = re.findall(r"code of the ([\w ]+)\?", long.messages[-1]["content"])
    told = [
        f"{i}. The code of the {owner} is {gold}."
        for i, (owner, gold) in enumerate(zip(owners, long.meta["golds"], strict=True), 1)
    ]
    assert [line[-len(t) :] for line, t in zip(lines, told, strict=True)] == told


def test_a_fact_that_the_prompt_does_not_state_is_answered_by_the_answer_alone(plain):
    (pair,) = slaq.short_long_pairs([slaq.Fact("Who?", "me"), slaq.Fact("When?", "now")], 2)
    ids, spans = job.right_response(plain, pair.long)
    assert plain.text(ids).endswith("1. me\n2. now") or plain.text(ids).endswith("1. now\n2. me")
    assert [plain.text(ids[s.start : s.stop]) for s in spans] == list(pair.long.meta["golds"])


def test_a_row_compares_the_two_forms_of_its_fact_and_a_second_call_reads_it(plain, tmp_path, monkeypatch):
    facts = job.measure(plain, PAIRS, GREEDY, out=tmp_path)
    assert facts["position"].tolist() == [0, 1, 0, 1] and facts["pair"].nunique() == 2
    row = facts.iloc[1]
    (_, long), (short,) = (
        method.attribute(plain, *job.right_response(plain, problem)) for problem in (PAIRS[0].long, PAIRS[0].short[1])
    )
    for name, value in method.similarities(short, long).items():
        assert row[name] == pytest.approx(value)
    first = method.attribute(plain, *job.right_response(plain, PAIRS[0].long))[0]
    assert row["other neurons cosine"] == pytest.approx(method.similarities(short, first)["neurons cosine"])
    assert (row["short_log_odds"], row["long_log_odds"]) == pytest.approx((short.log_odds, long.log_odds))
    monkeypatch.setattr(job, "_compare_forms", lambda *given: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(job.measure(plain, PAIRS, GREEDY, out=tmp_path), facts)
    assert len(list((tmp_path / "pairs").glob("*.json"))) == 2


def test_kept_pairs_depend_on_the_code_that_makes_and_judges_them():
    modules = store.modules_of(job.__name__)
    assert {"toolkit.jobs.slaq", "toolkit.methods.slaq", "toolkit.tasks.slaq", "toolkit.tasks.grading.answers"} <= set(modules)


def test_a_model_that_thinks_and_several_samples_are_refused(tiny, plain):
    with pytest.raises(ValueError, match="thinks before it answers"):
        job.measure(tiny, PAIRS, GREEDY)
    with pytest.raises(ValueError, match="2 samples"):
        job.measure(plain, PAIRS, replace(GREEDY, n=2))


def table(pairs: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for pair in range(pairs):
        for position in range(3):
            short, long = bool(rng.random() < 0.8), bool(rng.random() < 0.6)
            features = {name: rng.random() + (short == long) for name in job.FEATURES}
            others = {f"other {name}": rng.random() for name in job.FEATURES}
            rows.append({"pair": f"p{pair:03d}", "position": position, "short": short, "long": long, "short_log_odds": rng.normal(),
                         "long_log_odds": rng.normal(), **features, **others})  # fmt: skip
    return pd.DataFrame(rows)


def test_the_summary_counts_facts_and_does_not_depend_on_the_order_of_rows():
    facts = table(30)
    found = job.summary(facts, shuffles=5, protocol=Protocol(times=50))
    scores = slaq.alignment_scores(facts["short"].tolist(), facts["long"].tolist())
    assert {k: e.mean for k, e in found["accuracy"].items()} == pytest.approx(
        {"short": scores.short, "long": scores.long, "aligned": scores.aligned}
    )
    assert (found["pairs"], found["facts"]) == (30, 90)
    assert found["similarity"]["neurons top"]["same - other"].low > 0
    assert found["prediction"]["similarities"].auc.low > 0.8 > found["prediction"]["log-odds"].auc.mean
    again = job.summary(facts.sample(frac=1, random_state=1), shuffles=5, protocol=Protocol(times=50))
    assert json.dumps(again, default=store.jsonable) == json.dumps(found, default=store.jsonable)


def test_pairs_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        job.summary(table(10).iloc[1:])
