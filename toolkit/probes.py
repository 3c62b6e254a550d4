"""Linear probes: how well each layer predicts thinking length.

Probes are scored on problems that they were not fitted on. Cross-validation is by problem, since rollouts of one problem share its wording
and difficulty. Every score comes with a control: the labels are exchanged between problems at random, and a probe of the same kind is
fitted to these *shuffled* labels and scored on them. Score minus control is the *selectivity*: how much better a probe predicts the true
labels than labels that have no relation to the activations.

Intervals are 95 % bootstrap intervals over problems: whole problems are resampled, each with all its rows.

A probe shows which information is present in the activations, not whether the model uses it. To test that, steer along the probe's
direction and compare with steering along random directions.

Probes per head follow Inference-Time Intervention (Li et al., arXiv:2306.03341). Cross-validation by problem and the controls are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import stats
from toolkit.collect import States
from toolkit.directions import SHORT, assumed_penalty, logistic_model, ridge_model
from toolkit.sites import Layout
from toolkit.types import HeadScores

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Function ``(truth, prediction) -> score``; both arguments have one entry per row."""

CLASS_METRICS: Mapping[str, Metric] = {
    "auc": stats.auc,
    "accuracy": lambda truth, margin: stats.balanced_accuracy(truth, margin > 0),
}
TOKEN_METRICS: Mapping[str, Metric] = {"r2": stats.r_squared, "spearman": stats.spearman}


class TooFewProblemsError(ValueError):
    """There are too few problems for cross-validation."""


@dataclass(frozen=True)
class Protocol:
    """Settings of the cross-validation of probes; all defaults are our choices.

    Attributes:
        folds: Number of parts into which the problems are split; each part is predicted by a probe that is fitted to the others.
        penalty: Weight of the L2 penalty relative to the mean loss per row. Features are standardised first. The weight is fixed: it is not
            tuned on the scores.
        seed: Seed of the folds, the shuffled labels and the bootstrap.
        times: Number of bootstrap resamples of problems for each interval. Predictions are resampled; probes are not refitted.
    """

    folds: int = 5
    penalty: float = assumed_penalty
    seed: int = 0
    times: int = 300


def classify(states: States, label: str = SHORT, *, protocol: Protocol = Protocol()) -> pd.DataFrame:
    """Return a table of how well a logistic probe at each layer separates one class from all others, on held-out problems.

    Args:
        states: Activations, from ``collect.states``. Each row is a rollout, or a position in one; the column
            named ``"label"`` of ``states.rows`` holds its class.
        label: The class to separate from the others, by default ``"short"``.
        protocol: Settings of the cross-validation.

    Returns:
        Table with one row per layer and metric. Columns: ``layer``; ``metric`` (``auc``, or ``accuracy`` for balanced accuracy; chance is
        0.5 for both); ``mean, low, high`` (score with a 95 % interval over problems); ``control`` (score with shuffled labels);
        ``selectivity, selectivity_low, selectivity_high`` (``mean`` minus ``control``, with a 95 % interval over problems).

    Raises:
        KeyError: no row has the class.
        TooFewProblemsError: fewer than ``protocol.folds`` problems have rows of the class, or fewer than that have other rows.
    """
    return _by_layer(states, _is(states, label, protocol), logistic_model, CLASS_METRICS, protocol)


def regress(states: States, target: str = "remaining", *, protocol: Protocol = Protocol()) -> pd.DataFrame:
    """Return a table of how well a ridge probe at each layer predicts a number of tokens n, on held-out problems.

    The probe predicts ``log(1 + n)``. For the target ``"remaining"``, compare with ``position_only``: the position in the think span alone
    already predicts the number of remaining tokens to some degree.

    Args:
        states: Activations, from ``collect.states``. For the target ``"remaining"``, each row must be a position (``each=True``), not a
            rollout.
        target: Number of tokens to predict: ``"remaining"`` (think tokens after the row's position) or ``"think_tokens"`` (length of the
            rollout's thinking). Rows where it is NaN are left out.
        protocol: Settings of the cross-validation.

    Returns:
        Table with one row per layer and metric. Columns: ``layer``; ``metric`` (``r2``, share of the variance of ``log(1 + n)`` explained,
        or ``spearman``, rank correlation); ``mean, low, high`` (score with a 95 % interval over problems); ``control`` (score with shuffled
        targets); ``selectivity, selectivity_low, selectivity_high`` (``mean`` minus ``control``, with a 95 % interval over problems).

    Raises:
        KeyError: the states have no column ``target``.
        TooFewProblemsError: there are fewer problems than folds.
    """
    if target not in states.rows:
        raise KeyError(f"These states have no column {target!r}: they have {', '.join(states.rows)}. Collect them with each=True.")
    states = states.take(np.flatnonzero(np.isfinite(states.rows[target].to_numpy(float))))
    if (problems := states.rows["problem_id"].nunique()) < protocol.folds:
        raise TooFewProblemsError(
            f"{target!r} is known for rows of {problems} problems, too few for {protocol.folds} folds: "
            "collect states of more problems, or use fewer folds."
        )
    return _by_layer(states, np.log1p(states.rows[target].to_numpy(float)), ridge_model, TOKEN_METRICS, protocol)


def position_only(states: States, target: str = "remaining", *, protocol: Protocol = Protocol()) -> pd.DataFrame:
    """Return a table of the scores of a baseline for ``regress``: a ridge probe on position alone, without activations.

    The two features of a row are p and ``log(1 + p)``, where p is its position in the think span, in tokens. The table has one row per
    metric, and the columns of ``regress`` except ``layer``.

    Args:
        states: From ``collect.states(..., each=True)``, so that each row is a position. Its activations are not used.
        target: Number of tokens to predict, ``"remaining"`` or ``"think_tokens"``, as for ``regress``.
        protocol: Settings of the cross-validation.
    """
    # The two features take the place of the activations, as a single layer: [rows, 1, 2].
    at = torch.tensor(states.rows["position"].to_numpy(np.float32))
    features = torch.stack([at, at.log1p()], dim=-1)[:, None]
    return regress(replace(states, values=features), target, protocol=protocol).drop(columns="layer")


def classify_heads(
    states: States, heads: int | Layout, label: str = SHORT, *, protocol: Protocol = Protocol()
) -> tuple[HeadScores, HeadScores]:
    """Return two scores per head, ``(score, control)``, of a logistic probe on the head's output.

    Both are balanced accuracies on held-out problems, so chance is 0.5. The control is the score with shuffled labels.

    Args:
        states: Activations of kind ``"z"`` (outputs of the heads), from ``collect.states``. Each row is a rollout, or a position in one;
            the column named ``"label"`` of ``states.rows`` holds its class.
        heads: ``lm.layout``, or the number of heads per layer if it is the same in all layers.
        label: The class that the probe separates from all other rows, by default ``"short"``.
        protocol: Settings of the cross-validation.

    Raises:
        KeyError: no row has the class.
        ValueError: the states are not of kind ``"z"``, or their width is not a multiple of the number of heads.
        TooFewProblemsError: fewer than ``protocol.folds`` problems have rows of the class, or fewer than that have other rows.
    """
    _, layers, width = states.values.shape
    if states.kind != "z" or (isinstance(heads, int) and width % heads):
        raise ValueError(f"States of {states.kind!r}, width {width}, are not the outputs of {heads} heads: collect kind='z'.")
    truth = _is(states, label, protocol)
    # Layer -> outputs of its heads, [rows, heads, head_dim].
    z = {
        layer: states.values[:, layer].unflatten(-1, (heads, -1))
        if isinstance(heads, int)
        else heads.by_head(layer, states.values[:, layer])
        for layer in (range(layers) if isinstance(heads, int) else heads.attention_layers)
    }
    absent = () if isinstance(heads, int) else heads.absent
    scores = []
    for name, y in (("", truth), ("_shuffled", _shuffled(truth, _groups(states), protocol.seed))):
        score = torch.full((layers, heads if isinstance(heads, int) else heads.n_heads), torch.nan, dtype=torch.float64)
        for layer, head in ((layer, head) for layer, values in z.items() for head in range(values.shape[1])):
            margin = out_of_fold(z[layer][:, head].numpy(), y, _problems(states), logistic_model, protocol)
            score[layer, head] = stats.balanced_accuracy(y, margin > 0)
        scores.append(HeadScores(score, f"probe_{label}{name}", "balanced accuracy", states.provenance, absent))
    return scores[0], scores[1]


def out_of_fold(
    x: np.ndarray, y: np.ndarray, problems: np.ndarray, model: Callable[[int, float], Any], protocol: Protocol
) -> np.ndarray:
    """Return one prediction per row, each made by a probe that was fitted to other problems only.

    If ``y`` is boolean, the prediction is the probe's decision value (above 0 means True). Otherwise it is the predicted value of ``y``.

    Args:
        x: Features, ``[rows, features]``.
        y: Labels (boolean) or values to predict, one per row.
        problems: Index or id of the problem of each row.
        model: Function from (number of rows to fit, penalty) to an unfitted scikit-learn estimator, such as ``directions.ridge_model``.
            scikit-learn penalises sums of losses, so the number of rows is needed to weight the penalty.
        protocol: Settings of the cross-validation.

    Raises:
        TooFewProblemsError: ``y`` is boolean, and all rows with one of its two values are in a single fold.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    is_class = y.dtype == bool
    splitter = (StratifiedGroupKFold if is_class else GroupKFold)(protocol.folds, shuffle=True, random_state=protocol.seed)
    predictions = np.full(len(y), np.nan)
    for train, held_out in splitter.split(x, y, problems):
        if is_class and len(np.unique(y[train])) < 2:
            raise TooFewProblemsError("One class is in a single fold only: collect states of more problems, or use fewer folds.")
        fitted = model(len(train), protocol.penalty).fit(x[train], y[train])
        predictions[held_out] = fitted.decision_function(x[held_out]) if is_class else fitted.predict(x[held_out])
    return predictions


def _by_layer(
    states: States, y: np.ndarray, model: Callable[[int, float], Any], metrics: Mapping[str, Metric], protocol: Protocol
) -> pd.DataFrame:
    """Return the table of ``classify`` and ``regress``: scores, controls and selectivities of one probe per layer, for each metric."""
    groups, problems, rows = _groups(states), _problems(states), []
    noise = _shuffled(y, groups, protocol.seed)
    for layer in range(states.values.shape[1]):
        x = states.values[:, layer].numpy()
        predicted, predicted_noise = (out_of_fold(x, target, problems, model, protocol) for target in (y, noise))
        for name, metric in metrics.items():
            real, control = _resampled(metric, y, predicted, groups), _resampled(metric, noise, predicted_noise, groups)
            score, chance, gap = (
                stats.bootstrap(statistic, len(groups), seed=protocol.seed, times=protocol.times)
                for statistic in (real, control, stats.difference(real, control))
            )
            rows.append((layer, name, score.mean, score.low, score.high, chance.mean, gap.mean, gap.low, gap.high))
    columns = "layer metric mean low high control selectivity selectivity_low selectivity_high"
    return pd.DataFrame(rows, columns=columns.split())


def _is(states: States, label: str, protocol: Protocol) -> np.ndarray:
    """Return for each row whether it has the class ``label``.

    Raises:
        TooFewProblemsError: Fewer than ``protocol.folds`` problems have rows of the class, or fewer than that have other rows.
    """
    truth = np.zeros(len(states.rows), bool)
    truth[states.of(label)] = True
    inside, outside = (states.rows.loc[side, "problem_id"].nunique() for side in (truth, ~truth))
    if min(inside, outside) < protocol.folds:
        raise TooFewProblemsError(
            f"{inside} problems have rows of class {label!r} and {outside} have others, too few for {protocol.folds} folds: "
            "collect states of more problems, widen the class, or use fewer folds."
        )
    return truth


def _shuffled(y: np.ndarray, groups: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Return shuffled labels: each problem gets all labels of a problem that is chosen at random, which may be the problem itself.

    No two problems get the labels of the same problem. The labels that a problem gets are put in random order. If the problem has more rows
    than it gets labels, the labels are repeated. If it has fewer rows, the remaining labels are not used.

    The labels of a problem move together, so the rows of a problem have labels that are as similar as before. That makes the control fair:
    a probe that only recognises problems scores as well on the shuffled labels as on the true ones.

    Args:
        y: Labels or values, one per row.
        groups: Indices of the rows of each problem.
        seed: Random seed.
    """
    rng, shuffled = np.random.default_rng(seed), np.empty_like(y)
    for rows, donor in zip(groups, rng.permutation(len(groups)), strict=True):
        # resize repeats or cuts the donor's labels to the problem's number of rows.
        shuffled[rows] = np.resize(rng.permutation(y[groups[donor]]), len(rows))
    return shuffled


def _resampled(metric: Metric, y: np.ndarray, predicted: np.ndarray, groups: Sequence[np.ndarray]) -> stats.Statistic:
    """Return a function that takes resamples of problems and returns the metric on the rows of each resample.

    ``stats.bootstrap`` calls the function. The resamples are an array ``[resamples, problems]`` of indices into ``groups``.

    Args:
        metric: Function ``(truth, prediction) -> score``.
        y: True label or value of each row.
        predicted: Prediction for each row.
        groups: Indices of the rows of each problem.
    """

    def statistic(index: np.ndarray) -> np.ndarray:
        drawn = (np.concatenate([groups[i] for i in row]) for row in index)
        return np.array([metric(y[rows], predicted[rows]) for rows in drawn])

    return statistic


def _problems(states: States) -> np.ndarray:
    """Return the problem of each row, as an index from 0."""
    return pd.factorize(states.rows["problem_id"])[0]


def _groups(states: States) -> list[np.ndarray]:
    """Return the indices of the rows of each problem."""
    problems = _problems(states)
    return [np.flatnonzero(problems == i) for i in range(problems.max() + 1)]
