"""Mask retrieval heads and random heads of the same layers; compare the loss when thinking with the loss when answering directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import collect, edits, masks, stats
from toolkit.baselines import Budget
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.retrieval import RANKINGS, RetrievalMeasurement, Search
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads
from toolkit.types import Moments, Plan, Problem, Rollout


@dataclass(frozen=True)
class Mask:
    """A mask on the top ``count`` heads of a ranking: ``op`` and ``during`` as in ``masks.masking``."""

    ranking: str
    count: int
    op: str = "uniform"
    during: str = "newest"

    def __str__(self) -> str:
        return f"{self.ranking}: {self.count} heads, {self.op}, {DURING[self.during]}"


DURING = {"newest": "decode only", "all": "prefill too"}


def planned_masks(search: Search) -> list[Mask]:
    """Return the published form of masking (uniform, decode only) at every count, and every other form at the largest count."""
    curve = [Mask(ranking, count) for ranking, count in product(RANKINGS, search.counts)]
    forms = [Mask(r, max(search.counts), op, during) for r, op, during in product(RANKINGS, search.ops, DURING)]
    return list(dict.fromkeys([*curve, *forms]))


def reference(lm: LM, rollouts: Sequence[Rollout]) -> Moments:
    """Return the mean output of every head over all positions of prompts and responses, for mean ablation."""
    everywhere = collect.Positions("prompt and response", lambda r: range(len(r.token_ids)))
    return collect.moments(lm, rollouts, lambda r: "all", kinds=("z",), positions=everywhere)


def controls(plan: Plan, lm: LM, draws: int, seed: int) -> list[Plan]:
    """Return up to ``draws`` different plans with random heads of the same layers; none if the plan has more than half of all heads."""
    if 2 * len(plan.heads) > len(lm.layout.all_heads):
        return []
    drawn = [edits.random_heads(plan, lm.layout, seed=seed + draw) for draw in range(draws)]
    return list({frozenset(p.heads): p for p in drawn}.values())


def masking_effects(
    lm: LM,
    measurement: RetrievalMeasurement,
    search: Search,
    problems: Sequence[Problem],
    chosen: Sequence[Mask],
    *,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure accuracy and length with heads masked, beside random heads of the same layers.

    Args:
        problems: Test problems, greedily answered.
        chosen: The masks.
        out: Directory to keep rollouts in.

    Returns:
        Columns ``ranking, heads, op, during``; ``accuracy, low, high`` of the masked model; ``random, random_low, random_high`` of all its
        controls together (NaN without any); ``lost`` (base minus masked) and ``more_than_random`` (random minus masked), paired by
        problem, with ``_low, _high``; ``draws``; ``tokens`` and ``random_tokens``, mean response lengths. Intervals are 95 %, over
        problems and, for the controls, over draws (see ``toolkit.stats.seeds``); with fewer than ``stats.FEW_SEEDS`` draws they are not
        reliable.
    """
    base = _outcomes(lm, Condition(lm), problems, search.sampling, out and out / "base")
    done: dict[tuple, ndarray] = {}
    rows = []

    def run(plan: Plan, mask: Mask) -> ndarray:
        act = masks.masking(plan, mask.op, during=mask.during, reference=means if mask.op == "mean" else None)
        key = (frozenset(plan.heads), mask.op, mask.during)
        if key not in done:  # two rankings may choose the same heads
            where = out and out / f"{mask.op}-{mask.during}-{'-'.join(f'{i}.{j}' for i, j in sorted(plan.heads))}"
            done[key] = _outcomes(lm, Condition(lm, (act,)), problems, search.sampling, where)
        return done[key]

    means = reference(lm, measurement.rollouts) if any(m.op == "mean" for m in chosen) else None
    scores = measurement.scores
    for mask in chosen:
        plan = retrieval_heads.mask_plan(scores[mask.ranking], mask.count)
        top = run(plan, mask)
        noise = [run(control, mask) for control in controls(plan, lm, search.draws, search.seed)]
        rows.append((mask.ranking, mask.count, mask.op, DURING[mask.during], *_judged(base, top, noise, search.seed)))
    return pd.DataFrame(rows, columns=["ranking", "heads", "op", "during", *JUDGED])


def _outcomes(lm: LM, condition: Condition, problems: Sequence[Problem], sampling: Sampling, out: Path | None) -> ndarray:
    """``[2, problems, samples]``: correct (1 or 0), and response tokens."""
    answers = rollouts(condition, problems, sampling, out=out)
    return np.array([[r.correct for r in answers], [r.response_tokens for r in answers]], float).reshape(2, len(problems), -1)


JUDGED = (
    "accuracy", "low", "high", "random", "random_low", "random_high", "lost", "lost_low", "lost_high",
    "more_than_random", "more_than_random_low", "more_than_random_high", "draws", "tokens", "random_tokens",
)  # fmt: skip


def _judged(base: ndarray, top: ndarray, noise: Sequence[ndarray], seed: int) -> tuple[float | int, ...]:
    """The columns ``JUDGED`` of one mask, from outcomes of base, of the masked top heads, and of each random control."""
    accuracy, lost = _share_correct([top[0]], seed), _difference([base[0]], [top[0]], seed)
    random = more = NOTHING
    if noise:
        random = _share_correct([x[0] for x in noise], seed)
        more = _difference([x[0] for x in noise], [top[0]], seed)
    tokens = float(np.mean([x[1] for x in noise])) if noise else np.nan
    return (*accuracy, *random, *lost, *more, len(noise), float(top[1].mean()), tokens)


NOTHING = (np.nan,) * 3


def _share_correct(draws: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Share of correct answers with its interval; each draw is ``[problems, samples]``."""
    e = stats.mean_effect(_means(draws), seed=seed).within((0.0, 1.0))
    return e.mean, e.low, e.high


def _difference(a: Sequence[ndarray], b: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Draws of ``a`` minus draws of ``b``, paired by problem; a single draw on one side is compared with all draws of the other."""
    e = stats.mean_effect(_means(a) - _means(b), seed=seed).within((-1.0, 1.0))
    return e.mean, e.low, e.high


def _means(draws: Sequence[ndarray]) -> ndarray:
    """``[draws, problems]``: means over samples."""
    return np.stack([x.mean(axis=1) for x in draws])


MODES = {"thinking": (), "answering directly": (Budget(0),)}


def thinking_or_not(
    lm: LM, plan: Plan, problems: Mapping[str, Sequence[Problem]], sampling: Sampling, *, draws: int = 3, out: Path | None = None
) -> pd.DataFrame:
    """Measure whether masking a plan's heads hurts thinking more than answering directly, and how it changes think length.

    Heads are masked in the published form (uniform, decode only). To answer directly, the think span is closed at once.

    Args:
        plan: The heads to mask.
        problems: Problems by task.
        draws: Number of random controls.
        out: Directory to keep rollouts in.

    Returns:
        Columns ``task, mode, masked`` (``nothing``, ``top``, ``random``), ``accuracy, low, high``, ``lost`` (nothing masked minus masked)
        with ``lost_low, lost_high``, and ``think_tokens``. For each task, rows with the mode ``thinking - directly`` hold the difference
        of the two losses, for ``top`` and for ``random``.
    """
    random = controls(plan, lm, draws, sampling.seed)
    plans: dict[str, Sequence[Plan | None]] = {"nothing": [None], "top": [plan], "random": random}
    rows = []
    for task, questions in problems.items():
        correct: dict[tuple[str, str], list[ndarray]] = {}  # (mode, masked) -> [problems, samples] per draw
        for (mode, rules), (name, masked_plans) in product(MODES.items(), plans.items()):
            answers = []
            for i, p in enumerate(masked_plans):
                act = () if p is None else (masks.masking(p, "uniform", during="newest"),)
                where = out and out / f"{task}-{mode}-{name}{i}".replace(" ", "-")
                answers.append(rollouts(Condition(lm, act, rules=rules), questions, sampling, out=where))
            if not answers:  # no controls
                continue
            draw_outcomes = [np.array([r.correct for r in draw], float).reshape(len(questions), -1) for draw in answers]
            correct[mode, name] = draw_outcomes
            length = float(np.mean([r.think_tokens for draw in answers for r in draw]))
            lost = _difference(correct[mode, "nothing"], draw_outcomes, sampling.seed)
            rows.append((task, mode, name, *_share_correct(draw_outcomes, sampling.seed), *lost, length))
        thinking, directly = MODES
        for name in [name for name in ("top", "random") if (thinking, name) in correct]:
            # The loss when thinking minus the loss when answering directly, from one table of outcomes per draw.
            before, after = (_means(correct[thinking, m]) - _means(correct[directly, m]) for m in ("nothing", name))
            more = stats.mean_effect(before - after, seed=sampling.seed).within((-2.0, 2.0))
            rows.append((task, "thinking - directly", name, *NOTHING, more.mean, more.low, more.high, np.nan))
    columns = ["task", "mode", "masked", "accuracy", "low", "high", "lost", "lost_low", "lost_high", "think_tokens"]
    return pd.DataFrame(rows, columns=columns)
