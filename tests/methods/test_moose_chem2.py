"""MOOSE-Chem2: values, optimum and cost against brute force; hierarchy helps where general choices matter more, and not in reverse."""

from __future__ import annotations

import random
from functools import partial
from itertools import product

import numpy as np
import pytest

from toolkit.methods.moose_chem2 import (
    Counted,
    flat_search,
    generated,
    hierarchical_search,
    likelihood_judge,
    noisy_judge,
    random_search,
)

SEARCHES = (hierarchical_search, flat_search, random_search)


def brute(space, h):
    """Value of a complete hypothesis, or the mean over completions, by enumeration."""
    rest = product(range(space.options), repeat=space.levels - len(h))
    whole = [(*h, *r) for r in rest]
    each = [
        sum(space.main[i, c] for i, c in enumerate(w)) + sum(space.coupled[i][w[i], w[i + 1]] for i in range(space.levels - 1))
        for w in whole
    ]
    return np.mean(each), whole[int(np.argmax(each))]


@pytest.mark.parametrize("seed", range(3))
def test_values_and_the_optimum_are_those_of_enumeration(seed):
    space = generated(seed, levels=4, options=3)
    for h in [(), (1,), (2, 0), (0, 1, 2), (1, 1, 1, 0)]:
        assert space.value(h) == pytest.approx(brute(space, h)[0])
    assert space.best() == brute(space, ())[1]
    assert space.gain(space.best()) == pytest.approx(1)


def _alternating(asked: list, a, b) -> bool:
    """A judge that prefers the other one every second time, and keeps what it was asked."""
    asked.append((a, b))
    return len(asked) % 2 == 0


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("ensemble", [1, 3])
def test_all_searches_spend_the_same_calls_and_never_more(search, ensemble):
    for calls in (5, 31, 60):
        asked: list[tuple] = []
        judge = Counted(partial(_alternating, asked), calls, ensemble)
        h = search(judge, 5, 6, random.Random(0))
        made = len(asked)
        assert made == judge.spent <= calls and len(h) == 5
        # Shares of levels are whole numbers of ensembles: at most one comparison per level is left over.
        assert calls - made < ensemble * (5 if search is hierarchical_search else 1)


def gains(search, calls, noise, decay, ensemble=1, n=60):
    found = []
    for seed in range(n):
        space, rng = generated(seed, decay=decay), random.Random(seed)
        judge = Counted(noisy_judge(space, noise, random.Random(seed + 10_000)), calls, ensemble)
        found.append(space.gain(search(judge, space.levels, space.options, rng)))
    return np.array(found)


def lead(a, b):
    """Mean difference and its standard error, over the same spaces."""
    d = a - b
    return d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))


def test_patient_climbing_beats_random_hypotheses_at_equal_cost():
    assert lead(gains(partial(flat_search, refusals=12), 120, 0.0, 0.7), gains(random_search, 120, 0.0, 0.7)) > 2


def test_with_noise_hierarchy_beats_flat_search_where_general_choices_matter_more():
    assert lead(gains(hierarchical_search, 60, 1.0, 0.7), gains(flat_search, 60, 1.0, 0.7)) > 2


def test_a_majority_is_right_more_often_than_one_judge():
    space = generated(0)
    a, b = sorted([(0, 0, 0, 0, 0), space.best()], key=space.value, reverse=True)
    one, many = (
        np.mean([Counted(noisy_judge(space, 3.0, random.Random(s)), 99, e).prefers(a, b) for s in range(300)]) for e in (1, 9)
    )
    assert many > one + 0.05 > 0.6


def test_the_preference_of_a_model_is_its_mean_log_probability(tiny):
    from toolkit import collect
    from toolkit.types import Rollout

    value = likelihood_judge(tiny, "3+4", lambda h: "=" + "".join(map(str, h)))
    ids = tiny.tokenizer("3+4=7", add_special_tokens=False)["input_ids"]
    start = len(tiny.tokenizer("3+4", add_special_tokens=False)["input_ids"])
    logp = collect.logits(tiny, Rollout("", 0, tuple(ids), start, None, None, "stop", "", False)).log_softmax(-1)
    expected = np.mean([float(logp[i, token]) for i, token in enumerate(ids[start:])])
    assert value((7,)) == pytest.approx(expected, abs=1e-5) and value((7,)) == value((7,))


@pytest.mark.parametrize(
    "make",
    [lambda: generated(0, levels=1), lambda: generated(0, decay=0.0), lambda: Counted(bool, 3, 2), lambda: Counted(bool, 2, 3)],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="give"):
        make()
