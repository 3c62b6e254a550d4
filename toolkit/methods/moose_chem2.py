"""MOOSE-Chem2: fine-grained scientific hypothesis discovery by hierarchical search, arXiv:2505.19209.

A hypothesis is refined level by level, from general to specific. A language model compares a hypothesis with an edited one; its preferences
are the landscape that is climbed. At a general level the details are open, so the landscape is smoother and has fewer local optima.

Method (h_l: hypothesis up to level l; at each level):

    1. start from h_l-1 with a random choice at level l
    2. propose another choice at this level; take it if the judge prefers it; stop after 3 refusals in a row
    3. do this from several starts; the judge compares the results, and the preferred one is h_l

``flat_search`` climbs from complete random hypotheses, and edits any level. ``random_search`` compares complete random ones. All three spend
the same number of judge calls. A judge may be an ensemble: the majority of several comparisons, each of which costs a call.

Deviations: the paper has five levels, three starts per level, and a recombination of their results by the language model; its edits are
texts. Here starts are repeated until the level's share of the calls is spent (ours), the preferred result takes the place of a
recombination, and a hypothesis is one choice per level. ``Space`` is a generated space whose optimum is known. The paper
measures the share of the parts of a chemist's hypothesis that are found again.

Units and signs: a value is in units of the first level's spread, higher is better; cost is in judge calls.

Cost: one comparison per call; with a language model, two forward passes (``likelihood_judge`` keeps each value).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit import collect
from toolkit.lm import LM
from toolkit.types import Rollout

PUBLISHED_LEVELS, PUBLISHED_REFUSALS = 5, 3
assumed_decay, assumed_coupling = 0.7, 0.5  # of values from level to level, and of neighbouring levels: ours

Hypothesis = tuple[int, ...]
"""One choice per level, the most general first; a shorter one leaves the later levels open."""
Judge = Callable[[Hypothesis, Hypothesis], bool]
"""Function from two hypotheses of equal length to True if the first is preferred."""


@dataclass(frozen=True)
class Space:
    """A generated space of hypotheses with known values.

    The value of a hypothesis is the sum of a number per choice and a number per pair of choices at neighbouring levels. The value of an
    incomplete one is the mean over all ways to complete it.

    Attributes:
        main: Value of each choice, ``[levels, options]``.
        coupled: Value of each pair of choices at neighbouring levels, ``[levels - 1, options, options]``.
    """

    main: Float[ndarray, "levels options"]
    coupled: Float[ndarray, "pairs options options"]

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.main)

    @property
    def options(self) -> int:
        """Number of choices per level."""
        return self.main.shape[1]

    def value(self, h: Hypothesis) -> float:
        """Return the value of a hypothesis, or the mean over its completions if it leaves levels open."""
        k = len(h)
        total = sum(self.main[i, c] for i, c in enumerate(h)) + sum(self.coupled[i][a, b] for i, (a, b) in enumerate(pairwise(h)))
        rest = self.main[k:].mean(axis=1).sum() + self.coupled[k:].mean(axis=(1, 2)).sum()
        border = self.coupled[k - 1][h[-1]].mean() if 0 < k < self.levels else 0.0
        return float(total + rest + border)

    def best(self) -> Hypothesis:
        """Return the complete hypothesis with the highest value."""
        # best_from[c]: highest value of the levels from i on, with choice c at level i.
        best_from, choices = self.main[-1], []
        for i in range(self.levels - 2, -1, -1):
            later = self.coupled[i] + best_from
            choices.append(later.argmax(axis=1))
            best_from = self.main[i] + later.max(axis=1)
        h = [int(best_from.argmax())]
        for pointers in reversed(choices):
            h.append(int(pointers[h[-1]]))
        return tuple(h)

    def gain(self, h: Hypothesis) -> float:
        """Return the value of a complete hypothesis on a scale where the mean over all is 0 and the best is 1; negative below the mean."""
        mean = self.value(())
        return (self.value(h) - mean) / (self.value(self.best()) - mean)


def generated(
    seed: int,
    *,
    levels: int = PUBLISHED_LEVELS,
    options: int = 6,
    decay: float = assumed_decay,
    coupling: float = assumed_coupling,
) -> Space:
    """Return a random space: values of the choices at level l = 0, 1, .. are normal with standard deviation ``decay ** l``.

    Args:
        seed: Seed of all values.
        levels: Number of levels, at least 2.
        options: Choices per level, at least 2.
        decay: Factor by which a level matters less than the one before; 1 for a space without hierarchy, above 1 for a reversed one.
        coupling: Size of the values of pairs, relative to the later level's.

    Raises:
        ValueError: fewer than two levels or options, or a decay that is not positive.
    """
    if levels < 2 or options < 2 or decay <= 0:
        raise ValueError(
            f"levels={levels}, options={options}, decay={decay}: give two or more levels and options, and a decay above 0."
        )
    rng, scale = np.random.default_rng(seed), decay ** np.arange(levels)
    main = rng.normal(size=(levels, options)) * scale[:, None]
    return Space(main, rng.normal(size=(levels - 1, options, options)) * (coupling * scale[1:, None, None]))


def noisy_judge(space: Space, noise: float, rng: random.Random) -> Judge:
    """Return a judge that compares values, each with normal noise of standard deviation ``noise``, drawn anew in every call."""
    return lambda a, b: space.value(a) + rng.gauss(0, noise) > space.value(b) + rng.gauss(0, noise)


def likelihood_judge(lm: LM, prompt: str, text_of: Callable[[Hypothesis], str]) -> Callable[[Hypothesis], float]:
    """Return a function from a hypothesis to its mean log-probability in nats per token, given the prompt; values are kept.

    ``lambda a, b: value(a) > value(b)`` is a judge without noise: the model's own preference.

    Args:
        lm: The model.
        prompt: Text before the hypothesis.
        text_of: Function from a hypothesis, which may leave levels open, to its text.
    """
    before, known = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"], dict[Hypothesis, float]()

    def value(h: Hypothesis) -> float:
        if h not in known:
            ids = lm.tokenizer(text_of(h), add_special_tokens=False)["input_ids"]
            rollout = Rollout("", 0, (*before, *ids), len(before), None, None, "stop", "", False)
            logp = collect.logits(lm, rollout).log_softmax(-1)
            known[h] = float(logp[range(len(ids)), ids].mean())
        return known[h]

    return value


@dataclass
class Counted:
    """A judge with a budget: the majority of an ensemble, and the number of calls that it has cost.

    Attributes:
        judge: The judge of one comparison.
        calls: Budget, in judge calls.
        ensemble: Odd number of comparisons whose majority decides.
        spent: Calls so far.
    """

    judge: Judge
    calls: int
    ensemble: int = 1
    spent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.ensemble < 1 or self.ensemble % 2 == 0 or self.calls < self.ensemble:
            raise ValueError(
                f"ensemble={self.ensemble}, calls={self.calls}: give an odd ensemble, and calls for one comparison or more."
            )

    def can(self, limit: int | None = None) -> bool:
        """Return True if one more comparison stays within the budget, or within ``limit`` calls."""
        return self.spent + self.ensemble <= min(self.calls, self.calls if limit is None else limit)

    def prefers(self, a: Hypothesis, b: Hypothesis) -> bool:
        """Return True if the majority prefers ``a`` to ``b``; all comparisons of the ensemble are made and counted."""
        self.spent += self.ensemble
        return sum(self.judge(a, b) for _ in range(self.ensemble)) * 2 > self.ensemble


def _climb(
    judge: Counted, start: Hypothesis, places: Sequence[int], options: int, rng: random.Random, limit: int, refusals: int
) -> Hypothesis:
    """Return the hypothesis where climbing ends: after refusals in a row, or when the calls are spent."""
    h, refused = start, 0
    while refused < refusals and judge.can(limit):
        place = rng.choice(places)
        other = rng.choice([c for c in range(options) if c != h[place]])
        edited = (*h[:place], other, *h[place + 1 :])
        h, refused = (edited, 0) if judge.prefers(edited, h) else (h, refused + 1)
    return h


def _best_of_climbs(
    judge: Counted,
    draw: Callable[[], Hypothesis],
    places: Sequence[int],
    options: int,
    rng: random.Random,
    limit: int,
    refusals: int,
) -> Hypothesis:
    champion = _climb(judge, draw(), places, options, rng, limit, refusals)
    while judge.can(limit):
        result = _climb(judge, draw(), places, options, rng, limit, refusals)
        if result != champion and judge.can(limit) and judge.prefers(result, champion):
            champion = result
    return champion


def hierarchical_search(
    judge: Counted, levels: int, options: int, rng: random.Random, *, refusals: int = PUBLISHED_REFUSALS
) -> Hypothesis:
    """Return the hypothesis that is found level by level; each level has an equal share of the calls.

    Args:
        judge: Judge with its budget.
        levels: Number of levels.
        options: Choices per level.
        rng: Source of starts and proposals.
        refusals: Refusals in a row that end a climb.
    """
    h: Hypothesis = ()
    for level in range(levels):
        limit, draw = judge.calls * (level + 1) // levels, partial(_extended, h, options, rng)
        h = _best_of_climbs(judge, draw, [level], options, rng, limit, refusals)
    return h


def flat_search(judge: Counted, levels: int, options: int, rng: random.Random, *, refusals: int = PUBLISHED_REFUSALS) -> Hypothesis:
    """Return the preferred result of climbs from complete random hypotheses, which edit any level; arguments as in ``hierarchical_search``."""
    return _best_of_climbs(judge, lambda: _random(levels, options, rng), range(levels), options, rng, judge.calls, refusals)


def random_search(judge: Counted, levels: int, options: int, rng: random.Random) -> Hypothesis:
    """Return the preferred one of complete random hypotheses, each compared with the preferred one so far.

    The arguments are those of ``hierarchical_search``.
    """
    champion = _random(levels, options, rng)
    while judge.can():
        other = _random(levels, options, rng)
        if judge.prefers(other, champion):
            champion = other
    return champion


def _random(levels: int, options: int, rng: random.Random) -> Hypothesis:
    return tuple(rng.randrange(options) for _ in range(levels))


def _extended(h: Hypothesis, options: int, rng: random.Random) -> Hypothesis:
    return (*h, rng.randrange(options))
