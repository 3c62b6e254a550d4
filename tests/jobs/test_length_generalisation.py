"""Length generalisation at toy size: training learns, measuring agrees with decoding step by step, tables say what results say."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit import figures, store
from toolkit.jobs import length_generalisation as job
from toolkit.jobs import length_tables as tables
from toolkit.jobs.length_generalisation import Run, Size
from toolkit.methods.positional_encodings import ENCODINGS, attention_js
from toolkit.tasks.generators.sequences import BEGIN, END, THEN

FOLDER = Path(__file__).parents[2] / "data" / "length-generalisation"
TOY = Size(longest=2, steps=60, batch=16, rate=1e-2, tested=12, mapped=2, width=16, heads=2)


@pytest.fixture(scope="module")
def counter():
    return job.train(Run(task="count", encoding="t5"), TOY)


def greedy(model, prompt: tuple[int, ...], limit: int) -> list[int]:
    ids = [BEGIN, *prompt, THEN]
    written: list[int] = []
    while len(written) < limit and (not written or written[-1] != END):
        with torch.inference_mode():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def test_an_answer_is_right_if_and_only_if_greedy_decoding_writes_it(counter):
    right = 0
    for n in (1, 2, 4):
        examples = job.held_out("count", n, 12)
        for example, tokens in zip(examples, job.right_tokens(counter, examples), strict=True):
            written = greedy(counter, example.prompt, n + 1)
            assert (written == [*example.answer, END]) == (tokens == n + 1)
            right += tokens == n + 1
    assert 0 < right < 36, "both cases occurred"


def test_training_is_the_same_for_a_seed_and_differs_between_seeds():
    short = Size(longest=2, steps=3, batch=4, width=16, heads=2)
    first, again, other = (job.train(Run(task="sort", encoding="none", seed=s), short).head.weight for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("hint", ["none", "successor", "successor so far"])
def test_a_noted_hint_trains_the_second_head_and_only_then(hint):
    short = Size(longest=3, steps=3, batch=8, width=16, heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = job.Decoder("rope", job.VOCABULARY, width=16, heads=2).note_head.weight
    after = job.train(Run(task="sort", encoding="rope", hint=hint), short).note_head.weight
    assert torch.equal(before, after) == (hint != "successor so far")


def test_test_examples_are_the_same_for_all_runs_and_tested_lengths_are_multiples(counter):
    assert job.held_out("sort", 4, 5) == job.held_out("sort", 4, 5)
    measured = job.measure(counter, "count", TOY)
    assert list(measured["right_tokens"]) == ["2", "4", "6", "8", "10"] and measured["answer_tokens"]["10"] == 11
    assert np.shape(measured["attention_distance"]["4"]) == (2, 2)
    assert Size().trained("addition") == 3 and Size().trained("sort") == 5


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Unknown task 'sorting': expected one of sort"):
        job.train(Run(task="sorting", encoding="none"), TOY)
    with pytest.raises(ValueError, match="Unknown hint 'help': expected one of none, successor"):
        job.train(Run(task="sort", encoding="none", hint="help"), TOY)


# --- tables, of results made up so that the answer is known -----------------------------------------------------


def made_up(task: str, encoding: str, share: float, *, hint: str = "none", seed: int = 0) -> dict:
    """A result that is right on all short examples, and on a share of those of twice the length."""
    rng = random.Random(f"{encoding}{hint}{seed}")
    full = {"5": 6, "10": 11}
    counts = {"5": [6] * 40, "10": [11 if rng.random() < share else 4 for _ in range(40)]}
    distance = {n: [[2.0 + seed, 1.0 + seed], [3.0, 4.0]] for n in full}
    about = {"task": task, "encoding": encoding, "hint": hint, "seed": seed, "tokens": {"5": 13, "10": 23}}
    return about | {"right_tokens": counts, "answer_tokens": full, "attention_distance": distance}


def three(*arguments, **more) -> list[dict]:
    return [made_up(*arguments, seed=seed, **more) for seed in (0, 1, 2)]


RESULTS = [
    *three("sort", "none", 0.9), *three("sort", "absolute", 0.1), *three("sort", "alibi", 1.0), *three("sort", "t5", 0.9),
    *three("sort", "none", 1.0, hint="successor"), *three("sort", "none", 0.1, hint="any element"),
]  # fmt: skip


def test_verdicts_follow_from_the_intervals_and_corrected_p_values():
    table = tables.encodings_compared(tables.complete(RESULTS, (0, 1, 2)))
    verdicts = table[table["metric"] == "exact"].set_index("ordering")["verdict"]
    assert verdicts["none over absolute"] == "holds" and verdicts["t5 over absolute"] == "holds"
    assert verdicts["none over alibi"] != "holds" and "none over rope" not in verdicts
    row = table[(table["ordering"] == "none over absolute") & (table["metric"] == "exact")].iloc[0]
    assert row["mean"] == pytest.approx(0.8, abs=0.15) and row["p_holm"] >= row["p"]


def test_hints_are_compared_with_no_hint_and_with_their_random_control():
    table = tables.hints_compared(tables.complete(RESULTS, (0, 1, 2)))
    verdicts = table[table["metric"] == "tokens"].set_index("ordering")["verdict"]
    assert set(verdicts.index) == {"successor over no hint", "successor over any element", "any element over no hint"}
    assert verdicts["successor over any element"] == "holds" and verdicts["any element over no hint"] == "reversed"


def test_encodings_that_have_not_learnt_the_task_are_not_judged():
    bad = [r | {"right_tokens": {"5": [0] * 40, "10": [0] * 40}} for e in ("none", "absolute") for r in three("copy", e, 0.5)]
    table = tables.encodings_compared(tables.complete(bad, (0, 1, 2)))
    assert table["verdict"].str.startswith("not judged").all() and table["p_holm"].isna().all()


def test_a_combination_without_all_seeds_is_left_out():
    assert list(tables.complete([*three("sort", "t5", 1.0), made_up("sort", "rope", 1.0)], (0, 1, 2))) == [("sort", "t5", "none")]


def test_accuracies_are_means_over_seeds_and_examples_and_can_be_drawn():
    results = tables.complete(RESULTS, (0, 1, 2))
    table = tables.accuracies(results)
    row = table[(table["encoding"] == "absolute") & (table["multiple"] == 2) & (table["metric"] == "exact")].iloc[0]
    counts = np.array([r["right_tokens"]["10"] for r in RESULTS if r["encoding"] == "absolute"])
    assert row["mean"] == pytest.approx((counts == 11).mean()) and row["low"] <= row["mean"] <= row["high"]
    assert len(figures.accuracy_by_length(table).data) == 4, "one line per encoding, hints are not drawn"


def test_heads_are_sorted_within_a_layer_before_seeds_are_averaged():
    table = tables.attention_by_head(tables.complete(three("sort", "t5", 1.0), (0, 1, 2)))
    assert table["distance"].tolist() == [2.0, 3.0, 3.0, 4.0] and set(table["uniform"]) == {3.0}


def test_distance_between_decoders_is_that_of_the_nearest_heads_averaged_over_layers():
    torch.manual_seed(0)
    a, c = (torch.rand(2, 3, 2, 4, 4).softmax(-1) for _ in range(2))
    got = tables.map_distance(a, c)
    for example in range(3):
        layers = [min(float(attention_js(a[k, example], c[k, example])[x, y]) for x in (0, 1) for y in (0, 1)) for k in (0, 1)]
        assert got[example] == pytest.approx(np.mean(layers))


def test_likeness_names_the_encoding_whose_attention_is_as_far_as_it_is():
    torch.manual_seed(0)
    base = torch.randn(3, 2, 6, 2, 4, 4)  # seeds, layers, examples, heads, queries, keys

    def near(noise: float) -> list[torch.Tensor]:
        return list((base + noise * torch.randn_like(base)).softmax(-1))

    maps = {("sort", "none"): near(0.0), ("sort", "t5"): near(0.1), ("sort", "alibi"): near(3.0)}
    table = tables.likeness(maps).set_index("encoding")
    assert table.loc["alibi", "verdict"] == "holds" and table.loc["t5", "mean"] < table.loc["alibi", "mean"]
    assert table.loc["none", "mean"] > 0.0, "another seed, never the decoder itself"
    assert set(ENCODINGS) > set(table.index)


def test_a_verdict_on_likeness_is_lost_if_the_correction_over_all_tasks_loses_it():
    rng = np.random.default_rng(0)
    maps = {}
    for task in ("sort", "count", "copy", "reverse"):
        base = rng.normal(size=(3, 2, 6, 2, 4, 4))
        for encoding, noise in (("none", 0.0), ("t5", 0.5), ("rope", 0.6), ("alibi", 0.7)):
            near = torch.tensor(base + noise * rng.normal(size=base.shape)).float().softmax(-1)
            maps[task, encoding] = list(near)
    table = tables.likeness(maps).dropna(subset="p")
    assert (table["p_holm"] >= table["p"]).all() and (table["p"] < 0.05).any()
    judged = table["verdict"] != "no effect detectable"
    assert (judged == (table["p_holm"] <= 0.05)).all() and judged.sum() < (table["p"] < 0.05).sum()


# --- the committed study ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("length_study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_tables_of_the_committed_results(study):
    results = store.read_json(FOLDER / "results.json", dict)
    assert f"<!-- study: begin -->\n\n{study.page(results, results)}\n\n<!-- study: end -->" in (FOLDER / "README.md").read_text()


def test_the_committed_tables_are_those_of_the_committed_runs(study):
    committed = store.read_json(FOLDER / "results.json", dict)
    results = tables.complete(store.read_rows(FOLDER / "runs.jsonl"), committed["seeds"])
    for name, table in (
        ("accuracy", tables.accuracies),
        ("orderings", tables.encodings_compared),
        ("hints", tables.hints_compared),
    ):
        for row, again in zip(committed[name], study.store_rows(table(results)), strict=True):
            assert row == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-9, abs=1e-9) for k, v in again.items()}


def test_a_run_is_kept_and_done_again_only_if_its_settings_change(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "KEPT", tmp_path)
    monkeypatch.setattr(study, "SIZE", Size(longest=2, steps=2, batch=4, tested=2, mapped=2, width=16, heads=2))
    run = Run(task="sort", encoding="none")
    assert study.kept(run) is None
    study.perform(run)
    assert study.kept(run)["task"] == "sort" and study.kept(Run(task="sort", encoding="none", seed=1)) is None
    monkeypatch.setattr(study, "SIZE", Size(longest=2, steps=3, batch=4, tested=2, mapped=2, width=16, heads=2))
    assert study.kept(run) is None


def test_every_hint_that_is_compared_is_planned_with_its_control(study):
    planned = {(run.task, run.hint) for run in study.planned()}
    assert {hint for _, hint in planned} >= {hint for pair in tables.HINTS for hint in pair}
    assert len({run.name for run in study.planned()}) == len(study.planned())


def test_sentences_of_the_page_are_those_of_the_committed_results():
    committed = store.read_json(FOLDER / "results.json", dict)
    tokens = {(r["where"], r["ordering"]): r for r in committed["orderings"] if r["metric"] == "tokens"}
    judged = [r for r in tokens.values() if not r["verdict"].startswith("not judged")]
    assert len(judged) == 29
    assert {what for what, r in tokens.items() if r["verdict"] in ("holds", "reversed")} == {("copy", "t5 over absolute")}
    for where, ordering in (("copy", "t5 over absolute"), ("sort", "none over rope"), ("sort", "t5 over rope")):
        assert tokens[where, ordering]["low"] > 0.09 and 0.03 < tokens[where, ordering]["p_holm"] < 0.15
    nearer = {(r["task"], r["encoding"]): r for r in committed["likeness"] if "verdict" in r}
    assert len(nearer) == 18 and {r["verdict"] for r in nearer.values()} == {"no effect detectable"}
    single = {what for what, r in nearer.items() if r["further_low"] > 0}
    assert single >= {("parity", "rope"), *((task, e) for task in ("copy", "reverse") for e in ("rope", "absolute"))}
    assert {what for what, r in nearer.items() if r["further_high"] < 0} == {("copy", "alibi"), ("reverse", "alibi")}
    hints = [r for r in committed["hints"] if r["metric"] == "tokens"]
    beside = [r for r in hints if r["ordering"].endswith(("over any element", "over relabelled"))]
    assert beside and {r["verdict"] for r in beside} == {"no effect detectable"}
    harmful = {r["where"] for r in hints if r["verdict"] == "reversed"}
    assert harmful == {"sort, none", "sort, alibi"}
