"""Measure the tiny searcher on test questions, and write ``results.json``, the model card (README.md) and the loss curve (loss.svg).

    python data/tiny-searcher/measure.py          # measures what is not in runs/tiny-searcher yet, then writes
    python data/tiny-searcher/measure.py --card   # writes the card from results.json

Temperature 1; intervals over questions. Four conditions answer the same questions with the same random numbers: with the search tool,
without a tool, with every search replaced by recall, and, as a control, with a tool whose results are documents drawn at random.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import generate, report, stats, store
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition
from toolkit.metrics import with_interval
from toolkit.stats import Estimate
from toolkit.tasks import searching
from toolkit.tools import Tool, Toolbox
from toolkit.types import Problem, Rollout

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import publish  # noqa: E402

QUESTIONS = 120  # per place of the facts
SAMPLING = Sampling(n=4, max_new_tokens=160)
TOOL, NONE, MEMORY, RANDOM = "with the tool", "without", "searches replaced by recall", "with random results"
MEASURES: Mapping[str, tuple[str, int, Callable[[Rollout], float]]] = {
    "accuracy": ("share", 1, lambda r: float(r.correct)),
    "calls": ("calls", 2, lambda r: float(len(r.results))),
    "written": ("tokens", 1, lambda r: float(r.written_tokens)),
    "results": ("tokens", 1, lambda r: float(r.result_tokens)),
}
"""Measure -> unit, digits, and value of a response. The answer "unknown" is the right one if the facts are in neither."""
PLACES = {"weights": "in the weights", "corpus": "only in the corpus", "neither": "in neither"}


def search(query: str) -> str:
    """Return documents of the corpus that have nothing to do with the query.

    Args:
        query: The words to search for.
    """
    documents = searching.SHIPPED.documents
    drawn = [int(store.key([query, i])[:8], 16) % len(documents) for i in range(searching.DOCUMENTS)]
    return "\n".join(documents[i] for i in drawn)


def recall(lm: LM, reader: Any, drawn: int) -> list[int] | None:
    """Replace the start of a search by ``i know``: a decoding rule that makes the model answer from memory."""
    return lm.tokenizer.encode("i know") if drawn == lm.token_id("<search>") else None


def conditions(lm: LM) -> dict[str, Condition]:
    """Return the conditions, by name."""
    control = Toolbox((Tool(search),), max_calls=searching.MAX_CALLS)
    return {
        TOOL: Condition(lm, tools=searching.toolbox()),
        NONE: Condition(lm),
        MEMORY: Condition(lm, rules=(recall,)),
        RANDOM: Condition(lm, tools=control),
    }


def questions() -> list[Problem]:
    """Return the test questions: equally many for each place of the facts."""
    return [p for where in PLACES for p in searching.load("test", QUESTIONS, where=where)]


def means(rollouts: list[Rollout], value: Callable[[Rollout], float]) -> np.ndarray:
    """Return the mean of a value per question, in the order of the questions, ``[questions, 1]``."""
    return np.array([value(r) for r in rollouts]).reshape(-1, SAMPLING.n).mean(axis=1, keepdims=True)


def difference(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Return the mean of a minus b, paired by question."""
    return stats.bootstrap(stats.difference(stats.mean_of(a), stats.mean_of(b)), len(a))


def summary(problems: list[Problem], sampled: Mapping[str, list[Rollout]]) -> dict[str, Any]:
    """Return the measured numbers: by place of the facts, condition and measure; differences between conditions; and habits."""
    where = {p.id: p.meta["where"] for p in problems}
    parts = {w: {c: [r for r in rs if where[r.problem_id] == w] for c, rs in sampled.items()} for w in PLACES}
    table: dict[str, Any] = {w: {c: {} for c in sampled} for w in PLACES}
    gains: dict[str, Any] = {w: {} for w in PLACES}
    for w, part in parts.items():
        for name, (_, _, value) in MEASURES.items():
            per = {c: means(rs, value) for c, rs in part.items()}
            for c, values in per.items():
                table[w][c][name] = stats.bootstrap(stats.mean_of(values), len(values))
            gains[w][name] = {other: difference(per[TOOL], per[other]) for other in (NONE, MEMORY, RANDOM)}
    known = parts["weights"][TOOL]
    searched = {
        name: [r for r in known if bool(r.results) == called] for name, called in (("searched", True), ("not searched", False))
    }
    habits = {
        "share searched, in the weights": over(known, lambda r: float(bool(r.results))),
        "never searched, only in the corpus": over(parts["corpus"][TOOL], lambda r: float(not r.results)),
        "thinking closed": over([r for rs in parts.values() for r in rs[TOOL]], lambda r: float(r.closed)),
        **{f"accuracy, in the weights, {name}": over(rs, lambda r: float(r.correct)) for name, rs in searched.items()},
        **{f"response tokens, in the weights, {name}": over(rs, lambda r: float(r.response_tokens)) for name, rs in searched.items()},
    }  # fmt: skip
    cue = {p.id: p.meta["cue"] for p in problems}
    for name, flag in (("with a cue word", True), ("without", False)):
        part = [r for r in sampled[TOOL] if cue[r.problem_id] is flag]
        habits[f"calls, prompts {name}"] = over(part, lambda r: float(len(r.results)))
        habits[f"accuracy, prompts {name}"] = over(part, lambda r: float(r.correct))
    return {"table": table, "gains": gains, "habits": habits}


def over(rollouts: list[Rollout], value: Callable[[Rollout], float]) -> Estimate:
    """Return the mean of a value over responses, then over questions."""
    return stats.over_problems([value(r) for r in rollouts], [r.problem_id for r in rollouts])


def shown(e: Mapping[str, float], unit: str, digits: int, sign: str = "") -> str:
    """Return an estimate that was read from the results, with its interval."""
    return with_interval(e["mean"], e["low"], e["high"], unit, sign=sign, digits=digits)


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the card, by the name of their mark."""
    rows, gains = [], []
    for where, place in PLACES.items():
        for condition, found in result["table"][where].items():
            values = {name: shown(found[name], unit, digits) for name, (unit, digits, _) in MEASURES.items()}
            rows.append({"facts": place, "condition": condition, **values})
        for other in (NONE, MEMORY, RANDOM):
            found = result["gains"][where]
            values = {name: shown(found[name][other], unit, digits, "+") for name, (unit, digits, _) in MEASURES.items()}
            gains.append({"facts": place, f"{TOOL} minus": other, **values})
    names = {"accuracy": "accuracy, %", "written": "tokens written", "results": "tokens of results"}
    frames = [pd.DataFrame(part).rename(columns=names).set_index("facts") for part in (rows, gains)]
    habits = {
        n: shown(e, "tokens" if "tokens" in n or "calls" in n else "share", 2 if "calls" in n else 1)
        for n, e in result["habits"].items()
    }
    kept = pd.DataFrame({"with the tool": habits}).rename_axis("measure")
    return {"kinds": report.markdown(frames[0]), "gains": report.markdown(frames[1]), "habits": report.markdown(kept)}


def main() -> None:
    """Measure, and write results, card and loss curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="write the card from results.json, without measuring")
    if not parser.parse_args().card:
        lm, problems = lms.load(lms.TINY_SEARCHER, device="cpu"), questions()
        code = store.code_of("toolkit.generate", "toolkit.tasks.searching", "toolkit.tools.search")
        work = publish.work_folder(__file__, code, lm.fingerprint)
        sampled = {
            name: generate.rollouts(condition, problems, SAMPLING, out=work / store.safe_name(name))
            for name, condition in conditions(lm).items()
        }
        settings = {"questions per place": QUESTIONS, "sampling": SAMPLING.identity}
        about = {"made_by": store.made_by(code), "provenance": lm.provenance(0), "settings": settings}
        store.write_json({**about, **summary(problems, sampled)}, HERE / "results.json")
    log = [json.loads(line) for line in (HERE / "loss.jsonl").read_text().splitlines()]
    curve = publish.script("tiny-reasoner/measure.py").curve([row["tokens"] / 1e6 for row in log], [row["loss"] for row in log])
    store.write_text(curve, HERE / "loss.svg")
    for mark, text in tables(store.read_json(HERE / "results.json")).items():
        publish.splice(mark, text, HERE / "README.md")
        print(text)


if __name__ == "__main__":
    main()
