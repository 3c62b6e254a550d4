"""Keys and values: what is needed suffices and is necessary, whatever is asked; bad input says what to do."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit.tasks import threading
from toolkit.tasks.generators.pairs import MARKER, solve
from toolkit.tasks.threading import Ask, Pairs, ThreadError, kv_haystack

KINDS = ("single", "multi", "conditional", "thread", "multithread", "branched")


@st.composite
def asks(draw) -> Ask:
    kind = draw(st.sampled_from(KINDS))
    steps = draw(st.integers(2 if kind == "branched" else 1, 25)) if kind in ("thread", "multithread", "branched") else 1
    return Ask(
        kind,
        steps=steps,
        threads=draw(st.integers(1, 6)) if kind in ("multi", "conditional", "multithread") else 1,
        direction=draw(st.sampled_from(["forward", "backward", "random"])),
        depth=draw(st.none() | st.floats(0, 1, allow_subnormal=False)) if kind == "single" else None,
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
        least = int(re.findall(r"give at least (\d+)", str(error))[0])
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


@pytest.mark.parametrize("ask", threading.MIX, ids=lambda a: a.kind)
def test_the_same_seed_gives_the_same_haystack_and_another_another(ask):
    assert kv_haystack(ask, 30) == kv_haystack(ask, 30)
    others = [kv_haystack(ask, 30, seed=1), kv_haystack(ask, 30, sample=1), kv_haystack(ask, 30, split="dev")]
    assert len({f.answer for f in [kv_haystack(ask, 30), *others]}) == 4


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


def test_a_thread_that_comes_back_has_no_end():
    with pytest.raises(ThreadError, match="comes back to 'a' after 2 steps"):
        solve([("a", "b"), ("b", "a")], "thread", ["a"])
