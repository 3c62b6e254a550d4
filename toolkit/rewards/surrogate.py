"""Surrogate signals from format and length: reinforcement learning without ground-truth answers, arXiv:2505.19439.

Equations (L: length; L_max: a constant; x = L / L_max, at most 1; p: the x at which R_l is highest; R_l: length part; f: 1 if an answer can
be extracted and parses as mathematics, else 0; w: weight of the format):

    R_l = 1 - (1 - x/p)^2                     if x <= p: from 0 at x = 0 to 1 at x = p
          1 - 2 ((x - p) / (1 - p))^2         if x > p: down to -1 at x = 1
    r   = R_l + w if f = 1, min(0, R_l) if f = 0

This curve of R_l is the shape ``"parabola"``. An ablation of the paper uses the shape ``"polyline"``, two straight lines that meet at
p = 1/2: R_l = 2x if x <= 1/2, and 3 - 4x if x > 1/2.

Deviations:
  - The paper has w = 1. The released code gives 0.5 for well-formed tags and 0.5 for an answer. Its prompt template has no tags, so w was
    in effect 0.5 in its runs.
  - Here all responses longer than L_max have R_l = -1. In the released code R_l falls further.
  - The released code accepts only boxed answers. Here, if there is no box, any number in the answer counts, as in the toolkit's graders
    (ours). The answer is the column ``answer_text``, the text after the closing think tag.

Units and signs: lengths in tokens; higher is better. No labels are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.answers import parses
from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.stats import Number

PUBLISHED_LONGEST, PUBLISHED_BEST = 3072, 0.5
SCRIPT_FORMAT = 0.5  # weight of the format in the run of the released code


@dataclass(frozen=True)
class Surrogate:
    """Reward for an answer that parses as mathematics, plus a length part, which favours a medium length. Correctness has no effect.

    ``answers.parses`` decides whether an answer parses. The length part is between -1 and 1; ``length_reward`` has its formula. If the
    answer does not parse, the length part is at most 0.

    >>> batch = RewardBatch.from_columns(tokens=[1536, 0, 1536], answer_text=["7", "7", "unsure"])
    >>> Surrogate()(batch).values.tolist()
    [2.0, 1.0, 0.0]

    Attributes:
        longest: L_max, tokens: the length part is -1 at this length and above.
        best: p, the length at which the length part is highest, as a share of L_max, in (0, 1).
        format: Reward for an answer that parses: 1 in the paper, 0.5 (``SCRIPT_FORMAT``) in the released code.
        shape: Curve of the length part over the length: ``"parabola"``, or ``"polyline"``, two straight lines. The polyline has its
            maximum at 1/2, so any other ``best`` is an error.
    """

    longest: Number = PUBLISHED_LONGEST
    best: Number = PUBLISHED_BEST
    format: Number = 1.0
    shape: str = "parabola"

    name: ClassVar[str] = "surrogate"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "answer_text"})

    def __post_init__(self) -> None:
        if not 0 < self.best < 1 or self.longest <= 0:
            raise ValueError(f"{self}: need 0 < best < 1 and longest > 0.")
        if self.shape not in ("parabola", "polyline"):
            raise ValueError(f"shape={self.shape!r}: choose parabola or polyline.")
        if self.shape == "polyline" and self.best != PUBLISHED_BEST:
            raise ValueError(f"best={self.best}: the polyline is defined for best={PUBLISHED_BEST} only.")

    def length_reward(self, tokens: ndarray) -> Float[ndarray, " n"]:
        """Return the length part of the reward of each response, in [-1, 1].

        Let x be the length divided by the field ``longest``, at most 1. The field ``shape`` selects one of two curves:

        - ``"parabola"``: ``1 - (1 - x/p)^2`` if x <= p, else ``1 - 2 ((x - p) / (1 - p))^2``, where p is the field ``best``.
        - ``"polyline"``: ``2x`` if x <= 1/2, else ``3 - 4x``. It does not use ``best``, which has to be 1/2.

        Args:
            tokens: Length of each response, tokens.
        """
        x, p = np.minimum(tokens / self.longest, 1.0), self.best
        if self.shape == "polyline":
            return np.where(x <= p, 2 * x, 3 - 4 * x)
        return np.where(x <= p, 1 - (1 - x / p) ** 2, 1 - 2 * ((x - p) / (1 - p)) ** 2)

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        formed, length = np.array([parses(text) for text in batch["answer_text"]], bool), self.length_reward(batch["tokens"])
        return RewardValues.sum(format=self.format * formed, length=np.where(formed, length, np.minimum(0.0, length)))
