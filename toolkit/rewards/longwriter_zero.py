"""LongWriter-Zero: mastering ultra-long text generation via reinforcement learning, arXiv:2506.18841, its three rewards.

Equations (d: number of different 3-grams of words divided by the number of all, 1 for fewer than 3 words; h: share of the requested headings that stand on
lines of their own, in the requested order; k: share of the requested keywords that occur as words)::

    length     the reward of ``longwriter``: 1 for a length within the target range, less on either side
    quality    d (h + k) / 2                                                                                      (ours)
    format     1 if an answer that is not empty follows a closed think span, else 0

The paper averages the *advantages* of the three, so that no scale decides: train with the recipe ``longwriter``, whose advantage is
``advantages.decoupled``. Under plain GRPO the reward is the sum of the three.

Deviations: in the paper, quality is judged by a Bradley-Terry model of 72B weights, and a model judges format, with an overlap check against
repetition. Here both are rules: quality is the structure that the prompt requests, and repetition lowers it. A text of headings and keywords
alone has the highest quality; the length reward speaks against it.

Units and signs: all three from 0 to 1; higher is better. The columns ``headings`` and ``keywords`` are set by the task ``writing``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.correctness import Format
from toolkit.rewards.longwriter import LongWriter, assumed_longest
from toolkit.rewards.repetition import PUBLISHED_N, distinct_share
from toolkit.stats import Number


def headings_share(text: str, headings: Sequence[str]) -> float:
    """Return the share of the headings that stand on lines of their own, each after the one found before it; 1 if there are none.

    Marks around a heading, such as ``#``, ``*`` and a colon, do not count, nor does case.

    >>> headings_share("## Past\\nlong ago\\nUses:\\nmany", ["Past", "Uses", "Limits"])
    0.6666666666666666
    """
    lines = [_plain(line) for line in text.splitlines()]
    found = start = 0
    for heading in map(_plain, headings):
        if heading in lines[start:]:
            start = lines.index(heading, start) + 1
            found += 1
    return found / len(headings) if headings else 1.0


def keywords_share(text: str, keywords: Sequence[str]) -> float:
    """Return the share of the keywords that occur in a text as whole words, in any case; 1 if there are none.

    >>> keywords_share("Rain falls, and rivers rise.", ["rain", "river"])
    0.5
    """
    hits = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in keywords]
    return sum(hits) / len(hits) if hits else 1.0


def quality(text: str, headings: Sequence[str], keywords: Sequence[str]) -> float:
    """Return the quality of a text by rule, ``d (h + k) / 2``, from 0 to 1; 0 for a text without words. The rule is ours.

    >>> quality("Past\\nRain fell.", ["Past", "Uses"], ["rain"])
    0.75
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        return 0.0
    distinct = float(distinct_share([words], PUBLISHED_N)[0])
    return distinct * (headings_share(text, headings) + keywords_share(text, keywords)) / 2


def _plain(line: str) -> str:
    return line.strip(" \t#*_:").lower()


@dataclass(frozen=True)
class LongWriterZero:
    """Length, quality by rule, and format, as three components. The recipe ``longwriter`` averages their advantages.

    >>> batch = RewardBatch.from_columns(
    ...     answer_text=["Past\\nRain fell."], low_words=[2], high_words=[4], formatted=[True], headings=[("Past",)], keywords=[("rain",)]
    ... )
    >>> {name: values.tolist() for name, values in LongWriterZero()(batch).components.items()}
    {'length': [1.0], 'quality': [1.0], 'format': [1.0]}

    Attributes:
        longest: Length at which the length reward is 0 again, greater than the upper end of every target range.
        unit: Unit of the lengths: ``"words"`` of the answer, or ``"tokens"`` of the response.
    """

    longest: Number = assumed_longest
    unit: str = "words"

    name: ClassVar[str] = "longwriter_zero"

    @property
    def needs(self) -> frozenset[str]:
        return LongWriter(unit=self.unit).needs | Format.needs | {"answer_text", "headings", "keywords"}

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        rows = zip(batch["answer_text"], batch["headings"], batch["keywords"], strict=True)
        return RewardValues.sum(
            length=LongWriter(longest=self.longest, unit=self.unit)(batch).values,
            quality=np.array([quality(*row) for row in rows], np.float64),
            format=Format()(batch).values,
        )
