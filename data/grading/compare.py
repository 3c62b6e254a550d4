"""Compare the toolkit's graders with the recorded verdicts of lm-eval and lighteval: ``python data/grading/compare.py``.

Writes ``toolkit.jsonl`` (our verdicts), and the tables in README.md. It stops if a disagreement is not explained in ``explanations.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import report, store
from toolkit.rewards.answers import closed_answer_text
from toolkit.tasks.grading import grade
from toolkit.types import Problem

HERE = Path(__file__).parent
README = HERE / "README.md"
TOOLS = ("lm-eval", "lighteval")
MATH, NUMBER = "math", "number"  # our two graders: math-verify, and the last number of an answer
RIGHT = ("toolkit", "other", "convention")  # who is right where the verdicts differ
Row = dict[str, Any]


def responses() -> dict[str, Row]:
    """Return the recorded responses by id."""
    return {
        row["id"]: row
        for row in store.read_rows(HERE / "responses.jsonl", {"id": str, "format": str, "gold": str, "response": str})
    }


def ours(row: Row) -> dict[str, bool]:
    """Return the verdicts of our graders on a response, by the grader's name. The last number is only compared where gold is a number."""
    answer = closed_answer_text(row["response"])
    verdicts = {MATH: grade(Problem(row["id"], (), row["gold"], {"grader": "math"}), answer)}
    return verdicts | ({NUMBER: grade(Problem(row["id"], (), row["gold"]), answer)} if row["format"] == "gsm8k" else {})


def recorded() -> dict[str, dict[str, bool]]:
    """Return the committed verdicts: ``"TOOL GRADER"`` -> id -> verdict."""
    verdicts: dict[str, dict[str, bool]] = {}
    for tool in ("toolkit", *TOOLS):
        for row in store.read_rows(HERE / f"{tool}.jsonl", {"id": str}):
            for grader, verdict in row.items():
                if grader not in ("id", "graded"):
                    verdicts.setdefault(f"{tool} {grader}", {})[row["id"]] = verdict
    return verdicts


def disagreements(verdicts: dict[str, dict[str, bool]]) -> Iterator[tuple[str, str]]:
    """Yield ``(grader, id)`` wherever a grader's verdict differs from that of our grader for mathematics."""
    reference = verdicts[f"toolkit {MATH}"]
    for grader, column in verdicts.items():
        yield from ((grader, i) for i, verdict in column.items() if verdict != reference[i])


def explanations() -> list[Row]:
    """Return the explained disagreements: cause, who is right, and the ids by grader."""
    return store.read_json(HERE / "explanations.json")


def explained() -> list[tuple[str, str]]:
    """Return ``(grader, id)`` of every explained disagreement."""
    return [(grader, i) for entry in explanations() for grader, ids in entry["cases"].items() for i in ids]


def agreement(verdicts: dict[str, dict[str, bool]]) -> str:
    """Return the table of agreement with our grader for mathematics, and with our reading of the written responses, in Markdown."""
    reference, rows = verdicts[f"toolkit {MATH}"], []
    reading = {i: row["right"] for i, row in responses().items() if row["source"] == "written"}
    who = {(grader, i): entry["right"] for entry in explanations() for grader, ids in entry["cases"].items() for i in ids}
    for grader, column in verdicts.items():
        same = {i for i, verdict in column.items() if verdict == reference[i]}
        sampled, written = set(column) - set(reading), set(column) & set(reading)
        differing = [who[grader, i] for i in column if i not in same]
        agrees = [f"{len(part & same)} of {len(part)}" for part in (sampled, written)]
        as_read = f"{sum(column[i] == reading[i] for i in written)} of {len(written)}"
        rows.append([grader, *agrees, *(differing.count(name) for name in RIGHT), as_read])
    columns = [
        "grader",
        "agrees, models",
        "agrees, written",
        "toolkit is right",
        "the other is right",
        "a convention",
        "as we read it",
    ]
    return report.markdown(pd.DataFrame(rows, columns=columns).set_index("grader"))


def causes() -> str:
    """Return the table of causes, in Markdown."""
    rows = [
        [entry["cause"], entry["right"], "; ".join(f"{grader}: {len(ids)}" for grader, ids in entry["cases"].items())]
        for entry in explanations()
    ]
    return report.markdown(pd.DataFrame(rows, columns=["cause", "right", "graders, number of responses"]).set_index("cause"))


def misread(verdicts: dict[str, dict[str, bool]]) -> str:
    """Return the written responses on which our grader for mathematics differs from our reading, in Markdown."""
    rows = [
        [f"`{row['gold']}`", f"`{row['response']}`", "right" if row["right"] else "wrong"]
        for i, row in responses().items()
        if row["source"] == "written" and row["right"] != verdicts[f"toolkit {MATH}"][i]
    ]
    return report.markdown(pd.DataFrame(rows, columns=["gold answer", "response", "our reading"]).set_index("gold answer"))


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    import publish

    store.write_rows([{"id": i, **ours(row)} for i, row in responses().items()], HERE / "toolkit.jsonl")
    verdicts = recorded()
    missing, stale = set(disagreements(verdicts)) - set(explained()), set(explained()) - set(disagreements(verdicts))
    if missing or stale:
        raise SystemExit(f"explanations.json lacks {sorted(missing)} and explains what is no disagreement: {sorted(stale)}")
    for name, text in (("agreement", agreement(verdicts)), ("causes", causes()), ("misread", misread(verdicts))):
        publish.splice(name, text, README)


if __name__ == "__main__":
    main()
