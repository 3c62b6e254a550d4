"""Find and mask retrieval heads, and write the results: the command ``toolkit retrieval-heads``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from toolkit import figures, report, store, tasks
from toolkit.jobs.masking import masking_effects, planned_masks, thinking_or_not
from toolkit.jobs.retrieval import RANKINGS, RetrievalMeasurement, Search, measure_retrieval, sparsity, stability, top_heads
from toolkit.jobs.study import Say
from toolkit.lm import LM
from toolkit.methods import retrieval_heads
from toolkit.report import Section


def retrieval_report(lm: LM, search: Search, directory: str | Path, *, say: Say = lambda text: None) -> dict[str, pd.DataFrame]:
    """Find retrieval heads, mask them, and write a report.

    Writes ``copy.safetensors`` and ``write.safetensors`` (head scores), ``copy_examples.json`` (scores per example, in the format of the
    released files), ``retrieval.json`` (every table, with provenance), ``report.html`` and the rollouts into ``directory``. After a
    stop, call it again with the same arguments: finished rollouts are reused.

    Returns:
        The tables by name.
    """
    out = store.writable(directory)
    measurement = measure_retrieval(lm, search, out=out / "rollouts" / "dev", say=say)
    for name, (metric, _) in RANKINGS.items():
        store.save(measurement.scores[name], out / f"{metric}.safetensors")
    lists = retrieval_heads.to_lists(measurement.measured["copy, as published"].select("copy"))
    store.write_json(lists, out / "copy_examples.json")
    questions = [h.problem for h in search.haystacks(lm, "test")]
    chosen = planned_masks(search)
    say(
        f"masking heads in {len(chosen)} ways, each with {search.draws} random controls in the same layers, on {len(questions)} other haystacks"
    )
    tables = {
        "recall": measurement.recall(),
        "heads": top_heads(measurement),
        "sparsity": sparsity(measurement, Path(lm.name).name).reset_index(),
        "stability": stability(measurement, max(search.counts), seed=search.seed),
        "masking": masking_effects(lm, measurement, search, questions, chosen, out=out / "rollouts" / "masked"),
    }
    if lm.tags is not None and lm.tags.close is not None and search.task == "lookup":
        say("masking while thinking and while answering directly")
        plan = retrieval_heads.mask_plan(measurement.scores["write (ours)"], max(search.counts))
        both = {name: tasks.load(name, "test", search.instances, search.seed) for name in ("lookup", "arithmetic")}
        sampling = replace(search.sampling, temperature=1.0, n=2, max_new_tokens=2 * search.max_new_tokens)
        tables["thinking"] = thinking_or_not(lm, plan, both, sampling, draws=search.draws, out=out / "rollouts" / "thinking")
    about = {"search": search, "provenance": lm.provenance(search.seed)}
    store.write_json(about | {name: report.json_records(table) for name, table in tables.items()}, out / "retrieval.json")
    report.write_page(
        f"Retrieval heads of {lm.name}",
        f"{len(measurement.haystacks)} haystacks of {search.task}, answered greedily; heads masked on {len(questions)} others.",
        tables["heads"].round(3).set_index("ranking"),
        _sections(measurement, tables),
        out / "report.html",
    )
    return tables


def _sections(measurement: RetrievalMeasurement, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    maps = tuple(figures.head_scores(score).update_layout(title_text=name) for name, score in measurement.scores.items())
    sections = [
        Section(
            "Accuracy",
            "Share of haystacks answered correctly, by prompt length and depth of the needle.",
            (figures.recall(tables["recall"]),),
        ),
        Section(
            "Which heads",
            "As published: share of the answer's tokens to which a head attends most at the step that generates them. Ours: the logit that "
            "the head writes towards the generated token by attending anywhere in the needed piece.",
            maps,
        ),
        Section(
            "Sparsity",
            "Shares of heads by the published score, beside seven published models.",
            (figures.sparsity(tables["sparsity"]),),
        ),
        Section(
            "Stability", "Overlap of the top heads on a few examples with those on all.", (figures.stability(tables["stability"]),)
        ),
        Section(
            "Masking",
            "Accuracy with the top heads masked, and with equally many random heads of the same layers; 95 % intervals over haystacks.",
            (figures.masking_curve(tables["masking"]), figures.masking_forms(tables["masking"])),
        ),
    ]
    if "thinking" in tables:
        sections.append(
            Section("Thinking or answering directly", "Accuracy lost to masking.", (figures.thinking_or_not(tables["thinking"]),))
        )
    return sections
