"""The command ``toolkit retrieval-heads``: find retrieval heads, mask them, and write tables and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from toolkit import figures, pages, report, store, tasks
from toolkit.jobs import verdicts
from toolkit.jobs.masking import masking_effects, planned_masks, thinking_or_not
from toolkit.jobs.retrieval import RANKINGS, RetrievalMeasurement, Search, measure_retrieval, sparsity, stability, top_heads
from toolkit.jobs.study import Say
from toolkit.lm import LM
from toolkit.methods import retrieval_heads
from toolkit.pages import Page, Section


def retrieval_report(
    lm: LM, search: Search, directory: str | Path, *, say: Say = lambda text: None, command: str = ""
) -> dict[str, pd.DataFrame]:
    """Find retrieval heads (attention heads that copy from the prompt), mask them, and write a report.

    After a stop, call it again with the same arguments: finished rollouts are reused.

    Args:
        lm: Model to find the heads of.
        search: Task, number of haystacks, masks and random controls.
        directory: Directory to write to: ``copy.safetensors`` and ``write.safetensors`` (head scores), ``copy_examples.json`` (copy scores
            per example, in the format of the files that arXiv:2404.15574 released), ``retrieval.json`` (all tables, with provenance),
            ``report.html``, and ``rollouts/``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Returns:
        Name -> table. Each table is described by the function that makes it: ``recall`` (``RetrievalMeasurement.recall``), ``heads``
        (``top_heads``), ``sparsity``, ``stability`` and ``masking`` (``masking_effects``). For the task ``lookup`` and a model with a
        closing think tag, there is also ``thinking`` (``thinking_or_not``).
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
        f"measuring {len(chosen)} masks, each beside {search.draws} masks on random heads of the same layers, on {len(questions)} other haystacks"
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
    sections = _sections(measurement, tables)
    page = Page(
        title=f"Retrieval heads of {lm.name}",
        verdict=verdicts.of_masking(tables["masking"], tables.get("thinking")),
        main=sections[0],
        table=tables["heads"].round(3).set_index("ranking"),
        caption="The best heads; given_success is the score over correctly answered haystacks only.",
        sections=sections[1:],
        made=f"Heads are found on {len(measurement.haystacks)} haystacks (prompts that hide a fact) of the task {search.task}, answered greedily, and "
        f"masked on {len(questions)} others.",
        command=command,
    )
    pages.write(page, out / "report.html")
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
            "As published (copy): share of the tokens of the hidden answer that the head copies. It copies a token if, at the step that generates "
            "the token, the head attends most to this token in the prompt. Ours (write): what the head adds to the logit of the generated token by "
            "attending to the hidden fact, mean over tokens.",
            maps,
        ),
        Section(
            "Sparsity",
            "Shares of heads with a copy score above 0.1, above 0.5 and equal to zero, beside seven published models.",
            (figures.sparsity(tables["sparsity"]),),
        ),
        Section(
            "Stability",
            "Share of the top heads on all examples that are also among the top heads on only a few examples.",
            (figures.stability(tables["stability"]),),
        ),
        Section(
            "Masking",
            "Accuracy with the top heads masked, and with equally many random heads of the same layers; 95 % intervals over haystacks.",
            (figures.masking_curve(tables["masking"]), figures.masking_forms(tables["masking"])),
        ),
    ]
    if "thinking" in tables:
        sections.append(
            Section(
                "Thinking or answering directly",
                "Accuracy without a mask minus accuracy with the top heads or random heads masked, when the model thinks and when its think span is "
                "closed at once.",
                (figures.thinking_or_not(tables["thinking"]),),
            )
        )
    return sections
