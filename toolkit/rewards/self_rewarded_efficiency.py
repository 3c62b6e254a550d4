"""Self-rewarded efficiency RL of Efficiency Steering, arXiv:2506.15647: **our stand-in**, the reward was not found.

What is known: right and concise responses are rewarded, accuracy and brevity balanced as training goes, without an outside
signal, and the shortest and longest right responses of a problem are the two poles (as in the paper's steering vector).

Equation of the stand-in: SLPO's (``slpo``), which is exactly the position of a right response between those two poles:

    r = c (1 + alpha (L_max - L) / (L_max - L_min))

Deviations: all of it. Units and signs: tokens; + is paid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.rewards.slpo import SLPO


@dataclass(frozen=True)
class SelfRewardedEfficiency(SLPO):
    """Our stand-in: SLPO under another name."""

    name: ClassVar[str] = "self_rewarded_efficiency"
