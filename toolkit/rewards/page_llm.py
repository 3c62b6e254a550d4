"""PageLLM: multi-grained rewards for whole-page optimisation, arXiv:2506.09084. A reward of the page, and one of each item on it.

A page is a ranking of passages such as ``[3] > [1] > [2]`` (task ``ranking``). The page-level reward looks at the whole order; the item-level
reward looks at one item and the next, as a preference between the page and the page with these two swapped does.

Equations (g_r = 2^relevance - 1: gain of the item at rank r, 0 behind the last rank; d_r = 1 / log2(r + 1); I: DCG of the best order;
q: share of the named identifiers that are named for the first time; NDCG = sum_r g_r d_r / I):

    page   = q NDCG
    item_r = min(0, (g_r - g_r+1) (d_r - d_r+1) / I)          repeated or unknown identifier: -b
    r      = v page + w sum_r item_r

The bracket is how much NDCG falls if the item and the next are swapped, so an item is charged if the swap is better. Without the minimum,
the sum over items would not be highest for the best page.

Page is paid at the end of the response, each item at its identifier: with the advantage ``reward_to_go`` (recipe ``page_llm``), a swap is
charged where it is written. Passages that the answer does not name stand at the end of the page, in their given order, without a reward of
their own. A response without an answer gets 0.

Deviations: only the abstract was read. The paper trains two reward models on preferences of users, in four families: relevance, ranking,
diversity, redundancy. Ours are exact, from the labels of a generated task: relevance and ranking are in NDCG, redundancy is q; diversity is
left out, since our passages have no labels for it. v, w, b and all formulas are ours. The paper trains with PPO.

Units and signs: higher is better; page is from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.fine_grained import Segment
from toolkit.stats import Number
from toolkit.stats.rankings import IDENTIFIER, completed, ndcg

assumed_page, assumed_item, assumed_repeat = 1.0, 1.0, 0.1  # v, w, b: ours


def swap_gains(ranking: Sequence[int], relevance: Sequence[int]) -> Float[ndarray, " n"]:
    """Return for each rank how much NDCG falls if the item and the next one are swapped; negative if it rises.

    The last item has no next one. It is compared with an item without gain at the rank behind it.

    >>> swap_gains([0, 1], [0, 1]).round(3).tolist()
    [-0.369, 0.131]

    Args:
        ranking: Item indices, each once, the first rank first.
        relevance: Relevance of each item, 0 or more, by index.
    """
    gains = 2.0 ** np.asarray([relevance[i] for i in ranking]) - 1
    discounts = 1 / np.log2(np.arange(2, len(gains) + 3))
    best = (np.sort(gains)[::-1] * discounts[:-1]).sum()
    return -np.diff(np.append(gains, 0.0)) * -np.diff(discounts) / best


@dataclass(frozen=True)
class PageLLM:
    """Quality of a ranked page, minus the gain of better swaps of its named items.

    >>> pages = ["[2] > [1]", "[1] > [2]"]
    >>> batch = RewardBatch.from_columns(text=pages, answer_text=pages, relevance=[(0, 1)] * 2)
    >>> {name: values.round(3).tolist() for name, values in PageLLM()(batch).components.items()}
    {'page': [1.0, 0.631], 'items': [0.0, -0.369]}

    Attributes:
        assumed_page: v, the weight of the page.
        assumed_item: w, the weight of the items.
        assumed_repeat: b, the charge for an identifier that is repeated or unknown.
    """

    assumed_page: Number = assumed_page
    assumed_item: Number = assumed_item
    assumed_repeat: Number = assumed_repeat

    name: ClassVar[str] = "page_llm"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "answer_text", "relevance"})

    def __post_init__(self) -> None:
        if min(self.assumed_page, self.assumed_item, self.assumed_repeat) < 0:
            raise ValueError(f"{self}: give weights of 0 or more.")

    def segments(self, batch: RewardBatch) -> list[list[Segment]]:
        """Return the segments of each response with their rewards: one per identifier that it names, then one for the whole page.

        Raises:
            ValueError: no passage of a problem is relevant.
        """
        batch.check(self)
        columns = (batch[name] for name in ("text", "answer_text", "relevance"))
        return [self._segments(*row) for row in zip(*columns, strict=True)]

    def _segments(self, text: str, answer: str, relevance: Sequence[int]) -> list[Segment]:
        if not answer.strip():  # thinking that is never closed has no answer
            return [Segment(len(text), "page", 0.0)]
        start, ranking = max(0, text.rfind(answer)), completed(answer, len(relevance))
        value = dict(zip(ranking, float(self.assumed_item) * np.minimum(swap_gains(ranking, relevance), 0.0), strict=True))
        items, first = [], set[int]()
        for m in IDENTIFIER.finditer(text, start):
            item = int(m[1]) - 1
            fresh = item in value and item not in first
            items.append(Segment(m.end(), "items", float(value[item]) if fresh else -float(self.assumed_repeat)))
            first.add(item)
        distinct = len(first & value.keys()) / len(items) if items else 1.0
        return [*items, Segment(len(text), "page", float(self.assumed_page) * distinct * ndcg(ranking, relevance))]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        parts = self.segments(batch)
        return RewardValues.sum(
            **{kind: np.array([sum(s.value for s in own if s.kind == kind) for own in parts]) for kind in ("page", "items")}
        )
