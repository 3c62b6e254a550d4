"""Self-rewarded efficiency RL of Efficiency Steering, arXiv:2506.15647: **our stand-in**, since the reward was not found.

From the paper we know: right and concise responses are rewarded; accuracy and brevity are balanced during training without an external
signal; and the shortest and the longest right response to a problem are the two extremes (as in the paper's steering vector).

Equation of the stand-in (c: 1 if right, else 0; L: length; L_min, L_max: lengths of the two extremes). It is that of SLPO (``slpo``); the
bonus gives the position of a right response between the extremes:

    r = c (1 + alpha (L_max - L) / (L_max - L_min))

Deviations: the whole formula. Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.rewards.slpo import SLPO


@dataclass(frozen=True)
class SelfRewardedEfficiency(SLPO):
    """Stand-in for the reward of Efficiency Steering, whose formula was not found: correctness plus SLPO's bonus for shorter right answers.

    >>> from toolkit.rewards.batch import RewardBatch
    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 300, 50])
    >>> SelfRewardedEfficiency(alpha=0.5)(batch).values.tolist()
    [1.5, 1.0, 0.0]
    """

    name: ClassVar[str] = "self_rewarded_efficiency"
