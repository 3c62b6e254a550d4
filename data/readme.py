"""Write the README's tables of measured numbers from committed results: ``python data/readme.py``.

Each table stands between two marks of the README (see ``publish.splice``). A test compares the README with the tables made here, so its
numbers always equal the committed results. Scripts that measure again call :func:`update` at their end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit import exports, families, report
from toolkit.board import text_table
from toolkit.metrics import with_interval

ROOT = Path(__file__).parents[1]
ON_BOARD = (
    "base", "ThinkEdit, as published", "ThinkEdit (ours)", "control: random heads edited", "control: random direction edited", "steered -0.5",
    "steered +0.5", "control: steered randomly +0.5", "Efficiency Steering -0.25", "budget of 24", "no re-checks", "asked to be quick",
    "GRPO: correctness", "GRPO: naive length penalty", "GRPO-lambda", "DLER", "LASER-D", "HAPO", "DRPO", "PEAR", "Train Long, Think Short",
    "ThinkEdit (ours), then GRPO-lambda",
)  # fmt: skip
"""Rows of the board in the README."""
BOARD_METRICS = ("accuracy", "think_tokens", "shortest_20", "accuracy_lookup")
ON_REAL_WEIGHTS = (
    "ThinkEdit, as published: thinks longer",
    "ThinkEdit (ours): thinks longer",
    "Efficiency Steering: shorter",
    "Efficiency Steering: shorter than along a random direction",
    "Efficiency Steering: loses less than 3 points",
    "4 retrieval heads (our score) masked: needles lost",
    "more needles lost than with random heads",
    "GRPO, correctness, 8 steps: more accurate",
    "short thinking is wrong more often (within a problem, 3+ steps)",
    "longer thinking is less certain (within a problem)",
)
"""Effects on the smol reasoner in the README."""
FAST = {
    "direction at two sites and all head scores over a bare forward pass, time (47 M)": "collect, 47 M: over a bare forward of the same batches",
    "the same, times faster than the published way (47 M)": "collect, 47 M: times faster than the published way",
    "the same (tiny reasoner, 0.8 M)": "collect, tiny reasoner: times faster than the published way",
    "capture of every block over raw hooks, time (47 M)": "capture, last token: over raw hooks on the same batches",
    "the same, TransformerLens over ours": "capture, last token: TransformerLens bridge over ours",
    "the same, nnsight over ours": "capture, last token: nnsight over ours",
    "steered over unsteered sampling, time (47 M, 8 rows)": "steering, 47 M, batch 8, all: our decoding, steered over unsteered",
    "the same, think span only (tiny reasoner)": "steering, tiny reasoner, batch 8, think: our decoding, steered over unsteered",
    "sampling over `generate`, tokens per second (tiny reasoner, 128 rows)": "rollouts, tiny reasoner, 128 rows: tokens/s over generate, one batch",
    "the same (tiny reasoner, 512 rows)": "rollouts, tiny reasoner, 512 rows: tokens/s over generate, one batch",
    "the same (SmolLM2, 16 rows)": "rollouts, SmolLM2: tokens/s over generate, one batch",
    "GRPO step over TRL's trainer, time (tiny reasoner)": "GRPO, tiny reasoner, 16 x 8: seconds per step over TRL's stock trainer",
    "retrieval heads at 4,096 tokens, times faster than full eager attention (SmolLM2)": "retrieval heads, SmolLM2, 4096 tokens: times faster than full eager",
}
"""Rows of the speed table in the README, and their names in the benchmark's report."""


def read(path: str) -> Any:
    """Return the committed results in a JSON file."""
    return json.loads((ROOT / path).read_text())


def demo() -> str:
    """Return the table of ``toolkit demo``."""
    return report.markdown(pd.DataFrame.from_dict(read("notebooks/figures/demo.json"), orient="index"))


def board() -> str:
    """Return selected rows of the board."""
    table = text_table(read("data/board/board.json"), BOARD_METRICS)
    return report.markdown(table.loc[[name for name in ON_BOARD if name in table.index]])


def retrieval() -> str:
    """Return the table of accuracy with retrieval heads masked, beside random heads of the same layers."""
    rows = []
    for model, file, heads in (("tiny reasoner", "tiny-reasoner", 4), ("SmolLM2-135M", "smollm2", 5)):
        masking = {
            (r["ranking"], r["heads"], r["op"], r["during"]): r for r in read(f"data/retrieval-heads/{file}.json")["masking"]
        }
        for ranking in ("write (ours)", "copy, as published"):
            r = masking[ranking, heads, "uniform", "decode only"]
            masked, random = (
                with_interval(r[mean], r[low], r[high], "share", digits=0)
                for mean, low, high in (("accuracy", "low", "high"), ("random", "random_low", "random_high"))
            )
            rows.append((model, f"{heads}, {ranking}", f"{100 * (r['accuracy'] + r['lost']):.0f}", masked, random))
    columns = [
        "model",
        "heads masked, ranked by",
        "accuracy, nothing masked",
        "accuracy, these heads masked",
        "accuracy, random heads masked",
    ]
    return report.markdown(pd.DataFrame(rows, columns=columns).set_index("model"))


def entropy() -> str:
    """Return the table of the main entropy results on both models."""
    runs = [read(f"data/entropy/{name}.json") for name in ("tiny-reasoner", "smollm2")]

    def phase(run: Mapping[str, Any], name: str) -> str:
        row = next((r for r in run["phases"] if (r["phase"], r["responses"]) == (name, "all")), None)
        return with_interval(row["mean"], row["low"], row["high"], "nats") if row else "no separate answer"

    def within(run: Mapping[str, Any]) -> str:
        wanted = {"scope": "within", "kind": "spearman", "x": "entropy", "y": "response_tokens"}
        row = next(r for r in run["lengths"] if wanted.items() <= r.items())
        return with_interval(row["r"], row["low"], row["high"], "score", sign="+")

    def gain(run: Mapping[str, Any], kept: str) -> str:
        row = next((r for r in run["choices"] if r["kept"] == kept), None)
        return with_interval(row["gain"], row["gain_low"], row["gain_high"], "share", sign="+") if row else ""

    measures: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "entropy while thinking, nats per token": lambda run: phase(run, "think"),
        "entropy while answering, nats per token": lambda run: phase(run, "answer"),
        "Spearman correlation of entropy and length within a problem": within,
        "accuracy gained by keeping the response of lowest entropy (of 8; SmolLM2: of 6), points": lambda run: gain(
            run, "lowest think entropy"
        ),
        "accuracy gained by keeping the response with fewest failed steps, points": lambda run: gain(
            run, "lowest failed-step fraction"
        ),
    }
    rows = {name: [measure(run) for run in runs] for name, measure in measures.items()}
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["tiny reasoner", "SmolLM2-135M"]))


def smol() -> str:
    """Return the table of selected effects on the smol reasoner, with intervals and verdicts."""
    claims = {row["effect"]: row for row in read("data/smol-reasoner/results/claims.json")}
    rows = {name: [claims[name]["estimate (+ as claimed)"], claims[name]["verdict"]] for name in ON_REAL_WEIGHTS}
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["estimate (+ as claimed)", "verdict"]))


def speed() -> str:
    """Return the table of selected ratios from the last full benchmark, and how many of its rows with a target miss it."""
    ratios = {row["name"]: row for row in read("tests/benchmarks/report.json")["rows"]}
    rows = {name: [f"{ratios[row]['ratio']:.2f}", ratios[row]["reach"] or ""] for name, row in FAST.items()}
    table = report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["ratio", "target"]))
    aimed = [row for row in ratios.values() if row["reach"]]
    return f"{table}\n\n{sum(not met(row) for row in aimed)} of the report's {len(aimed)} rows with a target miss it."


def met(row: Mapping[str, Any]) -> bool:
    """Return whether a row of the benchmark reaches its target, written as ``<= 1.05`` or ``>= 6``."""
    sign, value = row["reach"].split()
    return row["ratio"] <= float(value) if sign == "<=" else row["ratio"] >= float(value)


def models() -> str:
    """Return the table of model families whose identities are tested; those with layers without heads are marked."""
    rows = {
        maker: ", ".join(f"{name} (`{kind}`){'†' if kind in families.HYBRID else ''}" for kind, name in types.items())
        for maker, types in {**families.FAMILIES, "with images": families.MULTIMODAL}.items()
    }
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["models (model type in transformers)"]))


def formats() -> str:
    """Return the table of the formats that ``toolkit export`` writes: what goes where, and how it was checked."""
    rows = {
        f"`{row.name}`": [row.takes, row.reader, ", ".join(row.during) or "-", row.followed, row.checked] for row in exports.FORMATS
    }
    columns = ["takes", "read by", "positions of steering", "made after", "checked"]
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("`--to`"))


def served() -> str:
    """Return the table of next-token divergences between llama.cpp and our own passes, with exported files."""
    rows = {
        name: [with_interval(**e, unit="nats", digits=4)]
        for name, e in read("data/engines/llama-server.json")["next token"].items()
    }
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["divergence, nats"]))


BLOCKS: Mapping[str, Callable[[], str]] = {
    "demo": demo, "board": board, "retrieval": retrieval, "entropy": entropy, "smol": smol, "speed": speed, "models": models,
    "formats": formats, "served": served,
}  # fmt: skip
"""Functions that make the README's tables, by mark."""


def update(names: Sequence[str] = tuple(BLOCKS)) -> None:
    """Write the tables into the README."""
    from publish import splice  # beside this script

    for name in names:
        splice(name, BLOCKS[name]())


if __name__ == "__main__":
    update()
