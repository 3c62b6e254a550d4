"""Test the five properties of retrieval heads that arXiv:2404.15574 claims, each as ``Claim`` objects with intervals and controls.

The input is the *copy score* of every head in each example: the share of the needle's distinct tokens that the head copies (see
``methods.retrieval_heads``). A head is a *retrieval head* if its mean score is above 0.1. The paper claims that such heads are

* universal: every model that can retrieve has them (``universal``);
* sparse: they are less than 5 % of all heads (``sparse``);
* intrinsic: a model derived from another has the same ones, with a correlation of scores above 0.8 (``intrinsic``);
* dynamic: some are active in every context, the others in some contexts only (``dynamic``);
* causal: masking them breaks retrieval, and masking random heads does not (``causal``).

Heads that are selected for their score are judged on other examples: those with even index on the selection from those with odd index, and
the reverse (*held out*). Random controls of the copy scores need no draws: the expected value over all random choices of heads is computed
exactly. The controls of masking (``causal``) are drawn. Intervals are 95 %, from a bootstrap over examples that leaves the selection fixed.
The share of heads in ``sparse`` has another interval, from one interval per head. The sizes that count as an effect are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats as scipy_stats

from toolkit import stats
from toolkit.claims import Claim
from toolkit.methods.retrieval_heads import PUBLISHED_THRESHOLD, HeadMetrics
from toolkit.stats import Effect, Estimate

SOURCE, CONTROL = "2404.15574", "control"
PUBLISHED_SPARSE = 0.05  # fewer than 5 % of the heads: abstract
PUBLISHED_INTRINSIC = 0.8  # correlation of a base model's scores with those of a derived model: section 3
SMALLEST = 0.1  # smallest effect that counts, as a share or a correlation: ours
SMALLEST_SPARSE = 0.01  # smallest difference from 5 % of the heads that counts: ours


@dataclass(frozen=True)
class CopyScores:
    """Copy scores of one model, per example and head.

    Attributes:
        name: Name of the model in the claims.
        copy: Scores from 0 to 1, ``[examples, heads]``, of the heads that exist.
        layers: Layer of each head.
        kinds: Kind of each example, such as the kind of fact that is hidden. ``dynamic`` compares examples of equal and different kinds.
    """

    name: str
    copy: Float[ndarray, "examples heads"]
    layers: Int[ndarray, " _"]
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        n, heads = self.copy.shape
        if n < 4 or len(self.layers) != heads or len(self.kinds) != n or not np.isfinite(self.copy).all():
            raise ValueError(
                f"{self.name}: scores of {n} examples and {heads} heads, {len(self.layers)} layers, {len(self.kinds)} kinds: need at least "
                "4 examples, finite scores, one layer per head and one kind per example."
            )


def copy_scores(name: str, metrics: HeadMetrics, kinds: Sequence[str]) -> CopyScores:
    """Return the copy scores of a model, from ``retrieval_heads.measure``. ``CopyScores`` has the other arguments."""
    layers, _ = metrics.present.nonzero(as_tuple=True)
    return CopyScores(name, metrics.values["copy"][:, metrics.present].double().numpy(), layers.numpy(), tuple(kinds))


def held_out(
    scores: Float[ndarray, "examples heads"], select: Callable[[Float[ndarray, " heads"]], Bool[ndarray, " heads"]]
) -> Bool[ndarray, "examples heads"]:
    """Return for each example which heads are selected by their mean score on the *other* half of the examples.

    Args:
        scores: One score per example and head. Examples with even and with odd index are the two halves.
        select: Function from the mean score of each head to a mask of the selected heads.

    >>> held_out(np.array([[1.0, 0.0], [0.0, 1.0]]), lambda mean: mean > 0.5).tolist()
    [[False, True], [True, False]]
    """
    chosen = np.zeros(scores.shape, bool)
    chosen[0::2], chosen[1::2] = select(scores[1::2].mean(axis=0)), select(scores[0::2].mean(axis=0))
    return chosen


def top(count: int) -> Callable[[ndarray], ndarray]:
    """Return a function from scores to a mask of the ``count`` highest ones; of equal scores, the first are taken."""

    def select(mean: ndarray) -> ndarray:
        mask = np.zeros(len(mean), bool)
        mask[np.argsort(-mean, kind="stable")[:count]] = True
        return mask

    return select


def universal(scores: CopyScores) -> list[Claim]:
    """Return two claims: the strongest head's held-out score is above 0.1, and is higher than that of a random other head."""
    best, others = _selected_and_others(scores.copy, held_out(scores.copy, top(1)))
    n = len(best)
    return [
        Claim(
            text=f"universal: {scores.name} has a head with a copy score above {PUBLISHED_THRESHOLD}",
            source=SOURCE,
            estimate=stats.bootstrap(stats.mean_of(best[:, None]), n),
            smallest=0.0,
            unit="points",
            beyond=PUBLISHED_THRESHOLD,
        ),
        Claim(
            text=f"universal: {scores.name}'s strongest head copies more than a random other head",
            source=CONTROL,
            estimate=stats.bootstrap(stats.mean_of((best - others)[:, None]), n),
            smallest=SMALLEST,
            unit="points",
        ),
    ]


def sparse(scores: CopyScores) -> list[Claim]:
    """Return two claims: under 5 % of the heads are retrieval heads, and the strongest 5 % copy more than random 5 %.

    The first estimate is minus the share of heads with a mean score above 0.1, so that + is the claimed direction (see ``_share_above``). The
    second is the share of all copying (sum of scores) that the strongest heads do, selected on held-out examples, minus their share of the
    heads.
    """
    copy, heads = scores.copy, scores.copy.shape[1]
    count = max(1, math.ceil(PUBLISHED_SPARSE * heads))
    done, share = (copy * held_out(copy, top(count))).sum(axis=1), _share_above(copy, PUBLISHED_THRESHOLD)

    def concentrated(index: ndarray) -> ndarray:
        total = copy.sum(axis=1)[index].sum(axis=1)
        # Without any copying, no head copies more than another.
        return np.where(total > 0, done[index].sum(axis=1) / np.where(total > 0, total, 1.0) - count / heads, 0.0)

    return [
        Claim(
            text=f"sparse: fewer than 5 % of {scores.name}'s heads are retrieval heads (share, negative)",
            source=SOURCE,
            estimate=Estimate(-share.mean, -share.high, -share.low),
            smallest=SMALLEST_SPARSE,
            unit="points",
            beyond=-PUBLISHED_SPARSE,
        ),
        Claim(
            text=f"sparse: the strongest {count} of {scores.name}'s {heads} heads do more of the copying than {count} random ones",
            source=CONTROL,
            estimate=stats.bootstrap(concentrated, len(copy)),
            smallest=SMALLEST,
            unit="points",
        ),
    ]


def intrinsic(base: CopyScores, derived: CopyScores) -> list[Claim]:
    """Return two claims: the scores of a derived model correlate with the base model's (above 0.8), and more than shuffled ones do.

    The correlation is that of the expected scores: noise from the examples does not lower it, as it lowers that of the measured means (see
    ``_correlation``). The control shuffles the heads of the derived model within each layer; its expected correlation is subtracted.
    Examples are paired, so both models must have answered the same ones, in the same order.

    Raises:
        ValueError: the models have different heads, or different numbers of examples.
    """
    if base.copy.shape != derived.copy.shape or not np.array_equal(base.layers, derived.layers):
        raise ValueError(
            f"{base.name} has scores {base.copy.shape}, {derived.name} {derived.copy.shape} [examples, heads]: measure both on the same "
            "examples, and compare models with the same heads only."
        )
    real, control = (_correlation(base, derived, shuffled=shuffled) for shuffled in (False, True))
    examples = np.arange(len(base.copy))
    return [
        Claim(
            text=f"intrinsic: {derived.name}'s head scores correlate with {base.name}'s above {PUBLISHED_INTRINSIC}",
            source=SOURCE,
            estimate=stats.over_weights(real, examples),
            smallest=0.0,
            unit="correlation",
            beyond=PUBLISHED_INTRINSIC,
        ),
        Claim(
            text=f"intrinsic: {derived.name}'s head scores correlate with {base.name}'s more than with heads shuffled within layers",
            source=CONTROL,
            estimate=stats.over_weights(stats.difference(real, control), examples),
            smallest=SMALLEST,
            unit="correlation",
        ),
    ]


def dynamic(scores: CopyScores) -> list[Claim]:
    """Return up to four claims about when heads are active, that is, copy at least one token of the needle.

    1. The head that is active most often is active in over 95 % of the examples; 2. it is active more often than a random other head.
    3. Retrieval heads are silent in some examples: the mean share of silent ones is above 0.
    4. Which of them are active depends on the context: their active sets overlap (Jaccard) more in examples of equal kind than in examples
    of different kind. Random kinds have the expected difference 0.

    Heads are selected on held-out examples, except for claim 4, which takes the heads from all examples. Claims 3 and 4 need at least two
    retrieval heads in both halves; without them they are left out, as is claim 4 if all examples are of one kind.
    """
    active = (scores.copy > 0).astype(float)
    often, others = _selected_and_others(active, held_out(active, top(1)))
    n = len(active)
    claims = [
        Claim(
            text=f"dynamic: some head of {scores.name} is active in over 95 % of the examples",
            source=SOURCE,
            estimate=stats.bootstrap(stats.mean_of(often[:, None]), n),
            smallest=0.0,
            unit="points",
            beyond=0.95,
        ),
        Claim(
            text=f"dynamic: {scores.name}'s most active head is active more often than a random other head",
            source=CONTROL,
            estimate=stats.bootstrap(stats.mean_of((often - others)[:, None]), n),
            smallest=SMALLEST,
            unit="points",
        ),
    ]
    chosen = held_out(scores.copy, lambda mean: mean > PUBLISHED_THRESHOLD)
    if chosen.sum(axis=1).min() < 2:
        return claims
    silent = 1 - (active * chosen).sum(axis=1) / chosen.sum(axis=1)
    claims.append(
        Claim(
            text=f"dynamic: retrieval heads of {scores.name} are silent in some examples (mean share of silent ones)",
            source=SOURCE,
            estimate=stats.bootstrap(stats.mean_of(silent[:, None]), n),
            smallest=SMALLEST,
            unit="points",
        )
    )
    if len(set(scores.kinds)) > 1:
        both = active[:, scores.copy.mean(axis=0) > PUBLISHED_THRESHOLD]
        claims.append(
            Claim(
                text=f"dynamic: the same retrieval heads of {scores.name} are active in examples of one kind, more than across kinds",
                source=CONTROL,
                estimate=stats.bootstrap(_by_kind(both, scores.kinds), n),
                smallest=SMALLEST,
                unit="points",
            )
        )
    return claims


def causal(name: str, row: Mapping[str, float]) -> list[Claim]:
    """Return two claims from one row of ``masking.masking_effects``: masking retrieval heads costs accuracy, and more than random heads.

    The second claim is left out if there were no random controls. With fewer than three it is not judged: ``not judged: 1 seed``; each
    control has a seed.

    Args:
        name: Model and mask in the claims, such as ``"tiny reasoner, 4 heads by write"``.
        row: Columns of ``masking_effects``; a missing number is ``None`` or NaN. ``draws``, the number of different controls, is needed if
            ``more_than_random`` is there.
    """
    texts = {
        "lost": (f"causal: accuracy lost, {name}", SOURCE),
        "more_than_random": (f"causal: more than random heads, {name}", CONTROL),
    }

    def estimate(column: str, source: str) -> Effect:
        draws = row["draws"] if source == CONTROL else stats.FEW_SEEDS
        few = f"{draws:.0f} seed{'s' * (draws > 1)}" if draws < stats.FEW_SEEDS else ""
        return Effect(row[column], row[f"{column}_low"], row[f"{column}_high"], math.nan, few)

    return [
        Claim(text=text, source=source, estimate=estimate(column, source), smallest=SMALLEST, unit="points")
        for column, (text, source) in texts.items()
        if row[column] is not None and not math.isnan(row[column])
    ]


def _selected_and_others(values: ndarray, chosen: ndarray) -> tuple[Float[ndarray, " examples"], Float[ndarray, " examples"]]:
    """Return two means per example: over the chosen heads, and over all others (the expected value of a random other head)."""
    return tuple((values * mask).sum(axis=1) / mask.sum(axis=1) for mask in (chosen, ~chosen))  # type: ignore[return-value]


def _share_above(scores: Float[ndarray, "examples heads"], threshold: float) -> Estimate:
    """Return the share of heads with a mean score above a threshold, with a 95 % interval.

    Each head has a t interval over examples, with Bonferroni's correction: with 95 % confidence, all heads' expected scores lie in their
    intervals together. The share's interval then runs from the heads whose interval is above the threshold to those whose interval is not
    below it. It covers at least 95 %, and usually more, if the t intervals do.

    A bootstrap of the share would not cover: a resample adds the noise of the examples a second time, and moves heads across the threshold
    mostly in one direction, away from where most heads are.

    Two errors remain. The share itself counts measured means, so with many heads a little below the threshold it is too large. A head with
    equal scores in all examples, such as one that never copies, counts as measured without error.
    """
    n = len(scores)
    mean, error = scores.mean(axis=0), scores.std(axis=0, ddof=1) / math.sqrt(n)
    reach = error * scipy_stats.t.isf(0.025 / max((error > 0).sum(), 1), n - 1)
    low, share, high = (float((end > threshold).mean()) for end in (mean - reach, mean, mean + reach))
    return Estimate(share, low, high)


def _correlation(base: CopyScores, derived: CopyScores, *, shuffled: bool) -> Callable[[ndarray], ndarray]:
    """Return a function from weights of examples ``[times, examples]`` to the correlation over heads of expected scores, from -1 to 1.

    It is Pearson's formula, with each variance and the covariance over heads averaged over all pairs of *different* examples: the product
    of scores in example i and in example j, i != j. The noise of different examples is independent, so these averages have the expected
    values of a measurement without noise. (Spearman's correction for attenuation does the same with split halves.) An example that a
    resample draws twice makes no pair with itself. So a resample adds no noise, and the percentile interval is not pushed to one side.

    What remains: a ratio of unbiased averages has a small bias, of the order of 1 / examples; with few examples, values beyond 1 are cut.
    The statistic is 0 if an average variance is not above 0, as for a model that copies nothing.

    With ``shuffled``, it is the expected correlation if the heads of the derived model are shuffled within layers. The expected value of a
    shuffled head is the mean of its layer, and shuffling does not change the variance.
    """
    a, b = (s.copy - s.copy.mean(axis=1, keepdims=True) for s in (base, derived))
    layers = base.layers[:, None] == base.layers
    other = b @ (layers / layers.sum(axis=1, keepdims=True)) if shuffled else b
    products = [a @ a.T, b @ b.T, a @ other.T]  # [examples, examples], sums over heads

    def statistic(weights: ndarray) -> ndarray:
        # Sums over pairs of examples, minus those of an example with itself.
        x, y, xy = (((weights @ p) * weights).sum(axis=1) - np.square(weights) @ np.diag(p) for p in products)
        defined = (x > 1e-12) & (y > 1e-12)
        return np.where(defined, np.clip(xy / np.sqrt(np.where(defined, x * y, 1.0)), -1.0, 1.0), 0.0)

    return statistic


def _by_kind(active: Float[ndarray, "examples heads"], kinds: Sequence[str]) -> stats.Statistic:
    """Return a statistic: mean Jaccard overlap of the active heads of two examples of equal kind, minus that of two of different kinds."""
    names = np.unique(np.asarray(kinds), return_inverse=True)[1]
    both = active @ active.T
    either = active.sum(axis=1)[:, None] + active.sum(axis=1) - both
    jaccard = np.where(either > 0, both / np.where(either > 0, either, 1.0), 1.0)  # two empty sets are equal
    same = names[:, None] == names
    other = ~np.eye(len(active), dtype=bool)  # an example drawn twice is no pair

    def statistic(index: ndarray) -> ndarray:
        means = []
        for row in index:
            at = np.ix_(row, row)
            equal, different = same[at] & other[at], ~same[at]
            ok = equal.any() and different.any()
            means.append(jaccard[at][equal].mean() - jaccard[at][different].mean() if ok else 0.0)
        return np.array(means)

    return statistic
