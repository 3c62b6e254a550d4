"""Measure interventions along an axis of difficulty, such as the number of steps, each beside random controls.

Four papers say that long inputs are hard in different ways: many steps through the context (Needle Threading, arXiv 2411.05000), much
information far apart (scope and dispersion, arXiv 2407.00402), long execution and one's own errors (arXiv 2509.09677), and the characters
inside tokens (CharBench, arXiv 2508.02591). ``measure_axis`` takes any of these axes.

Units: accuracies and shares of right steps are from 0 to 1. Counts, such as tokens, have another ``unit`` in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from toolkit import directions, generate, masks, stats
from toolkit.generate import Sampling
from toolkit.jobs.controls import random_controls, random_heads
from toolkit.jobs.edit import DOSE, edited
from toolkit.jobs.finding import Finding
from toolkit.jobs.masking import controls
from toolkit.lm import LM, Condition
from toolkit.metrics import RANGES, with_interval
from toolkit.stats import UNBOUNDED
from toolkit.steering import steering
from toolkit.tasks import haystack, running_sum
from toolkit.tasks.generators.planted import History
from toolkit.tasks.haystack import Haystack
from toolkit.types import Direction, Plan, Rollout

Item = TypeVar("Item")
Level = str | int | float
Measure = Callable[[Condition, Sequence[Item]], ndarray]
"""Function that returns one number per item, such as a share from 0 to 1, or NaN if the item does not count."""


@dataclass(frozen=True)
class Arm:
    """An intervention with its random controls.

    Attributes:
        treated: The model with the intervention.
        controls: The model with random interventions of the same kind, one per draw.
    """

    treated: Condition
    controls: tuple[Condition, ...]


def edit_arm(lm: LM, finding: Finding, *, draws: int = 3, seed: int = 0) -> Arm:
    """Return an edit of heads as an arm. The controls make the same edit on random other heads of the same layers.

    There may be fewer than ``draws`` controls, if the layers have few other heads.

    Args:
        finding: Heads to edit, from ``jobs.find_heads``.
        draws: Number of controls.
        seed: Seed of the first control; it rises by 1 with each further one.
    """
    others = random_controls(lm, finding, finding.plan, random_heads, draws, seed=seed)
    return Arm(edited(lm, finding.plan), tuple(edited(lm, other) for other in others))


def steering_arm(lm: LM, v: Direction, strength: float = DOSE, *, draws: int = 3, seed: int = 0) -> Arm:
    """Return steering in all layers and at all positions as an arm. The controls add random directions of equal norm.

    Args:
        v: Direction to add.
        strength: Factor of the direction, also of the random ones.
        draws: Number of controls.
        seed: Seed of the first control; it rises by 1 with each further one.
    """
    every = [v, *(directions.random_like(v, seed=seed + draw) for draw in range(draws))]
    treated, *others = (Condition(lm, (steering(d, strength),)) for d in every)
    return Arm(treated, tuple(others))


def masking_arm(lm: LM, plan: Plan, *, draws: int = 3, seed: int = 0) -> Arm:
    """Return masked heads as an arm, as in arXiv 2404.15574: uniform attention while decoding. The controls mask other heads of the layers.

    There may be fewer than ``draws`` controls, since equal draws count once.

    Args:
        plan: Heads to mask, such as ``retrieval_heads.mask_plan(scores, count)``.
        draws: Number of controls.
        seed: Seed of the first control; it rises by 1 with each further one.
    """
    plans = [plan, *controls(plan, lm, draws, seed)]
    treated, *others = (Condition(lm, (masks.masking(p, "uniform", during="newest"),)) for p in plans)
    return Arm(treated, tuple(others))


# --- measures ------------------------------------------------------------------------------------------------


def right_answers(sampling: Sampling) -> Measure:
    """Return a measure of problems: the share of right answers among a problem's samples."""

    def measure(condition: Condition, problems: Sequence[Any]) -> Float[ndarray, " problems"]:
        responses = generate.rollouts(condition, problems, sampling, progress=False)
        return np.array([r.correct for r in responses], float).reshape(len(problems), -1).mean(axis=1)

    return measure


def next_steps(max_new_tokens: int = 48) -> Measure:
    """Return a measure of histories (``tasks.generators.planted``): 1 if the next total follows from the last one in the history, else 0.

    The model goes on with its thinking, greedily. If it first corrects the last total, the next total must follow from the corrected one.
    An item is NaN if no total for the next turn is written. A line that is cut off at the token budget is not read.

    Args:
        max_new_tokens: Token budget, enough for two re-checks and the next line.
    """
    return partial(_next_steps, Sampling(temperature=0.0, max_new_tokens=max_new_tokens))


def _next_steps(sampling: Sampling, condition: Condition, histories: Sequence[History]) -> Float[ndarray, " histories"]:
    lm = condition.lm
    opening = (lm.tags.open or "") if lm.tags else ""
    begun = [lm.tokenizer(opening + h.text, add_special_tokens=False)["input_ids"] for h in histories]
    prompts = [(h.problem, [*lm.prompt_ids(h.problem.messages), *ids]) for h, ids in zip(histories, begun, strict=True)]
    written = [_whole_lines(lm, r) for r in generate.continuations(condition, prompts, sampling)]
    steps = [
        running_sum.execution_of(h.problem, h.text + text).step[len(h.totals)] for h, text in zip(histories, written, strict=True)
    ]
    return np.array([np.nan if step is None else step for step in steps], float)


def _whole_lines(lm: LM, r: Rollout) -> str:
    """Return the thinking of a response, without a last line that was cut off: its number may lack digits."""
    text = lm.text(r.token_ids[r.think.start : r.think.stop]) if r.think else ""
    return text[: text.rfind("\n") + 1] if r.finish == "length" and not r.closed else text


# --- axes ----------------------------------------------------------------------------------------------------


def by_dispersion(haystacks: Sequence[Haystack], names: Sequence[str] = ("near", "middle", "far")) -> dict[str, list[Haystack]]:
    """Return the haystacks in equal groups by the mean gap between needed pieces, smallest gap first.

    Use haystacks of one length and one number of pieces, so that groups differ in nothing else by design.

    Args:
        haystacks: Prompts with several needed pieces each.
        names: Names of the groups.

    Raises:
        ValueError: fewer haystacks than groups, or one with a single needed piece, which has no gap.
    """
    if len(haystacks) < len(names):
        raise ValueError(f"{len(haystacks)} haystacks for {len(names)} groups: give at least one per group.")
    if single := next((h for h in haystacks if len(h.needed) < 2), None):
        raise ValueError(f"{single.problem.id} needs one piece, so it has no gap: give haystacks with at least two needed pieces.")
    gaps = np.array([haystack.haystack_tags(h)["gap_mean"] for h in haystacks])
    parts = np.array_split(np.argsort(gaps, kind="stable"), len(names))
    return {name: [haystacks[i] for i in part] for name, part in zip(names, parts, strict=True)}


@dataclass(frozen=True)
class Cell:
    """Results of one arm at one level, one number per item.

    Attributes:
        base: Without an intervention, ``[items]``.
        treated: With the intervention, ``[items]``.
        controls: With each random control, ``[draws, items]``.
    """

    base: Float[ndarray, " items"]
    treated: Float[ndarray, " items"]
    controls: Float[ndarray, "draws items"]


Cells = Mapping[tuple[str, Level], Cell]
"""``(name of the arm, level)`` -> results."""


def measure_axis(
    base: Condition, arms: Mapping[str, Arm], levels: Mapping[Level, Sequence[Item]], measure: Measure
) -> dict[tuple[str, Level], Cell]:
    """Measure base, every intervention and its controls at every level of an axis.

    Args:
        base: The model without an intervention.
        arms: Name -> intervention with its controls. A condition that occurs twice is measured once.
        levels: Level -> items, such as problems; easiest level first.
        measure: Function that returns one number per item.

    Raises:
        ValueError: no arm, a level without items, or an arm without controls.
    """
    if not arms or not levels or not all(levels.values()):
        raise ValueError(f"{len(arms)} arms, {[len(v) for v in levels.values()]} items per level: give at least one of each.")
    if bare := [name for name, arm in arms.items() if not arm.controls]:
        raise ValueError(f"{bare[0]} has no random control: give at least one, such as random heads of the same layers.")
    cells: dict[tuple[str, Level], Cell] = {}
    for level, items in levels.items():
        done: dict[int, ndarray] = {}  # id of a condition -> its results

        def run(condition: Condition, items: Sequence[Item] = items, done: dict[int, ndarray] = done) -> ndarray:
            if id(condition) not in done:
                done[id(condition)] = measure(condition, items)
            return done[id(condition)]

        for name, arm in arms.items():
            cells[name, level] = Cell(run(base), run(arm.treated), np.stack([run(c) for c in arm.controls]))
    return cells


def pooled(cells: Cells, level: Level = "all") -> dict[tuple[str, Level], Cell]:
    """Return one cell per arm, with the items of all its levels together.

    Args:
        cells: Results from ``measure_axis``.
        level: Name of the joint level.
    """
    joint: dict[tuple[str, Level], Cell] = {}
    for name in dict.fromkeys(arm for arm, _ in cells):
        parts = [cell for (arm, _), cell in cells.items() if arm == name]
        joint[name, level] = Cell(
            np.concatenate([cell.base for cell in parts]),
            np.concatenate([cell.treated for cell in parts]),
            np.concatenate([cell.controls for cell in parts], axis=1),
        )
    return joint


NO_EFFECT = "no effect detectable"


def level_table(cells: Cells, *, unit: str = "share", seed: int = 0) -> pd.DataFrame:
    """Return a table with one row per arm and level.

    Columns: ``arm, level, unit, items``; ``draws``: number of random controls; ``base, treated, random``: means; ``change``: treated minus
    base; ``beyond_random``: treated minus the mean control. The last five have 95 % intervals (``change_low, change_high``, and so on), paired by item. Those that involve
    controls also vary over draws. ``verdict``: see ``axes.verdict``.

    Args:
        cells: Results from ``measure_axis``.
        unit: Unit of the results, such as ``share`` or ``tokens``. Intervals end where it ends.
        seed: Seed of the bootstrap.
    """
    rows = []
    lowest, highest = RANGES.get(unit, UNBOUNDED)
    for (name, level), cell in cells.items():
        treated, base = cell.treated[None], cell.base[None]
        estimates = {
            "base": stats.mean_effect(base, seed=seed).within((lowest, highest)),
            "treated": stats.mean_effect(treated, seed=seed).within((lowest, highest)),
            "random": stats.mean_effect(cell.controls, seed=seed, seeded=True).within((lowest, highest)),
            "change": stats.mean_effect(treated, base, seed=seed).within((lowest - highest, highest - lowest)),
            "beyond_random": stats.mean_effect(treated - cell.controls, seed=seed, seeded=True).within(
                (lowest - highest, highest - lowest)
            ),
        }
        row: dict[str, Any] = {"arm": name, "level": level, "unit": unit, "items": len(cell.base), "draws": len(cell.controls)}
        rows.append(row | _columns(estimates) | {"verdict": verdict(estimates["change"], estimates["beyond_random"])})
    return pd.DataFrame(rows)


def level_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return the means, differences, numbers of controls and verdicts of ``level_table`` as text cells, with 95 % intervals in brackets.

    Shares are in percent, and their differences in points. The rows are indexed by arm and level.
    """

    def difference(row: pd.Series, name: str) -> str:
        return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], row["unit"], sign="+")

    def mean(row: pd.Series, name: str) -> dict[str, str]:
        share = row["unit"] == "share"
        return {f"{name}, {'%' if share else row['unit']}": f"{100 * row[name]:.0f}" if share else f"{row[name]:.2f}"}

    rows = [
        {
            "arm": row["arm"],
            "level": row["level"],
            **mean(row, "base"),
            **mean(row, "treated"),
            **mean(row, "random"),
            "treated - base": difference(row, "change"),
            "treated - random": difference(row, "beyond_random"),
            "controls": row["draws"],
            "verdict": row["verdict"],
        }
        for _, row in table.iterrows()
    ]
    return pd.DataFrame(rows).set_index(["arm", "level"])


def growth_table(cells: Cells, *, seed: int = 0) -> pd.DataFrame:
    """Return the difference between an intervention's effect at the last level and at the first, one row per arm.

    Columns: ``arm, first, last`` (the levels); ``draws``: number of random controls; ``growth``: ``change`` at the last level minus that at
    the first; ``beyond_random_growth``: the same for treated minus controls. Both have 95 % intervals. ``verdict`` as in ``level_table``.

    Args:
        cells: Results from ``measure_axis``.
        seed: Seed of the bootstrap.
    """
    rows = []
    for name in dict.fromkeys(arm for arm, _ in cells):
        levels = [level for arm, level in cells if arm == name]
        first, last = cells[name, levels[0]], cells[name, levels[-1]]
        estimates = {
            "growth": _growth([c.treated[None] - c.base[None] for c in (first, last)], seed),
            "beyond_random_growth": _growth([c.treated - c.controls for c in (first, last)], seed, seeded=True),
        }
        row = {"arm": name, "first": levels[0], "last": levels[-1], "draws": len(first.controls)}
        rows.append(row | _columns(estimates) | {"verdict": verdict(*estimates.values())})
    return pd.DataFrame(rows)


def _growth(values: Sequence[Float[ndarray, "draws _"]], seed: int, *, seeded: bool = False) -> stats.Effect:
    """Return the mean at the last level minus the mean at the first. The levels have different items, which are resampled independently."""
    if any(np.isnan(row).all() for rows in values for row in rows):
        return stats.Effect(np.nan, np.nan, np.nan, np.nan)
    first, last = ([_resampled(row[~np.isnan(row)], seed + at) for row in rows] for at, rows in enumerate(values))
    both = [stats.Draws(b.estimate - a.estimate, b.resampled - a.resampled) for a, b in zip(first, last, strict=True)]
    return stats.combine(both, min(rows.shape[1] for rows in values), seeded=seeded)


def _resampled(values: Float[ndarray, " items"], seed: int) -> stats.Draws:
    return stats.draws(stats.mean_of(values[:, None]), len(values), seed=seed)


def verdict(change: stats.Effect, beyond_random: stats.Effect) -> str:
    """Return ``higher`` or ``lower`` if both intervals exclude 0 on this side, else ``no effect detectable``.

    With fewer than three random controls it is ``not judged: 1 seed`` or ``not judged: 2 seeds``; each control has a seed.

    Controls are compared by their mean. ``higher`` says that the intervention does more than random ones do on average, not that it does
    more than every one: the interval of ``beyond_random`` holds the uncertainty of that mean, which shrinks with the number of controls,
    and not the spread of single controls. So with many controls, an intervention that is itself a random draw often gets ``higher`` or
    ``lower``.

    Args:
        change: Difference from base.
        beyond_random: Difference from the mean of the random controls, from an estimate with ``seeded=True``.
    """
    if "seed" in beyond_random.note:  # the note of an effect names the seeds only if they are too few
        return f"not judged: {beyond_random.note}"
    if min(change.low, beyond_random.low) > 0:
        return "higher"
    return "lower" if max(change.high, beyond_random.high) < 0 else NO_EFFECT


def _columns(estimates: Mapping[str, stats.Estimate]) -> dict[str, float]:
    return {f"{name}{end}": v for name, e in estimates.items() for end, v in (("", e.mean), ("_low", e.low), ("_high", e.high))}
