"""Statistics of rollouts: paired bootstrap, effects with p-values, correlations, scores of predictions, scores of length control.

Arrays of outcomes are ``[problems, samples]``. Confidence intervals come from a bootstrap that resamples *problems*; all samples of a
problem stay together. ``shortest_accuracy`` is the accuracy of the responses with the shortest thinking. If equally long responses compete
for the last place, it is averaged over all their orders. So it does not depend on the order of the problems.
"""

from toolkit.stats.correlations import correlation
from toolkit.stats.estimates import (
    NO_VARIANCE,
    RESAMPLES,
    UNBOUNDED,
    Bounds,
    Estimate,
    Statistic,
    bootstrap,
    difference,
    mean_of,
    mean_of_others,
    mean_of_smallest,
    mean_where,
    over_problems,
    over_weights,
    resamples,
    shortest_accuracy,
)
from toolkit.stats.lengths import (
    RULER_FLEXIBLE,
    RULER_LEVELS,
    RULER_PRECISE,
    LengthMatch,
    Number,
    Ranges,
    assumed_flexible,
    assumed_precise,
    hits,
    length_match,
    looping,
    ranges_around,
    words,
)
from toolkit.stats.preferences import PairRows, bradley_terry, pair_agreement
from toolkit.stats.scores import auc, balanced_accuracy, holm, permutation_p, r_squared, spearman
from toolkit.stats.seeds import FEW_SEEDS, Draws, Effect, combine, draws, effect, half_width, mean_effect

__all__ = [
    "FEW_SEEDS",
    "NO_VARIANCE",
    "RESAMPLES",
    "RULER_FLEXIBLE",
    "RULER_LEVELS",
    "RULER_PRECISE",
    "UNBOUNDED",
    "Bounds",
    "Draws",
    "Effect",
    "Estimate",
    "LengthMatch",
    "Number",
    "PairRows",
    "Ranges",
    "Statistic",
    "assumed_flexible",
    "assumed_precise",
    "auc",
    "balanced_accuracy",
    "bootstrap",
    "bradley_terry",
    "combine",
    "correlation",
    "difference",
    "draws",
    "effect",
    "half_width",
    "hits",
    "holm",
    "length_match",
    "looping",
    "mean_effect",
    "mean_of",
    "mean_of_others",
    "mean_of_smallest",
    "mean_where",
    "over_problems",
    "over_weights",
    "pair_agreement",
    "permutation_p",
    "r_squared",
    "ranges_around",
    "resamples",
    "shortest_accuracy",
    "spearman",
    "words",
]
