"""Estimators of the direction of thinking length; random controls, cosines, stability and relative doses. Nothing here runs a model.

An estimator is a function from ``Moments`` (or from ``States``, if it needs single examples) to a ``Direction``. Its arguments ``pos`` and
``neg`` name the long and the short class, and + is longer.

Only the difference of means has a meaningful norm. The vectors of all other estimators are rescaled, layer by layer, to the norm of the
corresponding difference of means. Steering along any of them with the same strength then adds a vector of the same norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import stats
from toolkit.collect import States
from toolkit.types import LONG as LONG
from toolkit.types import SHORT as SHORT
from toolkit.types import Direction, Moments

assumed_penalty = 1.0  # L2 penalty of probes, per example, on standardised features: ours
assumed_resamples = 200  # number of resamples or splits in the stability measures: ours


class NoPairsError(ValueError):
    """No problem has examples of both classes, so there are no pairs within problems."""


def mean_difference(moments: Moments, kind: str, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the mean of class ``pos`` minus the mean of class ``neg``, per layer, not normalised; + is longer.

    Raises:
        KeyError: no such class or site kind in the moments.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> sums = {"resid_mid": torch.tensor([[[6.0, 2.0]], [[2.0, 2.0]]])}  # [labels, layers, width]
    >>> moments = Moments(("long", "short"), (2, 1), "think", sums, {}, made)
    >>> mean_difference(moments, "resid_mid").vector.tolist()
    [[1.0, -1.0]]
    """
    return _direction(moments, kind, "mean_difference", moments.mean(kind, pos) - moments.mean(kind, neg), (pos, neg))


def whitened(moments: Moments, kind: str, *, shrinkage: float = 0.1, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the linear-discriminant direction: the inverse within-class covariance times the mean difference, pos minus neg.

    It is our addition: it gives less weight to components that vary for other reasons than length, such as content. Each layer's vector is
    rescaled to the norm of the mean difference.

    Args:
        moments: Moments with outer products of ``kind``.
        kind: Site kind.
        shrinkage: The covariance C is replaced by ``(1 - shrinkage) C + shrinkage * (mean variance) * identity``; in (0, 1]. The default
            is our choice.

    Raises:
        KeyError: outer products of ``kind`` were not collected.
        ValueError: ``shrinkage`` is outside (0, 1].
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: need 0 < shrinkage <= 1.")
    delta = moments.mean(kind, pos) - moments.mean(kind, neg)
    covariance = moments.covariance(kind)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    vector = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * variance * eye, delta)
    return _direction(moments, kind, "whitened", _rescaled(vector, delta), (pos, neg))


# --- estimators over states ----------------------------------------------------------------------------------

Estimator = Callable[[States], Direction]
"""A function from states to a direction, such as ``paired_difference``."""


def unpaired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the mean of the rows of class ``pos`` minus the mean of the rows of class ``neg``, fp64, like ``mean_difference``."""
    return _of_rows(states, "mean_difference", _gap(states, pos, neg), states.of(pos), states.of(neg))


def paired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the mean of class ``pos`` minus the mean of class ``neg`` within each problem, averaged over problems, fp64.

    Only problems with both classes count. Differences between problems (difficulty, wording) cancel out; in an unpaired difference they
    do not.

    Raises:
        NoPairsError: no problem has both classes.
    """
    delta = differences(states, pos=pos, neg=neg)
    return _of_pairs(states, "paired_mean_difference", delta.mean(dim=0), delta)


def pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the first principal component of the states of both classes, signed like the mean difference so that + is longer.

    It is the direction of largest variance, which may have nothing to do with length: compare it with other directions by ``cosine``.
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    delta = _gap(states, pos, neg)
    vector = _first_component(states.values[torch.from_numpy(index)].double())
    return _of_rows(states, "pca", _signed(vector, delta), states.of(pos), states.of(neg))


def paired_pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the first principal component of the differences within problems, signed like their mean so that + is longer.

    Each difference (long minus short) enters with both signs. Their mean is then zero, so that centring does not remove the part that all
    differences share.

    Raises:
        NoPairsError: no problem has both classes.
    """
    delta = differences(states, pos=pos, neg=neg)
    vector = _first_component(torch.cat([delta, -delta]))
    return _of_pairs(states, "paired_pca", _signed(vector, delta.mean(dim=0)), delta)


def logistic(states: States, *, pos: str = LONG, neg: str = SHORT, penalty: float = assumed_penalty) -> Direction:
    """Return the weight vector, in activation space, of a logistic probe that separates class ``pos`` from class ``neg``.

    It points towards ``pos`` and is rescaled to the norm of the difference of means. ``probes.classify`` measures how well such a probe
    predicts.

    Args:
        penalty: L2 penalty per example on standardised features (see ``logistic_model``).
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    target = np.repeat([1, 0], [len(states.of(pos)), len(states.of(neg))])
    vector = _probe_normals(states.take(index), target, logistic_model(len(index), penalty))
    return _of_rows(states, "logistic", _rescaled(vector, _gap(states, pos, neg)), states.of(pos), states.of(neg))


def ridge(states: States, target: str = "think_tokens", *, penalty: float = assumed_penalty) -> Direction:
    """Return the weight vector of a ridge regression that predicts ``log1p(target)`` from the states. It needs no classes.

    The vector is rescaled to the norm of the difference of means between the rows above the median of the target and all other rows.
    ``probes.regress`` measures how well such a probe predicts.

    Args:
        target: Column of ``states.rows`` in tokens: ``"think_tokens"`` or ``"remaining"``. Rows with NaN are left out.
        penalty: L2 penalty per example on standardised features (see ``ridge_model``).

    Raises:
        ValueError: the target is constant.
    """
    tokens = states.rows[target].to_numpy(float)
    states, tokens = states.take(np.flatnonzero(np.isfinite(tokens))), tokens[np.isfinite(tokens)]
    above = tokens > np.median(tokens) if len(tokens) else np.zeros(0, bool)
    if not above.any():
        raise ValueError(f"{target!r} does not vary enough over {len(tokens)} rows for a regression: collect more rollouts.")
    long, short = np.flatnonzero(above), np.flatnonzero(~above)
    vector = _probe_normals(states, np.log1p(tokens), ridge_model(len(tokens), penalty))
    gap = states.values[above].double().mean(dim=0) - states.values[~above].double().mean(dim=0)
    return _of_rows(states, f"ridge({target})", _rescaled(vector, gap), long, short)


def differences(states: States, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, "problems layers width"]:
    """Return, per problem with both classes, the mean of its ``pos`` rows minus the mean of its ``neg`` rows, fp64.

    Raises:
        NoPairsError: no problem has both classes.
    """
    labels, gaps = states.rows["label"].to_numpy(), []
    for index in _by_problem(states).values():
        longs, shorts = index[labels[index] == pos], index[labels[index] == neg]
        if len(longs) and len(shorts):
            gaps.append(states.values[longs].double().mean(dim=0) - states.values[shorts].double().mean(dim=0))
    if not gaps:
        raise NoPairsError(
            f"None of the {states.rows['problem_id'].nunique()} problems has both a {pos!r} and a {neg!r} example. "
            "Sample more rollouts per problem, choose classes within problems, or use the unpaired estimator."
        )
    return torch.stack(gaps)


def logistic_model(examples: int, penalty: float = assumed_penalty) -> Any:
    """Return an unfitted logistic regression on standardised features, with balanced classes.

    It minimises mean loss + penalty / 2 |w|^2 when it is fitted to ``examples`` rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=1 / (examples * penalty), class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), classifier)


def ridge_model(examples: int, penalty: float = assumed_penalty) -> Any:
    """Return an unfitted ridge regression on standardised features.

    It minimises mean squared error + penalty |w|^2 when it is fitted to ``examples`` rows.
    """
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=examples * penalty))


# --- controls and comparisons --------------------------------------------------------------------------------


def random_like(direction: Direction, *, seed: int) -> Direction:
    """Return a random direction with the norm of ``direction`` in every layer, as the control for steering or edits along ``direction``.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> direction = Direction(torch.ones(2, 4), "resid_mid", "think", "mean_difference", 10, 10, made)
    >>> control = random_like(direction, seed=0)
    >>> control.estimator, control.norms.tolist()
    ('random(seed=0)', [2.0, 2.0])
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(direction.vector.shape, generator=generator, dtype=direction.vector.dtype)
    vector = vector * (direction.norms / vector.norm(dim=-1))[:, None]
    return Direction(
        vector, direction.kind, direction.positions, f"random(seed={seed})", direction.n_pos, direction.n_neg, direction.provenance
    )


def cosine(a: Direction, b: Direction) -> Float[Tensor, " layers"]:
    """Return the cosine between two directions, per layer.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> a = Direction(torch.tensor([[3.0, 4.0]]), "resid_mid", "think", "mean_difference", 10, 10, made)
    >>> b = Direction(torch.tensor([[1.0, 0.0]]), "resid_mid", "think", "pca", 10, 10, made)
    >>> round(float(cosine(a, b)[0]), 4)
    0.6
    """
    return torch.cosine_similarity(a.vector, b.vector, dim=-1)


def cosines(named: Mapping[str, Direction]) -> pd.DataFrame:
    """Return the cosines between all pairs of named directions: one row per layer, one column ``"a / b"`` per pair."""
    pairs = {f"{a} / {b}": cosine(named[a], named[b]).numpy() for a, b in combinations(named, 2)}
    return pd.DataFrame(pairs).rename_axis("layer")


def separation(moments: Moments, direction: Direction, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """Return d' per layer: the difference of the class means (pos minus neg) along the direction, in within-class standard deviations.

    The standard deviation is taken over single positions, not over example means.

    Raises:
        KeyError: outer products at the direction's kind of site were not collected.
    """
    unit = direction.unit()
    gap = ((moments.mean(direction.kind, pos) - moments.mean(direction.kind, neg)) * unit).sum(dim=-1)
    variance = torch.einsum("li,lij,lj->l", unit, moments.covariance(direction.kind), unit)
    return gap / variance.clamp(min=1e-12).sqrt()


# --- dose ----------------------------------------------------------------------------------------------------


def typical_norm(moments: Moments, kind: str) -> Float[Tensor, " layers"]:
    """Return the typical norm of the activations h per layer: the root mean square of ``|h|`` over positions.

    It is computed from the outer products in the moments. Without outer products, use ``collect.typical_norm``, which runs the model.

    Raises:
        KeyError: outer products of ``kind`` were not collected.
    """
    if kind not in moments.outer:
        raise KeyError(f"No second moments of {kind!r}: collect with second=({kind!r},), or use collect.typical_norm.")
    return (moments.outer[kind].diagonal(dim1=-2, dim2=-1).sum(dim=-1).sum(dim=0) / sum(moments.n)).sqrt()


def relative_dose(direction: Direction, strength: float, typical: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """Return ``|strength * v| / |h|`` per layer (0 or more): the norm of the added vector divided by the typical norm of activations.

    Example: with vectors of norm 2, strength -0.5 and a typical norm of 10 it is 0.1.

    Args:
        typical: Typical norm of the activations per layer, from ``typical_norm``.
    """
    return abs(strength) * direction.norms / typical


def in_typical_units(direction: Direction, typical: Float[Tensor, " layers"]) -> Direction:
    """Return the direction rescaled to the typical norm of the activations in every layer (our addition).

    Steering along it with strength 0.1 then adds a vector of a tenth of the typical norm.

    Args:
        typical: Typical norm of the activations per layer, from ``typical_norm``.
    """
    scaled = direction.unit() * typical[:, None].to(direction.vector)
    return replace(direction, vector=scaled, estimator=f"{direction.estimator}, typical norm")


# --- stability -----------------------------------------------------------------------------------------------


def bootstrap_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Return the cosine between the direction estimated from resampled problems and the direction estimated from all problems.

    Problems are resampled with replacement; one that is drawn twice counts as two problems. Resamples share examples with the full sample,
    so even a direction of pure noise has a cosine of about 0.7 (1/sqrt 2) here; in ``split_half_cosine`` its cosine is about 0.

    Args:
        estimator: Function from states to a direction.
        times: Number of resamples.
        level: Share of the resamples between ``low`` and ``high``.

    Returns:
        One row per layer, with columns ``mean, low, high`` of the cosine over resamples.
    """
    groups = list(_by_problem(states).values())
    full = estimator(states)
    drawn = stats.resamples(len(groups), seed=seed, times=times)
    return _interval(torch.stack([cosine(estimator(_problems(states, groups, row)), full) for row in drawn]), level)


def split_half_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Return the cosine between the directions estimated from two random halves of the problems.

    Each half has only half the data, so the direction from all problems is at least as stable.

    Args:
        estimator: Function from states to a direction.
        times: Number of random splits.
        level: Share of the splits between ``low`` and ``high``.

    Returns:
        One row per layer, with columns ``mean, low, high`` of the cosine over splits.

    Raises:
        ValueError: there is only one problem.
    """
    groups = list(_by_problem(states).values())
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} problem cannot be split into halves: collect states of more problems.")
    rng, half, values = np.random.default_rng(seed), len(groups) // 2, []
    for _ in range(times):
        order = rng.permutation(len(groups))
        first, second = (estimator(_problems(states, groups, part)) for part in (order[:half], order[half:]))
        values.append(cosine(first, second))
    return _interval(torch.stack(values), level)


def _interval(cosines: Float[Tensor, "times layers"], level: float) -> pd.DataFrame:
    low, high = np.quantile(cosines.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"mean": cosines.mean(dim=0).numpy(), "low": low, "high": high}).rename_axis("layer")


def _problems(states: States, groups: list[np.ndarray], chosen: np.ndarray) -> States:
    """Return the states of the chosen problems. A problem that is chosen twice becomes two problems."""
    part = states.take(np.concatenate([groups[i] for i in chosen]))
    copies = np.repeat(np.arange(len(chosen)), [len(groups[i]) for i in chosen])
    ids = [f"{p}#{c}" for p, c in zip(part.rows["problem_id"], copies, strict=True)]
    return replace(part, rows=part.rows.assign(problem_id=ids))


def _by_problem(states: States) -> dict[Any, np.ndarray]:
    """Return the row indices of each problem, in order of appearance."""
    return {k: np.asarray(v) for k, v in states.rows.groupby("problem_id", sort=False).indices.items()}


# --- shared --------------------------------------------------------------------------------------------------


def _gap(states: States, pos: str, neg: str) -> Float[Tensor, "layers width"]:
    return states.values[states.of(pos)].double().mean(dim=0) - states.values[states.of(neg)].double().mean(dim=0)


def _layers(values: Float[Tensor, "rows layers width"]) -> Iterator[np.ndarray]:
    return (values[:, layer].double().numpy() for layer in range(values.shape[1]))


def _first_component(values: Float[Tensor, "rows layers width"]) -> Float[Tensor, "layers width"]:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # PCA divides by the total variance, which is 0 in a layer without variance
        components = [PCA(1, svd_solver="full").fit(x).components_[0] for x in _layers(values)]
    return torch.from_numpy(np.stack(components))


def _probe_normals(states: States, target: np.ndarray, model: Any) -> Float[Tensor, "layers width"]:
    """Return the gradient of the probe's score with respect to the states before standardisation."""
    normals = []
    for x in _layers(states.values):
        scaler, probe = model.fit(x, target).named_steps.values()
        normals.append(probe.coef_.reshape(-1) / scaler.scale_)
    return torch.from_numpy(np.stack(normals))


def _rescaled(vector: Tensor, like: Float[Tensor, "layers width"]) -> Float[Tensor, "layers width"]:
    """Return the vector with the norm of ``like`` in every layer. A zero vector stays zero."""
    norm = vector.norm(dim=-1, keepdim=True)
    return vector * (like.norm(dim=-1, keepdim=True) / norm.where(norm > 0, 1.0))


def _signed(vector: Tensor, delta: Float[Tensor, "layers width"]) -> Float[Tensor, "layers width"]:
    sign = torch.where((vector * delta).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    return _rescaled(sign * vector, delta)


def _of_rows(states: States, estimator: str, vector: Tensor, pos: np.ndarray, neg: np.ndarray) -> Direction:
    return Direction(vector, states.kind, states.positions, estimator, len(pos), len(neg), states.provenance)


def _of_pairs(states: States, estimator: str, vector: Tensor, delta: Tensor) -> Direction:
    return Direction(vector, states.kind, states.positions, estimator, len(delta), len(delta), states.provenance)


def _direction(moments: Moments, kind: str, estimator: str, vector: Tensor, classes: tuple[str, str]) -> Direction:
    pos, neg = (moments.n[moments.index(label)] for label in classes)
    return Direction(vector, kind, moments.positions, estimator, pos, neg, moments.provenance)
