"""Directions of thinking length from collected activations, random control directions, and measures of directions. Runs no model.

An *estimator* computes a ``Direction``, one vector per layer, from ``Moments`` (sums of activations per class) or from ``States``
(activations of single rollouts or positions). Its arguments ``pos`` and ``neg`` name the classes with long and with short thinking. The
direction points from short to long: adding it to activations lengthens thinking.

The norm of a difference of means is the distance between long and short thinking. The norm of any other vector, such as the weights of a
probe, has no such meaning. So estimators that are not differences of means rescale each layer's vector to the norm of such a difference. A
steering strength then adds a vector of similar norm, whichever estimator was used.

The measures are cosines, d' between the classes, stability under resampling, and relative doses (the norm of the added vector divided by
the typical norm of the activations).
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

from toolkit.collect import States
from toolkit.types import LONG as LONG
from toolkit.types import SHORT as SHORT
from toolkit.types import Direction, Moments

assumed_penalty = 1.0  # L2 penalty of probes, relative to the mean loss per example, on standardised features: ours
assumed_resamples = 200  # number of resamples or splits in the stability measures: ours
assumed_redraws = 100  # number of draws of one resample or split, before the stability measures raise an error: ours


class NoPairsError(ValueError):
    """Raised if no problem has activations of both classes (long and short thinking), so that no problem has a difference."""


def mean_difference(moments: Moments, kind: str, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the mean activation of class ``pos`` (long thinking) minus that of class ``neg`` (short), per layer, not normalised.

    Args:
        moments: Sums of activations per class, with both classes (from ``collect.moments``).
        kind: Site in each layer, such as ``"resid_mid"``.

    Raises:
        KeyError: the moments lack one of the classes or the site.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> sums = {"resid_mid": torch.tensor([[[6.0, 2.0]], [[2.0, 2.0]]])}  # [labels, layers, width]
    >>> moments = Moments(("long", "short"), (2, 1), "think", sums, {}, made)
    >>> mean_difference(moments, "resid_mid").vector.tolist()
    [[1.0, -1.0]]
    """
    return _direction(moments, kind, "mean_difference", moments.mean(kind, pos) - moments.mean(kind, neg), (pos, neg))


def whitened(moments: Moments, kind: str, *, shrinkage: float = 0.1, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the linear-discriminant direction: the inverse within-class covariance times the mean difference (long minus short).

    Components that vary much within a class get less weight than in the mean difference: they vary for other reasons than length, such as
    content. Each layer's vector is rescaled to the norm of the mean difference. This estimator is not from a paper.

    Args:
        moments: Sums per class, from ``collect.moments``. They must include the outer products ``h h^T`` of the activations h at the site
            ``kind``.
        kind: Site in each layer, such as ``"resid_mid"``.
        shrinkage: s in the regularised covariance ``(1 - s) C + s m I``, in (0, 1]. C is the within-class covariance, m the mean of its
            diagonal, I the identity. The default is our choice.

    Raises:
        KeyError: the moments have no outer products at this site.
        ValueError: ``shrinkage`` is outside (0, 1].
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: need 0 < shrinkage <= 1.")
    delta = moments.mean(kind, pos) - moments.mean(kind, neg)
    covariance = moments.covariance(kind)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # m in the formula, one per layer
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    vector = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * variance * eye, delta)
    return _direction(moments, kind, "whitened", _rescaled(vector, delta), (pos, neg))


# --- estimators over states ----------------------------------------------------------------------------------

Estimator = Callable[[States], Direction]
"""Function that computes a direction from ``States`` (activations of single rollouts or positions), such as ``paired_difference``."""


def unpaired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the mean activation of class ``pos`` (long thinking) minus that of class ``neg`` (short), per layer, fp64.

    Every row of ``states`` (one rollout or one position) has equal weight. If each rollout has one row, the result equals that of
    ``mean_difference``, which computes it from moments.
    """
    return _of_rows(states, "mean_difference", _gap(states, pos, neg), states.of(pos), states.of(neg))


def paired_difference(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the difference between the classes within a problem, averaged over problems, per layer, fp64.

    A problem's difference is its mean activation in class ``pos`` (long thinking) minus its mean activation in class ``neg`` (short).
    Problems without both classes are left out; all others have the same weight. Differences between problems, such as difficulty or
    wording, cancel here, but not in ``unpaired_difference``.

    Raises:
        NoPairsError: no problem has both classes.
    """
    delta = differences(states, pos=pos, neg=neg)
    return _of_pairs(states, "paired_mean_difference", delta.mean(dim=0), delta)


def pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the first principal component of the activations of both classes together, per layer.

    This is the direction of largest variance, which may have nothing to do with length: compare it with other directions by ``cosine``. Its
    sign is chosen so that it points from class ``neg`` (short thinking) to ``pos`` (long). Its norm is that of the difference of the two
    class means.
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    delta = _gap(states, pos, neg)
    vector = _first_component(states.values[torch.from_numpy(index)].double())
    return _of_rows(states, "pca", _signed(vector, delta), states.of(pos), states.of(neg))


def paired_pca(states: States, *, pos: str = LONG, neg: str = SHORT) -> Direction:
    """Return the first principal component of the differences between long and short thinking within problems, per layer.

    There is one difference per problem (see ``differences``). PCA subtracts the mean of its data first, which would remove the part that
    all differences share. So the data hold each difference twice, once with its sign reversed: their mean is then zero.

    The sign of the result is chosen so that it points from short to long thinking. Its norm is that of the mean difference.

    Raises:
        NoPairsError: no problem has both classes.
    """
    delta = differences(states, pos=pos, neg=neg)
    vector = _first_component(torch.cat([delta, -delta]))
    return _of_pairs(states, "paired_pca", _signed(vector, delta.mean(dim=0)), delta)


def logistic(states: States, *, pos: str = LONG, neg: str = SHORT, penalty: float = assumed_penalty) -> Direction:
    """Return the weights of a logistic probe that predicts class ``pos`` (long thinking) against class ``neg`` (short), per layer.

    The probe is fitted to standardised activations; its weights are converted back to raw activations. Each layer's vector is rescaled to
    the norm of the difference of means. ``probes.classify`` measures how well such a probe predicts.

    Args:
        penalty: L2 penalty on the probe's weights, relative to the mean loss per example (see ``logistic_model``).
    """
    index = np.concatenate([states.of(pos), states.of(neg)])
    target = np.repeat([1, 0], [len(states.of(pos)), len(states.of(neg))])
    vector = _probe_normals(states.take(index), target, logistic_model(len(index), penalty))
    return _of_rows(states, "logistic", _rescaled(vector, _gap(states, pos, neg)), states.of(pos), states.of(neg))


def ridge(states: States, target: str = "think_tokens", *, penalty: float = assumed_penalty) -> Direction:
    """Return the weight vector of a ridge regression that predicts ``log1p(target)`` from the activations. No classes are needed.

    The regression is fitted to standardised activations; its weights are converted back to raw activations. ``probes.regress`` measures how
    well such a probe predicts.

    Each layer's vector is rescaled to the norm of a difference of means: the mean activation of the rows whose target is above the median
    minus that of the other rows.

    Args:
        target: Column of ``states.rows``, in tokens: ``"think_tokens"`` (length of thinking) or ``"remaining"`` (think tokens after the
            position). Rows whose target is NaN are left out.
        penalty: L2 penalty on the weights, relative to the mean squared error per example (see ``ridge_model``).

    Raises:
        ValueError: no row has a target above the median, for example because the target is constant.
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
    """Return each problem's difference between long and short thinking, fp64: the mean of its ``pos`` rows minus that of its ``neg`` rows.

    Rows are rows of ``states`` (one rollout or one position each); ``pos`` and ``neg`` name the classes long and short. Problems without
    rows of both classes are left out.

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
    """Return an unfitted scikit-learn pipeline: standardisation, then logistic regression in which both classes have equal weight.

    Fitting minimises ``mean loss + penalty / 2 |w|^2``, with w the weights of the standardised features.

    Args:
        examples: Number of rows that the pipeline will be fitted to. It is needed because scikit-learn minimises the *sum* of losses.
        penalty: ``penalty`` in the formula.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=1 / (examples * penalty), class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), classifier)


def ridge_model(examples: int, penalty: float = assumed_penalty) -> Any:
    """Return an unfitted scikit-learn pipeline: standardisation, then ridge regression.

    Fitting minimises ``mean squared error + penalty |w|^2``, with w the weights of the standardised features.

    Args:
        examples: Number of rows that the pipeline will be fitted to. It is needed because scikit-learn minimises the *sum* of errors.
        penalty: ``penalty`` in the formula.
    """
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=examples * penalty))


# --- controls and comparisons --------------------------------------------------------------------------------


def random_like(direction: Direction, *, seed: int) -> Direction:
    """Return a direction turned by a random rotation, the same in every layer: a control for steering or weight edits along ``direction``.

    Its norms are those of ``direction``, and so are the cosines between its layers. The cosines matter when several layers are steered: the
    residual stream adds up the vectors of all layers, and nearly equal vectors add up to a far larger one than independent vectors do. In a
    single layer, the result is uniformly distributed over the sphere.

    It is no fair control for removing a component (``op="ablate"``, ``project_out``): activations have hardly any component along it. For
    that, see ``States.shuffled`` and ``edits.random_written``.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> direction = Direction(torch.ones(2, 4), "resid_mid", "think", "mean_difference", 10, 10, made)
    >>> control = random_like(direction, seed=0)
    >>> control.estimator, [round(norm, 4) for norm in control.norms.tolist()]
    ('random(seed=0)', [2.0, 2.0])
    """
    generator = torch.Generator().manual_seed(seed)
    vector = direction.vector.detach().cpu().double()
    # With V = U S W (W: orthonormal rows), a random rotation R turns V into V R = U S (W R), and W R is a random orthonormal frame.
    U, S, W = torch.linalg.svd(vector, full_matrices=False)
    frame, R = torch.linalg.qr(torch.randn(W.T.shape, generator=generator, dtype=torch.float64))
    turned = (U * S) @ (frame * R.diagonal().sign()).T  # with this sign, the frame is uniformly distributed
    turned = turned * torch.nan_to_num(vector.norm(dim=-1) / turned.norm(dim=-1))[:, None]  # exact norms; zero stays zero
    return replace(direction, vector=turned.to(direction.vector), estimator=f"random(seed={seed})")


def split(direction: Direction, along: Direction) -> tuple[Direction, Direction]:
    """Return the part of a direction along another one, and the rest, which is orthogonal to it; both per layer. Their sum is the direction.

    In a layer where ``along`` is zero, the part is zero.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> a = Direction(torch.tensor([[3.0, 4.0]]), "resid_post", "think", "mean_difference", 10, 10, made)
    >>> b = Direction(torch.tensor([[2.0, 0.0]]), "resid_post", "think", "pca", 10, 10, made)
    >>> part, rest = split(a, b)
    >>> part.vector.tolist(), rest.vector.tolist()
    ([[3.0, 0.0]], [[0.0, 4.0]])
    """
    unit = along.unit().to(direction.vector)
    part = (direction.vector * unit).sum(dim=-1, keepdim=True) * unit
    return (
        replace(direction, vector=part, estimator=f"{direction.estimator}, along {along.estimator}"),
        replace(direction, vector=direction.vector - part, estimator=f"{direction.estimator}, without {along.estimator}"),
    )


def cosine(a: Direction, b: Direction) -> Float[Tensor, " layers"]:
    """Return the cosine between two directions, one value per layer.

    >>> from toolkit.types import Provenance
    >>> made = Provenance("example", None, "0", "0", "0.1.0")
    >>> a = Direction(torch.tensor([[3.0, 4.0]]), "resid_mid", "think", "mean_difference", 10, 10, made)
    >>> b = Direction(torch.tensor([[1.0, 0.0]]), "resid_mid", "think", "pca", 10, 10, made)
    >>> round(float(cosine(a, b)[0]), 4)
    0.6
    """
    return torch.cosine_similarity(a.vector, b.vector, dim=-1)


def cosines(named: Mapping[str, Direction]) -> pd.DataFrame:
    """Return the cosines between all pairs of named directions: one row per layer, one column per pair, named like ``"a / b"``."""
    pairs = {f"{a} / {b}": cosine(named[a], named[b]).numpy() for a, b in combinations(named, 2)}
    return pd.DataFrame(pairs).rename_axis("layer")


def separation(moments: Moments, direction: Direction, *, pos: str = LONG, neg: str = SHORT) -> Float[Tensor, " layers"]:
    """Return d' (d-prime) per layer: how far apart two classes are along a direction, in standard deviations.

    It is the mean of class ``pos`` (long thinking) minus that of class ``neg`` (short), both along the direction, divided by the standard
    deviation within a class. This standard deviation is over single positions, not over means of rollouts.

    Raises:
        KeyError: the moments lack outer products at the direction's site.
    """
    unit = direction.unit()
    gap = ((moments.mean(direction.kind, pos) - moments.mean(direction.kind, neg)) * unit).sum(dim=-1)
    variance = torch.einsum("li,lij,lj->l", unit, moments.covariance(direction.kind), unit)  # u^T C u per layer
    return gap / variance.clamp(min=1e-12).sqrt()  # the minimum avoids 0/0 in a layer where the direction is zero


# --- dose ----------------------------------------------------------------------------------------------------


def typical_norm(moments: Moments, kind: str) -> Float[Tensor, " layers"]:
    """Return the typical norm of the activations h per layer: the root mean square of ``|h|`` over positions.

    Each rollout has the same weight, divided equally among its positions. The norm is computed from the outer products ``h h^T`` in
    ``moments.outer``, so no model runs. If the moments lack them, use ``collect.typical_norm``, which runs the model.

    Args:
        moments: Moments that include outer products at the site ``kind``.
        kind: Site in each layer, such as ``"resid_mid"``.

    Raises:
        KeyError: the moments have no outer products at this site.
    """
    if kind not in moments.outer:
        raise KeyError(f"No second moments of {kind!r}: collect with second=({kind!r},), or use collect.typical_norm.")
    # The diagonal of h h^T holds the squared entries of h, so its sum is |h|^2. The second sum is over classes.
    return (moments.outer[kind].diagonal(dim1=-2, dim2=-1).sum(dim=-1).sum(dim=0) / sum(moments.n)).sqrt()


def relative_dose(direction: Direction, strength: float, typical: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """Return the norm of the vector that steering adds, ``strength * direction``, divided by the typical norm of activations, per layer.

    The typical norm is a root mean square (see ``typical_norm``).

    Example: a vector of norm 2, strength -0.5 and a typical norm of 10 give 0.1.

    Args:
        direction: Direction to steer along.
        strength: Factor on the direction; its sign has no effect here.
        typical: Typical norm of the activations per layer, from ``typical_norm``.
    """
    return abs(strength) * direction.norms / typical


def in_typical_units(direction: Direction, typical: Float[Tensor, " layers"]) -> Direction:
    """Return the direction with each layer's vector rescaled to the typical norm of the activations.

    The typical norm is a root mean square (see ``typical_norm``). Steering along the result with strength 0.1 adds a vector whose norm is a
    tenth of it. This unit is not from a paper.

    Args:
        direction: Direction to rescale.
        typical: Typical norm of the activations per layer, from ``typical_norm``.
    """
    scaled = direction.unit() * typical[:, None].to(direction.vector)
    return replace(direction, vector=scaled, estimator=f"{direction.estimator}, typical norm")


# --- stability -----------------------------------------------------------------------------------------------


def bootstrap_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Return the stability of a direction as a table: its cosine with directions that are estimated from resampled problems.

    Problems are resampled with replacement. A problem that is chosen twice counts as two problems. A resample from which no direction can
    be estimated, because it lacks a class for example, is drawn again.

    A high cosine alone proves little, since resamples share problems with the full sample. If activations did not depend on length at all,
    the cosine would still be about 0.7 (1 / sqrt 2). In ``split_half_cosine`` it would be about 0.

    Args:
        states: Activations of single rollouts or positions, of all problems.
        estimator: Function that computes a direction from states, such as ``paired_difference``.
        times: Number of resamples.
        seed: Seed of the resampling.
        level: Share of the resamples, 0 to 1, whose cosine lies between the columns ``low`` and ``high``.

    Returns:
        One row per layer. Columns: ``mean, low, high`` of the cosine over resamples.

    Raises:
        ValueError: ``assumed_redraws`` resamples in a row had no direction, because few problems have one of the classes.
        KeyError: the states lack a class (or what else the estimator raises for them).
    """
    groups, full, rng = list(_by_problem(states).values()), estimator(states), np.random.default_rng(seed)
    drawn = [_estimated(estimator, states, groups, lambda: [rng.integers(0, len(groups), len(groups))]) for _ in range(times)]
    return _interval(torch.stack([cosine(each, full) for (each,) in drawn]), level)


def split_half_cosine(
    states: States, estimator: Estimator, *, times: int = assumed_resamples, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Return the stability of a direction as a table: the cosine between directions from two random halves of the problems.

    Each half has only half of the problems, so its direction is noisier than that of all problems. The cosine is therefore a cautious
    estimate: directions from two separate samples of full size should agree at least as well. A split is drawn again if no direction can be
    estimated from one of its halves, because it lacks a class for example.

    Args:
        states: Activations of single rollouts or positions, of all problems.
        estimator: Function that computes a direction from states, such as ``paired_difference``.
        times: Number of random splits.
        seed: Seed of the splits.
        level: Share of the splits, 0 to 1, whose cosine lies between the columns ``low`` and ``high``.

    Returns:
        One row per layer. Columns: ``mean, low, high`` of the cosine over splits.

    Raises:
        ValueError: there are fewer than two problems; or for ``assumed_redraws`` splits in a row a half had no direction, because fewer
            than two problems have one of the classes, for example.
        KeyError: the states lack a class (or what else the estimator raises for them).
    """
    groups = list(_by_problem(states).values())
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} problem cannot be split into halves: collect states of more problems.")
    rng, half = np.random.default_rng(seed), len(groups) // 2

    def split() -> list[np.ndarray]:
        order = rng.permutation(len(groups))
        return [order[:half], order[half:]]

    return _interval(torch.stack([cosine(*_estimated(estimator, states, groups, split)) for _ in range(times)]), level)


def _estimated(
    estimator: Estimator, states: States, groups: list[np.ndarray], draw: Callable[[], list[np.ndarray]]
) -> list[Direction]:
    """Return the directions of the first draw from whose parts all directions can be estimated.

    Args:
        estimator: Function that computes a direction from states.
        states: States of all problems.
        groups: For each problem, the indices of its rows.
        draw: Function that draws the parts; each lists indices of problems in ``groups``.

    Raises:
        ValueError: a part had no direction in ``assumed_redraws`` draws.
    """
    for _ in range(assumed_redraws):
        try:
            return [estimator(_problems(states, groups, part)) for part in draw()]
        except (KeyError, ValueError) as error:
            reason = error
    estimator(states)  # if all problems together have no direction, its own error says why
    raise ValueError(
        f"None of {assumed_redraws} draws from {len(groups)} problems had all that a direction needs ({str(reason)[:100]}): few problems "
        "have one of the classes. Collect states of more problems."
    ) from reason


def _interval(cosines: Float[Tensor, "times layers"], level: float) -> pd.DataFrame:
    low, high = np.quantile(cosines.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"mean": cosines.mean(dim=0).numpy(), "low": low, "high": high}).rename_axis("layer")


def _problems(states: States, groups: list[np.ndarray], chosen: np.ndarray) -> States:
    """Return the states of the chosen problems. A problem that is chosen twice becomes two problems.

    Args:
        states: States of all problems.
        groups: For each problem, the indices of its rows.
        chosen: Indices of the chosen problems in ``groups``; an index may occur several times.
    """
    part = states.take(np.concatenate([groups[i] for i in chosen]))
    copies = np.repeat(np.arange(len(chosen)), [len(groups[i]) for i in chosen])
    # A different id for each copy: paired estimators group rows by problem id.
    ids = [f"{p}#{c}" for p, c in zip(part.rows["problem_id"], copies, strict=True)]
    return replace(part, rows=part.rows.assign(problem_id=ids))


def _by_problem(states: States) -> dict[Any, np.ndarray]:
    """Return a dict from problem id to the indices of the problem's rows in ``states``. The ids are in order of appearance."""
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
    """Fit a linear probe to each layer, and return its weights for raw (not standardised) activations.

    Args:
        states: Activations, one row per rollout or position.
        target: Values that the probe predicts, one per row: the class (1 or 0) or a length.
        model: Unfitted pipeline from ``logistic_model`` or ``ridge_model``.
    """
    normals = []
    for x in _layers(states.values):
        scaler, probe = model.fit(x, target).named_steps.values()
        normals.append(probe.coef_.reshape(-1) / scaler.scale_)  # w^T ((x - mean) / scale) = (w / scale)^T x + constant
    return torch.from_numpy(np.stack(normals))


def _rescaled(vector: Tensor, like: Float[Tensor, "layers width"]) -> Float[Tensor, "layers width"]:
    """Return ``vector`` with each layer rescaled to the norm of ``like`` in that layer. A zero vector stays zero."""
    norm = vector.norm(dim=-1, keepdim=True)
    return vector * (like.norm(dim=-1, keepdim=True) / norm.where(norm > 0, 1.0))


def _signed(vector: Tensor, delta: Float[Tensor, "layers width"]) -> Float[Tensor, "layers width"]:
    # Flip the layers in which the vector points from long to short, then rescale to the norm of ``delta``.
    sign = torch.where((vector * delta).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    return _rescaled(sign * vector, delta)


def _of_rows(states: States, estimator: str, vector: Tensor, pos: np.ndarray, neg: np.ndarray) -> Direction:
    return Direction(vector, states.kind, states.positions, estimator, len(pos), len(neg), states.provenance)


def _of_pairs(states: States, estimator: str, vector: Tensor, delta: Tensor) -> Direction:
    return Direction(vector, states.kind, states.positions, estimator, len(delta), len(delta), states.provenance)


def _direction(moments: Moments, kind: str, estimator: str, vector: Tensor, classes: tuple[str, str]) -> Direction:
    pos, neg = (moments.n[moments.index(label)] for label in classes)
    return Direction(vector, kind, moments.positions, estimator, pos, neg, moments.provenance)
