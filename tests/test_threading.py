"""Threads: what is needed suffices and is necessary, whatever is asked; spans decode to their pairs; bad input says what to do."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest
from bpe import bpe_lm, random_lm
from families import tokenizer as tiny_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit import store, tasks
from toolkit.lm import LM
from toolkit.tasks import grading, haystack, threading, words
from toolkit.tasks.haystack import Haystack, user_text
from toolkit.tasks.pairs import MARKER, solve
from toolkit.tasks.threading import Ask, Pairs, ThreadError, kv_haystack
from toolkit.types import Span

KINDS = ("single", "multi", "conditional", "thread", "multithread", "branched")
LARGE = tuple(
    Ask(ask.kind, ask.steps, ask.threads, ask.direction, ask.depth, ask.clustered, ask.branches, "uuid") for ask in threading.MIX
)


@pytest.fixture(params=["characters", "bpe"])
def lm(request) -> LM:
    return bpe_lm() if request.param == "bpe" else random_lm(tiny_tokenizer(), context=2048, name="tiny characters")


def read(lm: LM, found: Haystack, span: Span) -> str:
    return lm.text(found.prompt_ids[span.start : span.stop])


@st.composite
def asks(draw) -> Ask:
    kind = draw(st.sampled_from(KINDS))
    steps = draw(st.integers(2 if kind == "branched" else 1, 25)) if kind in ("thread", "multithread", "branched") else 1
    return Ask(
        kind,
        steps=steps,
        threads=draw(st.integers(1, 6)) if kind in ("multi", "conditional", "multithread") else 1,
        direction=draw(st.sampled_from(["forward", "backward", "random"])),
        depth=draw(st.none() | st.floats(0, 1)) if kind == "single" else None,
        clustered=kind in ("multi", "conditional") and draw(st.booleans()),
        branches=draw(st.integers(2, 3)) if kind == "branched" else 1,
        ids=draw(st.sampled_from(["short", "uuid"])),
    )


def haystack_of(ask: Ask, seed: int, more: int = 20) -> Pairs:
    """The smallest haystack of a question, and some pairs more."""
    try:
        kv_haystack(ask, 1, seed=seed)
        least = 1
    except ThreadError as error:
        least = int(re.findall(r"give (\d+) at least", str(error))[0])
    return kv_haystack(ask, least + more, seed=seed)


# --- what is needed ------------------------------------------------------------------------------------------


@given(asks(), st.integers(0, 10_000))
def test_the_verifier_finds_the_answer_in_the_whole_haystack(ask, seed):
    found = haystack_of(ask, seed)
    assert solve(found.pairs, ask.kind, found.starts) == found.answer


@given(asks(), st.integers(0, 10_000))
def test_the_needed_pairs_suffice(ask, seed):
    found = haystack_of(ask, seed)
    assert solve([found.pairs[i] for i in found.needed], ask.kind, found.starts) == found.answer


@given(asks(), st.integers(0, 10_000))
def test_each_needed_pair_is_necessary(ask, seed):
    """Without it neither the rest of the haystack nor the rest of what is needed gives the answer."""
    found = haystack_of(ask, seed)
    for gone in found.needed:
        rest = [pair for i, pair in enumerate(found.pairs) if i != gone]
        assert solve(rest, ask.kind, found.starts) != found.answer
        assert solve([found.pairs[i] for i in found.needed if i != gone], ask.kind, found.starts) != found.answer


@given(asks(), st.integers(0, 10_000))
def test_threads_run_in_their_direction_and_are_read_in_order(ask, seed):
    found = haystack_of(ask, seed)
    threads = [found.needed[i : i + ask.steps] for i in range(0, len(found.needed), ask.steps)]
    assert len(threads) == ask.threads and len(set(found.needed)) == ask.steps * ask.threads
    for thread, answer in zip(threads, found.answer, strict=True):
        links = [found.pairs[i] for i in thread]
        assert all(a[1] == b[0] for a, b in pairwise(links)) and links[-1][1] == answer
        if ask.direction != "random":
            assert list(thread) == sorted(thread, reverse=ask.direction == "backward")


@given(asks(), st.integers(0, 10_000))
def test_no_identifier_collides(ask, seed):
    """A value is a key only where the thread goes on, a key occurs again only where it branches."""
    found = haystack_of(ask, seed)
    keys, values = [k for k, _ in found.pairs], [v for _, v in found.pairs]
    assert len(set(values)) == len(values)
    assert len(set(keys)) == len(keys) or ask.kind == "branched"
    if ask.kind not in ("thread", "multithread", "branched"):
        assert not set(keys) & set(values)
    assert all(any(c.isdigit() for c in text) for text in keys + values)
    assert sum(MARKER in key for key in keys) == (ask.threads if ask.kind == "conditional" else 0)


def test_an_oracle_that_follows_the_dictionary_solves_all():
    """The golden value of the spec: 50 haystacks of 200 pairs, 5 threads of 10 steps, directions in turn."""
    for seed in range(50):
        ask = Ask("multithread", steps=10, threads=5, direction=("forward", "backward", "random")[seed % 3])
        found = kv_haystack(ask, 200, seed=seed)
        bound = dict(found.pairs)
        for start, end in zip(found.starts, found.answer, strict=True):
            key, hops = start, 0
            while key in bound:
                key, hops = bound[key], hops + 1
            assert (key, hops) == (end, 10)


def test_a_false_branch_ends_before_the_thread_does():
    def longest(after: dict[str, list[str]], key: str) -> list[int]:
        return [1 + n for value in after.get(key, []) for n in longest(after, value)] or [0]

    for seed in range(20):
        found = kv_haystack(Ask("branched", steps=5, branches=3), 60, seed=seed)
        after: dict[str, list[str]] = {}
        for key, value in found.pairs:
            after.setdefault(key, []).append(value)
        lengths = sorted(longest(after, found.starts[0]))
        assert lengths[-1] == 5 and lengths[-2] < 5
        assert sorted(map(len, after.values()), reverse=True)[:5] == [3, 3, 3, 3, 1]


def test_clustered_needles_stand_side_by_side_and_others_do_not():
    for kind in ("multi", "conditional"):
        near, far = (kv_haystack(Ask(kind, threads=8, clustered=c), 200) for c in (True, False))
        assert max(near.needed) - min(near.needed) == 7 and max(far.needed) - min(far.needed) > 30


def test_a_single_needle_lies_at_its_depth_and_is_the_same_at_every_depth_and_size():
    found = [kv_haystack(Ask("single", depth=d), n) for d, n in ((0.0, 101), (0.25, 101), (1.0, 101), (1.0, 11))]
    assert [f.needed for f in found] == [(0,), (25,), (100,), (10,)]
    assert len({f.pairs[f.needed[0]] for f in found}) == 1


# --- seeds and splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", threading.MIX, ids=lambda a: a.kind)
def test_the_same_seed_gives_the_same_haystack_and_another_another(ask):
    assert kv_haystack(ask, 30) == kv_haystack(ask, 30)
    others = [kv_haystack(ask, 30, seed=1), kv_haystack(ask, 30, sample=1), kv_haystack(ask, 30, split="dev")]
    assert len({f.answer for f in [kv_haystack(ask, 30), *others]}) == 4


def test_splits_are_disjoint_by_what_is_needed():
    found = {}
    for split in words.SPLITS:
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
    assert haystack.cells(deep).groupby(["length", "depth"]).size().tolist() == [2] * 6
    long = threading.grid(lm, (600,), [Ask("thread", steps=s) for s in (1, 4)], split="dev")
    assert haystack.cells(long, "steps", "direction")["steps"].tolist() == [1, 4]
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


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "thread", "steps": 0}, "steps=0: 1 to 25"),
        ({"kind": "thread", "steps": 26}, "steps=26: 1 to 25"),
        ({"kind": "multi", "threads": 26}, "threads=26: 1 to 25"),
        ({"kind": "single", "steps": 2}, "steps=2: more than one only with thread"),
        ({"kind": "thread", "steps": 2, "threads": 2}, "threads=2: more than one only with multi"),
        ({"kind": "thread", "depth": 0.5}, "depth=0.5"),
        ({"kind": "single", "depth": 1.5}, "depth=1.5"),
        ({"kind": "thread", "clustered": True}, "clustered"),
        ({"kind": "branched", "steps": 3}, "branches=1"),
        ({"kind": "branched", "branches": 2}, "steps=1"),
        ({"kind": "thread", "branches": 2}, "branches=2"),
    ],
)
def test_a_question_without_sense_is_refused(settings, match):
    with pytest.raises(ThreadError, match=re.escape(match)):
        Ask(**settings)


@given(asks(), st.integers(0, 100))
def test_a_haystack_too_small_says_how_large_it_has_to_be(ask, seed):
    assume(ask.steps * ask.threads > 1)
    with pytest.raises(ThreadError, match=r"n_pairs=1 cannot hold the \d+ pairs"):
        kv_haystack(ask, 1, seed=seed)
    assert len(haystack_of(ask, seed, more=0).pairs) >= ask.steps * ask.threads


def test_a_context_too_short_says_what_would_do(lm):
    ask = Ask("thread", steps=4)
    with pytest.raises(haystack.ContextTooShortError, match=r"length=100: ask for \d+ at least") as error:
        threading.place(lm, ask, 100)
    enough = int(re.findall(r"ask for (\d+)", str(error.value))[0])
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


def test_a_thread_that_comes_back_has_no_end():
    with pytest.raises(ThreadError, match="comes back to 'a' after 2 steps"):
        solve([("a", "b"), ("b", "a")], "thread", ["a"])
