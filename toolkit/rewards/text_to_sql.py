"""Contrastive reward for multilingual Text-to-SQL, arXiv:2510.13827: execution, plus similarity of question and query.

Equations (e: 1 if the query's rows are those of the right query, else 0; s: similarity of the embeddings of question and query; w: weight):

    r    e + w s

The similarity tells queries apart that all fail, so a group without a right query has a gradient too. The paper takes the embeddings from
an encoder that is tuned contrastively, so that a question is close to its query in every language.

Deviations: formula and weight were not found; the sum and w are ours (``assumed_weight``). The encoder is an argument. The default similarity is
the share of the query's names and values that the question holds (ours): it needs no encoder, but works in one language only. Rows are
compared as a multiset, and in order if the right query has ORDER BY at its end (ours).

Units and signs: e is 0 or 1; higher is better. Cost: two queries per response, with the limits of ``tools.sql.Database``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.turns import words
from toolkit.stats import Number
from toolkit.tools.queries import executes_like, query_of

assumed_weight = 0.2
KEYWORDS = frozenset((
    "select", "from", "where", "and", "or", "not", "order", "by", "group", "having", "limit", "join", "on", "as", "desc", "asc", "distinct",
    "count", "sum", "avg", "min", "max", "in", "like", "between", "is", "null",
))  # fmt: skip


def assumed_similarity(question: str, query: str) -> float:
    """Return the share of a query's names and values that are words of the question, from 0 to 1 (ours); 0 without any.

    >>> assumed_similarity("name of towns with people 3", "select name from towns where people = 4")
    0.75
    """
    known, wanted = {*words(question)}, [word for word in words(query) if word not in KEYWORDS]
    return float(np.mean([word in known for word in wanted])) if wanted else 0.0


@dataclass(frozen=True)
class ContrastiveSQL:
    """1 if the query in the answer gives the right rows, plus the weighted similarity of question and query.

    >>> columns = dict(question="names with people 3", gold_sql="select name from t where people = 3")
    >>> schema = "create table t (name, people); insert into t values ('Ao', 3), ('Bei', 5);"
    >>> batch = RewardBatch.from_columns(answer_text=["select name from t where people < 4", "drop table t"], schema=schema, **columns)
    >>> ContrastiveSQL(weight=0.2)(batch).values.round(2).tolist()
    [1.05, 0.0]

    Attributes:
        weight: w, weight of the similarity.
        similarity: Function from question and query to a number from 0 to 1.
    """

    weight: Number = assumed_weight
    similarity: Callable[[str, str], float] = assumed_similarity

    name: ClassVar[str] = "contrastive_sql"
    needs: ClassVar[frozenset[str]] = frozenset({"answer_text", "question", "gold_sql", "schema"})

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        queries = [query_of(answer) for answer in batch["answer_text"]]
        right = [executes_like(q, str(g), str(s)) for q, g, s in zip(queries, batch["gold_sql"], batch["schema"], strict=True)]
        similar = [self.similarity(str(question), q) if q else 0.0 for question, q in zip(batch["question"], queries, strict=True)]
        return RewardValues.sum(execution=np.array(right, float), similarity=self.weight * np.array(similar, float))
