"""Read a ranking from an answer such as ``[3] > [1] > [2]``, and score it by NDCG.

Passages are numbered from 1 in texts, and from 0 in lists. A *ranking* is a list of passage indices, the most relevant first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

IDENTIFIER = re.compile(r"\[(\d+)\]")
SEPARATOR = " > "


def written(ranking: Sequence[int]) -> str:
    """Return a ranking as text.

    >>> written([2, 0, 1])
    '[3] > [1] > [2]'
    """
    return SEPARATOR.join(f"[{i + 1}]" for i in ranking)


def named(text: str, n: int) -> list[int]:
    """Return the indices of the passages that ``text`` names, in the order in which each is first named. Numbers above ``n`` are ignored.

    >>> named("[3] > [1] > [3] > [9]", 3)
    [2, 0]
    """
    return list(dict.fromkeys(int(i) - 1 for i in IDENTIFIER.findall(text) if 1 <= int(i) <= n))


def completed(text: str, n: int) -> list[int]:
    """Return the ranking in ``text``, with the passages that it does not name at the end, in their given order.

    >>> completed("[3] > [1]", 4)
    [2, 0, 1, 3]
    """
    first = named(text, n)
    return first + [i for i in range(n) if i not in first]


def ndcg(ranking: Sequence[int], relevance: Sequence[int], k: int | None = None) -> float:
    """Return the normalised discounted cumulative gain of a ranking, from 0 to 1.

    With the relevance g_r of the passage at rank r: ``DCG = sum_r (2^g_r - 1) / log2(r + 1)``, and NDCG is DCG over that of the best
    ranking. scikit-learn computes it.

    >>> round(ndcg([1, 0, 2], [3, 2, 0]), 4)
    0.834

    Args:
        ranking: Passage indices, each exactly once, the most relevant first.
        relevance: Relevance of each passage, 0 or more, by index.
        k: Number of ranks that count. Default: all.

    Raises:
        ValueError: the ranking does not hold every index once, ``k`` is below 1, a relevance is negative, or no passage is relevant.
    """
    from sklearn.metrics import ndcg_score

    n = len(relevance)
    if sorted(ranking) != list(range(n)):
        raise ValueError(f"The ranking {list(ranking)[:20]} of {n} passages: give each index from 0 to {n - 1} once.")
    if n == 0 or min(relevance) < 0 or max(relevance) == 0:
        raise ValueError(f"relevance={list(relevance)[:20]}: NDCG needs numbers of 0 or more, at least one above 0.")
    if k is not None and k < 1:
        raise ValueError(f"k={k}: at least 1 rank has to count.")
    if n == 1:
        return 1.0  # scikit-learn refuses a single passage
    gains, scores = 2.0 ** np.asarray(relevance) - 1, np.empty(n)
    scores[list(ranking)] = np.arange(n, 0, -1)
    return float(ndcg_score(gains[None], scores[None], k=k, ignore_ties=True))
