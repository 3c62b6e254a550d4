"""Report on a judge: accuracy, calibration, and its length bias, in one table, whatever gave the scores.

With scores s of responses, and pairs (i, j) of which i is preferred, P(i over j) = sigma(s_i - s_j), sigma the logistic function::

    accuracy            share of the pairs with s_i > s_j                                         a tie counts half
    calibration error   sum over bins b of n_b / n |mean outcome - mean P|                        each pair in both orders; 10 bins
    length correlation  Spearman's correlation of score and length, within prompts
    longer preferred    share of the pairs whose longer response scores higher                    pairs of equal length are left out
    accuracy at equal length    sigma(theta)                                                      ``at_equal_length``
    length effect               phi

    P(judge agrees)  = sigma( theta + phi tanh(d / std(d)) )        d: length of the preferred response minus that of the other

The last model is that of AlpacaEval's length-controlled win rate (Dubois et al., 2024, arXiv:2404.04475, eq. 2). Calibration error: Guo et
al., 2017, arXiv:1706.04599.

Deviations: the model of arXiv:2404.04475 also has a term for the difficulty of each instruction, which needs many systems. Theirs compares
two systems; here the same function serves for that, and for a judge's agreement with preferences. phi is penalised weakly, by ``phi^2 /
2``; theta is not.

Units and signs: lengths in tokens or words, as given; scores in logits, higher is better; shares from 0 to 1. A positive length effect says
that the judge agrees more often if the preferred response is the longer one, at the same margin of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import special

from toolkit import stats
from toolkit.stats import Estimate, PairRows

BINS, TIMES = 10, 500  # bins of probability; bootstrap resamples of the fitted and the binned quantities
# Newton's method: tolerance, most steps, and largest |theta| and |phi| (sigma(10) = 0.99995)
_SETTLED, _STEPS, _LIMIT = 1e-9, 50, 10.0


def report(
    scores: Float[ndarray, " n"],
    lengths: Sequence[float] | ndarray,
    pairs: PairRows,
    problems: Sequence[str] | ndarray,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the table of a judge: accuracy, calibration and length bias, with 95 % bootstrap intervals over problems.

    Args:
        scores: Score of each response, in logits.
        lengths: Length of each response, such as its number of tokens.
        pairs: Rows of pairs of responses to one prompt, the preferred one first.
        problems: Problem id (prompt) of each response.
        seed: Seed of the bootstrap.

    Returns:
        Table with one row per metric of the module, and the columns ``metric, mean, low, high, reference``. ``reference`` is the value that
        the metric has without the judge's fault: 0.5 (chance) for accuracies; for ``calibration error``, the mean error of a calibrated
        judge with the same probabilities and as many pairs; for ``longer preferred``, the share of pairs whose longer response is
        preferred by the labels, averaged like the metric (per problem first); 0 for a correlation and the length effect.

    Raises:
        ValueError: there are no pairs, a pair's responses belong to two problems, or not one number per response.
    """
    lengths, problems = np.asarray(lengths, float), np.asarray(problems, str)
    if not len(pairs) or not len(scores) == len(lengths) == len(problems):
        raise ValueError(
            f"{len(pairs)} pairs, {len(scores)} scores, {len(lengths)} lengths, {len(problems)} problems: give at least one pair, and one "
            "of each of the others per response."
        )
    first, second = pairs[:, 0], pairs[:, 1]
    if (problems[first] != problems[second]).any():
        at = int(np.flatnonzero(problems[first] != problems[second])[0])
        raise ValueError(f"Pair {at} has responses to two problems: scores are comparable within a problem only.")
    of, gap, longer = problems[first], scores[first] - scores[second], lengths[first] - lengths[second]
    agrees = stats.pair_agreement(scores, pairs)
    uneven = longer != 0
    rows = [("accuracy", stats.over_problems(agrees, of, seed=seed), 0.5)]
    rows.append(
        (
            "calibration error",
            stats.over_weights(lambda w: _calibration_errors(gap, w), of, seed=seed, times=TIMES),
            calibrated_error(gap, seed=seed),
        )
    )
    correlation = stats.correlation(scores, lengths, problems, kind="spearman", within=True, seed=seed)
    rows.append(("length correlation", correlation, 0.0))
    if uneven.any():
        takes_longer = np.where(longer > 0, agrees, 1 - agrees)[uneven]
        reference = stats.over_problems((longer[uneven] > 0).astype(float), of[uneven]).mean
        rows.append(("longer preferred", stats.over_problems(takes_longer, of[uneven], seed=seed), reference))
    fair, effect = at_equal_length(agrees, longer, of, seed=seed)
    rows += [("accuracy at equal length", fair, 0.5), ("length effect", effect, 0.0)]
    return pd.DataFrame(
        [(name, e.mean, e.low, e.high, reference) for name, e, reference in rows],
        columns=["metric", "mean", "low", "high", "reference"],
    )


# --- length control ------------------------------------------------------------------------------------------


def at_equal_length(
    wins: Float[ndarray, " n"], longer: Float[ndarray, " n"], problems: Sequence[str] | ndarray, *, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Return the win rate at equal length and the length effect phi (arXiv:2404.04475), with 95 % bootstrap intervals over problems.

    Args:
        wins: Outcome of each comparison for the first response: 1 won, 0 lost, or a number between.
        longer: Length of the first response minus that of the second.
        problems: Problem id of each comparison.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: there are no comparisons, or an outcome is not from 0 to 1.
    """
    wins, longer = np.asarray(wins, float), np.asarray(longer, float)
    if not len(wins) or not ((wins >= 0) & (wins <= 1)).all():
        raise ValueError(f"{len(wins)} outcomes, not all from 0 to 1: give at least one.")
    spread = longer.std()
    term = np.tanh(longer / spread) if spread > 0 else np.zeros(len(longer))
    rate = stats.over_weights(lambda w: special.expit(_fitted(wins, term, w)[:, 0]), problems, seed=seed, times=TIMES)
    return rate, stats.over_weights(lambda w: _fitted(wins, term, w)[:, 1], problems, seed=seed, times=TIMES)


def _fitted(
    wins: Float[ndarray, " n"], term: Float[ndarray, " n"], weights: Float[ndarray, "times n"]
) -> Float[ndarray, "times 2"]:
    """Return theta and phi of greatest penalised likelihood for each row of weights, by Newton's method. Both stay within -10 and 10.

    scikit-learn's classifier takes no outcomes between 0 and 1, has no bound if all outcomes are equal, and fits one set of weights.
    """
    x = np.stack([np.ones(len(term)), term], axis=1)
    w, penalty = np.zeros((len(weights), 2)), np.array([1e-9, 1.0])  # the tiny first entry keeps the matrix invertible
    for _ in range(_STEPS):
        p = special.expit(w @ x.T)
        slope = (weights * (wins - p)) @ x - penalty * w
        curve = np.einsum("tn,ni,nj->tij", weights * p * (1 - p), x, x, optimize=True) + np.diag(penalty)
        step = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        w = np.clip(w + np.clip(step, -2, 2), -_LIMIT, _LIMIT)  # bounded steps: Newton's method may overshoot far from the optimum
        if np.abs(step).max() < _SETTLED:
            break
    return w


# --- calibration ---------------------------------------------------------------------------------------------


def reliability(gap: Float[ndarray, " n"], bins: int = BINS) -> pd.DataFrame:
    """Return the reliability curve of a judge: mean probability and share of right outcomes, per bin of probability.

    Every pair counts in both orders, so the curve is symmetric about (0.5, 0.5), and lies on the diagonal if the judge is calibrated.

    Args:
        gap: Score of the preferred response minus that of the other, one per pair, in logits.
        bins: Number of equally wide bins from 0 to 1.

    Returns:
        Table with one row per bin that is not empty, and the columns ``predicted, observed, share`` (of all pairs).
    """
    from sklearn.calibration import calibration_curve

    p = special.expit(np.concatenate([gap, -gap]))
    observed, predicted = calibration_curve(np.repeat([1, 0], len(gap)), p, n_bins=bins)
    counts = np.bincount(_bin_of(p, bins), minlength=bins)
    return pd.DataFrame({"predicted": predicted, "observed": observed, "share": counts[counts > 0] / len(p)})


def calibration_error(gap: Float[ndarray, " n"], bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance of the reliability curve from the diagonal, weighted by pairs.

    Args:
        gap: Score of the preferred response minus that of the other, one per pair, in logits.
        bins: Number of equally wide bins from 0 to 1.

    >>> round(calibration_error(np.array([2.0, 2.0, 2.0, -2.0])), 3)  # three of four are right, with probability 0.881
    0.131
    """
    return float(_calibration_errors(gap, np.ones((1, len(gap))), bins)[0])


def calibrated_error(gap: Float[ndarray, " n"], *, bins: int = BINS, times: int = 100, seed: int = 0) -> float:
    """Return the mean calibration error of a calibrated judge with the same probabilities. It is above 0, since pairs are finite in number.

    Args:
        gap: Score of the preferred response minus that of the other, one per pair, in logits. Only its size matters.
        bins: Number of equally wide bins from 0 to 1.
        times: Number of draws of all outcomes.
        seed: Seed of the draws.
    """
    rng, size = np.random.default_rng(seed), np.abs(gap)
    right = rng.random((times, len(size))) < special.expit(size)
    return float(np.mean([calibration_error(np.where(row, size, -size), bins) for row in right]))


def _bin_of(p: Float[ndarray, " n"], bins: int) -> ndarray:
    """Return the bin of each probability, as scikit-learn's ``calibration_curve`` numbers them; it returns no counts."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)


def _calibration_errors(
    gap: Float[ndarray, " n"], weights: Float[ndarray, "times n"], bins: int = BINS
) -> Float[ndarray, " times"]:
    """Return the calibration error for each row of weights: ``sum over bins |sum over pairs (outcome - P)| / n``."""
    p = special.expit(np.concatenate([gap, -gap]))
    both, rest = np.concatenate([weights, weights], axis=1), np.repeat([1, 0], len(gap)) - p
    in_bin = _bin_of(p, bins)[:, None] == np.arange(bins)
    return np.abs((both * rest) @ in_bin.astype(float)).sum(axis=1) / both.sum(axis=1)
