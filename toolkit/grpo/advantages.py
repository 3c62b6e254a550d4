"""Advantages: the weight of each rollout in the policy gradient, computed from the rewards of a whole batch. Pure functions of arrays.

Every function maps ``(components [n, k], groups [n], tokens [n])`` to advantages ``[n]``, one per rollout; a positive advantage raises the
rollout's probability. ``components`` has one column per part of the reward, and the reward r of a rollout is the sum of its columns (only
``decoupled`` treats the columns separately). ``groups`` holds the group of each rollout as an integer, one integer per problem; rows may
come in any order. ``tokens`` are response lengths. ``mean_g`` and ``std_g`` are the mean and the standard deviation of r over a group. All
standard deviations have Bessel's correction, as in TRL and verl.

Difference from the papers: a group of one rollout gets 0 where a paper divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

Values = Float[ndarray, "n components"]
Advantage = Callable[[Values, Int[ndarray, " n"], Int[ndarray, " n"]], Float[ndarray, " n"]]

TRL_EPSILON, VERL_EPSILON = 1e-4, 1e-8  # added to a standard deviation: trl's grpo_trainer.py, verl's masked_whiten


def group_mean(values: Float[ndarray, " n"], groups: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return for each row the mean of the values of its group, ``[n]``.

    >>> group_mean(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1])).tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    names, which = np.unique(groups, return_inverse=True)
    return (np.bincount(which, values) / np.bincount(which, minlength=len(names)))[which]


def group_std(values: Float[ndarray, " n"], groups: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return for each row the sample standard deviation of the values of its group, ``[n]``; 0 for a group of one."""
    _, which = np.unique(groups, return_inverse=True)
    n = np.bincount(which)
    squares = np.bincount(which, np.square(values - group_mean(values, groups)))
    # Rounding leaves 1e-17 where all values of a group are equal.
    return np.sqrt(np.where(n > 1, squares / np.maximum(n - 1, 1), 0.0)).round(12)[which]


def grpo(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return GRPO's advantages (arXiv 2402.03300): ``(r - mean_g) / (std_g + 1e-4)``, as TRL's ``scale_rewards="group"``.

    >>> grpo(np.array([[1.0], [0.0]]), np.array([0, 0]), np.array([5, 9])).round(3).tolist()
    [0.707, -0.707]
    """
    r = components.sum(axis=1)
    return (r - group_mean(r, groups)) / (group_std(r, groups) + TRL_EPSILON)


def dr_grpo(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return Dr. GRPO's advantages (arXiv 2503.20783): ``r - mean_g``, no division, as TRL's ``scale_rewards="none"``."""
    r = components.sum(axis=1)
    return r - group_mean(r, groups)


def leave_one_out(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return RLOO's advantages (arXiv 2402.14740): reward minus the mean reward of the group's *other* rollouts.

    That is ``(r - mean_g) G / (G - 1)`` for a group of G rollouts.
    """
    _, which = np.unique(groups, return_inverse=True)
    n = np.bincount(which)[which]
    return dr_grpo(components, groups, tokens) * n / np.maximum(n - 1, 1)


def dler(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return DLER's advantages as in the paper (arXiv 2510.15110): ``A = r - mean_g``, then ``(A - mean_batch(A)) / std_batch(A)``.

    Each rollout counts once in the mean and the standard deviation over the batch. TRL's ``scale_rewards="batch"`` divides by the standard
    deviation of the *raw* rewards instead.
    """
    centred = dr_grpo(components, groups, tokens)
    return _whitened(centred, np.ones(len(centred)))


def dler_tokens(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return DLER's advantages as in its released code (verl's ``masked_whiten``).

    The formula is that of ``dler``, but each rollout counts once per response *token* in the mean and standard deviation over the batch.
    """
    return _whitened(dr_grpo(components, groups, tokens), tokens.astype(float))


def _whitened(values: Float[ndarray, " n"], weights: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Subtract the weighted mean and divide by the weighted standard deviation. All 0 if the weights sum to less than 2."""
    total = weights.sum()
    if total < 2:
        return np.zeros(len(values))
    mean = (weights * values).sum() / total
    variance = (weights * np.square(values - mean)).sum() / (total - 1)
    return (values - mean) / (np.sqrt(variance) + VERL_EPSILON)


def decoupled(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return GRPO's advantages, computed for each reward component separately and averaged, as in LongWriter-Zero (arXiv 2506.18841).

    In the paper this is ``(A_len + A_write + A_format) / 3``. A component that does not vary within a group has advantage 0 in that group,
    even if other components vary.
    """
    return np.mean([grpo(components[:, [k]], groups, tokens) for k in range(components.shape[1])], axis=0)


ALL: Mapping[str, Advantage] = MappingProxyType(
    {f.__name__: f for f in (grpo, dr_grpo, leave_one_out, dler, dler_tokens, decoupled)}
)
"""Name, as in ``Recipe.advantage`` -> function."""
