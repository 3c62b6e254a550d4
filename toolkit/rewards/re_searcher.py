"""RE-Searcher, arXiv:2509.26048: a goal before each search, a reflection after it, and a reward for right reflections.

Equations (c: 1 if the answer is right; f: 1 if the response is valid; g: 1 if a result held a gold document; s: share of the results whose
reflection is right, 0 without results; w: weight of reflection):

    ladder   right: 1 if valid, 0.8 if not;   wrong: 0.2 (0.3 with g) if valid, 0.1 if not;   no answer: 0
    r        ladder + w s

A response is valid if it is well formed, every turn with an answered call states a goal, and every result is followed by a reflection. A
reflection is right if it calls a result useful that holds a gold document, or one useless that does not.

Robustness, as in the paper's study of fragility: ``pass_consistency`` counts the questions that are right in exactly one of several runs,
and ``result_similarity`` compares the results of a query with those of the query with one word changed (``perturbed``).

Deviations: the paper's formulas could not be read. The ladder has the sizes that the comments in Search-R1's code give, as arguments; w was
not found (``assumed_weight``). The paper lets a language model judge reflections; here they are compared with the gold documents. The
pattern of a goal is ours. Similarity is the Jaccard index of the documents (lines) of two results, and a changed word is one of the query's
words replaced by a word from a list (ours).

Units and signs: higher is better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.turns import Protocol, assumed_usefulness, assumed_verdict, verdicts
from toolkit.stats import Number

SEARCH_R1_LADDER = (1.0, 0.8, 0.2, 0.1)  # right and valid, right and invalid, wrong and valid, wrong and invalid
SEARCH_R1_FOUND = 0.1  # added to wrong and valid if a gold document was found
assumed_weight = 0.2
assumed_goal = re.compile(r"<goal>|\basked\s*:", re.IGNORECASE)
assumed_threshold = 0.5


@dataclass(frozen=True)
class RESearcher:
    """A ladder of correctness and validity, plus the weighted share of right reflections on results.

    >>> text = "<goal>river</goal><search>Zor</search><result>Tal is in Zor</result>relevant. Tal"
    >>> columns = dict(calls=1, correct=[1, 0], formatted=1, answer_text="Tal", gold_documents=[("Tal is in Zor",)] * 2)
    >>> RESearcher(weight=0.2)(RewardBatch.from_columns(text=[text] * 2, **columns)).values.round(2).tolist()
    [1.2, 0.5]

    Attributes:
        weight: w, weight of the share of right reflections.
        ladder: Rewards of right and valid, right and invalid, wrong and valid, wrong and invalid responses.
        found: Added for a wrong, valid response if a result held a gold document.
        goal: Pattern of a stated goal.
        usefulness: Function from the text of a result and the gold documents to a number from 0 to 1; useful is above 0.5.
        pattern: Pattern of a reflection, see ``turns.verdicts``.
        protocol: Marks of calls and results.
    """

    weight: Number = assumed_weight
    ladder: tuple[Number, Number, Number, Number] = SEARCH_R1_LADDER
    found: Number = SEARCH_R1_FOUND
    goal: re.Pattern[str] = assumed_goal
    usefulness: Callable[[str, Sequence[str]], float] = assumed_usefulness
    pattern: re.Pattern[str] = assumed_verdict
    protocol: Protocol = field(default_factory=Protocol)

    name: ClassVar[str] = "re_searcher"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "calls", "correct", "formatted", "answer_text", "gold_documents"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        rungs, reflection = np.zeros(len(batch)), np.zeros(len(batch))
        for i, (turns, documents) in enumerate(zip(self.protocol.of_batch(batch), batch["gold_documents"], strict=True)):
            useful = [self.usefulness(turn.result or "", documents) > assumed_threshold for turn in turns[:-1]]
            reflected = verdicts(turns, self.pattern)
            stated = all(self.goal.search(turn.written) for turn in turns[:-1])
            valid = bool(batch["formatted"][i]) and stated and None not in reflected
            rungs[i] = self._rung(bool(batch["correct"][i]), valid, any(useful), bool(batch["answer_text"][i].strip()))
            if useful:
                reflection[i] = np.mean([v is not None and v == u for v, u in zip(reflected, useful, strict=True)])
        return RewardValues.sum(ladder=rungs, reflection=self.weight * reflection)

    def _rung(self, correct: bool, valid: bool, found: bool, answered: bool) -> float:
        if not answered:
            return 0.0
        return float(self.ladder[2 * (not correct) + (not valid)] + (self.found if valid and found and not correct else 0.0))


def pass_consistency(correct: Bool[ndarray, "questions runs"]) -> dict[str, float]:
    """Return the shares of questions that are right in all runs (``always``), in none (``never``) and in some (``mixed``).

    >>> pass_consistency(np.array([[1, 1], [0, 0], [1, 0], [0, 1]], bool))
    {'always': 0.25, 'never': 0.25, 'mixed': 0.5}

    Args:
        correct: True for each question and run with a right answer.
    """
    share = np.asarray(correct, float).mean(axis=1)
    return {
        "always": float((share == 1).mean()),
        "never": float((share == 0).mean()),
        "mixed": float(((share > 0) & (share < 1)).mean()),
    }


def perturbed(query: str, replacements: Sequence[str], seed: int) -> str:
    """Return a query with one of its words, drawn at random, replaced by another word.

    >>> perturbed("river of Zor", ["lake", "hill"], seed=0)
    'river of hill'

    Args:
        query: The query, with at least one word.
        replacements: Words to draw from, at least two.
        seed: Seed of the draw.

    Raises:
        ValueError: the query has no word, or there are fewer than two replacements.
    """
    if not query.split() or len({*replacements}) < 2:
        raise ValueError(
            f"query={query!r}, {len({*replacements})} replacements: need a word in the query and two words to draw from."
        )
    random, parts = np.random.default_rng(seed), query.split()
    at = int(random.integers(len(parts)))
    others = [word for word in replacements if word != parts[at]]
    return " ".join([*parts[:at], others[int(random.integers(len(others)))], *parts[at + 1 :]])


def result_similarity(one: str, other: str) -> float:
    """Return the Jaccard index of the documents of two results, one document per line: from 0, nothing shared, to 1, the same documents.

    >>> result_similarity("a is b\\nc is d", "c is d")
    0.5
    """
    a, b = ({line.strip() for line in text.splitlines()} - {""} for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 1.0
