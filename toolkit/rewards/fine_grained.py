"""Fine-Grained RLHF: fine-grained human feedback gives better rewards, arXiv:2306.01693. One reward per error type, at the end of segments.

A response is cut into segments, by another rule for each error type. Each segment is scored, and the score is paid at its last token.

Equation (t: token; k: error type; j: segment of this type; R_k: score of a segment; w_k: weight; pi, pi_0: policy and initial model):

    r_t = sum_k sum_j [t is the last token of segment j] w_k R_k(j)  -  beta log( pi(t) / pi_0(t) )

The reward of a whole response is the sum over its tokens. The recipe ``fine_grained`` trains with one advantage per token
(``grpo.advantages.reward_to_go``), ``grpo.dense`` places the rewards.

Three error types, with the paper's sizes (``w_k R_k``) for long answers to questions, and our detectors for generated arithmetic:

* ``relevance``, plus or minus 0.3 per sub-sentence. Ours: a line of thinking fails if it repeats an earlier line, or calculates with a
  number that is neither in the question nor an earlier result.
* ``facts``, plus or minus 0.5 per sentence. Ours: a line fails if one of its equations is wrong. Lines without equations are not scored.
* ``complete``, 0.3 times a score, once at the end. Ours: 1 for a right answer, 0 for a wrong one, -1 if there is no number in it.

Deviations: the paper trains one reward model per error type on human labels; the rules here replace them (ours), so they are never wrong
on generated arithmetic, and say little elsewhere. Sub-sentences are cut at the paper's marks ``, ; ! ?``, and at line breaks and full
stops. The paper trains PPO with a critic (gamma 1, lambda .95); we have none. Its term with beta is TRL's KL term of the loss here.

Units and signs: higher is better. A right step is paid more than none, so the sum grows with the number of right steps: a length reward in
disguise. ``assumed_right_step=0.0`` pays errors only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_WEIGHTS = {"relevance": 0.3, "facts": 0.5, "complete": 0.3}
LEAST_WORDS = 5  # of a sub-sentence, in the paper
# Not a part of a longer expression, such as "3 + 4 = 10" in "2 * 3 + 4 = 10", or of a number with a point.
EQUATION = re.compile(r"(?<![\d.,*/+-])(?<![*/]\s)(?P<left>-?\d+(?:\s*[+-]\s*\d+)+)\s*=\s*(?P<right>-?\d+)(?!\d|[.,]\d)")
# A think tag of any format that the toolkit knows, or another special token. Some formats have a word of a message's header in the tag.
_TAG = r"(?:<[^<>\s]+>(?:analysis|assistant|final|thought)?|\[/?think\])"
_TAGS_AT_END = re.compile(rf"(?:\s*{_TAG})+\s*$", re.IGNORECASE)
_RECHECK = re.compile(r"\b(wait|ok|fix)\b")  # words of our generators around a repeated step


class Response(NamedTuple):
    """Input of a detector: the response's text, the question, the answer's text, and whether the answer is right."""

    text: str
    question: str
    answer: str
    correct: bool


class Scored(NamedTuple):
    """A segment and its score.

    Attributes:
        stop: Offset in the response's text behind the segment's last character.
        score: R_k, from -1 to 1.
    """

    stop: int
    score: float


class Segment(NamedTuple):
    """A segment and the reward that is paid at its last token.

    Attributes:
        stop: Offset in the response's text behind the segment's last character.
        kind: Error type.
        value: Weight times score.
    """

    stop: int
    kind: str
    value: float


Detector = Callable[[Response], Sequence[Scored]]


def sub_sentences(text: str) -> list[tuple[int, int]]:
    """Return the character ranges ``[start, stop)`` of the sub-sentences of a text, in order, without blanks at their ends.

    A sub-sentence ends after one of ``, ; ! ? .`` that is followed by a blank, if it then has at least five words. The text after the last
    such mark of a line is a sub-sentence too, however short.

    >>> text = "one two three four five, six. seven"
    >>> [text[a:b] for a, b in sub_sentences(text)]
    ['one two three four five,', 'six. seven']
    """
    ranges = []
    for line in re.finditer(r"[^\n]+", text):
        start = line.start()
        for mark in re.finditer(r"[,;!?.](?=\s)", line[0]):
            stop = line.start() + mark.end()
            if len(text[start:stop].split()) >= LEAST_WORDS:
                ranges.append((start, stop))
                start = stop
        ranges.append((start, line.end()))
    trimmed = [(b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())) for a, b in ranges]
    return [(a, b) for a, b in trimmed if a < b]


def thinking_of(response: Response) -> str:
    """Return the part of a response's text that is before its answer, or all of it without an answer, without tags at its end."""
    start = response.text.rfind(response.answer) if response.answer.strip() else -1
    return _TAGS_AT_END.sub("", response.text if start < 0 else response.text[:start])


def equations_hold(line: str) -> bool | None:
    """Return True if all equations of + and - in a line are right, False if one is wrong, ``None`` if there is none.

    >>> [equations_hold(line) for line in ("wait 17+5=22 ok", "22-9=14", "so")]
    [True, False, None]
    """
    found = [(_total(m["left"]), int(m["right"])) for m in EQUATION.finditer(line)]
    return all(left == right for left, right in found) if found else None


def _total(expression: str) -> int:
    return sum(int(re.sub(r"\s", "", term)) for term in re.findall(r"[+-]?\s*\d+", expression))


def wrong_facts(response: Response) -> list[Scored]:
    """Return a score for each line of thinking with equations: 1 if all are right, else -1."""
    lines = re.finditer(r"[^\n]+", thinking_of(response))
    return [Scored(m.end(), 1.0 if holds else -1.0) for m in lines if (holds := equations_hold(m[0])) is not None]


def irrelevant(response: Response) -> list[Scored]:
    """Return a score for each sub-sentence of thinking: -1 if it repeats an earlier one or uses a foreign number, else 1.

    A number is foreign if it stands on the left of an equation, and neither in the question nor as the result of an earlier equation. If
    the question has no number, none is foreign. A sub-sentence without a letter or digit is not scored.
    """
    text, scored, seen = thinking_of(response), [], set[str]()
    known = set(re.findall(r"\d+", response.question))
    any_known = bool(known)
    for start, stop in sub_sentences(text):
        part = re.sub(_TAG, " ", text[start:stop].lower())
        content = " ".join(re.findall(r"\w+|[-+*/=]", _RECHECK.sub(" ", part)))
        if not re.search(r"\w", content):
            continue
        equations = list(EQUATION.finditer(part))
        foreign = any_known and any(not set(re.findall(r"\d+", m["left"])) <= known for m in equations)
        scored.append(Scored(stop, -1.0 if content in seen or foreign else 1.0))
        seen.add(content)
        known |= {m["right"].lstrip("-") for m in equations}
    return scored


def incomplete(response: Response) -> list[Scored]:
    """Return one score at the end of the response: 1 for a right answer, 0 for a wrong one, -1 for an answer without a number."""
    answered = re.search(r"\d", response.answer) is not None
    return [Scored(len(response.text), 1.0 if response.correct else 0.0 if answered else -1.0)]


DETECTORS: dict[str, Detector] = {"relevance": irrelevant, "facts": wrong_facts, "complete": incomplete}


@dataclass(frozen=True)
class FineGrained:
    """Sum of the rewards of all segments of a response: one component per error type.

    >>> batch = RewardBatch.from_columns(text=["<think>3+4=7\\n</think>7"], question="3+4=?", answer_text="7", correct=True)
    >>> {name: values.tolist() for name, values in FineGrained()(batch).components.items()}
    {'relevance': [0.3], 'facts': [0.5], 'complete': [0.3]}

    Attributes:
        weights: Error type -> w_k. Types with weight 0 are left out of the sum.
        assumed_right_step: Factor of the rewards above 0 of ``relevance`` and ``facts``: 1 as published; 0 pays for errors only (ours).
        detectors: Error type -> function from a response to the scores of its segments.
    """

    weights: dict[str, Number] = field(default_factory=lambda: dict(PUBLISHED_WEIGHTS))
    assumed_right_step: Number = 1.0
    detectors: dict[str, Detector] = field(default_factory=lambda: dict(DETECTORS))

    name: ClassVar[str] = "fine_grained"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "question", "answer_text", "correct"})

    def __post_init__(self) -> None:
        if unknown := sorted(self.weights.keys() - self.detectors.keys()):
            raise ValueError(f"No detector of the error type {unknown[0]!r}: there are {', '.join(self.detectors)}.")
        if not self.weights or min(self.weights.values()) < 0 or self.assumed_right_step < 0:
            raise ValueError(f"{self.weights}, {self.assumed_right_step}: give at least one weight, and numbers of 0 or more.")

    def segments(self, batch: RewardBatch) -> list[list[Segment]]:
        """Return the segments of each response, with the reward of each, in no particular order."""
        batch.check(self)
        columns = (batch[name] for name in ("text", "question", "answer_text", "correct"))
        return [self._segments(Response(t, q, a, bool(c))) for t, q, a, c in zip(*columns, strict=True)]

    def _segments(self, response: Response) -> list[Segment]:
        factors = {kind: 1.0 if kind == "complete" else float(self.assumed_right_step) for kind in self.weights}
        return [
            Segment(stop, kind, float(weight) * score * (factors[kind] if score > 0 else 1.0))
            for kind, weight in self.weights.items()
            for stop, score in self.detectors[kind](response)
        ]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        parts = self.segments(batch)
        return RewardValues.sum(
            **{kind: np.array([sum(s.value for s in own if s.kind == kind) for own in parts], float) for kind in self.weights}
        )
