"""ACE-RL: adaptive constraint-enhanced reward for long-form generation, arXiv:2509.04903. The share of an instruction's constraints met.

Each instruction has a checklist of its own. A response is paid for each item that it meets, and for its length.

Equations (c_1 .. c_m: constraints of the instruction other than its lengths; l_1 .. l_k: its length constraints; s: 1 if the number of
words is in the range of a length constraint, words / lowest if it is below, highest / words if it is above; w: weight):

    r = (1 - w) mean_i [c_i is met]  +  w mean_j s(l_j)

A mean over no constraints is left out: the other one then has weight 1. An instruction without any constraint pays 1 to every response.

Deviations: only the abstract was read. In the paper, a language model decomposes the instruction, also into constraints that it does not
state, and a second one verifies each; levels of the scores, weights and the formula of the length reward were not found. Here constraints are
read by rule (``toolkit.constraints``), checks are exact, and w and s are ours. The task ``instructions`` generates such instructions.

Units and signs: higher is better, from 0 to 1; lengths in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.constraints import LENGTH, extract, length_score
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

assumed_length_weight = 0.5  # w: ours


@dataclass(frozen=True)
class ACERL:
    """Share of the instruction's constraints that the answer meets, mixed with a score of its length.

    >>> batch = RewardBatch.from_columns(question='Use at most 2 words. Mention "a". Mention "b".', answer_text=["a b", "a", "b a c c"])
    >>> ACERL()(batch).values.tolist()
    [1.0, 0.75, 0.75]

    Attributes:
        assumed_length_weight: w, the weight of length, from 0 to 1.
    """

    assumed_length_weight: Number = assumed_length_weight

    name: ClassVar[str] = "ace_rl"
    needs: ClassVar[frozenset[str]] = frozenset({"question", "answer_text"})

    def __post_init__(self) -> None:
        if not 0 <= self.assumed_length_weight <= 1:
            raise ValueError(f"{self}: give a weight from 0 to 1.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        parts = [self._parts(q, a) for q, a in zip(batch["question"], batch["answer_text"], strict=True)]
        met, length = np.array(parts, float).reshape(-1, 2).T
        return RewardValues.sum(constraints=met, length=length)

    def _parts(self, instruction: str, text: str) -> tuple[float, float]:
        if not text.strip():  # an empty answer keeps every prohibition
            return 0.0, 0.0
        found = extract(instruction)
        met = [c.met(text) for c in found if c.kind not in LENGTH]
        lengths = [length_score(c, text) for c in found if c.kind in LENGTH]
        w = float(self.assumed_length_weight) if met and lengths else float(bool(lengths))
        return (1 - w) * float(np.mean(met) if met else 1.0), w * float(np.mean(lengths) if lengths else 1.0)
