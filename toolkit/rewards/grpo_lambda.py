"""GRPO-lambda: stable reinforcement learning for efficient reasoning, arXiv:2505.18086.

Equations (c: 1 if right, else 0; L: length; K: number of groups in the batch; lambda: share of the groups with a length
penalty; a_k: accuracy of group k; mu_k, s_k: mean and standard deviation of the lengths of the right responses of group k; alpha: largest
penalty; sigma: the logistic function):

    r = c (1 - alpha sigma((L - mu_k) / s_k))        in the ceil(lambda K) groups of highest a_k (efficiency groups)
    r = c                                            in the other groups (accuracy groups)

A group holds the responses to one problem. Length is penalised only in the groups of the batch with the largest share of right responses.

Deviations: alpha was not found in the paper; ``assumed_alpha`` is the value in an implementation that is not by the authors. The paper does
not say which of several groups of equal accuracy comes first. Here a hash of optimizer step and problem id decides. The order therefore
changes from step to step, and does not depend on the position in the batch. The implementation by others also penalises wrong responses in
an efficiency group, and fails on a group without a right response; we copy neither.

Units and signs: lengths in tokens; higher is better. Groups are ranked over the whole batch: in a run of several processes, give every
process the rollouts of all processes.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from toolkit.rewards.arora_zanette import check_alpha, discount
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_share = 0.2  # lambda: the value of an example in notes on the paper
assumed_alpha = 0.6  # from an implementation that is not by the authors


@dataclass(frozen=True)
class GRPOLambda:
    """Correctness, minus a length penalty for right responses in those groups of the batch that have the highest accuracy.

    A group consists of the responses to one problem. Its accuracy is the share of right responses. The reward is that of GRPO-lambda
    (arXiv:2505.18086).

    The penalty is between 0 and ``alpha``, and rises with the length relative to the right responses of the group: see
    ``arora_zanette.discount``.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 1, 0], tokens=[100, 300, 100, 300], problem_id=["easy", "easy", "hard", "hard"])
    >>> GRPOLambda(share=0.5, alpha=0.6)(batch).values.round(3).tolist()
    [0.839, 0.561, 1.0, 0.0]

    Attributes:
        share: lambda, in (0, 1]: the share of the batch's groups that get a length penalty.
        alpha: Largest possible length penalty, in [0, 1]: if alpha were above 1, a right response could earn less than a wrong one.
        ddof: 0 or 1 (the paper does not say which): the standard deviation of lengths divides by n - ddof, where n is the number of right
            responses of the group.
    """

    share: Number = assumed_share
    alpha: Number = assumed_alpha
    ddof: int = 0

    name: ClassVar[str] = "grpo_lambda"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "tokens"})

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: need 0 < share <= 1.")

    def priced(self, batch: RewardBatch) -> Bool[ndarray, " n"]:
        """Return a mask ``[n]``, True for the rows of the groups with a length penalty: the most accurate groups of the batch.

        The mask includes the wrong responses of these groups, but their penalty is 0. The number of such groups is the field ``share``
        times the number of groups in the batch, rounded up. Among groups of equal accuracy, a hash of optimizer step and problem id
        decides.
        """
        g = batch.groups
        if not len(g):
            return np.zeros(0, bool)
        accuracy = np.bincount(g, batch["correct"].astype(float)) / np.bincount(g)
        ties = np.array([zlib.crc32(f"{batch.step}|{problem}".encode()) for problem in batch.group_ids])
        # lexsort sorts by its last key, here the negative accuracy, so the most accurate groups come first. Groups of equal accuracy are
        # sorted by the key before it, the hash, and groups of equal hash by the first key, the problem id.
        # Rounding errors must not add a group: 0.07 * 100 is 7.000000000000001, and ceil would give 8. So subtract 1e-9 first.
        top = np.lexsort((batch.group_ids.astype(str), ties, -accuracy))[: max(1, math.ceil(self.share * len(accuracy) - 1e-9))]
        return np.isin(g, top)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        return RewardValues.sum(
            correctness=batch["correct"], length=np.where(self.priced(batch), -discount(batch, self.alpha, self.ddof), 0.0)
        )
