"""Search-Gen-V, nuggets as rubric, arXiv:2510.14660: an answer is scored by the facts (nuggets) that it states.

Equations (N: nuggets of a question; l_k: label that a verifier gives nugget k: supported, partly supported or not; w: weight of a partly
supported nugget):

    r           mean over k in N of (1 if supported, w if partly, 0 if not)

The short form has one nugget, the gold answer. The long form has the nuggets of the column ``nuggets``.

The verifier is trained with a reward of its own (a: 1 if all labels are right; f: F1, averaged over the three labels, where a label that
neither the verifier nor the gold labels use counts 1; t: 1, 0.5 or 0 for the format of the reasoning; q: 1 if the output has the requested format; b: number of
reasoning blocks):

    r_v         0.35 f + 0.35 a + 0.2 t + 0.1 q;   times 0.1 if b > 1;   0 if the number of labels is wrong or f = 0

Deviations: the paper's verifier is a language model of 4 billion parameters. Here it is an argument. Its default, ``assumed_verifier``,
compares words (ours); ``judging.nuggets`` trains a small one. w was not found (``assumed_partial``).

Units and signs: r from 0 to 1; higher is better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

LABELS = ("support", "partial_support", "not_support")
Verifier = Callable[[str, Sequence[str]], Sequence[str]]
"""A function from an answer and the nuggets to one label per nugget."""
FORMS = ("short", "long")
assumed_partial = 0.5
assumed_half = 0.5  # share of a nugget's words from which the default verifier calls it partly supported


def assumed_verifier(answer: str, nuggets: Sequence[str]) -> list[str]:
    """Return a label for each nugget (ours): supported if the answer has all its words, partly if at least half of them, else not.

    >>> assumed_verifier("Tal is a river", ["river Tal", "river Zor", "Mip"])
    ['support', 'partial_support', 'not_support']

    Args:
        answer: Text of the answer.
        nuggets: Facts that it should state.
    """
    known = {*_tokens(answer)}
    shares = [np.mean([word in known for word in _tokens(nugget)]) if _tokens(nugget) else 0.0 for nugget in nuggets]
    return ["support" if s == 1 else "partial_support" if s >= assumed_half else "not_support" for s in shares]


def _tokens(text: str) -> list[str]:
    """Return the words of a text, with numbers as wholes: "-3.5" is one word."""
    return re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower())


def nugget_score(labels: Sequence[str], *, partial: Number = assumed_partial) -> float:
    """Return the mean weight of the labels of an answer's nuggets; 0 without nuggets.

    >>> nugget_score(["support", "partial_support", "not_support", "not_support"])
    0.375

    Args:
        labels: Label of each nugget.
        partial: Weight of a partly supported nugget.

    Raises:
        ValueError: a label is not one of ``LABELS``.
    """
    weights = {"support": 1.0, "partial_support": float(partial), "not_support": 0.0}
    if unknown := [label for label in labels if label not in weights]:
        raise ValueError(f"The label {unknown[0]!r} of a nugget: expected one of {', '.join(LABELS)}.")
    return float(np.mean([weights[label] for label in labels])) if labels else 0.0


@dataclass(frozen=True)
class SearchGenV:
    """Mean weight of the nuggets that the answer supports.

    >>> batch = RewardBatch.from_columns(answer_text=["Tal and Mip", "Tal"], nuggets=[("Tal", "Mip")] * 2)
    >>> SearchGenV(form="long")(batch).values.tolist()
    [1.0, 0.5]

    Attributes:
        form: ``"short"``: the gold answer is the only nugget. ``"long"``: the column ``nuggets`` holds them.
        verifier: Function from an answer and the nuggets to one label per nugget.
        partial: Weight of a partly supported nugget, from 0 to 1.
    """

    form: str = "short"
    verifier: Verifier = assumed_verifier
    partial: Number = assumed_partial

    name: ClassVar[str] = "search_gen_v"

    def __post_init__(self) -> None:
        if self.form not in FORMS or not 0 <= self.partial <= 1:
            raise ValueError(f"form={self.form!r}, partial={self.partial}: need short or long, and a weight from 0 to 1.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"answer_text", "gold_answer" if self.form == "short" else "nuggets"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        rubrics = [(str(gold),) for gold in batch["gold_answer"]] if self.form == "short" else batch["nuggets"]
        labels = [self.labels(answer, nuggets) for answer, nuggets in zip(batch["answer_text"], rubrics, strict=True)]
        return RewardValues.sum(nuggets=np.array([nugget_score(row, partial=self.partial) for row in labels]))

    def labels(self, answer: str, nuggets: Sequence[str]) -> Sequence[str]:
        """Return the verifier's label of each nugget. Raise ValueError if it does not give one per nugget."""
        labels = self.verifier(answer, nuggets)
        if len(labels) != len(nuggets):
            raise ValueError(f"The verifier gave {len(labels)} labels for {len(nuggets)} nuggets: it must give one per nugget.")
        return labels


def macro_f1(labels: Sequence[str], gold: Sequence[str]) -> float:
    """Return F1 averaged over the three labels. A label that neither ``labels`` nor ``gold`` contains counts 1.

    >>> round(macro_f1(["support", "not_support", "support"], ["support", "not_support", "partial_support"]), 4)
    0.5556

    Args:
        labels: Labels that a verifier gave, one per nugget.
        gold: The right labels.
    """
    pairs = list(zip(labels, gold, strict=True))
    scores = []
    for label in LABELS:
        both, either = sum(p == label == g for p, g in pairs), sum((p == label) + (g == label) for p, g in pairs)
        scores.append(2 * both / either if either else 1.0)
    return float(np.mean(scores))


def verifier_reward(
    labels: Sequence[str], gold: Sequence[str], *, reasoning: Number = 1.0, requested: bool = True, blocks: int = 1
) -> float:
    """Return the reward with which a verifier is trained, from 0 to 1.

    >>> round(verifier_reward(["support", "not_support", "support"], ["support", "not_support", "partial_support"]), 4)
    0.4944

    Args:
        labels: Labels that the verifier gave.
        gold: The right labels.
        reasoning: t, format of the reasoning: 1, 0.5 or 0.
        requested: True if the output has the requested format.
        blocks: Number of reasoning blocks in the output.
    """
    if len(labels) != len(gold) or (f1 := macro_f1(labels, gold)) == 0:
        return 0.0
    total = 0.35 * f1 + 0.35 * (list(labels) == list(gold)) + 0.2 * reasoning + 0.1 * requested
    return float(total * (0.1 if blocks > 1 else 1.0))
