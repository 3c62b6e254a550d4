"""Efficiency Steering: the inherent efficiency within large reasoning models (Zhao et al., 2025), arXiv:2506.15647.

Equations (for each problem the shortest and the longest *correct* response, T its think span, h_l the residual stream):

    v_l = mean over problems of ( mean_{t in T_long} h_l(t)  -  mean_{t in T_short} h_l(t) )
    h_l <- h_l + strength * v_l       at one layer l, at the newest position of each step

Because every problem gives one response to each side, this is also the difference of the two class means: one pass of
``collect.moments(lm, rollouts, pairs(rollouts))`` is all it takes.

Deviations: we could read the abstract and secondary accounts only. They give the contrast, the difference of means, a single
target layer and the newest position; they do not give the positions averaged over, the number of pairs, the layer, the strength,
the normalisation or any code. Those are arguments here, with defaults named ``assumed_...`` (ours): the predictors of the think
span, pairs that differ by a ratio of 2, at least 8 pairs, ``resid_post``, un-normalised v, layers of the middle third, and layer
and strength chosen on a dev split by :func:`choose`. Lengths are think tokens.

Units and signs: lengths in tokens. **The sign is flipped**: the paper's +v is *more efficient* (shorter thinking); here as in
every direction of this toolkit + is longer. The paper's ``h + lambda v`` is ``edits.steering(v, -lambda, layers=(l,),
during="newest")``. Strength 1 is the mean difference between the longest and the shortest correct thinking, or, with ``typical``,
as large as the stream itself.

Cost: one forward pass over two rollouts a problem; choosing costs one dose-response on the dev split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from toolkit import directions
from toolkit.collect import MLP
from toolkit.directions import LONG, SHORT
from toolkit.types import Direction, Moments, Rollout

PUBLISHED_POSITION = "newest"  # steered position: secondary account; see Deviations
assumed_ratio = 2.0  # longest over shortest, in think tokens: ours ("usually less than half" is the paper's observation)
assumed_min_pairs = 8  # pairs below which a mean is noise: ours
assumed_site = MLP  # the stream after the block: ours
assumed_strengths = (-0.25, -0.5, -1.0, -1.5, -2.0)  # tried on dev, in class differences: ours
assumed_max_loss = 1.0  # points of accuracy that shortening may cost: ours


class TooFewPairsError(ValueError):
    """Too few problems have a short and a long correct rollout."""


class NothingQualifiesError(ValueError):
    """No layer and strength shortens thinking at the accuracy asked for."""


@dataclass(frozen=True)
class LengthPairs:
    """The shortest and the longest correct rollout of each problem. Called with a rollout: its class, or ``None``.

    Attributes:
        samples: Problem id -> sample indices ``(shortest, longest)``.
        tokens: Problem id -> their think tokens.
    """

    samples: Mapping[str, tuple[int, int]]
    tokens: Mapping[str, tuple[int, int]]

    def __call__(self, rollout: Rollout) -> str | None:
        short, long = self.samples.get(rollout.problem_id, (None, None))
        return {short: SHORT, long: LONG}.get(rollout.sample) if short is not None else None

    def __len__(self) -> int:
        return len(self.samples)


def pairs(rollouts: Sequence[Rollout], *, ratio: float = assumed_ratio, at_least: int = assumed_min_pairs) -> LengthPairs:
    """Pairs within problems that have at least 2 correct rollouts, the longest at least ``ratio`` times the shortest.

    Only correct rollouts with a closed think span of at least one token count. Ties go to the smaller sample index.

    Raises:
        TooFewPairsError: fewer than ``at_least`` problems qualify; gives the counts at each step.
        ValueError: ``ratio`` not above 1, or a sample given twice.
    """
    if not ratio > 1:
        raise ValueError(f"ratio={ratio}: need ratio > 1, or a pair would not differ in length.")
    if len({(r.problem_id, r.sample) for r in rollouts}) < len(rollouts):
        raise ValueError("Some rollouts have the same problem and sample: number the samples of merged runs apart.")
    correct: dict[str, list[Rollout]] = defaultdict(list)
    for r in rollouts:
        if r.correct and r.closed and r.think_tokens:
            correct[r.problem_id].append(r)
    by_length = {p: sorted(found, key=lambda r: (r.think_tokens, r.sample)) for p, found in correct.items() if len(found) > 1}
    ends = {p: (found[0], max(found, key=lambda r: r.think_tokens)) for p, found in by_length.items()}
    kept = {p: e for p, e in ends.items() if e[1].think_tokens >= ratio * e[0].think_tokens}
    if len(kept) < at_least:
        ratios = [long.think_tokens / short.think_tokens for short, long in ends.values()]
        spread = np.quantile(ratios, [0.5, 0.95]).round(2).tolist() if ratios else []
        raise TooFewPairsError(
            f"{len(kept)} pairs, {at_least} needed: of {len({r.problem_id for r in rollouts})} problems {len(correct)} have a correct "
            f"rollout that thinks, {len(ends)} have two or more, {len(kept)} differ by a ratio of {ratio:g} (50 %, 95 % of ratios: "
            f"{spread}). Sample more rollouts a problem, more problems, or lower ratio."
        )
    return LengthPairs(
        {p: (short.sample, long.sample) for p, (short, long) in kept.items()},
        {p: (short.think_tokens, long.think_tokens) for p, (short, long) in kept.items()},
    )


def direction(
    moments: Moments,
    kind: str = assumed_site,
    *,
    estimator: Callable[[Moments, str], Direction] = directions.mean_difference,
    typical: Float[Tensor, " layers"] | None = None,
) -> Direction:
    """v_l per layer from moments collected by :class:`LengthPairs`; + is longer (the paper's sign flipped).

    Args:
        typical: Typical norms of the stream (``collect.typical_norm``); if given, v_l has this norm, else it is left as it is.

    Raises:
        ValueError: the classes differ in size, so they were not collected by pairs.
    """
    counts = {name: moments.n[moments.index(name)] for name in (SHORT, LONG)}
    if counts[SHORT] != counts[LONG]:
        raise ValueError(f"These moments hold {counts}: pairs give one each. Collect them with by=efficiency_steering.pairs(...).")
    v = estimator(moments, kind)
    return v if typical is None else directions.in_typical_units(v, typical)


def assumed_layers(n_layers: int) -> range:
    """Layers tried on dev: the middle third (ours)."""
    return range(n_layers // 3, max(n_layers // 3 + 1, -(-2 * n_layers // 3)))


@dataclass(frozen=True)
class Choice:
    """A layer and a strength, with what they did on the dev split.

    Attributes:
        shortening: Share of the base's think tokens saved.
        loss: Points of accuracy lost to base; negative if gained.
    """

    layer: int
    strength: float
    shortening: float
    loss: float


def choose(doses: pd.DataFrame, *, max_loss: float = assumed_max_loss) -> Choice:
    """The layer and strength that shorten thinking most, of those that cost at most ``max_loss`` points of accuracy (ours).

    Ties go to the smaller ``|strength|``, then to the lower layer. A best of many is flattered by chance: measure it again on test.

    Args:
        doses: One row per layer and strength of *one* direction, measured on dev. Columns: ``layer, strength, think_tokens,
            accuracy, base_think_tokens, base_accuracy`` (accuracy a share of 1); ``direction`` may name the direction.

    Raises:
        NothingQualifiesError: no row does; says what the best ones did.
        ValueError: columns missing, numbers missing, or several directions in one table.
    """
    needed = ["layer", "strength", "think_tokens", "accuracy", "base_think_tokens", "base_accuracy"]
    if missing := [name for name in needed if name not in doses]:
        raise ValueError(f"The dose table has no columns {missing}: it has {list(doses)}.")
    if "direction" in doses and doses["direction"].nunique() > 1:
        raise ValueError(f"Several directions in one table, {sorted(doses['direction'].unique())}: pass the rows of one.")
    if doses[needed].isna().to_numpy().any():
        raise ValueError(f"The dose table has missing numbers in {list(doses[needed].columns[doses[needed].isna().any()])}.")
    table = doses[doses["strength"] != 0]
    table = table.assign(
        shortening=(1 - table["think_tokens"] / table["base_think_tokens"]).round(9),
        loss=(100 * (table["base_accuracy"] - table["accuracy"])).round(9),
        dose=table["strength"].abs(),
    )
    fit = table[(table["shortening"] > 0) & (table["loss"] <= max_loss)]
    if fit.empty:
        raise NothingQualifiesError(_why(table, max_loss))
    best = fit.sort_values(["shortening", "dose", "layer", "strength"], ascending=[False, True, True, True]).iloc[0]
    return Choice(int(best["layer"]), float(best["strength"]), float(best["shortening"]), float(best["loss"]))


def _why(table: pd.DataFrame, max_loss: float) -> str:
    if table.empty:
        return "The dose table holds no strength but 0: measure some."
    shorter = table[table["shortening"] > 0]
    if shorter.empty:
        return f"None of {len(table)} layers and strengths shortens thinking: try strengths of the other sign, larger ones, or other layers."
    mild = shorter.loc[shorter["loss"].idxmin()]
    return (
        f"{len(shorter)} of {len(table)} layers and strengths shorten thinking, but none at a loss of {max_loss:g} points or less; the "
        f"mildest, layer {mild['layer']:g} at {mild['strength']:g}, saves {100 * mild['shortening']:.1f} % at {mild['loss']:.2f} "
        "points. Try smaller strengths or other layers, or allow a larger max_loss."
    )
