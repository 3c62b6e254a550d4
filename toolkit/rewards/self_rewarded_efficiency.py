"""A replacement for the reward "self-rewarded efficiency RL", arXiv:2506.15647. **We did not find the paper's formula and use our own.**

The paper (Zhao et al., 2025) says: right and concise responses are rewarded, and accuracy and brevity are balanced during training without
an external signal. The paper also has a steering vector (``methods.efficiency_steering``), which contrasts the shortest with the longest
right response to a problem. Our reward uses these two lengths.

Equation of our reward, the same as of ``slpo.SLPO`` (c: 1 if right, else 0; L: length; L_min, L_max: lengths of the shortest and the
longest right response of the group; alpha: largest bonus):

    r = c (1 + alpha (L_max - L) / (L_max - L_min))        c if L_max = L_min

Deviations: the whole formula is ours. Units and signs: lengths in tokens; higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.rewards.slpo import SLPO


@dataclass(frozen=True)
class SelfRewardedEfficiency(SLPO):
    """Correctness plus a bonus for right responses: ``alpha`` for the shortest right response of the group, falling to 0 for the longest.

    The group consists of the responses to the same problem. The reward is ``slpo.SLPO`` under another name. It stands in for the reward
    "self-rewarded efficiency RL" (arXiv:2506.15647), whose formula we did not find.

    >>> from toolkit.rewards.batch import RewardBatch
    >>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 300, 50])
    >>> SelfRewardedEfficiency(alpha=0.5)(batch).values.tolist()
    [1.5, 1.0, 0.0]
    """

    name: ClassVar[str] = "self_rewarded_efficiency"
