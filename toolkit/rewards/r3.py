"""R3, regularised relevance reward, arXiv:2402.03469: relevance, kept from being gamed by factors for length and repetition.

Equations (M(x): embedding of the question, M(y) of the response, M(z) of the reference answer; <a, b>: their similarity; n: words of the
response; F: a rescaling):

    LI    n / 100                                    length incentive
    RP    number of different 3-grams of words / number of all 3-grams of words
    r     <M(x), M(y)> LI RP     for open questions;      F(<M(z), M(y)>) RP     for others

Relevance alone is gamed by copying the question, and length alone by repetition; the product rewards neither.

Deviations: the paper's M is Contriever. Here the similarity is an argument, and its default is the cosine of word counts (ours). F was not
found: an argument, by default the identity. The paper lets a language model tell open questions from others; here ``open_ended`` says which
form is used. ``incentive`` may be negative, so that short responses earn more (ours).

Units and signs: length in words; higher is better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.repetition import PUBLISHED_N, distinct_share
from toolkit.rewards.turns import words
from toolkit.stats import Number

PUBLISHED_UNIT = 100  # words per unit of the length incentive


def assumed_similarity(one: str, other: str) -> float:
    """Return the cosine of the word counts of two texts, from 0 to 1 (ours); 0 if one has no words.

    >>> round(assumed_similarity("the river of Zor", "a river"), 4)
    0.3536
    """
    a, b = Counter(words(one)), Counter(words(other))
    norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(n * b[word] for word, n in a.items()) / norms if norms else 0.0


def identity(similarity: float) -> float:
    """Return the similarity as it is: our stand-in for F."""
    return similarity


@dataclass(frozen=True)
class R3:
    """Similarity of response and question (or reference), times factors for length and for distinct 3-grams.

    >>> batch = RewardBatch.from_columns(question="a b c", answer_text=["a b c", "a b c a b c"])
    >>> R3()(batch).values.round(4).tolist()
    [0.03, 0.045]

    Attributes:
        open_ended: True for the form with the question and the length incentive; False for that with the reference answer.
        similarity: Function from two texts to a number.
        rescale: F, applied to the similarity with the reference answer.
        incentive: Sign and weight of the length incentive. The factor is ``incentive n / unit`` if it is positive, and
            ``max(0, 1 + incentive n / unit)`` if it is negative.
        unit: Words at which the length incentive is 1.
    """

    open_ended: bool = True
    similarity: Callable[[str, str], float] = assumed_similarity
    rescale: Callable[[float], float] = identity
    incentive: Number = 1.0
    unit: Number = PUBLISHED_UNIT

    name: ClassVar[str] = "r3"

    def __post_init__(self) -> None:
        if not self.unit > 0 or self.incentive == 0:
            raise ValueError(f"unit={self.unit}, incentive={self.incentive}: need a unit above 0 and an incentive that is not 0.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"answer_text", "question" if self.open_ended else "gold_answer"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        others = batch["question" if self.open_ended else "gold_answer"]
        relevance = np.array([self.similarity(str(o), answer) for o, answer in zip(others, batch["answer_text"], strict=True)])
        parts = [answer.split() for answer in batch["answer_text"]]
        factor = distinct_share(parts, PUBLISHED_N)
        if self.open_ended:
            factor = factor * self.length(np.array([len(p) for p in parts], float))
        else:
            relevance = np.array([self.rescale(r) for r in relevance.tolist()])
        return RewardValues.sum(relevance=relevance * factor)

    def length(self, n: Float[ndarray, " rows"]) -> Float[ndarray, " rows"]:
        """Return the factor for the length of responses with ``n`` words: from 0 upwards."""
        return np.maximum(0.0, self.incentive * n / self.unit + (self.incentive < 0))
