"""Measure the accuracy lost when retrieval heads are masked, compared with masking random heads of the same layers.

``thinking_or_not`` also compares the loss when the model thinks with the loss when it answers directly. "As published" means as in
arXiv:2404.15574.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import collect, edits, masks, stats, store
from toolkit.baselines import Budget
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.retrieval import RANKINGS, RetrievalMeasurement, Search
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads
from toolkit.types import Moments, Plan, Problem, Rollout


@dataclass(frozen=True)
class Mask:
    """A way to mask the top heads of a ranking: which heads, how, and at which positions.

    Attributes:
        ranking: Name of the ranking, a key in ``jobs.retrieval.RANKINGS``.
        count: Number of heads to mask, from the top of the ranking.
        op: Operation: ``uniform`` (the head attends equally to all keys that it can see), ``zero`` (its output is set to 0) or ``mean``
            (its output is replaced by its mean over all positions of prompts and responses).
        during: Positions at which the heads are masked: ``newest`` (the prompt's last position and all response tokens, as in
            arXiv:2404.15574) or ``all`` (the whole prompt too).
    """

    ranking: str
    count: int
    op: str = "uniform"
    during: str = "newest"

    def __str__(self) -> str:
        return f"{self.ranking}: {self.count} heads, {self.op}, {DURING[self.during]}"


DURING = {"newest": "decode only", "all": "prefill too"}
"""Positions at which heads are masked (``Mask.during``) -> their name in tables. "Decode only" includes the prompt's last position."""


def planned_masks(search: Search) -> list[Mask]:
    """Return the masks to measure. Each ranking of the heads (see ``jobs.retrieval.RANKINGS``) has the same masks.

    The form of arXiv:2404.15574 (operation ``uniform``, ``during="newest"``) is measured at every number of heads in ``search.counts``. At
    the largest number, every operation in ``search.ops`` is measured at both sets of positions, ``during="newest"`` and ``during="all"``.
    """
    curve = [Mask(ranking, count) for ranking, count in product(RANKINGS, search.counts)]
    forms = [Mask(r, max(search.counts), op, during) for r, op, during in product(RANKINGS, search.ops, DURING)]
    return list(dict.fromkeys([*curve, *forms]))  # without duplicates, in order


def reference(lm: LM, rollouts: Sequence[Rollout]) -> Moments:
    """Return the sums of activations (``Moments``) from which the masking operation ``mean`` computes the mean output of every head.

    A head's output is averaged over all positions of each rollout's prompt and response, and then over rollouts.
    """
    everywhere = collect.Positions("prompt and response", lambda r: range(len(r.token_ids)))
    return collect.moments(lm, rollouts, lambda r: "all", kinds=("z",), positions=everywhere)


def controls(plan: Plan, lm: LM, draws: int, seed: int) -> list[Plan]:
    """Return random controls of a plan: plans that mask equally many *other* heads of the same layers, chosen at random.

    There may be fewer than ``draws`` controls: if two of them choose the same heads, only one is returned. If the plan masks more than half
    of all heads, the list is empty, since too few others are left. If a layer has too few other heads, the missing ones come from the
    nearest layer that has heads left.

    Args:
        plan: Heads that are masked.
        lm: Model that the plan is for.
        draws: Number of times that heads are chosen at random.
        seed: Random seed of the first choice; it rises by 1 with each further choice.
    """
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
    """Measure accuracy and response length with the top heads masked, compared with masking random heads of the same layers.

    Args:
        lm: Model to mask heads in.
        measurement: Retrieval metrics of every head. Its scores rank the heads, and its rollouts give the means for mean ablation.
        search: Number and seed of the random controls, token budget and batch size.
        problems: Problems of the test split, answered with greedy decoding.
        chosen: Masks to measure, such as ``planned_masks(search)``.
        out: Directory to save rollouts in, from which a repeated call resumes; ``None`` saves nothing.

    Returns:
        One row per mask. Columns:

        * ``ranking, heads`` (number of masked heads), ``op, during``: the mask.
        * ``accuracy, low, high``: accuracy of the masked model, 0 to 1.
        * ``random, random_low, random_high``: mean accuracy of the random controls. NaN if there are none (see ``controls``).
        * ``lost, lost_low, lost_high``: accuracy of base minus that of the masked model, paired by problem.
        * ``more_than_random, more_than_random_low, more_than_random_high``: accuracy of the controls minus that of the masked model,
          paired by problem. A positive value means that masking the top heads costs more accuracy than masking random ones.
        * ``draws``: number of random controls, all different (see ``controls``).
        * ``tokens, random_tokens``: mean response length in tokens, of the masked model and of the controls.

        Columns that end in ``low`` and ``high`` are the ends of 95 % intervals, from resampling problems. The intervals of ``random`` and
        ``more_than_random`` come from resampling the random controls too; with fewer than three controls they are unreliable.
    """
    base = _outcomes(lm, Condition(lm), problems, search.sampling, out and out / "base")
    done: dict[tuple, ndarray] = {}  # (heads, operation, positions) -> outcomes
    rows = []

    mean_outputs = reference(lm, measurement.rollouts) if any(m.op == "mean" for m in chosen) else None

    def run(plan: Plan, mask: Mask) -> ndarray:
        intervention = masks.masking(plan, mask.op, during=mask.during, reference=mean_outputs if mask.op == "mean" else None)
        key = (frozenset(plan.heads), mask.op, mask.during)
        if key not in done:  # two rankings may choose the same heads
            name = f"{mask.op}-{mask.during}-{'-'.join(f'{i}.{j}' for i, j in sorted(plan.heads))}"
            where = out and out / store.safe_name(name)  # the names of many heads are longer than a file system takes
            done[key] = _outcomes(lm, Condition(lm, (intervention,)), problems, search.sampling, where)
        return done[key]

    scores = measurement.scores
    for mask in chosen:
        plan = retrieval_heads.mask_plan(scores[mask.ranking], mask.count)
        top = run(plan, mask)
        noise = [run(control, mask) for control in controls(plan, lm, search.draws, search.seed)]
        rows.append((mask.ranking, mask.count, mask.op, DURING[mask.during], *_judged(base, top, noise, search.seed)))
    return pd.DataFrame(rows, columns=["ranking", "heads", "op", "during", *JUDGED])


def _outcomes(lm: LM, condition: Condition, problems: Sequence[Problem], sampling: Sampling, out: Path | None) -> ndarray:
    """Return correctness (1 or 0) and length (response tokens) of every response, as ``[2, problems, samples]``."""
    answers = rollouts(condition, problems, sampling, out=out)
    return np.array([[r.correct for r in answers], [r.response_tokens for r in answers]], float).reshape(2, len(problems), -1)


JUDGED = (
    "accuracy", "low", "high", "random", "random_low", "random_high", "lost", "lost_low", "lost_high",
    "more_than_random", "more_than_random_low", "more_than_random_high", "draws", "tokens", "random_tokens",
)  # fmt: skip


def _judged(base: ndarray, top: ndarray, noise: Sequence[ndarray], seed: int) -> tuple[float | int, ...]:
    """Return the results for one mask, in the order of the columns ``JUDGED``. ``masking_effects`` describes these columns.

    Args:
        base: Outcomes without a mask, ``[2, problems, samples]``, from ``_outcomes``.
        top: Outcomes with the top heads masked.
        noise: Outcomes with random heads masked, one array per control. Empty if there are no controls.
        seed: Seed of the bootstrap.
    """
    accuracy, lost = _share_correct([top[0]], seed), _difference([base[0]], [top[0]], seed)
    random = more = NOTHING
    if noise:
        random = _share_correct([x[0] for x in noise], seed)
        more = _difference([x[0] for x in noise], [top[0]], seed)
    tokens = float(np.mean([x[1] for x in noise])) if noise else np.nan
    return (*accuracy, *random, *lost, *more, len(noise), float(top[1].mean()), tokens)


NOTHING = (np.nan,) * 3  # mean, low, high where there is no estimate


def _share_correct(draws: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Return ``(mean, low, high)`` of the share of correct answers.

    ``draws`` holds one array ``[problems, samples]`` per set of masked heads: 1 for a correct response, 0 for a wrong one.
    """
    e = stats.mean_effect(_means(draws), seed=seed).within((0.0, 1.0))
    return e.mean, e.low, e.high


def _difference(a: Sequence[ndarray], b: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Return ``(mean, low, high)`` of the share correct in ``a`` minus that in ``b``, paired by problem.

    ``a`` and ``b`` hold one array ``[problems, samples]`` per set of masked heads: 1 for a correct response, 0 for a wrong one. If ``a`` or
    ``b`` has a single array, it is compared with every array of the other.
    """
    e = stats.mean_effect(_means(a) - _means(b), seed=seed).within((-1.0, 1.0))
    return e.mean, e.low, e.high


def _means(draws: Sequence[ndarray]) -> ndarray:
    """Return the mean over samples of each array ``[problems, samples]``, stacked as ``[arrays, problems]``."""
    return np.stack([x.mean(axis=1) for x in draws])


MODES = {"thinking": (), "answering directly": (Budget(0),)}
"""Way to answer -> decoding rules that enforce it. A budget of 0 think tokens closes the think span at once."""


def thinking_or_not(
    lm: LM, plan: Plan, problems: Mapping[str, Sequence[Problem]], sampling: Sampling, *, draws: int = 3, out: Path | None = None
) -> pd.DataFrame:
    """Measure whether masking heads costs more accuracy when the model thinks than when it answers directly.

    Heads are masked as in arXiv:2404.15574: from the prompt's last position on, they attend equally to all keys that they can see. To make
    the model answer directly, its think span is closed at once.

    Args:
        lm: Model to mask heads in.
        plan: Heads to mask.
        problems: Name of a task -> its problems.
        sampling: Sampling settings.
        draws: Number of random controls, which mask other heads of the same layers. There may be fewer (see ``controls``).
        out: Directory to save rollouts in, from which a repeated call resumes; ``None`` saves nothing.

    Returns:
        One row per task, mode and mask. Columns:

        * ``task``.
        * ``mode``: ``thinking``, ``answering directly``, or the difference between the two, ``thinking - directly``.
        * ``masked``: ``nothing``, ``top`` (the heads of ``plan``) or ``random`` (the controls).
        * ``accuracy, low, high``: accuracy, 0 to 1 (NaN for ``thinking - directly``).
        * ``lost, lost_low, lost_high``: accuracy with nothing masked minus accuracy with the mask, paired by problem. For ``thinking -
          directly``: the loss when thinking minus the loss when answering directly.
        * ``draws``: number of random controls for ``random``, all different; else 1.
        * ``think_tokens``: mean think length (NaN for ``thinking - directly``).

        Intervals (``low`` to ``high``) are 95 %, from resampling problems; for ``random``, they vary over the controls too. With fewer than
        three controls they are unreliable.
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
            rows.append((task, mode, name, *_share_correct(draw_outcomes, sampling.seed), *lost, len(answers), length))
        thinking, directly = MODES
        for name in [name for name in ("top", "random") if (thinking, name) in correct]:
            # (T0 - D0) - (Tm - Dm) = (T0 - Tm) - (D0 - Dm): the loss when thinking minus the loss when answering directly. T: accuracy with
            # thinking, D: directly, 0: nothing masked, m: masked. A difference of two losses lies between -2 and 2.
            unmasked, masked = (_means(correct[thinking, m]) - _means(correct[directly, m]) for m in ("nothing", name))
            more = stats.mean_effect(unmasked - masked, seed=sampling.seed).within((-2.0, 2.0))
            rows.append((task, "thinking - directly", name, *NOTHING, more.mean, more.low, more.high, len(masked), np.nan))
    columns = ["task", "mode", "masked", "accuracy", "low", "high", "lost", "lost_low", "lost_high", "draws", "think_tokens"]
    return pd.DataFrame(rows, columns=columns)
