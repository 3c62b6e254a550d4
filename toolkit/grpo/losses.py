"""Losses that TRL lacks: DRPO's, and the mode-switching loss of Adaptive Deep Reasoning. Pure functions of tensors and arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor


@dataclass(frozen=True)
class DRPO:
    """DRPO's loss (arXiv 2510.04474): correct rollouts are weighed among themselves by brevity, wrong ones by their own likelihood.

    With ``s_i`` the mean token log-probability of rollout i under the current policy, P and N the correct and wrong rollouts of a group::

        w_i  = softmax over P of (1 - L_i / capacity) / lam                                  (constants)
        J_q  = sum_P w_i s_i - tau * log( mean_N exp(s_j / tau) )
        loss = - (1/Q) sum_q J_q [P and N not empty] + sg(beta * max(0, KL - delta)) * KL

    Q counts every group, also those without a correct or without a wrong rollout. No weight on a correct rollout is ever negative.
    ``KL`` is the token mean of ``log pi_old - log pi`` over the micro-batch, so its size is part of the method.

    Attributes:
        lam: Temperature of the brevity weights; larger is more even (DisCO in the limit).
        tau: Temperature over the wrong rollouts.
        capacity: Longest response, tokens; ``None`` is the run's ``max_completion_length``.
        beta: Weight of the KL hinge.
        delta: Where it begins.
    """

    lam: float = 0.1
    tau: float = 10.0
    capacity: int | None = None
    beta: float = 1e3
    delta: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.lam > 0 and self.tau > 0 and self.beta >= 0):
            raise ValueError(f"{self}: need lam > 0, tau > 0 and beta >= 0.")


def drpo_objective(
    score: Float[Tensor, " n"], correct: Bool[Tensor, " n"], tokens: Int[Tensor, " n"], groups: Int[Tensor, " n"], form: DRPO
) -> Float[Tensor, ""]:
    """Mean over groups of ``J_q``. Rollouts without tokens belong to neither set. ``form.capacity`` must be given."""
    if form.capacity is None:
        raise ValueError("DRPO needs a capacity in tokens here.")
    brevity = (1 - tokens / form.capacity) / form.lam
    names = groups.unique()
    total = score.sum() * 0.0  # a graph even if no group counts
    for name in names:
        mine = (groups == name) & (tokens > 0)
        right, wrong = mine & correct, mine & ~correct
        if not right.any() or not wrong.any():
            continue
        weights = torch.softmax(brevity[right], dim=0)
        smooth = torch.logsumexp(score[wrong] / form.tau, dim=0) - wrong.sum().log()
        total = total + (weights * score[right]).sum() - form.tau * smooth
    return total / len(names)


def kl_estimate(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
    """Token mean of ``log pi_old - log pi``; may be negative, being an estimate from samples."""
    return ((old - new) * mask).sum() / mask.sum().clamp(min=1)


def kl_hinge(new: Float[Tensor, "n t"], old: Float[Tensor, "n t"], mask: Int[Tensor, "n t"], form: DRPO) -> Float[Tensor, ""]:
    """``sg(beta max(0, KL - delta)) KL``; its gradient is that of ``beta/2 max(0, KL - delta)^2``."""
    kl = kl_estimate(new, old, mask)
    return (form.beta * (kl - form.delta).clamp(min=0)).detach() * kl


@dataclass(frozen=True)
class ModeSwitch:
    """Margin loss on the first response token of the question asked without instruction: ``weight * max(0, margin - (z_preferred -
    z_other))``, averaged over the problems with a preference (Adaptive Deep Reasoning, arXiv 2505.20101).

    The form, margin, weight and the rule for the preference are ours: the paper's were not found. A group prefers the short mode where
    its short half reaches ``assumed_simple`` accuracy, else the long one; none where all its rollouts are wrong.

    Attributes:
        long: Text whose first token begins a long response.
        short: ... a short response.
    """

    long: str
    short: str
    assumed_margin: float = 1.0
    assumed_weight: float = 0.1
    assumed_simple: float = 0.5

    def __post_init__(self) -> None:
        if self.long == self.short:
            raise ValueError(f"Both modes begin with {self.long!r}: they cannot be told apart.")


def preference(
    correct: Bool[ndarray, " n"], long: Bool[ndarray, " n"], groups: Int[ndarray, " n"], form: ModeSwitch
) -> Int[ndarray, " n"]:
    """Each row's preference of its group: 1 for the long mode, -1 for the short one, 0 for none."""
    _, which = np.unique(groups, return_inverse=True)

    def right(rows: ndarray) -> ndarray:
        return np.bincount(which[rows], correct[rows], minlength=which.max() + 1) / np.bincount(
            which[rows], minlength=which.max() + 1
        )

    simple, solved = right(~long) >= form.assumed_simple, np.bincount(which, correct) > 0
    return np.where(solved, np.where(simple, -1, 1), 0)[which]


def switch_hinge(
    logits: Float[Tensor, "n vocab"], prefer: Int[Tensor, " n"], tokens: tuple[int, int], form: ModeSwitch
) -> Float[Tensor, " n"]:
    """The hinge of each problem, 0 without a preference. ``tokens`` are the first token of the long and of the short mode."""
    gap = (logits[:, tokens[0]] - logits[:, tokens[1]]) * prefer
    return torch.where(prefer != 0, form.assumed_weight * (form.assumed_margin - gap).clamp(min=0), 0.0)
