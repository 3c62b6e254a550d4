"""Advantages: the weight of each rollout in the policy gradient, computed from the rewards of a whole batch. Pure functions of arrays.

Every function in ``ALL`` maps ``(components, groups, tokens)`` to advantages ``[n]``, one per rollout of the batch. A positive advantage
raises the rollout's probability. Functions in ``STEPS`` return one advantage per *step* instead, a turn of a response with tool calls, and
functions in ``TOKENS`` one per token. The arguments of those in ``ALL`` are:

* ``components [n, k]``: the parts of the reward, one column per part. The reward r of a rollout is the sum of its k parts. Only
  ``decoupled`` and ``gdpo`` treat the parts separately.
* ``groups [n]``: the group of each rollout, as an integer. A group is the set of rollouts of one problem. Rows may come in any order.
* ``tokens [n]``: response lengths, used by ``dler_tokens`` only.

In the formulas, ``mean_g`` and ``std_g`` are the mean and the standard deviation of r over the rollout's group. All standard deviations
have Bessel's correction, as in TRL and verl.

Difference from the papers: for a group of one rollout, the papers' formulas for the standard deviation and for RLOO's advantage
(``leave_one_out``) divide by zero. Here both are 0 for such a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from toolkit.types import Rollout

Values = Float[ndarray, "n components"]
Advantage = Callable[[Values, Int[ndarray, " n"], Int[ndarray, " n"]], Float[ndarray, " n"]]
TokenAdvantage = Callable[[Float[ndarray, "n positions"], Int[ndarray, " n"]], Float[ndarray, "n positions"]]
StepAdvantage = Callable[[Sequence[Float[ndarray, " _"]], Int[ndarray, " n"]], list[Float[ndarray, " _"]]]

TRL_EPSILON, VERL_EPSILON = 1e-4, 1e-8  # added to a standard deviation before division: trl's grpo_trainer.py, verl's masked_whiten


def group_mean(values: Float[ndarray, " n"], groups: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return, for each rollout, the mean of ``values`` over its group, ``[n]``.

    >>> group_mean(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1])).tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    names, which = np.unique(groups, return_inverse=True)  # ``which``: index of each rollout's group, from 0 without gaps
    return (np.bincount(which, values) / np.bincount(which, minlength=len(names)))[which]


def group_std(values: Float[ndarray, " n"], groups: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return, for each rollout, the sample standard deviation of ``values`` over its group, ``[n]``; 0 for a group of one."""
    _, which = np.unique(groups, return_inverse=True)
    n = np.bincount(which)
    squares = np.bincount(which, np.square(values - group_mean(values, groups)))
    # Where all values of a group are equal, floating-point error leaves about 1e-17 instead of 0; rounding to 12 decimals removes it.
    return np.sqrt(np.where(n > 1, squares / np.maximum(n - 1, 1), 0.0)).round(12)[which]


def grpo(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return GRPO's advantages (arXiv 2402.03300): ``(r - mean_g) / (std_g + 1e-4)``, one per rollout.

    r is the reward of a rollout, the sum of its ``components``. ``mean_g`` and ``std_g`` are the mean and the standard deviation of r over
    the rollout's group. TRL computes the same with ``scale_rewards="group"``. The module ``advantages`` explains the arguments; ``tokens``
    is not used.

    >>> grpo(np.array([[1.0], [0.0]]), np.array([0, 0]), np.array([5, 9])).round(3).tolist()
    [0.707, -0.707]
    """
    r = components.sum(axis=1)
    return (r - group_mean(r, groups)) / (group_std(r, groups) + TRL_EPSILON)


def dr_grpo(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return Dr. GRPO's advantages (arXiv 2503.20783): the reward minus the mean reward of the rollout's group.

    Unlike in GRPO, the difference is not divided by the standard deviation of the group's rewards. The reward of a rollout is the sum of
    its ``components``. A group is the set of rollouts of one problem. TRL computes the same with ``scale_rewards="none"``. The module
    ``advantages`` explains the arguments; ``tokens`` is not used.
    """
    r = components.sum(axis=1)
    return r - group_mean(r, groups)


def leave_one_out(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return RLOO's advantages (arXiv 2402.14740): the reward minus the mean reward of the *other* rollouts of the group.

    The reward of a rollout is the sum of its ``components``. A group is the set of rollouts of one problem. For a group of G rollouts the
    result is ``G / (G - 1)`` times the advantage of ``dr_grpo``; for a group of one it is 0. The module ``advantages`` explains the
    arguments; ``tokens`` is not used.
    """
    _, which = np.unique(groups, return_inverse=True)
    n = np.bincount(which)[which]  # size of each rollout's group
    return dr_grpo(components, groups, tokens) * n / np.maximum(n - 1, 1)


def dler(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return DLER's advantages as in the paper (arXiv 2510.15110): ``(A - mean(A)) / (std(A) + 1e-8)``.

    A is the reward of a rollout, the sum of its ``components``, minus the mean reward of its group. A group is the set of rollouts of one
    problem. Mean and standard deviation of A are taken over all rollouts of the batch.

    TRL's ``scale_rewards="batch"`` differs: its divisor is the standard deviation of the rewards, not of A. The module ``advantages``
    explains the arguments; ``tokens`` is not used.
    """
    centred = dr_grpo(components, groups, tokens)
    return _whitened(centred, np.ones(len(centred)))


def dler_tokens(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return DLER's advantages as in its released code (verl's ``masked_whiten``): ``(A - mean(A)) / (std(A) + 1e-8)``.

    A is the reward of a rollout, the sum of its ``components``, minus the mean reward of its group. A group is the set of rollouts of one
    problem. Mean and standard deviation of A are taken over all response *tokens* of the batch, where each token has the A of its rollout.
    So a long rollout counts more than a short one. ``tokens`` holds the response lengths. The module ``advantages`` explains the arguments.
    """
    return _whitened(dr_grpo(components, groups, tokens), tokens.astype(float))


def _whitened(values: Float[ndarray, " n"], weights: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return ``values`` minus their weighted mean, divided by their weighted standard deviation.

    A weight is the number of observations with that value: 1 to count rollouts, or the rollout's number of tokens to count tokens. A
    standard deviation needs at least two observations. If the weights sum to less than 2, all returned values are 0.
    """
    total = weights.sum()
    if total < 2:
        return np.zeros(len(values))
    mean = (weights * values).sum() / total
    variance = (weights * np.square(values - mean)).sum() / (total - 1)  # Bessel's correction, for ``total`` observations
    return (values - mean) / (np.sqrt(variance) + VERL_EPSILON)


def decoupled(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return advantages that are averaged over the components of the reward, as in LongWriter-Zero (arXiv 2506.18841).

    GRPO's advantage (``grpo``) is computed for each column of ``components`` separately; the result is the mean over columns. A component
    that does not vary within a group adds 0 there, even if other components vary. The paper's three components are length, writing quality
    and format. The module ``advantages`` explains the arguments; ``tokens`` is not used.
    """
    return np.mean([grpo(components[:, [k]], groups, tokens) for k in range(components.shape[1])], axis=0)


def gdpo(components: Values, groups: Int[ndarray, " n"], tokens: Int[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return GDPO's advantages (arXiv 2601.05242): components are normalised within the group, added, and normalised over the batch.

    ``z`` is GRPO's advantage (``grpo``) of each column of ``components``, added over the columns. The result is
    ``(z - mean(z)) / (std(z) + 1e-4)``, with mean and standard deviation over all rollouts of the batch. TRL computes the same from several
    reward functions with ``multi_objective_aggregation="normalize_then_sum"``.

    The size of a component does not matter: one that hardly varies within its group counts as much as the others. So a component for length
    should be paid to right answers only. The module ``advantages`` explains the arguments; ``tokens`` is not used.

    >>> gdpo(np.array([[1.0, 0.1], [0.0, 0.0]]), np.array([0, 0]), np.array([5, 9])).round(3).tolist()
    [0.707, -0.707]
    """
    z = np.sum([grpo(components[:, [k]], groups, tokens) for k in range(components.shape[1])], axis=0)
    if len(z) < 2:
        return np.zeros(len(z))
    return (z - z.mean()) / (z.std(ddof=1) + TRL_EPSILON)


BY_COMPONENT = frozenset({"decoupled", "gdpo"})
"""Names of the advantages that treat the components of a reward separately. The others get the reward as a single column."""
ALL: Mapping[str, Advantage] = MappingProxyType(
    {f.__name__: f for f in (grpo, dr_grpo, leave_one_out, dler, dler_tokens, decoupled, gdpo)}
)
"""Name of an advantage -> function that computes it. ``Recipe.advantage`` is such a name."""


def grpo_steps(steps: Sequence[Float[ndarray, " _"]], groups: Int[ndarray, " n"]) -> list[Float[ndarray, " _"]]:
    """Return GRPO's advantages with process rewards (arXiv 2402.03300, section 4.1.3): one advantage per step of each rollout.

    The rewards of all steps of a group are normalised together: ``z = (r - mean) / (std + 1e-4)``. The advantage of a step is the sum of z
    over this step and all later ones of its rollout. A group is the set of rollouts of one problem. As everywhere here, the standard
    deviation has Bessel's correction; a step is a turn, and the paper's steps are spans that a reward model scores.

    >>> [a.round(3).tolist() for a in grpo_steps([np.array([1.0, 0.0]), np.array([0.0, 1.0])], np.array([0, 0]))]
    [[0.0, -0.866], [0.0, 0.866]]

    Args:
        steps: Reward of each step of each rollout.
        groups: Group of each rollout, as an integer.
    """
    lengths = [len(r) for r in steps]
    flat, of_steps = np.concatenate(steps), np.repeat(groups, lengths)
    z = (flat - group_mean(flat, of_steps)) / (group_std(flat, of_steps) + TRL_EPSILON)
    return [part[::-1].cumsum()[::-1] for part in np.split(z, np.cumsum(lengths)[:-1])]


STEPS: Mapping[str, StepAdvantage] = MappingProxyType({"grpo_steps": grpo_steps})
"""Name of an advantage per step -> function that computes it. The reward of such a recipe needs a method ``steps``."""


def reward_to_go(rewards: Float[ndarray, "n positions"], groups: Int[ndarray, " n"]) -> Float[ndarray, "n positions"]:
    """Return one advantage per token from rewards per token: ``(G_t - mean_t) / (std + 1e-4)``, with ``G_t = r_t + r_t+1 + ...``

    ``mean_t`` is the mean of G_t over the group at the same position. It takes the place of a critic (ours), and so of the generalised
    advantage estimates of Fine-Grained RLHF (arXiv 2306.01693). After its end a response has G_t = 0, and
    these zeros count in ``mean_t``. ``std`` is the root mean square of ``G_t - mean_t`` over the positions of the group up to its last reward.
    If all rewards are paid at the last token and all responses are equally long, the numerator is the advantage of ``dr_grpo``.

    >>> reward_to_go(np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([0, 0])).round(3).tolist()
    [[0.0, 1.413], [0.0, -1.413]]

    Args:
        rewards: Reward of each token; 0 behind a response's end.
        groups: Group of each rollout, as an integer.
    """
    to_go, advantages = rewards[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        # Rounding, as in ``group_std``.
        centred = (to_go[rows] - to_go[rows].mean(axis=0)).round(12)
        # The batch may be wider than the group's longest response.
        last = np.flatnonzero(to_go[rows].any(axis=0)).max(initial=0)
        advantages[rows] = centred / (np.sqrt(np.square(centred[:, : last + 1]).mean()) + TRL_EPSILON)
    return advantages


TOKENS: Mapping[str, TokenAdvantage] = MappingProxyType({"reward_to_go": reward_to_go})
"""Name of an advantage per token -> function that computes it. The reward of such a recipe needs a method ``segments`` (see ``dense``)."""


def per_token(steps: Sequence[Float[ndarray, " _"]], rollouts: Sequence[Rollout]) -> Float[ndarray, "n positions"]:
    """Return the advantage of each token: that of its turn. Tokens of tool results, and positions after a response's end, get 0.

    Args:
        steps: Advantage of each turn of each rollout. A rollout has one turn more than it has tool results.
        rollouts: The rollouts.

    Raises:
        ValueError: the number of turns differs.
    """
    values = np.zeros((len(rollouts), max(r.response_tokens for r in rollouts)))
    for row, of_turns, rollout in zip(values, steps, rollouts, strict=True):
        if len(of_turns) != len(rollout.results) + 1:
            raise ValueError(
                f"{len(of_turns)} steps of a response with {len(rollout.results)} tool results: expected {len(rollout.results) + 1}, "
                "one per turn."
            )
        turns = np.zeros(rollout.response_tokens, np.int64)
        for span in rollout.results:
            turns[span.stop - rollout.prompt_len :] += 1
        row[: rollout.response_tokens] = np.where(rollout.written, of_turns[turns], 0.0)
    return values
