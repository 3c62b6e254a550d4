"""Losses that TRL lacks: DRPO's loss and the mode-switching loss of Adaptive Deep Reasoning. Pure functions of tensors and arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor


@dataclass(frozen=True)
class DRPO:
    """Parameters of DRPO's loss (arXiv 2510.04474), which weights correct rollouts by brevity and wrong rollouts by their likelihood.

    A group q is the set of rollouts of one problem; P are its correct and N its wrong rollouts. ``L_i`` is the response length of rollout i
    in tokens. ``s_i`` is the rollout's mean token log-probability under the current policy ``pi``. ``pi_old`` is the policy that sampled,
    and ``sg`` is the stop-gradient. The loss of a micro-batch with Q groups is::

        w_i  = softmax over i in P of (1 - L_i / capacity) / lam
        J_q  = sum over i in P of w_i s_i  -  tau * log( mean over j in N of exp(s_j / tau) )        0 if P or N is empty
        loss = - (1/Q) sum over q of J_q  +  sg(beta * max(0, KL - delta)) * KL

    The weights ``w_i`` are not negative, so ``J_q`` never falls if a correct rollout becomes likelier. ``KL`` is the mean of
    ``log pi_old - log pi`` over the response tokens of the micro-batch. The limit ``delta`` is applied to this mean, so the loss depends on
    the size of the micro-batch.

    Attributes:
        lam: Temperature of the brevity weights; a larger value makes them more equal. As ``lam`` goes to infinity, length has no effect.
        tau: Temperature of the mean over wrong rollouts; a smaller value gives more weight to the likeliest wrong rollouts.
        capacity: Length in tokens by which response lengths are divided; ``None`` means the run's token limit (``max_completion_length``).
        beta: Weight of the KL term.
        delta: Largest KL, in nats per token, at which the KL term is 0.
    """

    lam: float = 0.1
    tau: float = 10.0
    capacity: int | None = None
    beta: float = 1e3
    delta: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.lam > 0 and self.tau > 0 and self.beta >= 0):
            raise ValueError(f"{self}: lam and tau must be above 0, and beta at least 0.")


def drpo_objective(
    score: Float[Tensor, " n"], correct: Bool[Tensor, " n"], tokens: Int[Tensor, " n"], groups: Int[Tensor, " n"], form: DRPO
) -> Float[Tensor, ""]:
    """Return DRPO's objective, which training maximises: the mean of ``J_q`` over the groups q of a micro-batch.

    A group is the set of rollouts of one problem. ``DRPO`` has the formula of ``J_q``. Maximising it makes the group's correct rollouts
    likelier, short ones most, and its wrong rollouts less likely. Rollouts without response tokens are ignored.

    Args:
        score: ``s_i``, the mean token log-probability of each rollout under the current policy.
        correct: True for each correct rollout.
        tokens: Response length of each rollout, in tokens.
        groups: Group of each rollout, as an integer.
        form: Parameters of the loss: ``capacity``, ``lam`` and ``tau`` are used. ``capacity`` must not be ``None``.
    """
    if form.capacity is None:
        raise ValueError("capacity=None: give DRPO's capacity in tokens.")
    brevity = (1 - tokens / form.capacity) / form.lam
    names = groups.unique()
    total = score.sum() * 0.0  # so that the result has a gradient (zero) even if every group is skipped
    for name in names:
        members = (groups == name) & (tokens > 0)
        right, wrong = members & correct, members & ~correct
        if not right.any() or not wrong.any():
            continue
        weights = torch.softmax(brevity[right], dim=0)
        # log of the mean over wrong rollouts of exp(s_j / tau)
        smooth = torch.logsumexp(score[wrong] / form.tau, dim=0) - wrong.sum().log()
        total = total + (weights * score[right]).sum() - form.tau * smooth
    return total / len(names)


def kl_estimate(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
    """Return an estimate of KL(pi_old || pi) in nats per token: the mean of ``log pi_old - log pi`` over response tokens.

    ``pi`` is the current policy and ``pi_old`` the policy that sampled the tokens. The estimate may be negative.

    Args:
        new: Log-probabilities of the response tokens under ``pi``.
        old: Log-probabilities of the response tokens under ``pi_old``.
        mask: 1 for a response token, 0 for padding.
    """
    # At least 1, so that a micro-batch without response tokens gives 0.
    return ((old - new) * mask).sum() / mask.sum().clamp(min=1)


def kl_hinge(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"], form: DRPO) -> Float[Tensor, ""]:
    """Return DRPO's KL term ``sg(beta * max(0, KL - delta)) * KL``, with KL from ``kl_estimate`` and ``sg`` the stop-gradient.

    The term has the gradient of ``beta / 2 * max(0, KL - delta)^2``.

    Args:
        new: Log-probabilities of the response tokens under the current policy.
        old: Log-probabilities under the policy that sampled.
        mask: 1 for a response token, 0 for padding.
        form: Parameters of the loss. Two are used: ``beta``, the weight of the term, and ``delta``, the largest KL in nats per token at
            which the term is 0.
    """
    kl = kl_estimate(new, old, mask)
    # The factor is detached, so only the last ``kl`` has a gradient.
    return (form.beta * (kl - form.delta).clamp(min=0)).detach() * kl


@dataclass(frozen=True)
class ModeSwitch:
    """Parameters of the mode-switching loss of Adaptive Deep Reasoning (arXiv 2505.20101).

    The loss teaches the model to choose between two modes, long and short thinking, when the prompt requests neither. Each mode has a token
    that begins its responses. ``z`` is that token's logit at the first response position, after a prompt without a request. The loss of a
    problem is ``weight * max(0, margin - (z_preferred - z_other))``, or 0 without a preferred mode. The loss of a batch is the mean over
    its problems.

    The preferred mode follows from the rollouts of the problem. Half of them were prompted for long thinking, half for short. If all
    rollouts are wrong, no mode is preferred. Otherwise short is preferred if the accuracy of the short half is at least ``assumed_simple``,
    else long.

    We did not find the paper's formula. The formula, its numbers (``assumed_...``) and the rule for the preferred mode are ours.

    Attributes:
        long: Text whose first token begins a long response.
        short: Text whose first token begins a short response.
        assumed_margin: ``margin``, the smallest difference of logits at which the loss is 0.
        assumed_weight: ``weight`` of the loss.
        assumed_simple: Smallest accuracy of the short half (0 to 1) at which short is preferred.
    """

    long: str
    short: str
    assumed_margin: float = 1.0
    assumed_weight: float = 0.1
    assumed_simple: float = 0.5

    def __post_init__(self) -> None:
        if self.long == self.short:
            raise ValueError(f"Both modes begin with {self.long!r}: give two different texts.")


def preference(
    correct: Bool[ndarray, " n"], long: Bool[ndarray, " n"], groups: Int[ndarray, " n"], form: ModeSwitch
) -> Int[ndarray, " n"]:
    """Return, for each rollout, the preferred mode of its problem: 1 for long thinking, -1 for short thinking, 0 for none.

    No mode is preferred if all rollouts of the problem are wrong. Otherwise short is preferred if the rollouts whose prompt requested short
    thinking have an accuracy of at least ``form.assumed_simple``, else long.

    Args:
        correct: True for each correct rollout.
        long: True if the rollout's prompt requested long thinking, False if it requested short thinking.
        groups: Group of each rollout, as an integer; one group per problem.
        form: Parameters of the mode-switching loss. Only ``assumed_simple`` is used: an accuracy, 0 to 1.
    """
    _, which = np.unique(groups, return_inverse=True)

    def accuracy(rows: ndarray) -> ndarray:  # of each group, over the chosen rows only
        n = which.max() + 1
        return np.bincount(which[rows], correct[rows], minlength=n) / np.bincount(which[rows], minlength=n)

    # ``simple``: the problem needs only short thinking. ``solved``: at least one rollout is correct.
    simple, solved = accuracy(~long) >= form.assumed_simple, np.bincount(which, correct) > 0
    return np.where(solved, np.where(simple, -1, 1), 0)[which]


def switch_hinge(
    logits: Float[Tensor, "n vocab"], prefer: Int[Tensor, " n"], tokens: tuple[int, int], form: ModeSwitch
) -> Float[Tensor, " n"]:
    """Return the mode-switching loss of each problem, which teaches the model to begin its response in the problem's preferred mode.

    A mode is long or short thinking; each has a token that begins its responses (see ``ModeSwitch``). ``gap`` is the logit of the preferred
    mode's token minus the logit of the other mode's token. The loss is ``assumed_weight * max(0, assumed_margin - gap)``, or 0 for a
    problem without a preferred mode.

    Args:
        logits: Logits at the first response position, one row per problem.
        prefer: Preferred mode of each problem: 1 for long, -1 for short, 0 for none.
        tokens: Ids of the tokens that begin a long and a short response, in this order.
        form: Parameters of the loss: ``assumed_weight`` and ``assumed_margin`` (a difference of logits) are used.
    """
    # ``prefer`` is the sign that turns (long minus short) into (preferred minus other).
    gap = (logits[:, tokens[0]] - logits[:, tokens[1]]) * prefer
    return torch.where(prefer != 0, form.assumed_weight * (form.assumed_margin - gap).clamp(min=0), 0.0)
