"""PEAR: phase entropy aware reward for efficient reasoning, arXiv:2510.08026.

Equations (H_think, H_answer: mean entropy of the policy over the tokens before and after the closing think tag, as in
``methods.phase_entropy``; P: excess entropy of thinking; alpha, s: constants; r_fmt: reward of a wrong response, called the format reward
in the paper):

    P = max(0, H_think - alpha H_answer)
    r = min(1, s - P) if right, r_fmt if wrong

Deviations: the values of s and r_fmt in the paper's runs were not found; the defaults, ``assumed_scale`` and ``assumed_format_reward``, are
those of a call in the README of the released code. The entropy of a missing phase (no thinking, or no answer) counts as 0. By the printed
formula, a right response after thinking of high entropy can earn less than a wrong one, although the paper's text says that r stays in [0,
1]. With ``lowest=0`` no right response earns less than 0 (ours, off by default).

Units and signs: entropies in nats, at the temperature at which they were measured; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_ALPHA = 1.0
assumed_scale, assumed_format_reward = 1.0, 0.0


@dataclass(frozen=True)
class PEAR:
    """Reward for right responses that falls with the excess entropy: entropy of thinking minus ``alpha`` times entropy of the answer.

    A right response gets ``min(1, scale - excess)``, where a negative excess counts as 0. A wrong response gets ``wrong``. The columns
    ``think_entropy`` and ``answer_entropy`` hold the mean entropy per token of each part, in nats.

    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], think_entropy=[0.5, 0.1, 0.5], answer_entropy=[0.25, 0.25, 0.25])
    >>> PEAR()(batch).values.tolist()
    [0.75, 1.0, 0.0]

    Attributes:
        alpha: Weight of the answer's entropy.
        scale: Reward of a right response without excess entropy, s in the paper. No right response earns more than 1.
        wrong: Reward of a wrong response, r_fmt in the paper.
        lowest: Smallest reward of a right response; ``None`` for no lower limit.
    """

    alpha: Number = PUBLISHED_ALPHA
    scale: Number = assumed_scale
    wrong: Number = assumed_format_reward
    lowest: Number | None = None

    name: ClassVar[str] = "pear"
    needs: ClassVar[frozenset[str]] = frozenset({"correct", "think_entropy", "answer_entropy"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        # A phase without tokens has the entropy NaN, which counts as 0.
        think, answer = (np.nan_to_num(batch[f"{phase}_entropy"]) for phase in ("think", "answer"))
        right = batch["correct"].astype(bool)
        reward = np.minimum(1.0, self.scale - np.maximum(0.0, think - self.alpha * answer))
        if self.lowest is not None:
            reward = np.maximum(reward, self.lowest)
        return RewardValues.sum(
            correctness=np.where(right, self.scale, self.wrong), entropy=np.where(right, reward - self.scale, 0.0)
        )
