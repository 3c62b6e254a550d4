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
    """Parameters of DRPO's loss (arXiv 2510.04474): correct rollouts are weighted by brevity, wrong rollouts by their likelihood.

    Let ``L_i`` be the response length of rollout i in tokens, ``s_i`` its mean token log-probability under the current policy ``pi``, P and
    N the correct and the wrong rollouts of a group q, ``pi_old`` the policy that sampled, and ``sg`` the stop-gradient::

        w_i  = softmax over P of (1 - L_i / capacity) / lam
        J_q  = sum_P w_i s_i - tau * log( mean_N exp(s_j / tau) )
        loss = - (1/Q) sum_q J_q [P and N not empty] + sg(beta * max(0, KL - delta)) * KL

    ``Q`` is the number of all groups, including those with only correct or only wrong rollouts, whose ``J_q`` counts as 0. The weight of a
    correct rollout is never negative. ``KL`` is the token mean of ``log pi_old - log pi`` over one micro-batch, so the micro-batch size is
    part of the method.

    Attributes:
        lam: Temperature of the brevity weights; a larger value makes them more equal (in the limit, length has no effect, as in DisCO).
        tau: Temperature of the mean over the wrong rollouts; a smaller value gives the likeliest ones more weight.
        capacity: Length in tokens by which response lengths are divided; ``None`` means the run's token limit (``max_completion_length``).
        beta: Weight of the KL term.
        delta: KL above which the KL term is active, nats per token.
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
    """Return DRPO's objective, which is to be maximised: the mean of ``J_q`` over groups (see ``DRPO``).

    Rollouts without tokens are ignored.

    Args:
        score: s, the mean token log-probability of each rollout under the current policy.
        correct: True for a correct rollout.
        tokens: Response length of each rollout.
        groups: Group of each rollout, as an integer.
        form: Parameters of the loss; ``capacity`` must be set.
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
        smooth = torch.logsumexp(score[wrong] / form.tau, dim=0) - wrong.sum().log()
        total = total + (weights * score[right]).sum() - form.tau * smooth
    return total / len(names)


def kl_estimate(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
    """Return the token mean of ``log pi_old - log pi``, in nats per token: an estimate of KL(pi_old || pi), which may be negative.

    Args:
        new: Log-probabilities of the response tokens under the current policy ``pi``.
        old: Log-probabilities under ``pi_old``, the policy that sampled.
        mask: 1 for a response token, 0 for padding.
    """
    return ((old - new) * mask).sum() / mask.sum().clamp(min=1)


def kl_hinge(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"], form: DRPO) -> Float[Tensor, ""]:
    """Return DRPO's KL term ``sg(beta max(0, KL - delta)) KL``, with KL from ``kl_estimate`` and ``sg`` the stop-gradient.

    Its gradient equals that of ``beta/2 max(0, KL - delta)^2``. ``new``, ``old`` and ``mask`` are the arguments of ``kl_estimate``.
    """
    kl = kl_estimate(new, old, mask)
    return (form.beta * (kl - form.delta).clamp(min=0)).detach() * kl


@dataclass(frozen=True)
class ModeSwitch:
    """Parameters of the mode-switching loss of Adaptive Deep Reasoning (arXiv 2505.20101).

    The loss teaches the model to choose between long and short thinking when the question requests neither. Each mode has a first response
    token; ``z`` is that token's logit after the question without a request. The loss of a problem is
    ``weight * max(0, margin - (z_preferred - z_other))``; the loss of a batch is the mean over its problems, of which those without a
    preference contribute 0.

    A group prefers the short mode if its short half reaches ``assumed_simple`` accuracy, else the long mode; it has no preference if all
    its rollouts are wrong. Form, margin, weight and preference rule are ours, since the paper's were not found.

    Attributes:
        long: Text whose first token begins a long response.
        short: Text whose first token begins a short response.
        assumed_margin: Margin between the two logits.
        assumed_weight: Weight of the loss.
        assumed_simple: Accuracy of the short half from which the short mode is preferred.
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
    """Return the mode that each row's group prefers: 1 for long, -1 for short, 0 for none (see ``ModeSwitch``).

    Args:
        correct: Whether each rollout is correct.
        long: Whether the prompt of each rollout requested long thinking; otherwise it requested short thinking.
        groups: Group of each rollout, as an integer.
        form: Supplies ``assumed_simple``.
    """
    _, which = np.unique(groups, return_inverse=True)

    def accuracy(rows: ndarray) -> ndarray:  # of each group, over the chosen rows only
        n = which.max() + 1
        return np.bincount(which[rows], correct[rows], minlength=n) / np.bincount(which[rows], minlength=n)

    simple, solved = accuracy(~long) >= form.assumed_simple, np.bincount(which, correct) > 0
    return np.where(solved, np.where(simple, -1, 1), 0)[which]


def switch_hinge(
    logits: Float[Tensor, "n vocab"], prefer: Int[Tensor, " n"], tokens: tuple[int, int], form: ModeSwitch
) -> Float[Tensor, " n"]:
    """Return the mode-switching loss of each problem (see ``ModeSwitch``); 0 without a preference.

    Args:
        logits: Logits of the first response token, one row per problem.
        prefer: Preferred mode of each problem: 1 for long, -1 for short, 0 for none.
        tokens: Ids of the first token of the long mode and of the short mode.
        form: Supplies margin and weight.
    """
    gap = (logits[:, tokens[0]] - logits[:, tokens[1]]) * prefer
    return torch.where(prefer != 0, form.assumed_weight * (form.assumed_margin - gap).clamp(min=0), 0.0)
