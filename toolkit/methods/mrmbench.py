"""MRMBench: interpreting reward models by probing them for preference dimensions (2025), arXiv:2511.12464.

A benchmark asks which dimensions of preference, such as correctness or verbosity, the states of a judge represent; at inference, the distance
of a response to the centroids of a dimension says whether the judge relies on the dimension there.

Equations (h: state of the judge for a response, d_model numbers; y_k: label of dimension k; W_k: probe of dimension k; c: a centroid)::

    probe       p(y_k | h) = softmax(W_k h)                       one linear probe per dimension, without bias; the judge is frozen
    score       accuracy of the probe on responses to other prompts
    centroids   c_{k, v} = mean of h over validation responses with y_k = v
    distance    d_k = min_v |h - c_{k, v}|_2                      small: the judge relies on dimension k
    filter      keep a response if min_k d_k is at most a threshold

Sources: the paper and its code. Labels are binary (*easy*) or of three classes (*hard*); any number of classes works here.

Deviations: features are standardised with the mean and spread of the training responses, which the paper's probes on normed states do not
need; they take the state at the last token, here the caller chooses. The paper's threshold is 140, in the units of one model; here it is a
quantile. Shuffled labels are our control. Whether centroids are per class is our reading. The paper uses the filter while a policy is
trained; here it is measured which pairs it leaves out, and whether the judge is right more often on the others.

Units and signs: accuracies from 0 to 1; distances in the units of the features.

Cost: one logistic regression per dimension and control. ``data/judging`` has a measurement on a frozen SmolLM2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from toolkit import stats

assumed_penalty = 1.0  # weight of |w|^2 / 2 relative to the mean loss per row: ours
CONTROLS = 20  # probes on shuffled labels


def probe(features: Float[ndarray, "n d"], labels: Int[ndarray, " n"], penalty: float = assumed_penalty) -> Any:
    """Return a fitted linear probe of one dimension: a scikit-learn pipeline of standardisation and regression without bias.

    Args:
        features: State of each response.
        labels: Class of each response in this dimension.
        penalty: Weight of the L2 penalty relative to the mean loss per row.

    Raises:
        ValueError: all labels are equal.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        raise ValueError(f"All {len(labels)} labels are {labels[:1].tolist()}: a probe needs responses of two classes.")
    classifier = LogisticRegression(C=1 / (len(labels) * penalty), fit_intercept=False, max_iter=2000)
    return make_pipeline(StandardScaler(), classifier).fit(features, labels)


def probe_dimensions(
    train: tuple[Float[ndarray, "n d"], Int[ndarray, "n k"]],
    test: tuple[Float[ndarray, "m d"], Int[ndarray, "m k"]],
    problems: Sequence[str] | ndarray,
    names: Sequence[str],
    *,
    controls: int = CONTROLS,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the accuracy of one probe per dimension on test responses, beside probes that were trained on shuffled labels.

    Args:
        train: Features and labels (one column per dimension) of the training responses.
        test: The same of the test responses, to other prompts.
        problems: Problem id (prompt) of each test response.
        names: Name of each dimension.
        controls: Number of probes on shuffled labels, per dimension.
        seed: Seed of the shuffles and of the bootstrap.

    Returns:
        Table with one row per dimension, and the columns ``dimension``; ``mean, low, high`` (accuracy with a 95 % bootstrap interval over
        problems); ``control`` and ``control_high`` (mean and 97.5 % quantile of the accuracies of the shuffled probes).

    Raises:
        ValueError: not one name per dimension, or all training labels of a dimension are equal.
    """
    (x, y), (held_x, held_y) = train, test
    if not len(names) == y.shape[1] == held_y.shape[1]:
        raise ValueError(f"{len(names)} names for labels of {y.shape[1]} and {held_y.shape[1]} dimensions: give one name each.")
    rng, rows = np.random.default_rng(seed), []
    for k, name in enumerate(names):
        right = probe(x, y[:, k]).predict(held_x) == held_y[:, k]
        e = stats.over_problems(right.astype(float), problems, seed=seed)
        shuffled = [float((probe(x, rng.permutation(y[:, k])).predict(held_x) == held_y[:, k]).mean()) for _ in range(controls)]
        rows.append((name, e.mean, e.low, e.high, float(np.mean(shuffled)), float(np.quantile(shuffled, 0.975))))
    return pd.DataFrame(rows, columns=["dimension", "mean", "low", "high", "control", "control_high"])


# --- inference-time probing ----------------------------------------------------------------------------------


def centroids(features: Float[ndarray, "n d"], labels: Int[ndarray, " n"]) -> Float[ndarray, "classes d"]:
    """Return the mean features of each class of a dimension, in the order of the classes.

    >>> centroids(np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), np.array([0, 0, 1])).tolist()
    [[1.0, 0.0], [5.0, 5.0]]
    """
    return np.stack([features[labels == value].mean(axis=0) for value in np.unique(labels)])


def centroid_distance(features: Float[ndarray, "n d"], centres: Float[ndarray, "classes d"]) -> Float[ndarray, " n"]:
    """Return the Euclidean distance of each response to the nearest centroid of a dimension. Small: the judge relies on the dimension.

    >>> centroid_distance(np.array([[1.0, 3.0]]), np.array([[1.0, 0.0], [5.0, 5.0]])).tolist()
    [3.0]
    """
    from scipy.spatial.distance import cdist

    return cdist(features, centres).min(axis=1)


def within_quantile(distances: Float[ndarray, " n"], share: float) -> Bool[ndarray, " n"]:
    """Return which responses to keep: those whose distance is at most the quantile ``share`` of all distances.

    Args:
        distances: Distance of each response, or the smallest one over dimensions.
        share: Share of the responses to keep, above 0 and at most 1.

    Raises:
        ValueError: the share is out of range.

    >>> within_quantile(np.array([1.0, 9.0, 2.0, 3.0]), 0.75).tolist()
    [True, False, True, True]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give the share to keep, above 0 and at most 1.")
    return distances <= np.quantile(distances, share, method="inverted_cdf")
