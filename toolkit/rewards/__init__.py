"""Every length reward of the literature as a function of a batch of rollouts, one file a paper; ``ALL`` lists them.

The same object has three uses: the trainer of ``toolkit.grpo``, anyone's TRL script (:func:`as_trl`), and offline questions
(:func:`score`): what would it have paid these responses?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from toolkit.rewards.adaptive_deep_reasoning import AdaptiveDeepReasoning
from toolkit.rewards.arora_zanette import AroraZanette
from toolkit.rewards.batch import MissingColumnError, Reward, RewardBatch, RewardValues
from toolkit.rewards.beyond_monolithic import BeyondMonolithic
from toolkit.rewards.combine import Gated, MeanOfAdvantages, Schedule, WeightedSum
from toolkit.rewards.correctness import Correctness, Format, LengthPenalty
from toolkit.rewards.cosine import Cosine
from toolkit.rewards.crf import CRF
from toolkit.rewards.dler import DLER, DifficultyAwareDLER
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.kimi import Kimi
from toolkit.rewards.l1 import L1Exact, L1Max
from toolkit.rewards.laser import Laser, LaserD, LaserDE
from toolkit.rewards.longwriter import LongWriter
from toolkit.rewards.mash import MASH
from toolkit.rewards.offline import compare, mean_advantages, score
from toolkit.rewards.overlong import Overlong
from toolkit.rewards.pear import PEAR
from toolkit.rewards.ppr import ReNorm
from toolkit.rewards.repetition import Distinct, Repetition, RepetitionPenalty
from toolkit.rewards.ruler import Ruler
from toolkit.rewards.sar import SAR
from toolkit.rewards.self_rewarded_efficiency import SelfRewardedEfficiency
from toolkit.rewards.slpo import SLPO
from toolkit.rewards.surrogate import Surrogate
from toolkit.rewards.train_long_think_short import TrainLongThinkShort
from toolkit.rewards.trl import as_trl
from toolkit.rewards.truncation import ThinkPrune, Truncation

__all__ = [
    "ALL",
    "Distinct",
    "Gated",
    "MeanOfAdvantages",
    "MissingColumnError",
    "ReNorm",
    "Reward",
    "RewardBatch",
    "RewardEntry",
    "RewardValues",
    "Schedule",
    "WeightedSum",
    "as_trl",
    "compare",
    "mean_advantages",
    "score",
]


@dataclass(frozen=True)
class RewardEntry:
    """A reward in the list.

    Attributes:
        make: Makes it; takes its parameters by name.
        paper: arXiv id, or "" for ours.
        line: What it pays, in one sentence.
    """

    make: Callable[..., Any]
    paper: str
    line: str


_ENTRIES = (
    RewardEntry(Correctness, "", "1 for a right answer, 0 for a wrong one."),
    RewardEntry(Format, "", "1 for a well-formed response, 0 for another."),
    RewardEntry(LengthPenalty, "", "Naive: correctness less a price a token, right or wrong."),
    RewardEntry(Truncation, "2504.01296", "Correctness within a fixed length, nothing beyond."),
    RewardEntry(ThinkPrune, "2504.01296", "ThinkPrune: truncation whose length falls in stages."),
    RewardEntry(
        Cosine, "2502.03373", "Right answers are paid less, wrong ones more, the longer they are, along a cosine (as TRL's)."
    ),
    RewardEntry(Overlong, "2503.14476", "DAPO: correctness less a soft punishment near the length limit (as TRL's)."),
    RewardEntry(AroraZanette, "2502.04463", "Right answers are discounted by their length among the right answers of the group."),
    RewardEntry(Kimi, "2501.12599", "Correctness plus length within the range of the group; wrong answers can only lose by it."),
    RewardEntry(L1Exact, "2503.04697", "Correctness less the distance to the budget in the prompt."),
    RewardEntry(L1Max, "2503.04697", "Right answers are paid by how far they stay below the budget in the prompt."),
    RewardEntry(GRPOLambda, "2505.18086", "Length is priced in the most accurate groups of the batch only."),
    RewardEntry(DLER, "2510.15110", "Correctness of responses that end within a length; the rest is in advantage and sampling."),
    RewardEntry(DifficultyAwareDLER, "2510.15110", "DLER with a shorter length where the group is mostly right."),
    RewardEntry(Laser, "2505.15612", "A bonus for right answers within a length."),
    RewardEntry(LaserD, "2505.15612", "LASER with a length for each difficulty that follows training (stateful)."),
    RewardEntry(LaserDE, "2505.15612", "LASER-D that also pays wrong answers for going on beyond that length (stateful)."),
    RewardEntry(HAPO, "2505.11225", "Length against the shortest right answer to the same problem so far (stateful)."),
    RewardEntry(SLPO, "2511.22891", "ORION: a bonus for right answers by how near they are to the shortest right one."),
    RewardEntry(TrainLongThinkShort, "2508.08940", "Correctness, closeness to a shrinking budget in the prompt, and format."),
    RewardEntry(
        AdaptiveDeepReasoning,
        "2505.20101",
        "Right answers are paid more in the mode their problem calls for (partly our stand-in).",
    ),
    RewardEntry(SAR, "2509.05489", "Correctness plus how much the question explains the response."),
    RewardEntry(PEAR, "2510.08026", "Right answers lose what their thinking's entropy exceeds that of their answer."),
    RewardEntry(CRF, "2511.09158", "Right answers are paid more for being judged concise by a trained head."),
    RewardEntry(Surrogate, "2505.19439", "An answer that parses, and a length neither short nor long; no labels."),
    RewardEntry(LongWriter, "2506.18841", "LongWriter-Zero: 1 within a target range of lengths, falling off on either side."),
    RewardEntry(SelfRewardedEfficiency, "2506.15647", "Our stand-in (SLPO): the paper's formula was not found."),
    RewardEntry(
        BeyondMonolithic,
        "2510.05283",
        "Our stand-in: a penalty for being shorter than right answers are; the formula was not found.",
    ),
    RewardEntry(MASH, "2510.01152", "Right answers are discounted by their cost beyond the cheapest known right one (stateful)."),
    RewardEntry(Ruler, "2409.18943", "1 if the length hits the target in the prompt."),
    RewardEntry(Repetition, "2402.03469", "Correctness times the share of different n-grams."),
    RewardEntry(RepetitionPenalty, "2502.03373", "A price for repeated n-grams (as TRL's)."),
)

ALL: Mapping[str, RewardEntry] = MappingProxyType({entry.make.name: entry for entry in _ENTRIES})  # type: ignore[attr-defined]
"""Name -> reward, its paper and one line."""
