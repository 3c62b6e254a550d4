"""Write the tables of README.md and data/README.md from committed results, and from sizes: ``python data/readme.py``.

Each table stands between two marks of its page (see ``publish.splice``). A test compares the pages with the tables made here, so their
numbers always equal the committed results. Scripts that measure again call :func:`update` at their end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from toolkit import exports, families, report, rewards
from toolkit.board import text_table
from toolkit.jobs.check import Shape, memory
from toolkit.metrics import with_interval
from toolkit.rewards import kinds

ROOT = Path(__file__).parents[1]
ON_BOARD = (
    "base", "ThinkEdit, as published", "ThinkEdit (ours)", "control: random heads edited", "control: random direction edited", "steered -0.5",
    "control: steered randomly -0.5", "steered +0.5", "control: steered randomly +0.5", "Efficiency Steering -0.25",
    "control: Efficiency Steering, random direction -0.25", "2 retrieval heads masked", "control: 2 random heads masked", "CREST, 8 heads",
    "control: CREST", "NoWait", "control: NoWait", "budget of 24", "budget of 48", "control: budget of 48", "asked to be quick",
    "GRPO: correctness", "GRPO: naive length penalty", "GRPO-lambda", "DLER", "LASER-D", "HAPO", "DRPO", "PEAR", "Train Long, Think Short",
    "GRPO-lambda, one vector per layer", "GRPO-lambda, two heads", "control: GRPO-lambda, two random heads",
    "ThinkEdit (ours), then GRPO-lambda",
)  # fmt: skip
"""Rows of the board in data/README.md."""
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
"""Effects on the smol reasoner in data/README.md."""
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
"""Rows of the speed table in data/README.md, and their names in the benchmark's report."""
_QWEN3 = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
GPU_MODELS = {
    "1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "4B": Qwen3Config(**_QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "8B": Qwen3Config(**_QWEN3, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
}  # fmt: skip
"""Shapes of Qwen2-1.5B, Qwen3-4B and Qwen3-8B."""
GPU: Mapping[str, Any] = {
    "bandwidth": 3.0e12, "products": 8.0e14, "over the limit": 2, "of the peak": 0.4, "launches of a layer": 0.9e-3,
    "rows": 64, "responses": 1600, "tokens": 2000, "train steps": 100, "train rows": 128, "train tokens": 1024,
}  # fmt: skip
"""Assumptions of the table of costs on a GPU.

The first two are an H100's, in bytes and operations in bfloat16 per second. Then: a decoding step takes twice the time of reading weights and
cache (``tests/gpu`` aims at that); passes reach 40 % of the products' speed; launching a layer's operations takes 0.9 ms. The rest is work.
"""


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


def shape(config: Any) -> tuple[Shape, int]:
    """Return the sizes of a model in bfloat16, and its number of layers, from its config. No weights are made."""
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_key_value_heads * head * config.num_hidden_layers * 2
    return Shape(weights, 2 * weights, 2, cached), config.num_hidden_layers


def gpu_costs() -> str:
    """Return the table of memory and minutes for each command on one GPU, computed: nothing has been run on one."""
    columns = {name: costs(*shape(config)) for name, config in GPU_MODELS.items()}
    rows = {
        command: [f"{costs_of[command][0]:.0f} GB, {minutes(costs_of[command][1])}" for costs_of in columns.values()]
        for command in next(iter(columns.values()))
    }
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=[*columns]))


def costs(sizes: Shape, layers: int) -> dict[str, tuple[float, float]]:
    """Return memory in GB and seconds for each command. The numbers in ``GPU`` are its assumptions."""
    rows, responses, tokens, train = GPU["rows"], GPU["responses"], GPU["tokens"], GPU["train tokens"]
    kinds = memory(sizes, rows=rows, tokens=tokens)
    loaded, sampling, whole, lora = (size / 1e9 for size in kinds.values())
    # A step reads all weights and, on average, half of the longest cache.
    read = (sizes.held + rows * tokens / 2 * sizes.cached) / GPU["bandwidth"]
    sample = responses / rows * tokens * read * GPU["over the limit"]
    operations = sizes.weights / (GPU["products"] * GPU["of the peak"])  # seconds for one operation per weight
    once = 2 * responses * tokens * operations
    # Under autocast, as in training, steps are not recorded: launching them takes longer than reading the weights.
    trained = GPU["train rows"] * train
    drawn = train * max(layers * GPU["launches of a layer"], read)
    steps = GPU["train steps"]
    return {
        "`rollouts`": (sampling, sample),
        "`thinkedit` of given rollouts, `entropy`": (loaded, once),
        "`compare`, three conditions": (sampling, 3 * sample),
        "`grpo --train adapter`": (lora, steps * (drawn + 6 * trained * operations)),
        "`grpo`, all weights": (whole, steps * (drawn + 8 * trained * operations)),
    }


def minutes(seconds: float) -> str:
    """Return a duration as text; minutes below 10 with one digit, hours from 2 on."""
    return (
        f"{seconds / 3600:.0f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    )


def systems() -> str:
    """Return the table of the 50 systems: where each runs, and what was found. Effects on the board come from its results.

    A system may name the metric of its effects in ``metric``; by default they are on accuracy and think tokens.
    """
    paired = read("data/board/board.json")["paired"]

    def effect(name: str, metric: str, unit: str) -> str:
        change = paired[name][metric]
        return with_interval(change["mean"], change["low"], change["high"], unit, sign="+")

    rows = {}
    for system in read("data/systems.json"):
        metric = system.get("metric", "accuracy")
        effects = [
            f"{name}: {effect(name, metric, 'share')} points"
            + (f", {effect(name, 'think_tokens', 'tokens')} tokens" if metric == "accuracy" else "")
            for name in system.get("board", [])
        ]
        paper, on = system["paper"], metric.removeprefix("accuracy").replace("_", ", ")
        rows[f"{system['name']} ([{paper}](https://arxiv.org/abs/{paper}))"] = [
            ", ".join(f"`{place}`" for place in system["where"]),
            system.get("runs", ""),
            " ".join([system.get("found", ""), *([f"Board{on}: {'; '.join(effects)}."] if effects else [])]).strip(),
        ]
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["where", "runs as", "found"]))


def further() -> str:
    """Return the table of the methods beyond the 50 systems. Effects of training-free ones come from the results of ``data/rivals``."""
    judged = read("data/rivals/results.json")["methods"]
    rows = {}
    for method in read("data/further.json"):
        effects = []
        if name := method.get("rival"):
            for metric, unit, label in (("right", "share", "points"), ("tokens", "tokens", "tokens")):
                change = judged[name][metric]["minus control"]
                effects.append(f"{with_interval(change['mean'], change['low'], change['high'], unit, sign='+')} {label}")
        paper = method["paper"]
        rows[f"{method['name']} ([{paper}](https://arxiv.org/abs/{paper}))"] = [
            ", ".join(f"`{place}`" for place in method["where"]),
            method["runs"],
            f"Minus its random control: {', '.join(effects)}." if effects else method.get("found", "Not measured yet."),
        ]
    return report.markdown(pd.DataFrame.from_dict(rows, orient="index", columns=["where", "runs as", "found on the tiny reasoner"]))


RESULTS, FRONT, PREFERENCES = ROOT / "data/README.md", ROOT / "README.md", ROOT / "data/rewards/README.md"


def sources() -> str:
    """Return the table of the sources of rewards."""
    return "\n".join(["| source | meaning |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in kinds.SOURCES.items())])


def reward_kinds() -> str:
    """Return the table of rewards as models of preference."""
    lines = ["| reward | paper | sources | paid | assumes |", "| --- | --- | --- | --- | --- |"]
    for name, entry in rewards.ALL.items():
        kind = kinds.KINDS[name]
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else ""
        paid = "dense" if kinds.is_dense(entry.make) else "sparse"
        lines.append(f"| `{name}` | {paper} | {', '.join(kind.sources)} | {paid} | {kind.assumes} |")
    return "\n".join(lines)


BLOCKS: Mapping[str, tuple[Path, Callable[[], str]]] = {
    "demo": (RESULTS, demo), "board": (RESULTS, board), "retrieval": (RESULTS, retrieval), "entropy": (RESULTS, entropy),
    "smol": (RESULTS, smol), "speed": (RESULTS, speed), "served": (RESULTS, served), "further": (RESULTS, further),
    "models": (FRONT, models), "formats": (FRONT, formats), "gpu": (FRONT, gpu_costs), "systems": (FRONT, systems),
    "sources": (PREFERENCES, sources), "kinds": (PREFERENCES, reward_kinds),
}  # fmt: skip
"""Mark of a table -> page that holds it, and function that makes it."""


def update(names: Sequence[str] = tuple(BLOCKS)) -> None:
    """Write the tables into their pages."""
    from publish import splice  # beside this script

    for name in names:
        page, table = BLOCKS[name]
        splice(name, table(), page)


if __name__ == "__main__":
    update()
