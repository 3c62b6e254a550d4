"""The search for retrieval heads: examples from haystacks, masking tests with controls, thinking against answering directly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from toolkit import edits, evaluate, jobs, masks, needles, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import masking, retrieval
from toolkit.jobs.masking import Mask
from toolkit.lm import Condition
from toolkit.methods import retrieval_heads
from toolkit.needles import NeedleError
from toolkit.tasks import threading
from toolkit.types import HeadEdit, HeadScores, Plan

SMALL = jobs.Search(instances=6, counts=(1,), ops=("zero",), draws=1, max_new_tokens=60)


@pytest.fixture(scope="module")
def found(tiny) -> retrieval.RetrievalMeasurement:
    return jobs.measure_retrieval(tiny, SMALL)


def test_examples_cover_every_needed_piece_or_the_answer_alone(tiny):
    hidden = replace(SMALL, instances=12).haystacks(tiny, "dev")
    answers = rollouts(tiny, [h.problem for h in hidden], SMALL.sampling, progress=False)
    whole = needles.examples(hidden, answers)
    published = needles.examples(hidden, answers, whole=False)
    assert len(whole) == sum(len(h.needed) for h in hidden) > len(published) == len(hidden)
    for e, h in zip(published, hidden, strict=True):
        assert tiny.tokenizer.decode(e.rollout.token_ids[e.needle.start : e.needle.stop]) == h.problem.answer


def test_a_response_to_something_else_is_no_example(tiny, found):
    with pytest.raises(NeedleError, match="does not answer one of these haystacks"):
        needles.examples(found.haystacks[1:], found.rollouts[:1])


def test_every_form_is_tested_once_and_the_published_one_at_every_count():
    chosen = masking.planned_masks(jobs.Search(counts=(1, 3)))
    assert len(chosen) == len(set(chosen))
    for ranking in retrieval.RANKINGS:
        own = [m for m in chosen if m.ranking == ranking]
        assert {m.count for m in own if (m.op, m.during) == ("uniform", "newest")} == {1, 3}
        assert {(m.op, m.during) for m in own if m.count == 3} == {(o, d) for o in masks.ABLATIONS for d in ("newest", "all")}


def test_controls_are_of_the_same_layers_exclude_the_targets_and_do_not_repeat(tiny, provenance):
    score = HeadScores(tiny_scores := np_scores(tiny), "made up", "share", tiny.provenance())
    assert tiny_scores.shape == (4, 8)
    plan = retrieval_heads.mask_plan(score, 4)
    drawn = masking.controls(plan, tiny, 5, 0)
    assert len({frozenset(p.heads) for p in drawn}) == len(drawn) > 1
    for control in drawn:
        assert not set(control.heads) & set(plan.heads)
        assert sorted(layer for layer, _ in control.heads) == sorted(layer for layer, _ in plan.heads)
    assert masking.controls(retrieval_heads.mask_plan(score, 31), tiny, 2, 0) == []


def np_scores(tiny):
    import torch

    return torch.rand(tiny.layout.n_layers, tiny.layout.n_heads, generator=torch.Generator().manual_seed(0)).double()


def test_masked_accuracies_equal_the_comparison_of_conditions(tiny, found):
    """The job's table against ``evaluate.compare`` on the same conditions."""
    mask = Mask("write (ours)", 2, "zero", "all")
    problems = tasks.lookup.load("test", 8)
    row = jobs.masking_effects(tiny, found, SMALL, problems, [mask]).iloc[0]
    plan = retrieval_heads.mask_plan(found.scores["write (ours)"], 2)
    noise = edits.random_heads(plan, tiny.layout, seed=0)
    judged = {name: Condition(tiny, (masks.masking(p, "zero", during="all"),)) for name, p in (("top", plan), ("random", noise))}
    compared = evaluate.summary(evaluate.compare({"base": tiny, **judged}, problems, SMALL.sampling, progress=False))
    accuracy = compared[compared["metric"] == "accuracy"].set_index("condition")
    assert row["accuracy"] == accuracy.loc["top", "mean"] and row["random"] == accuracy.loc["random", "mean"]
    assert row["lost"] == pytest.approx(-accuracy.loc["top", "difference"])
    assert row["lost_high"] == pytest.approx(-accuracy.loc["top", "difference_low"])
    assert row["more_than_random"] == pytest.approx(row["random"] - row["accuracy"])


def test_masking_nothing_loses_nothing_thinking_or_not(tiny, provenance):
    plan = retrieval_heads.mask_plan(HeadScores(np_scores(tiny), "made up", "share", tiny.provenance()), 0)
    asked = {"lookup": tasks.lookup.load("test", 6)}
    table = jobs.thinking_or_not(tiny, plan, asked, Sampling(n=2, max_new_tokens=60), draws=1)
    assert (table["lost"].dropna() == 0).all()
    assert (table[table["mode"] == "answering directly"]["think_tokens"] == 0).all()
    assert (table[table["mode"] == "thinking"]["think_tokens"] > 0).all()
    assert (table["draws"] == 1).all()


def test_controls_that_choose_the_same_heads_are_counted_once_in_every_table(tiny, provenance, monkeypatch):
    plan = retrieval_heads.mask_plan(HeadScores(np_scores(tiny), "made up", "share", tiny.provenance()), 2)
    other = edits.random_heads(plan, tiny.layout, seed=0)
    monkeypatch.setattr(edits, "random_heads", lambda plan, layout, *, seed: other)
    asked = {"lookup": tasks.lookup.load("test", 2)}
    table = jobs.thinking_or_not(tiny, plan, asked, Sampling(n=1, max_new_tokens=8), draws=3)
    assert set(table[table["masked"] == "random"]["draws"]) == {1}
    assert len(jobs.masking_arm(tiny, plan, draws=3).controls) == 1


@pytest.mark.parametrize("task", ["lookup", "threading"])
def test_recall_has_a_cell_for_every_haystack_and_no_more(found, tiny, task):
    if task == "threading":  # its problems record a depth of None
        haystacks = threading.grid(tiny, [200, 300], threading.MIX[:2], n=2)
        answers = rollouts(tiny, [h.problem for h in haystacks], Sampling(temperature=0.0, max_new_tokens=8), progress=False)
        found = retrieval.RetrievalMeasurement(haystacks, answers, {})
    cells = found.recall()
    assert cells["n"].sum() == len(found.rollouts)
    assert (cells["correct"] * cells["n"]).sum() == pytest.approx(sum(r.correct for r in found.rollouts))


def test_depth_is_that_of_the_first_fact_in_the_text(tiny):
    """Pieces of a lookup are listed in the order in which they are followed, which is not that of the text."""
    haystacks = retrieval.Search(task="lookup", instances=60).haystacks(tiny, "dev")
    h = next(h for h in haystacks if h.needed[0].start > min(span.start for span in h.needed))
    answers = rollouts(tiny, [h.problem], Sampling(temperature=0.0, max_new_tokens=4), progress=False)
    text, chain = h.problem.messages[-1]["content"], h.problem.meta["chain"]
    first = min(text.index(f"{name}={value};") for name, value in pairwise(chain))
    before = len(tiny.prompt_ids([{"role": "user", "content": text[:first]}])) / len(h.prompt_ids)
    assert retrieval.RetrievalMeasurement([h], answers, {}).recall()["depth"].item() == pytest.approx(before, abs=0.05)


def test_rollouts_of_many_masked_heads_are_kept_under_names_that_a_file_system_takes(tiny, found, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        masking, "_outcomes", lambda lm, condition, problems, sampling, out: written.append(out) or np.ones((2, 1, 1))
    )
    heads = [(layer, head) for layer in range(36, 56) for head in range(30, 36)]
    for few in (heads, heads[:-1]):
        plan = Plan(tuple(HeadEdit(*h, "scale", 1.0) for h in few), None, "many", tiny.provenance())
        monkeypatch.setattr(masking.retrieval_heads, "mask_plan", lambda scores, count, plan=plan: plan)
        monkeypatch.setattr(masking, "controls", lambda plan, lm, draws, seed: [])
        jobs.masking_effects(tiny, found, SMALL, [], [Mask("write (ours)", 2, "zero", "all")], out=tmp_path)
    names = [where.name for where in written if where.name.startswith("zero")]
    assert len(set(names)) == 2 and max(map(len, names)) < 100


def test_report_writes_scores_lists_tables_and_page(tiny, tmp_path):
    tables = jobs.retrieval_report(tiny, replace(SMALL, instances=3), tmp_path / "out")
    written = store.read_json(tmp_path / "out" / "retrieval.json")
    assert written["provenance"]["fingerprint"] == tiny.fingerprint
    assert len(written["masking"]) == len(tables["masking"])
    lists = retrieval_heads.from_lists(store.read_json(tmp_path / "out" / "copy_examples.json"))
    scores = store.load(tmp_path / "out" / "copy.safetensors", HeadScores, fingerprint=tiny.fingerprint)
    assert np.allclose(lists.mean(dim=0), scores.score)
    assert "Which heads" in (tmp_path / "out" / "report.html").read_text()
    parts = sorted((tmp_path / "out" / "rollouts").rglob("*.parquet"))
    before = [p.stat().st_mtime_ns for p in parts]
    again = jobs.retrieval_report(tiny, replace(SMALL, instances=3), tmp_path / "out")
    assert [p.stat().st_mtime_ns for p in parts] == before, "finished rollouts are kept"
    assert again["masking"].equals(tables["masking"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "arithmetic"}, "task='arithmetic' is no retrieval task"),
        ({"counts": ()}, "must be at least 1"),
        ({"instances": 0}, "must be at least 1"),
        ({"ops": ("half",)}, "ops=half: unknown masking operation; choose from zero, mean, uniform"),
    ],
)
def test_bad_searches_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        jobs.Search(**more)


@pytest.mark.parametrize("task", ["needle", "threading"])
def test_a_search_is_sized_for_its_model(llama, task):
    hidden = jobs.Search(task, instances=8, lengths=(480,)).haystacks(llama, "dev")
    assert hidden and all(len(h.prompt_ids) <= 480 for h in hidden)
