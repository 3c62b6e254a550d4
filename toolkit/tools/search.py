"""Search in a corpus of texts with BM25, as the package bm25s computes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

INSTALL = "pip install 'reasoning-length-toolkit[search]'"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Search:
    """Search in a corpus. The method ``search`` is the tool: ``Tool(corpus.search)``.

    The score of a text is BM25 in Lucene's form, as bm25s computes it by default. Words are compared in lower case. Texts with equal scores
    keep the order of the corpus, so a result depends only on corpus and query.

    Attributes:
        texts: The corpus.
        top: Largest number of texts in a result.

    Raises:
        ImportError: bm25s is not installed.
    """

    texts: tuple[str, ...]
    top: int = 3

    def __post_init__(self) -> None:
        if not self.texts or self.top < 1 or not any(map(words, self.texts)):
            raise ValueError(f"Search over {len(self.texts)} texts, top={self.top}: need texts with words, and at least 1 result.")
        _ = self._index  # so that a missing package is an error now

    @cached_property
    def _index(self) -> Any:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(f"Search needs the package bm25s: {INSTALL}.") from error
        index = bm25s.BM25()
        index.index([words(text) for text in self.texts], show_progress=False)
        return index

    def ranked(self, query: str) -> list[tuple[int, float]]:
        """Return pairs (index of the text, BM25 score) of the best texts, best first. Texts that share no word with the query are left out.

        Args:
            query: Words to search for.
        """
        known = [word for word in words(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [(i, scores[i]) for i in order[: self.top] if scores[i] > 0]

    def search(self, query: str) -> str:
        """Search for texts that contain words of a query and return the best ones, one per line.

        Args:
            query: The words to search for.
        """
        return "\n".join(self.texts[i] for i, _ in self.ranked(query)) or "nothing found"


def words(text: str) -> Sequence[str]:
    """Return the words of a text in lower case.

    >>> words("The river of Zor-Tal")
    ['the', 'river', 'of', 'zor', 'tal']
    """
    return _WORD.findall(text.lower())
