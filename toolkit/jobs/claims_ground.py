"""Settings and shared samples of the command ``toolkit claims``, and functions that turn differences and correlations into claims.

The rollouts of the train split give the length direction and the heads. Everything is judged on the test split. Steering strengths are
tried on the dev split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import evaluate, generate, stats
from toolkit.claims import Claim
from toolkit.jobs.finding import EditSettings, Finding, find_heads
from toolkit.jobs.retrieval import Search
from toolkit.jobs.study import Say, Study, extraction_rollouts
from toolkit.lm import LM, Condition
from toolkit.metrics import METRICS, RANGES, Outcomes
from toolkit.stats import Effect, Estimate, Statistic
from toolkit.types import Problem, Report, Rollout

CONTROL = "control"  # source of a claim that compares an effect with a random control
BASE = "base"
# Smallest effects that matter, all ours: share of base's length; points of accuracy and of needles, as shares; correlations; nats per token.
assumed_length, assumed_points, assumed_needles, assumed_correlation, assumed_nats = 0.05, 0.03, 0.1, 0.1, 0.1
assumed_shuffles = 20  # random shuffles, or random directions, that a correlation is compared with: ours
assumed_masked = 0.04  # share of the heads that are masked, as many as ThinkEdit edits: ours


class NotMeasuredError(ValueError):
    """A claim cannot be measured on this model and task. The message says why; the report repeats it."""


@dataclass(frozen=True)
class ClaimsStudy:
    """Settings of the command ``toolkit claims``.

    Attributes:
        study: Task, numbers of problems per split and of samples per problem, token budget, and seed.
        names: Names of the groups of claims, keys of ``published_claims.CLAIMS``.
        edit: Settings of ThinkEdit's edit: share of heads, length classes, and number of random controls (``draws``).
        search: Prompts that hide a fact, on which retrieval heads are found and masked.
        train_problems: Number of train problems, from whose responses directions and heads are computed. ``None``: as many as test problems.
    """

    study: Study
    names: tuple[str, ...]
    edit: EditSettings
    search: Search
    train_problems: int | None = None

    def __post_init__(self) -> None:
        if self.study.samples < 2:
            raise ValueError(
                f"samples={self.study.samples}: claims compare responses to the same problem. Give at least 2 samples per problem."
            )
        if not self.study.temperature > 0:
            raise ValueError(f"temperature={self.study.temperature}: give one above 0, or all responses to a problem are equal.")


@dataclass(frozen=True)
class Ground:
    """A model with the samples that several groups of claims share. The samples are kept in a directory.

    Attributes:
        lm: The model.
        plan: Settings.
        out: Directory in which rollouts are kept.
        say: Function that is called with one line of progress at a time.
    """

    lm: LM
    plan: ClaimsStudy
    out: Path
    say: Say = lambda text: None

    @cached_property
    def problems(self) -> dict[str, list[Problem]]:
        """Problems of each split."""
        return {"train": self._training.load("train", self.lm)} | {s: self.plan.study.load(s, self.lm) for s in ("dev", "test")}

    @cached_property
    def train(self) -> list[Rollout]:
        """Rollouts of the train split, from which the direction and the heads are computed."""
        return extraction_rollouts(self.lm, self._training, out=self.out / "rollouts" / "train", say=self.say)

    @property
    def tests(self) -> list[Problem]:
        """Problems of the test split."""
        return self.problems["test"]

    @cached_property
    def finding(self) -> Finding:
        """Length direction, head scores and edit of the published form of ThinkEdit, computed from ``train``."""
        return find_heads(self.lm, self.train, self.plan.edit, origin=self.plan.study.origin("train"))

    @cached_property
    def base(self) -> list[Rollout]:
        """Rollouts of the unchanged model on the test problems, with the entropy of every token."""
        self.say(f"sampling {len(self.tests)} x {self.plan.study.samples} responses of the unchanged model")
        where = evaluate.rollout_folder(self._tested, BASE)
        return generate.rollouts(Condition(self.lm), self.tests, self._sampling, out=where)

    def compare(self, conditions: Mapping[str, Condition]) -> Report:
        """Sample responses of conditions to the test problems, and return them with those of base as a report."""
        return evaluate.compare({BASE: Condition(self.lm), **conditions}, self.tests, self._sampling, out=self._tested)

    @property
    def _training(self) -> Study:
        return replace(self.plan.study, problems=self.plan.train_problems or self.plan.study.problems)

    @property
    def _sampling(self) -> generate.Sampling:
        return replace(self.plan.study.sampling, details=True)

    @property
    def _tested(self) -> Path:
        return self.out / "rollouts" / "test"


@dataclass(frozen=True)
class Comparison:
    """Differences between conditions of a report, as claims.

    Attributes:
        report: Results of ``Ground.compare``.
        seed: Seed of the bootstrap.
    """

    report: Report
    seed: int = 0

    def outcomes(self, name: str) -> Outcomes:
        """Return the outcomes of a condition."""
        return evaluate.outcomes(self.report, name)

    def claim(
        self, text: str, source: str, metric: str, names: Sequence[str], minus: Sequence[str] = (BASE,), *, sign: int = 1, beyond: float = 0.0
    ) -> Claim:  # fmt: skip
        """Return the claim that a metric is larger in some conditions than in others.

        Args:
            text: The claim in words.
            source: Paper that makes it, or ``control`` if the conditions in ``minus`` are the draws of a random control. With fewer than three
                draws, the claim is not judged.
            metric: ``think_tokens``, or a metric that is a share, such as ``accuracy``.
            names: Names of the conditions. Several are the draws of one random condition.
            minus: Names of the conditions that are subtracted; several are draws. At least one of the two has a single name.
            sign: -1 for the claim that the metric is smaller.
            beyond: Value that the signed difference exceeds if the claim is right.
        """
        base = self.outcomes(BASE)
        how = METRICS[metric].how
        assert how is not None, metric
        first, second = ([how(self.outcomes(name), base) for name in group] for group in (names, minus))
        pairs = [stats.difference(a, b) if sign > 0 else stats.difference(b, a) for a, b in product(first, second) if a and b]
        if not pairs:
            raise NotMeasuredError(f"{metric} needs more samples per problem than {base.shape[1]}.")
        e = stats.effect(pairs, base.shape[0], seed=self.seed, seeded=len(pairs) > 1 or source == CONTROL)
        if metric == "think_tokens":
            unit, smallest = "tokens", assumed_length * float(base.think_tokens.mean())
        else:
            low, high = RANGES["share"]
            unit, smallest, e = "points", assumed_points, e.within((low - high, high - low))
        return Claim(text=text, source=source, estimate=e, smallest=0.0 if beyond else smallest, unit=unit, beyond=beyond)


def within_correlation(rows: pd.DataFrame, x: ndarray, y: ndarray) -> tuple[Statistic, int]:
    """Return Pearson's correlation of two columns within problems as a statistic of resampled problems, and the number of problems.

    Each problem's mean is subtracted from both columns first. Problems with a single row are left out. The statistic is 0 for a resample in
    which one of the columns does not vary.

    Args:
        rows: Table with the column ``problem_id``, one row per number of ``x`` and ``y``.
        x: First column.
        y: Second column.

    Raises:
        NotMeasuredError: fewer than two problems have two rows, or a column does not vary within any problem.
    """
    table = pd.DataFrame({"problem": rows["problem_id"].to_numpy(), "x": np.asarray(x, float), "y": np.asarray(y, float)})
    groups = table.groupby("problem")
    table = table[groups["x"].transform("size") > 1]
    if table["problem"].nunique() < 2:
        raise NotMeasuredError("fewer than two problems have two responses to compare.")
    centred = table[["x", "y"]] - table.groupby("problem")[["x", "y"]].transform("mean")
    products = pd.DataFrame({"xy": centred["x"] * centred["y"], "xx": centred["x"] ** 2, "yy": centred["y"] ** 2})
    sums = products.groupby(table["problem"]).sum().to_numpy()
    if min(sums[:, 1].sum(), sums[:, 2].sum()) < 1e-12:
        raise NotMeasuredError("one of the two does not vary between the responses to a problem.")

    def statistic(index: ndarray) -> ndarray:
        xy, xx, yy = np.moveaxis(sums[index].sum(axis=1), -1, 0)
        size = np.sqrt(xx * yy)
        return np.where(size > 0, xy / np.where(size > 0, size, 1.0), 0.0)

    return statistic, len(sums)


def correlated(
    text: str, source: str, rows: pd.DataFrame, x: str, y: str, *, sign: int = 1, seed: int = 0
) -> list[Claim]:  # fmt: skip
    """Return two claims on a correlation within problems: that it has the claimed sign, and that it is larger than with shuffled numbers.

    The control shuffles ``x`` among the responses to each problem, ``assumed_shuffles`` times.

    Args:
        text: The claim in words, without "within a problem".
        source: Paper that makes the claim.
        rows: One row per response, with the columns ``problem_id``, ``x`` and ``y``. Rows with NaN are left out.
        x: Name of the first column.
        y: Name of the second column.
        sign: Claimed sign, 1 or -1.
        seed: Seed of the bootstrap and of the shuffles.
    """
    rows = rows.dropna(subset=[x, y]).reset_index(drop=True)
    real, n = within_correlation(rows, sign * rows[x].to_numpy(float), rows[y].to_numpy(float))
    rng = np.random.default_rng(seed)
    shuffles = []
    for _ in range(assumed_shuffles):
        values = rows.groupby("problem_id")[x].transform(lambda v: rng.permutation(v.to_numpy())).to_numpy(float)
        shuffles.append(within_correlation(rows, sign * values, rows[y].to_numpy(float))[0])
    alone = stats.effect([real], n, seed=seed)
    beyond = stats.effect([stats.difference(real, shuffled) for shuffled in shuffles], n, seed=seed, seeded=True)
    return [
        correlation_claim(f"{text} (within a problem)", source, alone),
        correlation_claim(f"{text}, more than with shuffled responses", CONTROL, beyond.within((-2.0, 2.0))),
    ]


def correlation_claim(text: str, source: str, effect: Effect) -> Claim:
    """Return the claim that a correlation is positive, or larger than another."""
    return Claim(text=text, source=source, estimate=effect, smallest=assumed_correlation, unit="correlation")


def not_measured(text: str, source: str, reason: Any) -> Claim:
    """Return a claim without a measurement, with the reason."""
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    return Claim(text=text, source=source, estimate=nothing, smallest=0.0, unit="", missing=" ".join(str(reason).split()))
