"""Length rewards from the literature, one file per paper. A reward maps a batch of rollouts to one number per rollout.

The constant ``ALL`` maps the name of each reward to its ``RewardEntry``. ``ALL[name].make(**parameters)`` returns a reward object.

A reward object has three uses: training with ``toolkit.grpo``, training with any TRL script (``as_trl``), and scoring existing rollouts
without training (``score``).

Rewards of tool calls read a response as *turns*, see ``toolkit.rewards.turns``. Some of them need labels of the problems, which
``score(rollouts, reward, problems)`` reads from ``Problem.meta``.

Example: the reward "slpo" of a right response is 1, plus a bonus of up to ``alpha`` if the response is short. The reward of a wrong
response is 0. The three entries of each list belong to three rollouts of one problem.

>>> batch = RewardBatch.from_columns(correct=[1, 1, 0], tokens=[100, 300, 50])
>>> ALL["slpo"].make(alpha=0.5)(batch).values.tolist()
[1.5, 1.0, 0.0]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from toolkit.rewards.ace_rl import ACERL
from toolkit.rewards.adaptive_deep_reasoning import AdaptiveDeepReasoning
from toolkit.rewards.alp import ALP
from toolkit.rewards.arora_zanette import AroraZanette
from toolkit.rewards.batch import MissingColumnError, Reward, RewardBatch, RewardValues
from toolkit.rewards.beyond_monolithic import BeyondMonolithic, Hybrid
from toolkit.rewards.combine import Gated, MeanOfAdvantages, Schedule, WeightedSum
from toolkit.rewards.correctness import Correctness, Format, LengthPenalty
from toolkit.rewards.cosine import Cosine
from toolkit.rewards.crf import CRF
from toolkit.rewards.dler import DLER, DifficultyAwareDLER
from toolkit.rewards.dot import DOT
from toolkit.rewards.fine_grained import FineGrained
from toolkit.rewards.gr3 import GR3
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.kimi import Kimi
from toolkit.rewards.l1 import L1Exact, L1Max
from toolkit.rewards.laser import Laser, LaserD, LaserDE
from toolkit.rewards.longwriter import LongWriter
from toolkit.rewards.longwriter_zero import LongWriterZero
from toolkit.rewards.mash import MASH
from toolkit.rewards.offline import compare, mean_advantages, score
from toolkit.rewards.overlong import Overlong
from toolkit.rewards.page_llm import PageLLM
from toolkit.rewards.pear import PEAR
from toolkit.rewards.ppr import PPR, ReNorm
from toolkit.rewards.r3 import R3
from toolkit.rewards.re_searcher import RESearcher
from toolkit.rewards.repetition import Distinct, Repetition, RepetitionPenalty
from toolkit.rewards.reseek import ReSeek
from toolkit.rewards.ruler import Ruler
from toolkit.rewards.sar import SAR
from toolkit.rewards.search_gen_v import SearchGenV
from toolkit.rewards.self_rewarded_efficiency import SelfRewardedEfficiency
from toolkit.rewards.slpo import SLPO
from toolkit.rewards.surrogate import Surrogate
from toolkit.rewards.text_to_sql import ContrastiveSQL
from toolkit.rewards.toolrl import ToolRL
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
    """One entry of ``ALL``: the class of a reward, its paper, and a description.

    Attributes:
        make: Class of the reward; ``make(**parameters)`` returns a reward object.
        paper: arXiv id of the paper, or "" if the reward comes from no paper.
        line: Description of the reward in one sentence, for tables.
    """

    make: Callable[..., Any]
    paper: str
    line: str


_ENTRIES = (
    RewardEntry(Correctness, "", "1 for a right answer, 0 for a wrong one."),
    RewardEntry(Format, "", "1 for a well-formed response, 0 for any other."),
    RewardEntry(LengthPenalty, "", "Naive: correctness minus a penalty per token, for right and wrong answers."),
    RewardEntry(Truncation, "2504.01296", "Correctness within a fixed length, 0 beyond it."),
    RewardEntry(ThinkPrune, "2504.01296", "ThinkPrune: truncation with a length that falls in stages."),
    RewardEntry(
        Cosine, "2502.03373", "Longer right answers earn less and longer wrong answers earn more, along a cosine (as in TRL)."
    ),
    RewardEntry(Overlong, "2503.14476", "DAPO: correctness minus a soft penalty near the length limit (as in TRL)."),
    RewardEntry(
        AroraZanette, "2502.04463", "Right answers are discounted by their length relative to the right answers of the group."
    ),
    RewardEntry(
        Kimi, "2501.12599", "Correctness plus a score for length within the range of the group; wrong answers can only lose by it."
    ),
    RewardEntry(ALP, "2506.05256", "Correctness minus a price per token that rises with the share of right answers of the group."),
    RewardEntry(
        GR3, "2603.10535", "Right answers are divided by a number that grows with their length relative to the group's mean."
    ),
    RewardEntry(DOT, "2601.03969", "Correctness, but 0 for outliers in length in groups that are all right."),
    RewardEntry(L1Exact, "2503.04697", "Correctness minus the distance to the budget in the prompt."),
    RewardEntry(L1Max, "2503.04697", "Right answers earn more the further they stay below the budget in the prompt."),
    RewardEntry(GRPOLambda, "2505.18086", "Length is penalised only in the most accurate groups of the batch."),
    RewardEntry(
        DLER,
        "2510.15110",
        "Correctness of responses that end within a length; the rest of the method is in advantages and sampling.",
    ),
    RewardEntry(DifficultyAwareDLER, "2510.15110", "DLER with a lower length limit if the group is mostly right."),
    RewardEntry(Laser, "2505.15612", "A bonus for right answers within a length."),
    RewardEntry(LaserD, "2505.15612", "LASER with one length per difficulty, adapted during training (stateful)."),
    RewardEntry(LaserDE, "2505.15612", "LASER-D with a bonus for wrong answers that go beyond that length (stateful)."),
    RewardEntry(HAPO, "2505.11225", "Length relative to the shortest right answer to the same problem so far (stateful)."),
    RewardEntry(SLPO, "2511.22891", "ORION: a bonus for right answers that grows towards the shortest right answer of the group."),
    RewardEntry(TrainLongThinkShort, "2508.08940", "Correctness, closeness to a shrinking budget in the prompt, and format."),
    RewardEntry(
        AdaptiveDeepReasoning,
        "2505.20101",
        "Right answers earn more in the mode that suits their problem (partly our stand-in).",
    ),
    RewardEntry(SAR, "2509.05489", "Correctness plus the share of the response that the question explains."),
    RewardEntry(PEAR, "2510.08026", "Right answers lose the amount by which the entropy of thinking exceeds that of the answer."),
    RewardEntry(CRF, "2511.09158", "Right answers earn more if a trained head judges them concise."),
    RewardEntry(Surrogate, "2505.19439", "Rewards an answer that parses and a medium length; needs no labels."),
    RewardEntry(LongWriter, "2506.18841", "LongWriter-Zero: 1 within a target range of lengths, less on either side."),
    RewardEntry(
        LongWriterZero, "2506.18841", "Length within a range, requested headings and keywords without repetition, and format."
    ),
    RewardEntry(SelfRewardedEfficiency, "2506.15647", "Our stand-in (SLPO): the paper's formula was not found."),
    RewardEntry(
        BeyondMonolithic,
        "2510.05283",
        "Our stand-in: a penalty for being shorter than the right answers; the formula was not found.",
    ),
    RewardEntry(Hybrid, "2510.05283", "A rule where it is sure, the score of a reward model where it is not (our formula)."),
    RewardEntry(
        MASH,
        "2510.01152",
        "Right answers are discounted by their cost, calls or tokens, beyond that of the cheapest known one (stateful).",
    ),
    RewardEntry(ReSeek, "2510.00568", "Correctness plus a reward for judging each search result rightly."),
    RewardEntry(
        RESearcher, "2509.26048", "A ladder of correctness and format, plus the share of right reflections on search results."
    ),
    RewardEntry(PPR, "2509.25598", "ReNorm: a score of each turn plus correctness minus 1; one advantage per turn."),
    RewardEntry(FineGrained, "2306.01693", "One reward per error type at the ends of segments; one advantage per token."),
    RewardEntry(ACERL, "2509.04903", "Share of the instruction's constraints that the answer meets, and a score of its length."),
    RewardEntry(
        PageLLM, "2506.09084", "NDCG of a ranked page, minus the gain of swapping an item with the next where that is better."
    ),
    RewardEntry(ToolRL, "2504.13958", "Format, and calls that match the right ones in name, parameters and values."),
    RewardEntry(SearchGenV, "2510.14660", "Share of the facts (nuggets) that a verifier finds in the answer."),
    RewardEntry(ContrastiveSQL, "2510.13827", "1 for a query with the right rows, plus its similarity to the question."),
    RewardEntry(R3, "2402.03469", "Relevance times factors for length and for distinct 3-grams."),
    RewardEntry(Ruler, "2409.18943", "1 if the length is within the target range of the prompt, else 0."),
    RewardEntry(Repetition, "2402.03469", "Correctness times the share of distinct n-grams."),
    RewardEntry(RepetitionPenalty, "2502.03373", "A penalty for repeated n-grams (as in TRL)."),
)

ALL: Mapping[str, RewardEntry] = MappingProxyType({entry.make.name: entry for entry in _ENTRIES})  # type: ignore[attr-defined]
"""Reward name -> ``RewardEntry``: class, paper and a one-sentence description."""
