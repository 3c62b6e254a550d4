"""Answer the test questions with perturbed queries, for every policy that ``study.py`` kept: ``python data/searching/robustness.py``.

In half of the searches, chosen by a hash of the query, one word of the query is replaced by a word of another query before the corpus is
searched. This is the study of fragility of RE-Searcher (arXiv 2509.26048): a policy that reflects on its results should search again.
Writes ``robustness.json`` and the second table of ``README.md`` here. Questions whose fact is only in the corpus; the same random numbers with and without.
Intervals of 95 % are over problems and seeds. About 4 minutes on one core.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import report, store, tasks
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.rewards.re_searcher import perturbed
from toolkit.tasks.searching import MAX_CALLS, corpus
from toolkit.tools import Tool, Toolbox
from toolkit.types import Problem

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import publish  # noqa: E402
import study  # noqa: E402

ARMS = ("before training", study.BASE, "RE-Searcher", "ReSeek")
METRICS = {"accuracy": "share", "calls": "calls"}


def fragile(words: Sequence[str]) -> Toolbox:
    """Return the searcher's tools, with one word replaced in half of the queries."""
    texts = corpus()

    def search(query: str) -> str:
        """Search the corpus with a query that may be perturbed."""
        seed = zlib.crc32(query.encode())
        return texts.search(perturbed(query, words, seed) if query.split() and seed % 2 else query)

    return Toolbox((Tool(search),), max_calls=MAX_CALLS)


def measured(lm: LM, tools: Toolbox | None, tests: list[Problem], seed: int) -> dict[str, list[float]]:
    """Return one mean per problem and metric."""
    episodes = rollouts(
        Condition(lm, tools=tools), tests, Sampling(n=study.SAMPLES, max_new_tokens=study.LONGEST, seed=seed), progress=False
    )
    values = {"accuracy": [float(r.correct) for r in episodes], "calls": [len(r.results) for r in episodes]}
    return {name: np.array(v, float).reshape(len(tests), -1).mean(1).tolist() for name, v in values.items()}


def page(found: dict[str, Any]) -> str:
    """Return the table of the README."""

    def cell(e: dict[str, float], unit: str, sign: str = "") -> str:
        return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign)

    rows = {
        arm: {
            "accuracy, as asked": cell(row["as asked"]["accuracy"], "share"),
            "perturbed minus as asked": cell(row["difference"]["accuracy"], "share", "+"),
            "calls, perturbed minus as asked": cell(row["difference"]["calls"], "calls", "+"),
        }
        for arm, row in found.items()
    }
    return report.markdown(pd.DataFrame(rows).T.rename_axis("only in the corpus"))


def main() -> None:
    ground = study.searching()
    tests = [p for p in ground.tests if p.meta["where"] == "corpus"]
    words = sorted(
        {word for p in tasks.load("searching", "train", study.POOL) for q in p.meta["gold_queries"] for word in q.split()}
    )
    found: dict[str, Any] = {}
    parts: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
    for arm in ARMS:
        parts[arm] = {"as asked": [], "perturbed": []}
        for seed in study.SEEDS:
            lm = ground.lm if arm == "before training" else study.policy(ground, arm, seed)
            for name, tools in (("as asked", ground.tools), ("perturbed", fragile(words))):
                parts[arm][name].append(measured(lm, tools, tests, seed))
        found[arm] = {
            name: {m: publish.estimate([p[m] for p in ps], unit=u) for m, u in METRICS.items()} for name, ps in parts[arm].items()
        }
        asked, changed = parts[arm]["as asked"], parts[arm]["perturbed"]
        found[arm]["difference"] = {
            m: publish.estimate([p[m] for p in changed], [p[m] for p in asked], unit=u) for m, u in METRICS.items()
        }
    trained = store.read_json(HERE / "results.json")["made_by"]
    store.write_json(
        {"made_by": store.made_by(study.CODE), "policies_made_by": trained, "questions": len(tests), "arms": found},
        HERE / "robustness.json",
    )
    publish.splice("robustness", page(found), HERE / "README.md")


if __name__ == "__main__":
    main()
