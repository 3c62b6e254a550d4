"""Measure models beyond their trained length, with Giraffe and with LongHeads: ``python data/long-context/measure.py``.

Writes ``results.json`` and the tables of ``README.md`` here. Every finished part is kept in ``runs/long-context``, so after a stop the same
command resumes; other code, settings or weights start anew. ``--only PART,..`` measures some parts; ``--publish`` writes the results of the parts that are there.

1. *tiny-heads*: recall of the tiny reasoner's lookup task in contexts of 1, 2 and 4 times the longest training text. Full attention,
   LongHeads, and two controls of the same cost: random chunks and a sliding window.
2. *tiny-giraffe*: the same contexts, with the four forms of changed frequencies.
3. *tiny-overlap*: do the heads that select the needle's chunk have high retrieval scores? Rank correlation over heads, with permutations of
   heads within their layer.
4. *tiny-cost*: CPU time and peak memory of one pass by length.
5. *smol-text*, *smol-needle*, *smol-lines*: SmolLM2-135M in bf16 on Python's language reference, on facts hidden in filler text, and on
   records like those of LongChat-lines. The longest prompts are read with LongHeads and with a sliding window too.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from toolkit import jobs, needles, report, stats, store
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import LengthStudy
from toolkit.lm import LM, Condition
from toolkit.methods import long_heads, retrieval_heads
from toolkit.methods.long_heads import LongHeads
from toolkit.metrics import with_interval
from toolkit.tasks import haystack, lookup
from toolkit.types import Span

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "data"))
import publish  # noqa: E402

CODE = store.code_of(
    "toolkit.jobs.context",
    "toolkit.methods.long_heads",
    "toolkit.methods.giraffe",
    "toolkit.methods.retrieval_heads",
    "toolkit.needles",
)
TRAINED = lookup.CONTEXT[1]  # characters before the question in the longest training texts of the tiny reasoner (train.py)
TINY_LENGTHS = (TRAINED, 2 * TRAINED, 4 * TRAINED)
TINY = LengthStudy(TINY_LENGTHS, "lookup", instances=16)
TINY_CHUNKS = {"LongHeads": "scores", "random chunks": "random", "sliding window": "recent"}
TINY_CHUNK, TINY_WINDOW = 32, TRAINED
COST_LENGTHS = (640, 2560, 10240)
SCALE, EXPONENT = 4.0, 0.5
SMOL_WINDOW = 8192
SMOL_LENGTHS = (SMOL_WINDOW // 2, 3 * SMOL_WINDOW // 2)
SMOL_LINES = LengthStudy(SMOL_LENGTHS, "lines", instances=4, max_new_tokens=8)
SMOL_NEEDLE = LengthStudy(SMOL_LENGTHS, "needle", instances=10, max_new_tokens=24)
SMOL_CHUNKS = {"LongHeads": "scores", "sliding window": "recent"}
SMOL_CHUNK = 256
EDGES = (0, 2048, SMOL_WINDOW, 10240)  # positions in the text, between which perplexity is averaged
OVERLAP_CONTEXT, OVERLAP_CHUNK, OVERLAP_WINDOW = 2 * TRAINED, 16, 320
EXAMPLES, PERMUTATIONS = 12, 10_000

BASES = {
    "tiny-heads": "full attention", "tiny-giraffe": "full attention", "smol-needle": "as trained", "smol-lines": "as trained",
}  # fmt: skip
"""Part -> the condition that the others are compared with."""

Rows = list[dict[str, Any]]


@cache
def model_of(part: str) -> LM:
    """Return the model that a part measures."""
    if part.startswith("tiny"):
        return lms.load("tiny-reasoner", device="cpu")
    return lms.load(lms.smollm2_path(), device="cpu", dtype=torch.bfloat16, tags=lms.ThinkTags(None, None))


def folder_of(part: str) -> Path:
    """Return the folder of the finished cells of a part; other code, settings or weights have another one."""
    return publish.work_folder(__file__, CODE, model_of(part).fingerprint) / part


def kept(part: str, name: str, measure: Callable[[], Rows]) -> Rows:
    """Return the rows of one cell of a part; they are measured only if they are not kept yet."""
    path = store.writable(folder_of(part)) / f"{store.safe_name(name)}.jsonl"
    if path.exists():
        return [dict(row) for row in store.read_rows(path)]
    print(f"measuring {part}: {name}", flush=True)
    rows = measure()
    store.write_rows(rows, path)
    return rows


def lengths_of(part: str, conditions: Mapping[str, Condition], study: LengthStudy) -> Rows:
    """Return the rows of every condition at every length, shortest first."""
    return [
        row
        for length in study.lengths
        for name, condition in conditions.items()
        for row in kept(part, f"{length}-{name}", lambda n=name, c=condition, at=length: jobs.length_rows(n, c, study, at))
    ]


def tiny_heads(lm: LM) -> Rows:
    """Return recall with full attention and with attention to chunks."""
    chunked = {name: LongHeads(TINY_CHUNK, TINY_WINDOW, rule) for name, rule in TINY_CHUNKS.items()}
    return lengths_of("tiny-heads", {"full attention": Condition(lm), **{n: Condition(lm, (h,)) for n, h in chunked.items()}}, TINY)


def tiny_giraffe(lm: LM) -> Rows:
    """Return recall with trained and with changed frequencies."""
    forms = {
        form: jobs.stretched(lm, form, scale=SCALE, exponent=EXPONENT, context=4096, trained=TRAINED) for form in jobs.ROTARY_FORMS
    }
    return lengths_of("tiny-giraffe", {form: Condition(new) for form, new in forms.items()}, TINY)


def tiny_overlap(lm: LM) -> Rows:
    """Return one row per head: retrieval scores, and how often the head selects the needle's chunk, in each of the examples.

    Retrieval scores are measured on prompts of the trained length, selection on other prompts of twice that length, at the tokens that
    predict the response.
    """
    sampling = Sampling(temperature=0.0, max_new_tokens=TINY.max_new_tokens, batch_size=1)
    found = [haystack.locate_lookup(lm, p) for p in lookup.load("dev", EXAMPLES, hops=(1, 1), context=(TRAINED, TRAINED))]
    answers = rollouts(lm, [h.problem for h in found], sampling)
    scores = {
        name: retrieval_heads.scores(retrieval_heads.measure(lm, needles.examples(found, answers, whole=whole)), metric).score
        for name, metric, whole in (("copy", "copy", False), ("write", "write", True))
    }
    settings, rates, chances = LongHeads(OVERLAP_CHUNK, OVERLAP_WINDOW), [], []
    for problem in tqdm(lookup.load("test", EXAMPLES, hops=(1, 1), context=(OVERLAP_CONTEXT, OVERLAP_CONTEXT))):
        h = haystack.locate_lookup(lm, problem)
        gold = lm.tokenizer(TINY.gold(problem), add_special_tokens=False)["input_ids"]
        ids, span = [*h.prompt_ids, *gold], Span(len(h.prompt_ids), len(h.prompt_ids) + len(gold)).predictors()
        rates.append(long_heads.hit_rates(long_heads.selections(lm, ids, span, settings), span, h.needle, settings))
        chances.append(long_heads.chance_of_hits(span, h.needle, settings))
    return [
        {"layer": layer, "head": head, **{n: float(s[layer, head]) for n, s in scores.items()},
         "selected": [None if r[layer, head].isnan() else float(r[layer, head]) for r in rates],
         "by_chance": [None if math.isnan(c) else c for c in chances]}
        for layer, head in lm.layout.all_heads
    ]  # fmt: skip


def cost(lm: LM, length: int, name: str) -> dict[str, Any]:
    """Return CPU time and additional peak memory of one pass over a random text, in a process of its own."""
    condition = Condition(lm, (LongHeads(TINY_CHUNK, TINY_WINDOW, TINY_CHUNKS[name]),) if name in TINY_CHUNKS else ())
    ids = torch.randint(7, lm.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with condition.active() as model, torch.inference_mode():
        model.body(ids, use_cache=True)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"condition": name, "length": length, "seconds": time.process_time() - start, "megabytes": used / 1024}


def tiny_cost(lm: LM) -> Rows:
    """Return time and memory of one pass by length, for full attention and for attention to chunks."""
    longer = long_heads.extended(lm, max(COST_LENGTHS))
    rows = []
    for length in COST_LENGTHS:
        for name in ("full attention", "LongHeads", "sliding window"):
            with multiprocessing.get_context("fork").Pool(1) as pool:  # a new process: peak memory is counted per process
                rows += kept("tiny-cost", f"{length}-{name}", lambda n=name, at=length, p=pool: [p.apply(cost, (longer, at, n))])
    return rows


def smol_forms(lm: LM) -> dict[str, Condition]:
    context = 4 * SMOL_WINDOW
    forms = {form: jobs.stretched(lm, form, scale=SCALE, exponent=EXPONENT, context=context) for form in ("parts", "linear")}
    return {"as trained": Condition(long_heads.extended(lm, context)), **{n: Condition(new) for n, new in forms.items()}}


def smol_text(lm: LM) -> Rows:
    """Return the mean negative log-probability of a text between positions, by condition."""
    ids = lm.tokenizer(jobs.perplexity_text("python"), add_special_tokens=False, verbose=False)["input_ids"]

    def read(name: str, condition: Condition) -> Rows:
        values = jobs.text_nll(condition, ids, EDGES)
        return [{"condition": name, "start": a, "stop": b, "nll": v} for a, b, v in zip(EDGES[:-1], EDGES[1:], values, strict=True)]

    conditions = {**smol_forms(lm), "LongHeads": smol_chunked(lm)["LongHeads"]}
    return [row for name, c in conditions.items() for row in kept("smol-text", name, lambda n=name, c=c: read(n, c))]


def smol_chunked(lm: LM) -> dict[str, Condition]:
    """Return SmolLM2 with attention to chunks, half of the trained length in all."""
    longer = long_heads.extended(lm, 4 * SMOL_WINDOW)
    return {n: Condition(longer, (LongHeads(SMOL_CHUNK, SMOL_WINDOW // 2, rule),)) for n, rule in SMOL_CHUNKS.items()}


def smol_needle(lm: LM) -> Rows:
    """Return recall of facts and the perplexity of the right answer, by condition; attention to chunks only beyond the trained length."""
    forms = {name: c for name, c in smol_forms(lm).items() if name != "linear"}  # linear scaling ruins plain text already
    rows = lengths_of("smol-needle", forms, SMOL_NEEDLE)
    return rows + lengths_of("smol-needle", smol_chunked(lm), replace(SMOL_NEEDLE, lengths=SMOL_LENGTHS[-1:]))


def smol_lines(lm: LM) -> Rows:
    """Return recall of records and the perplexity of the right number, by condition."""
    return lengths_of("smol-lines", {name: c for name, c in smol_forms(lm).items() if name != "linear"}, SMOL_LINES)


PARTS: dict[str, Callable[[], Rows]] = {
    "tiny-heads": lambda: tiny_heads(model_of("tiny-heads")),
    "tiny-overlap": lambda: kept("tiny-overlap", "heads", lambda: tiny_overlap(model_of("tiny-overlap"))),
    "tiny-cost": lambda: tiny_cost(model_of("tiny-cost")),
    "tiny-giraffe": lambda: tiny_giraffe(model_of("tiny-giraffe")),
    "smol-text": lambda: smol_text(model_of("smol-text")),
    "smol-needle": lambda: smol_needle(model_of("smol-needle")),
    "smol-lines": lambda: smol_lines(model_of("smol-lines")),
}


# --- results -----------------------------------------------------------------------------------------------------


def overlap_results(rows: pd.DataFrame) -> dict[str, Any]:
    """Return rank correlations over heads of selection rates and retrieval scores, with intervals and permutation p-values."""
    layers, rng = rows["layer"].to_numpy(), np.random.default_rng(0)
    order = np.stack([np.lexsort((rng.random(len(layers)), layers)) for _ in range(PERMUTATIONS)])  # heads permuted within layers
    rates = np.array(rows["selected"].tolist(), dtype=float)  # [heads, examples]
    rate = np.nanmean(rates, axis=1)
    by_chance = np.array(rows["by_chance"].iloc[0], dtype=float)  # the same for all heads
    results: dict[str, Any] = {
        "examples": rates.shape[1], "mean rate": float(rate.mean()), "rate of random chunks": float(np.nanmean(by_chance)),
    }  # fmt: skip
    for metric in ("copy", "write"):
        score = rows[metric].to_numpy()
        value = stats.spearman(rate, score)
        drawn = np.array([stats.spearman(rate[index], score) for index in order[:1000]])
        resampled = [
            stats.spearman(np.nanmean(rates[:, index], axis=1), score) for index in stats.resamples(rates.shape[1], times=1000)
        ]
        low, high = np.quantile(resampled, [0.025, 0.975])
        top = np.argsort(-score, kind="stable")[:4]
        means = np.array([rate[index][top].mean() for index in order])
        results[metric] = {
            "spearman": value, "low": float(low), "high": float(high), "permuted": float(drawn.mean()),
            "p": stats.permutation_p(np.abs(drawn - drawn.mean()) >= abs(value - drawn.mean())),
            "top 4": float(rate[top].mean()), "top 4 permuted": float(means.mean()),
            "p of top 4": stats.permutation_p(means >= rate[top].mean()),
        }  # fmt: skip
    return results


def read_part(part: str) -> Rows:
    """Return the rows of a part that are kept so far."""
    return [dict(row) for path in sorted(folder_of(part).glob("*.jsonl")) for row in store.read_rows(path)]


def results() -> dict[str, Any]:
    """Return all results that are kept so far."""
    found: dict[str, Any] = {
        "trained": TRAINED,
        "sizes": {"tiny": TINY, "lines": SMOL_LINES, "needle": SMOL_NEEDLE, "scale": SCALE, "exponent": EXPONENT},
    }
    for part, base in BASES.items():
        rows = read_part(part)
        if part == "tiny-giraffe":  # the unchanged model was measured already
            rows = [row for row in read_part("tiny-heads") if row["condition"] == base] + rows
        of_base = {row["length"] for row in rows if row["condition"] == base}
        if rows := [row for row in rows if row["length"] in of_base]:
            found[part] = report.json_records(jobs.length_table(pd.DataFrame(rows), base=base))
    by_position = read_part("smol-text")
    if costs := read_part("tiny-cost"):
        found["tiny-cost"] = sorted(costs, key=lambda row: (row["length"], row["condition"]))
    if by_position:
        found["smol-text"] = by_position
    if heads := read_part("tiny-overlap"):
        found["tiny-overlap"] = overlap_results(pd.DataFrame(heads))
    return found


# --- tables ------------------------------------------------------------------------------------------------------


def length_text(rows: list[dict[str, Any]], base: str) -> str:
    """Return recall and nll by length as a Markdown table."""

    def interval(row: dict[str, Any], name: str, unit: str, sign: str = "") -> str:
        return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], unit, sign=sign, digits=None if unit else 2)

    cells = [
        {
            "length": row["length"],
            "condition": row["condition"],
            "recall, %": interval(row, "recall", "share"),
            "change, points": "" if row["condition"] == base else interval(row, "recall_change", "share", "+"),
            "nll of a right response, nats per token": interval(row, "nll", ""),
            "change, nats": "" if row["condition"] == base else interval(row, "nll_change", "", "+"),
            "CPU s per response": f"{row['seconds']:.2f}",
        }
        for row in sorted(rows, key=lambda row: (row["length"], row["condition"] != base))
    ]
    return report.markdown(pd.DataFrame(cells).set_index("length"))


def overlap_text(found: dict[str, Any]) -> str:
    """Return the agreement of selection and retrieval scores as a Markdown table."""
    cells = [
        {
            "retrieval score": metric,
            "Spearman correlation over heads": with_interval(e["spearman"], e["low"], e["high"], "", sign="+", digits=2),
            "permuted": f"{e['permuted']:+.2f}, p = {e['p']:.3f}",
            "needle's chunk selected: the 4 heads of highest score": f"{e['top 4']:.0%}",
            "4 permuted heads": f"{e['top 4 permuted']:.0%}, p = {e['p of top 4']:.3f}",
            "all heads": f"{found['mean rate']:.0%}",
            "random chunks": f"{found['rate of random chunks']:.0%}",
        }
        for metric, e in ((m, found[m]) for m in ("copy", "write"))
    ]
    return report.markdown(pd.DataFrame(cells).set_index("retrieval score"))


def texts(found: dict[str, Any]) -> dict[str, str]:
    """Return the table of every part that was measured, as Markdown."""
    tables = {part: length_text(found[part], base) for part, base in BASES.items() if part in found}
    if "tiny-overlap" in found:
        tables["tiny-overlap"] = overlap_text(found["tiny-overlap"])
    if "tiny-cost" in found:
        costs = pd.DataFrame(found["tiny-cost"]).rename(columns={"seconds": "CPU s", "megabytes": "MB"})
        tables["tiny-cost"] = report.markdown(costs.round(2).set_index("length"))
    if "smol-text" in found:
        rows = pd.DataFrame(found["smol-text"])
        rows["positions"] = [f"{a:,} to {b:,}" for a, b in zip(rows["start"], rows["stop"], strict=True)]
        wide = rows.pivot(index="condition", columns="positions", values="nll")[rows["positions"].unique()]
        tables["smol-text"] = report.markdown(wide)
    return tables


def main() -> None:
    """Measure the parts that are not kept yet, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas between")
    parser.add_argument("--publish", action="store_true", help="measure nothing, write what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.publish:
        for part in given.only.split(","):
            PARTS[part]()
    found = results()
    models = {part: model_of(part).provenance(0) for part in found if part in PARTS}
    store.write_json(found | {"made_by": store.made_by(CODE), "models": models}, HERE / "results.json")
    for name in (*BASES, "tiny-overlap", "tiny-cost", "smol-text"):
        publish.splice(name, texts(found).get(name, "Not measured yet."), HERE / "README.md")


if __name__ == "__main__":
    main()
