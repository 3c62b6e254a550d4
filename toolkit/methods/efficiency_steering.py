"""Efficiency Steering: the inherent efficiency within large reasoning models (Zhao et al., 2025), arXiv:2506.15647.

The method steers the residual stream along a direction v: the mean difference between long and short thinking about the same problem.

Equations. For each problem, *long* is its longest correct response and *short* its shortest. T_long and T_short are the positions that
predict the think tokens of these responses; h_l(t) is the residual stream at layer l and position t:

    v_l = mean over problems of ( mean_{t in T_long} h_l(t)  -  mean_{t in T_short} h_l(t) )
    h_l <- h_l + strength * v_l       at one layer l, at the prompt's last token and at every response token

Each problem gives one long and one short response. So v_l is also the mean over all long responses minus the mean over all short ones.
``collect.moments(lm, rollouts, pairs(rollouts))`` collects both means in one pass.

Deviations: we could read only the paper's abstract and other authors' descriptions of the paper. They say that the shortest and the longest
correct response are compared, that v is a difference of means, and where v is added (see above). The rest are our choices. They are
arguments whose defaults are the constants ``assumed_...`` of this module:

* activations: ``resid_post`` (residual stream after the block), mean over the positions in T_long or T_short; v is not normalised;
* pairs: the longest response must have at least 2 times as many think tokens as the shortest; fewer than 8 such pairs raise an error;
* steering: the layers of the middle third are tried; ``choose`` picks layer and strength on a dev split.

Units and signs: lengths are numbers of think tokens. **The sign of v is the opposite of the paper's.** In the paper, v points from long to
short: adding it makes thinking *more efficient* (shorter). Here, as for all directions of this toolkit, adding v makes thinking longer. So
to steer as the paper does with strength lambda, use ``edits.steering(v, -lambda, layers=(l,), during="newest")``. Strength 1 adds v itself.
The argument ``typical`` of ``direction`` rescales v to the typical norm of the residual stream at each layer.

Cost: one forward pass for each of two rollouts per problem. ``choose`` runs no model. It needs a table of length and accuracy for every
layer and strength, measured by sampling responses to the dev split under steering. ``doses.choose_dose`` measures this table and calls
``choose``.
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

PUBLISHED_POSITION = (
    "newest"  # steered position (prompt's last token and all response tokens): from a secondary account, see Deviations
)
assumed_ratio = 2.0  # longest over shortest, in think tokens: ours ("usually less than half" is the paper's observation)
assumed_min_pairs = 8  # smallest number of pairs to average: ours
assumed_site = MLP  # the residual stream after the block: ours
assumed_strengths = (-0.25, -0.5, -1.0, -1.5, -2.0)  # tried on dev, in multiples of the class difference: ours
assumed_max_loss = 1.0  # largest loss of accuracy, in percentage points: ours


class TooFewPairsError(ValueError):
    """Too few problems have a correct rollout that thinks much longer than another correct one. Raised by ``pairs``.

    The arguments of ``pairs`` set the limits: ``ratio`` how much longer, ``at_least`` how many problems are enough.
    """


class NothingQualifiesError(ValueError):
    """No combination of layer and strength shortens thinking without too large a loss of accuracy. Raised by ``choose``.

    The argument ``max_loss`` of ``choose`` is the largest allowed loss.
    """


@dataclass(frozen=True)
class LengthPairs:
    """One pair of rollouts per problem, from ``pairs``: the correct rollouts with the shortest and with the longest thinking.

    A ``LengthPairs`` can be called with a rollout, to give its class: ``"short"`` for the shortest rollout of a pair, ``"long"`` for the
    longest, and ``None`` for a rollout that is in no pair. ``len`` gives the number of pairs.

    Attributes:
        samples: Problem id -> sample indices (``Rollout.sample``) of its two rollouts, ``(shortest, longest)``.
        tokens: Problem id -> numbers of think tokens of its two rollouts, ``(shortest, longest)``.
    """

    samples: Mapping[str, tuple[int, int]]
    tokens: Mapping[str, tuple[int, int]]

    def __call__(self, rollout: Rollout) -> str | None:
        short, long = self.samples.get(rollout.problem_id, (None, None))
        return {short: SHORT, long: LONG}.get(rollout.sample) if short is not None else None

    def __len__(self) -> int:
        return len(self.samples)


def pairs(rollouts: Sequence[Rollout], *, ratio: float = assumed_ratio, at_least: int = assumed_min_pairs) -> LengthPairs:
    """Return one pair of rollouts per problem, as a ``LengthPairs``: the correct rollouts with the fewest and with the most think tokens.

    A problem has no pair if its longest correct rollout has less than ``ratio`` times as many think tokens as its shortest. Only rollouts
    with a correct answer and a closed think span of at least one token are considered. Of rollouts with equal length, the one with the
    smallest sample index is taken.

    >>> from toolkit.types import Span
    >>> def rollout(sample, n):  # n think tokens
    ...     return Rollout("q", sample, (0,) * (n + 3), 1, Span(1, n + 1), Span(n + 2, n + 3), "stop", "", correct=True)
    >>> pairs([rollout(0, 10), rollout(1, 30), rollout(2, 12)], at_least=1).tokens
    {'q': (10, 30)}

    Args:
        rollouts: Graded rollouts, several per problem.
        ratio: Smallest allowed value of (think tokens of the longest rollout) / (think tokens of the shortest); above 1.
        at_least: Smallest number of pairs to accept; with fewer pairs, an error is raised.

    Raises:
        TooFewPairsError: Fewer than ``at_least`` problems have a pair; the message gives the counts.
        ValueError: ``ratio`` is not above 1, or two rollouts have the same problem and sample.
    """
    if not ratio > 1:
        raise ValueError(f"ratio={ratio}: need ratio > 1, or a pair would not differ in length.")
    if len({(r.problem_id, r.sample) for r in rollouts}) < len(rollouts):
        raise ValueError("Some rollouts have the same problem and sample: give the samples of merged runs different numbers.")
    correct: dict[str, list[Rollout]] = defaultdict(list)  # problem id -> candidates
    for r in rollouts:
        if r.correct and r.closed and r.think_tokens:
            correct[r.problem_id].append(r)
    by_length = {p: sorted(rs, key=lambda r: (r.think_tokens, r.sample)) for p, rs in correct.items() if len(rs) > 1}
    # Of several longest rollouts, max returns the first, which has the smallest sample index.
    ends = {p: (rs[0], max(rs, key=lambda r: r.think_tokens)) for p, rs in by_length.items()}
    different = {p: e for p, e in ends.items() if e[1].think_tokens >= ratio * e[0].think_tokens}
    if len(different) < at_least:
        ratios = [long.think_tokens / short.think_tokens for short, long in ends.values()]
        spread = np.quantile(ratios, [0.5, 0.95]).round(2).tolist() if ratios else []
        raise TooFewPairsError(
            f"{len(different)} pairs, {at_least} needed: of {len({r.problem_id for r in rollouts})} problems, {len(correct)} have a "
            f"correct rollout that thinks, {len(ends)} have two or more, and in {len(different)} the longest is at least {ratio:g} times "
            f"the shortest (50 %, 95 % quantiles of the ratio: {spread}). Sample more rollouts per problem, sample more problems, or lower ratio."
        )
    return LengthPairs(
        {p: (short.sample, long.sample) for p, (short, long) in different.items()},
        {p: (short.think_tokens, long.think_tokens) for p, (short, long) in different.items()},
    )


def direction(
    moments: Moments,
    kind: str = assumed_site,
    *,
    estimator: Callable[[Moments, str], Direction] = directions.mean_difference,
    typical: Float[Tensor, " layers"] | None = None,
) -> Direction:
    """Return the length direction of each layer: the mean residual stream of the longest minus that of the shortest correct responses.

    The residual stream of each response is first averaged over the positions at which ``moments`` was collected, by default those that
    predict its think tokens. Adding the direction makes thinking longer. (In the paper, arXiv:2506.15647, it has the opposite sign.)

    Args:
        moments: Mean activations of the longest and of the shortest responses, from ``collect.moments(lm, rollouts, pairs(rollouts))``.
        kind: Where the residual stream is read: ``"resid_post"`` (after the block) or ``"resid_mid"`` (after attention).
        estimator: Function that computes the direction from ``moments`` and ``kind``; default: the difference of means.
        typical: Norm to which each layer's vector is scaled, usually the root mean square norm of the residual stream
            (``collect.typical_norm``). ``None`` leaves the vectors as they are.

    Raises:
        ValueError: The moments have different numbers of longest and shortest responses, so they were not collected with ``pairs``.
    """
    counts = {name: moments.n[moments.index(name)] for name in (SHORT, LONG)}
    if counts[SHORT] != counts[LONG]:
        raise ValueError(
            f"These moments hold {counts} rollouts, but pairs give equal counts: collect them with by=efficiency_steering.pairs(...)."
        )
    v = estimator(moments, kind)
    return v if typical is None else directions.in_typical_units(v, typical)


def assumed_layers(n_layers: int) -> range:
    """Return the layers at which to try steering on the dev split: the middle third of the model (our choice).

    >>> list(assumed_layers(12))
    [4, 5, 6, 7]
    """
    # -(-a // b) rounds a / b up. The max makes sure of at least one layer.
    return range(n_layers // 3, max(n_layers // 3 + 1, -(-2 * n_layers // 3)))


@dataclass(frozen=True)
class Choice:
    """A layer and strength of steering, chosen by ``choose``, with the effect of this steering on the dev split.

    Attributes:
        layer: Steered layer.
        strength: Steering strength; a negative strength shortens thinking.
        shortening: Reduction of the mean number of think tokens by steering, as a share of the base model's mean; above 0, at most 1.
        loss: Accuracy of the base model minus accuracy when steered, in percentage points; negative if steering improves accuracy.
    """

    layer: int
    strength: float
    shortening: float
    loss: float


def choose(doses: pd.DataFrame, *, max_loss: float = assumed_max_loss) -> Choice:
    """Return the layer and strength that shorten thinking most, among those that lower accuracy by at most ``max_loss`` percentage points.

    The criterion is ours. Of rows that shorten thinking equally, the one with the smaller ``|strength|`` is chosen, then the one with the
    lower layer. The choice is the best of many, so its effect on the dev split overestimates its true effect: measure it again on the test
    split.

    >>> rows = [(3, -0.5, 40, 0.80, 50, 0.80), (3, -1.0, 30, 0.60, 50, 0.80)]
    >>> choose(pd.DataFrame(rows, columns=["layer", "strength", "think_tokens", "accuracy", "base_think_tokens", "base_accuracy"]))
    Choice(layer=3, strength=-0.5, shortening=0.2, loss=0.0)

    Args:
        doses: Effects of steering along *one* direction on the dev split, one row per layer and strength. ``doses.choose_dose`` measures
            such a table. Columns: ``layer, strength``; ``think_tokens, accuracy`` (means when steered); ``base_think_tokens,
            base_accuracy`` (means without steering). Accuracies are from 0 to 1. Rows with strength 0 are ignored. If there is a column
            ``direction``, all its entries must be equal.
        max_loss: Largest allowed loss of accuracy, in percentage points.

    Raises:
        NothingQualifiesError: No row shortens thinking within ``max_loss``. The message says why, and what to try.
        ValueError: A column is missing or has NaN, or the column ``direction`` has different entries.
    """
    needed = ["layer", "strength", "think_tokens", "accuracy", "base_think_tokens", "base_accuracy"]
    if missing := [name for name in needed if name not in doses]:
        raise ValueError(f"The dose table lacks the columns {missing}: it has {list(doses)}.")
    if "direction" in doses and doses["direction"].nunique() > 1:
        raise ValueError(f"The dose table holds several directions, {sorted(doses['direction'].unique())}: pass the rows of one.")
    if doses[needed].isna().to_numpy().any():
        raise ValueError(f"The dose table has NaN in the columns {list(doses[needed].columns[doses[needed].isna().any()])}.")
    table = doses[doses["strength"] != 0]
    # Rounded, so that floating-point noise neither breaks ties nor moves a loss beyond max_loss.
    table = table.assign(
        shortening=(1 - table["think_tokens"] / table["base_think_tokens"]).round(9),
        loss=(100 * (table["base_accuracy"] - table["accuracy"])).round(9),
        dose=table["strength"].abs(),
    )
    qualified = table[(table["shortening"] > 0) & (table["loss"] <= max_loss)]
    if qualified.empty:
        raise NothingQualifiesError(_why_none_qualifies(table, max_loss))
    best = qualified.sort_values(["shortening", "dose", "layer", "strength"], ascending=[False, True, True, True]).iloc[0]
    return Choice(int(best["layer"]), float(best["strength"]), float(best["shortening"]), float(best["loss"]))


def _why_none_qualifies(table: pd.DataFrame, max_loss: float) -> str:
    """Return the message of the error that ``choose`` raises. It says why no row qualifies, and what to try.

    The possible reasons: no row has a strength other than 0; no row shortens thinking; or every row that shortens thinking lowers accuracy
    by more than ``max_loss``.

    Args:
        table: The argument ``doses`` of ``choose`` without the rows of strength 0, with the columns ``shortening`` (share, 0 to 1) and
            ``loss`` (percentage points).
        max_loss: Largest allowed loss of accuracy, in percentage points.
    """
    if table.empty:
        return "The dose table holds no strength other than 0: measure at least one."
    shorter = table[table["shortening"] > 0]
    if shorter.empty:
        return f"None of {len(table)} layers and strengths shortens thinking: try larger strengths, the opposite sign, or other layers."
    mild = shorter.loc[shorter["loss"].idxmin()]
    return (
        f"{len(shorter)} of {len(table)} layers and strengths shorten thinking, but none at a loss of {max_loss:g} points or less. The "
        f"mildest, layer {mild['layer']:g} at strength {mild['strength']:g}, saves {100 * mild['shortening']:.1f} % at {mild['loss']:.2f} "
        "points. Try smaller strengths or other layers, or allow a larger max_loss."
    )
