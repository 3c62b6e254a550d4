"""Compare a trained steering vector with a direction that was found from activations: how much of its effect does the other explain?

Both are split, layer by layer, into the part along the other and the rest (``directions.split``). The parts are judged like the whole. The
same split along random directions is the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit import directions, evaluate, stats
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.metrics import share_of
from toolkit.steering import Steering
from toolkit.types import Direction, Problem, Report

assumed_draws = 3  # random directions: ours


def explained(
    lm: LM,
    trained: Steering,
    found: Direction,
    problems: Sequence[Problem],
    sampling: Sampling = Sampling(n=4),
    *,
    draws: int = assumed_draws,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure which share of the effect of a trained vector on think length lies along a found direction, and the reverse.

    The found direction is rescaled to the norm of the trained one in every layer. Both are added with the strength of ``trained``.

    Args:
        lm: The initial model.
        trained: Steering along the trained direction, such as ``Trained.policy.during[0]``.
        found: The found direction, at the same site.
        problems: Problems that were used neither to train nor to find the directions.
        sampling: Sampling settings.
        draws: Number of random directions.
        out: Directory of the rollouts, from which a repeated call resumes; ``None`` stores nothing.

    Returns:
        One row per part. Columns: ``whole`` (``"trained"`` or ``"found"``); ``part`` (``"whole"``, ``"along the other"``,
        ``"without the other"``, or ``"along random"`` with the number of the draw); ``cosine`` (mean over layers of the absolute cosine
        between the part and the whole); ``effect, effect_low, effect_high`` (think tokens minus those of base, 95 % interval from
        resampling problems); ``share, share_low, share_high`` (the effect divided by that of the whole; NaN unless the interval of the
        whole's effect excludes zero); and ``accuracy`` (0 to 1).

    Raises:
        ValueError: the directions were made at different sites.
    """
    if found.kind != trained.site:
        raise ValueError(
            f"The found direction was made at {found.kind}, the trained vector acts at {trained.site}: find a direction at {trained.site}."
        )
    rescaled = replace(found, vector=found.unit() * trained.direction.norms[:, None])
    parts: dict[tuple[str, str], Direction] = {}
    for name, whole, other in (("trained", trained.direction, rescaled), ("found", rescaled, trained.direction)):
        along, without = directions.split(whole, other)
        parts |= {(name, "whole"): whole, (name, "along the other"): along, (name, "without the other"): without}
        for draw in range(draws):
            parts[name, f"along random {draw}"] = directions.split(whole, directions.random_like(other, seed=draw))[0]
    conditions = {"base": Condition(lm)}
    conditions |= {f"{name}, {part}": Condition(lm, (replace(trained, direction=d),)) for (name, part), d in parts.items()}
    report = evaluate.compare(conditions, problems, sampling, out=out, progress=False)
    rows = []
    for (name, part), direction in parts.items():
        whole = parts[name, "whole"]
        used = (whole.norms > 0) & (direction.norms > 0)
        cosine = float(directions.cosine(direction, whole)[used].abs().mean()) if used.any() else 0.0
        rows.append((name, part, cosine, *_effects(report, f"{name}, {part}", f"{name}, whole")))
    columns = ["effect", "effect_low", "effect_high", "share", "share_low", "share_high", "accuracy"]
    return pd.DataFrame(rows, columns=["whole", "part", "cosine", *columns])


def _effects(report: Report, condition: str, whole: str) -> tuple[float, ...]:
    """Return effect and share of a condition with their intervals, and its accuracy; ``explained`` describes the columns."""
    base, of_part, of_whole = (_lengths(report, name) for name in (report.base, condition, whole))
    effect = stats.bootstrap(stats.mean_of(of_part - base), len(base))
    share = share_of(of_part - base, of_whole - base)
    accuracy = float(report.rows.loc[report.rows["condition"] == condition, "correct"].mean())
    return effect.mean, effect.low, effect.high, share.mean, share.low, share.high, accuracy


def _lengths(report: Report, condition: str) -> np.ndarray:
    """Return think tokens, ``[problems, samples]``, with problems sorted by id."""
    rows = report.rows[report.rows["condition"] == condition].sort_values(["problem_id", "sample"])
    return rows["think_tokens"].to_numpy(float).reshape(rows["problem_id"].nunique(), -1)
