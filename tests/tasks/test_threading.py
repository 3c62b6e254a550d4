"""Threads: what is needed suffices and is necessary, whatever is asked; spans decode to their pairs; bad input says what to do."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from bpe import bpe_lm, lm_of, read

from toolkit import stats, store, tasks
from toolkit.lm import LM
from toolkit.tasks import grading, haystack, splits, threading
from toolkit.tasks.generators.pairs import solve
from toolkit.tasks.haystack import user_text
from toolkit.tasks.threading import Ask, ThreadError, kv_haystack

KINDS = ("single", "multi", "conditional", "thread", "multithread", "branched")
LARGE = tuple(
    Ask(ask.kind, ask.steps, ask.threads, ask.direction, ask.depth, ask.clustered, ask.branches, "uuid") for ask in threading.MIX
)


@pytest.fixture(params=["characters", "bpe"])
def lm(request) -> LM:
    return lm_of(request.param)


# --- seeds and splits ----------------------------------------------------------------------------------------


def test_splits_are_disjoint_by_what_is_needed():
    found = {}
    for split in splits.SPLITS:
        problems = [p for seed in range(2) for p in threading.load(split, 40, seed)]
        assert all(p.meta["split"] == split for p in problems)
        found[split] = {(p.meta["kind"], p.meta["asked"], p.answer) for p in problems}
    assert all(not found[a] & found[b] for a, b in combinations(found, 2))


def test_threading_is_a_task_by_name_and_survives_a_file(tmp_path):
    problems = tasks.load("threading", "test", 40)
    assert len({p.id for p in problems}) == 40 and {p.meta["kind"] for p in problems} == set(KINDS)
    path = store.save_problems(problems, tmp_path / "threads.jsonl")
    again = tasks.load(str(path), n=40)
    assert [p.id for p in again] == [p.id for p in problems]
    assert all(grading.grade(p, p.answer) for p in [*problems, *again])


# --- in the tokens of a prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [*threading.MIX, *LARGE], ids=lambda a: f"{a.kind}-{a.ids}")
def test_spans_decode_to_the_needed_pairs_and_the_answers(lm, ask):
    h = threading.place(lm, ask, 1900, seed=3)
    found = kv_haystack(ask, h.problem.meta["pairs"], split="test", seed=3)
    assert list(h.prompt_ids) == lm.prompt_ids(h.problem.messages)
    for span, i in zip(h.needed, found.needed, strict=True):
        key, value = found.pairs[i]
        text = read(lm, h, span)
        assert f'"{key}": "{value}"' in text and text.strip(" ,{}\n") == f'"{key}": "{value}"'
    assert [read(lm, h, s).strip('" ,}') for s in h.answers] == list(found.answer) == h.problem.answer.split(", ")
    assert threading.question(found) in read(lm, h, h.query)
    assert all(any(n.start <= a.start and a.stop <= n.stop for n in h.needed) for a in h.answers)


def test_the_spans_alone_are_enough_to_answer(lm):
    """A reader of nothing but the tokens of the needed spans finds the answer; without any one of them it does not."""
    for ask in threading.MIX:
        h = threading.place(lm, ask, 1200)
        read_off = [re.findall(r'"([^"]+)": "([^"]+)"', read(lm, h, s))[0] for s in h.needed]
        starts = () if ask.kind == "conditional" else h.problem.meta["asked"]
        assert ", ".join(solve(read_off, ask.kind, starts)) == h.problem.answer
        for i in range(len(read_off)):
            assert ", ".join(solve(read_off[:i] + read_off[i + 1 :], ask.kind, starts)) != h.problem.answer


def test_contrast_and_control_hold_no_needed_pair(lm):
    for ask in threading.MIX:
        h = threading.place(lm, ask, 1200)
        pairs = [read(lm, h, s).strip(" ,{}\n") for s in h.needed]
        body = user_text(h.without).partition("\n")[0]
        assert body.count('": "') == h.problem.meta["pairs"] - len(pairs)
        assert not any(pair in body or pair in lm.text(h.control) for pair in pairs)
        changed = {i for i, (a, b) in enumerate(zip(h.prompt_ids, h.control, strict=True)) if a != b}
        assert changed <= {i for s in h.needed for i in range(s.start, s.stop)}


def test_a_length_is_met_to_within_a_pair_or_two_and_never_exceeded(lm):
    for length in (500, 1000, 2048):
        for ask in threading.MIX:
            h = threading.place(lm, ask, length)
            each = len(h.prompt_ids) / h.problem.meta["pairs"]
            assert length - 3 * each <= len(h.prompt_ids) == h.problem.meta["tokens"] <= length


def test_a_grid_names_its_cells(lm):
    deep = threading.grid(lm, (400, 600), [Ask("single", depth=d) for d in (0.0, 0.5, 1.0)], n=2)
    assert haystack.grid_cells(deep).groupby(["length", "depth"]).size().tolist() == [2] * 6
    long = threading.grid(lm, (600,), [Ask("thread", steps=s) for s in (1, 4)], split="dev")
    assert haystack.grid_cells(long, "steps", "direction")["steps"].tolist() == [1, 4]
    assert len({h.problem.id for h in [*deep, *long]}) == 14


# --- grading -------------------------------------------------------------------------------------------------


def problem_of(kind: str, **more):
    return threading.problem(kv_haystack(Ask(kind, **more), 20))


def test_a_single_answer_is_the_last_identifier():
    p = problem_of("thread", steps=3)
    start, gold = p.meta["asked"][0], p.answer
    for text in (gold, f"It is {gold.upper()}.", f'"{gold}"', f"{start} -> ab12 -> {gold}", f"{gold} is where {start} leads"):
        assert grading.grade(p, text), text
    for text in ("", "no idea", start, gold[:-1], f"{gold} or ab12", f"{gold}x"):
        assert not grading.grade(p, text), text


def test_several_answers_are_wanted_in_their_order():
    p = problem_of("multi", threads=3)
    a, b, c = p.answer.split(", ")
    x, y, z = p.meta["asked"]
    assert grading.grade(p, f"[{a}, {b}, {c}]") and grading.grade(p, f"{x}: {a}\n{y}: {b}\n{z}: {c}")
    assert not any(grading.grade(p, text) for text in (f"{b}, {a}, {c}", f"{a}, {b}", f"{a}, {b}, {c}, {a}", ""))


def test_values_under_a_condition_are_wanted_all_and_no_others():
    p = problem_of("conditional", threads=3)
    a, b, c = p.answer.split(", ")
    assert grading.grade(p, f"{c}, {a}, {b}") and grading.grade(
        p, "; ".join(f"{k}={v}" for k, v in zip(p.meta["asked"], (a, b, c), strict=True))
    )
    assert not any(grading.grade(p, text) for text in (f"{a}, {b}", f"{a}, {b}, {c}, zz99", ""))


def test_bold_and_code_marks_around_an_identifier_are_no_part_of_it():
    for p in (problem_of("thread", steps=3), problem_of("multi", threads=3), problem_of("conditional", threads=3)):
        values, asked = p.answer.split(", "), p.meta["asked"]
        for around in ("**{}**", "*{}*", "`{}`", "**`{}`**"):
            assert grading.grade(p, ", ".join(around.format(value) for value in values)), around
            pairs = [f"{around.format(key)}: {around.format(value)}" for key, value in zip(asked, values, strict=False)]
            assert grading.grade(p, "\n".join([*pairs, *values[len(pairs) :]])), around
        assert grading.grade(p, f"**{p.answer}**") and grading.grade(p, f"**The answer:** {p.answer}")
    assert grading.identifiers("**a1*b2**, 12ab-*3c4d") == ["a1*b2", "12ab-*3c4d"]  # between letters or digits, it is the marker


# --- effective context length --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "size", "reached"),
    [
        ({1000: 1.0, 2000: 0.5}, 1500.0, "crossed"),
        ({2000: 0.5, 1000: 1.0}, 1500.0, "crossed"),
        ({1000: 0.75, 2000: 0.5}, 1000.0, "crossed"),
        ({1000: 1.0, 2000: 0.5, 4000: 1.0}, 1500.0, "crossed"),
        ({1000: 0.7, 2000: 1.0}, 0.0, "never"),
        ({1000: 1.0, 2000: 0.75}, 2000.0, "always"),
    ],
)
def test_the_effective_context_length_is_where_accuracy_first_falls_through(accuracy, size, reached):
    assert threading.effective_context_length(accuracy) == threading.ContextLength(size, reached)


def test_the_interval_of_the_context_length_is_that_of_the_threshold_crossings_of_resampled_answers():
    right = {1000: [True] * 36 + [False] * 4, 2000: [True] * 20 + [False] * 20}
    e = threading.context_length_interval(right)
    assert e.mean == threading.effective_context_length({1000: 0.9, 2000: 0.5}).size
    rng = np.random.default_rng(7)  # a plain bootstrap with binomial draws
    drawn = [
        threading.effective_context_length({size: rng.binomial(len(v), sum(v) / len(v)) / len(v) for size, v in right.items()}).size
        for _ in range(4000)
    ]
    assert (e.low, e.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=60)


def test_a_context_length_that_no_resample_crosses_has_an_interval_of_its_own_value():
    assert threading.context_length_interval({500: [True] * 9, 900: [True] * 9}) == stats.Estimate(900.0, 900.0, 900.0)
    assert threading.context_length_interval({500: [False] * 9}) == stats.Estimate(0.0, 0.0, 0.0)
    for nothing in ({}, {500: []}):
        with pytest.raises(ThreadError, match="at least one for every size"):
            threading.context_length_interval(nothing)


# --- bad input -----------------------------------------------------------------------------------------------


def test_a_context_too_short_says_what_would_do(lm):
    ask = Ask("thread", steps=4)
    with pytest.raises(haystack.ContextTooShortError, match=r"length=100: ask for at least \d+") as error:
        threading.place(lm, ask, 100)
    enough = int(re.findall(r"ask for at least (\d+)", str(error.value))[0])
    h = threading.place(lm, ask, enough)
    assert len(h.prompt_ids) == enough and h.problem.meta["pairs"] == 4


def test_a_length_beyond_the_context_is_refused(lm):
    with pytest.raises(haystack.ContextTooLongError, match="length=2049 tokens is beyond the 2048"):
        threading.place(lm, Ask(), 2049)


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    lm = bpe_lm()
    monkeypatch.setattr(type(lm.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(haystack.NoOffsetsError, match="no character offsets"):
        threading.place(lm, Ask(), 400)


def test_an_empty_grid_and_no_questions_are_refused(lm):
    for lengths, questions, n in (((), [Ask()], 1), ((400,), [], 1), ((400,), [Ask()], 0)):
        with pytest.raises(ThreadError, match="one of each"):
            threading.grid(lm, lengths, questions, n=n)
    with pytest.raises(ThreadError, match="No questions"):
        threading.load(asks=())
    with pytest.raises(ThreadError, match="No accuracies"):
        threading.effective_context_length({})


def test_an_unknown_split_is_refused(lm):
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        kv_haystack(Ask(), 20, split="valid")
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        threading.place(lm, Ask(), 400, split="valid")
