"""Tensor algebra: estimators of a length direction, its random control, cosines, stability and relative dose.

An estimator is a function of :class:`~toolkit.types.Moments` or, where single examples are needed, of
:class:`~toolkit.collect.States`; nothing here runs a model. + is longer, whatever the estimator.

Only the difference of means has a length of its own. The vectors of all other estimators are rescaled, layer by layer, to the
norm of the difference of means that they stand beside, so that one strength means one dose.
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
from toolkit.types import Direction, Moments

LONG, SHORT = "long", "short"
assumed_penalty = 1.0  # of probes, per example, on standardised features: ours
assumed_resamples = 200  # of the stability measures: ours


class NoPairsError(ValueError):
    """No problem has examples of both classes, so nothing can be paired within a problem."""


def mean_difference(moments: Moments, kind: str, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Mean of class ``pos`` minus mean of class ``neg``, per layer, un-normalised; + is longer."""
    return _direction(moments, kind, "mean_difference", moments.mean(kind, pos) - moments.mean(kind, neg), (pos, neg))


def whitened(moments: Moments, kind: str, *, shrinkage: float = 0.1, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Linear-discriminant direction: the mean difference multiplied by the inverse within-class covariance (ours).

    Directions in which activations vary a lot for other reasons (content) are turned down. Its length carries no meaning,
    so it is rescaled to the norm of the mean difference, which keeps steering strengths comparable.

    Args:
        shrinkage: Weight of the mean variance on the diagonal, in (0, 1]; ours.
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


def unpaired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Mean of the rows of ``pos`` minus mean of the rows of ``neg``, fp64: :func:`mean_difference`, from states."""
    return _of_rows(states, "mean_difference", _gap(states, pos, neg), states.of(pos), states.of(neg))


def paired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Difference of means within each problem, averaged over the problems that have both classes, fp64.

    What differs between problems (difficulty, wording) cancels out; an unpaired difference keeps it.

    Raises:
        NoPairsError: no problem has both.
    """
    delta = differences(states, pos=pos, neg=neg)
    return _of_pairs(states, "paired_mean_difference", delta.mean(dim=0), delta)


def pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """First principal component of the states of both classes, centred on their common mean; the class means fix its sign.

    It is the direction of largest variance, which need not be that of length: compare it by :func:`cosine`.
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    delta = _gap(states, pos, neg)
    vector = _first_component(states.values[torch.from_numpy(index)].double())
    return _of_rows(states, "pca", _signed(vector, delta), states.of(pos), states.of(neg))


def paired_pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """First principal component of the differences within problems, each taken with both signs (so the mean is zero and the
    common difference stays in); the mean difference fixes its sign.

    Raises:
        NoPairsError: no problem has both classes.
    """
    delta = differences(states, pos=pos, neg=neg)
    vector = _first_component(torch.cat([delta, -delta]))
    return _of_pairs(states, "paired_pca", _signed(vector, delta.mean(dim=0)), delta)


def logistic(states: States, *, pos: str = LONG, neg: str = SHORT, penalty: float = assumed_penalty) -> Direction:
    """Normal of a logistic probe that tells ``pos`` from ``neg``, in activation space. How good it is: ``probes.classify``.

    Args:
        penalty: L2 penalty per example on standardised features (see :func:`logistic_model`).
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    target = np.repeat([1, 0], [len(states.of(pos)), len(states.of(neg))])
    vector = _probe_normals(states.take(index), target, logistic_model(len(index), penalty))
    return _of_rows(states, "logistic", _rescaled(vector, _gap(states, pos, neg)), states.of(pos), states.of(neg))


def ridge(states: States, target: str = "think_tokens", *, penalty: float = assumed_penalty) -> Direction:
    """Normal of a ridge regression of ``log1p(target)`` on the states; needs no classes. How good it is: ``probes.regress``.

    Args:
        target: Column of ``states.rows`` in tokens: ``"think_tokens"`` or ``"remaining"``; rows where it is NaN are left out.
            Rows above its median count as the long class, which also gives the vector its norm.
    """
    tokens = states.rows[target].to_numpy(float)
    states, tokens = states.take(np.flatnonzero(np.isfinite(tokens))), tokens[np.isfinite(tokens)]
    above = tokens > np.median(tokens) if len(tokens) else np.zeros(0, bool)
    if not above.any():
        raise ValueError(f"{target!r} does not vary enough over {len(tokens)} rows to be regressed on: collect more rollouts.")
    long, short = np.flatnonzero(above), np.flatnonzero(~above)
    vector = _probe_normals(states, np.log1p(tokens), ridge_model(len(tokens), penalty))
    gap = states.values[above].double().mean(dim=0) - states.values[~above].double().mean(dim=0)
    return _of_rows(states, f"ridge({target})", _rescaled(vector, gap), long, short)


def differences(states: States, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, "problems layers width"]:
    """Per problem that has both classes: mean of its rows of ``pos`` minus mean of its rows of ``neg``, fp64."""
    labels, found = states.rows["label"].to_numpy(), []
    for index in _by_problem(states).values():
        ours, theirs = index[labels[index] == pos], index[labels[index] == neg]
        if len(ours) and len(theirs):
            found.append(states.values[ours].double().mean(dim=0) - states.values[theirs].double().mean(dim=0))
    if not found:
        raise NoPairsError(
            f"None of the {states.rows['problem_id'].nunique()} problems has both a {pos!r} and a {neg!r} example. "
            "Sample more rollouts a problem, choose classes within problems, or use the unpaired estimator."
        )
    return torch.stack(found)


def logistic_model(examples: int, penalty: float = assumed_penalty) -> Any:
    """Standardised logistic regression, classes balanced: minimises mean loss + penalty/2 |w|^2 over so many examples."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=1 / (examples * penalty), class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), classifier)


def ridge_model(examples: int, penalty: float = assumed_penalty) -> Any:
    """Standardised ridge regression: minimises mean squared error + penalty |w|^2 over so many examples."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=examples * penalty))


# --- controls and comparisons --------------------------------------------------------------------------------


def random_like(direction: Direction, *, seed: int) -> Direction:
    """A random direction of equal norm in every layer: the control of everything done with ``direction``."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(direction.vector.shape, generator=generator, dtype=direction.vector.dtype)
    vector = vector * (direction.norms / vector.norm(dim=-1))[:, None]
    return Direction(
        vector, direction.kind, direction.positions, f"random(seed={seed})", direction.n_pos, direction.n_neg, direction.provenance
    )


def cosine(a: Direction, b: Direction) -> Float[Tensor, " layers"]:
    """Cosine between two directions, per layer."""
    return torch.cosine_similarity(a.vector, b.vector, dim=-1)


def cosines(named: Mapping[str, Direction]) -> pd.DataFrame:
    """Cosines between directions by name, every pair once: one row a layer, one column ``"a / b"`` a pair."""
    pairs = {f"{a} / {b}": cosine(named[a], named[b]).numpy() for a, b in combinations(named, 2)}
    return pd.DataFrame(pairs).rename_axis("layer")


def separation(moments: Moments, direction: Direction, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """How far the classes lie apart along the direction, per layer, in within-class standard deviations (d').

    Needs second moments of the direction's site. The deviation is that of single positions, not of example means.
    """
    unit = direction.unit()
    gap = ((moments.mean(direction.kind, pos) - moments.mean(direction.kind, neg)) * unit).sum(dim=-1)
    variance = torch.einsum("li,lij,lj->l", unit, moments.covariance(direction.kind), unit)
    return gap / variance.clamp(min=1e-12).sqrt()


# --- dose ----------------------------------------------------------------------------------------------------


def typical_norm(moments: Moments, kind: str) -> Float[Tensor, " layers"]:
    """Root mean square of ``|h|`` over positions, per layer, from second moments (``collect.typical_norm`` needs none)."""
    if kind not in moments.outer:
        raise KeyError(f"No second moments of {kind!r}: collect with second=({kind!r},), or use collect.typical_norm.")
    return (moments.outer[kind].diagonal(dim1=-2, dim2=-1).sum(dim=-1).sum(dim=0) / sum(moments.n)).sqrt()


def relative_dose(direction: Direction, strength: float, typical: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """``|strength * v| / |h|`` per layer: how large what is added is, beside the typical norm of what it is added to."""
    return abs(strength) * direction.norms / typical


def in_typical_units(direction: Direction, typical: Float[Tensor, " layers"]) -> Direction:
    """The direction with the typical norm of the stream in every layer: steering strength is then the relative dose (ours)."""
    scaled = direction.unit() * typical[:, None].to(direction.vector)
    return replace(direction, vector=scaled, estimator=f"{direction.estimator}, typical norm")


# --- stability -----------------------------------------------------------------------------------------------


def bootstrap_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Cosine of the direction from resampled problems to the full one, per layer: ``mean, low, high``.

    A problem drawn twice counts as two problems. The resamples share examples with the full sample: a direction of pure noise
    already has a cosine of about 0.7 (1/sqrt 2) here, and of about 0 in :func:`split_half_cosine`.
    """
    groups = list(_by_problem(states).values())
    full = estimator(states)
    drawn = stats.resamples(len(groups), seed=seed, times=times)
    return _interval(torch.stack([cosine(estimator(_problems(states, groups, row)), full) for row in drawn]), level)


def split_half_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Cosine between the directions of two random halves of the problems, per layer: ``mean, low, high`` over splits.

    Each half has half the data, so this is a lower bound on the stability of the full direction.
    """
    groups = list(_by_problem(states).values())
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} problem cannot be split into halves: collect states of more problems.")
    rng, half, found = np.random.default_rng(seed), len(groups) // 2, []
    for _ in range(times):
        order = rng.permutation(len(groups))
        first, second = (estimator(_problems(states, groups, part)) for part in (order[:half], order[half:]))
        found.append(cosine(first, second))
    return _interval(torch.stack(found), level)


def _interval(cosines: Float[Tensor, "times layers"], level: float) -> pd.DataFrame:
    low, high = np.quantile(cosines.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"mean": cosines.mean(dim=0).numpy(), "low": low, "high": high}).rename_axis("layer")


def _problems(states: States, groups: list[np.ndarray], chosen: np.ndarray) -> States:
    """States of the chosen problems; one chosen twice becomes two problems."""
    found = states.take(np.concatenate([groups[i] for i in chosen]))
    copies = np.repeat(np.arange(len(chosen)), [len(groups[i]) for i in chosen])
    return replace(
        found, rows=found.rows.assign(problem_id=[f"{p}#{c}" for p, c in zip(found.rows["problem_id"], copies, strict=True)])
    )


def _by_problem(states: States) -> dict[Any, np.ndarray]:
    """Row indices of each problem, in order of appearance."""
    return {k: np.asarray(v) for k, v in states.rows.groupby("problem_id", sort=False).indices.items()}


# --- shared --------------------------------------------------------------------------------------------------


def _gap(states: States, pos: str, neg: str) -> Float[Tensor, "layers width"]:
    return states.values[states.of(pos)].double().mean(dim=0) - states.values[states.of(neg)].double().mean(dim=0)


def _layers(values: Float[Tensor, "rows layers width"]) -> Iterator[np.ndarray]:
    return (values[:, layer].double().numpy() for layer in range(values.shape[1]))


def _first_component(values: Float[Tensor, "rows layers width"]) -> Float[Tensor, "layers width"]:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # a layer where nothing varies has no share of variance to explain
        found = [PCA(1, svd_solver="full").fit(x).components_[0] for x in _layers(values)]
    return torch.from_numpy(np.stack(found))


def _probe_normals(states: States, target: np.ndarray, model: Any) -> Float[Tensor, "layers width"]:
    """Gradient of the probe's score with respect to the states themselves: the standardisation is undone."""
    found = []
    for x in _layers(states.values):
        scaler, probe = model.fit(x, target).named_steps.values()
        found.append(probe.coef_.reshape(-1) / scaler.scale_)
    return torch.from_numpy(np.stack(found))


def _rescaled(vector: Tensor, like: Float[Tensor, "layers width"]) -> Float[Tensor, "layers width"]:
    """The vector with the norms of another, layer by layer; zero stays zero."""
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
