"""Measure a model inside and beyond the length that it was trained on: retrieval, and the perplexity of right answers and of a text.

``length_table`` compares conditions, such as a model and the same model with other rotary frequencies (Giraffe, arXiv 2308.10882) or with
attention to chunks (LongHeads, arXiv 2402.10685). ``giraffe_report`` does the work of the command ``toolkit giraffe``.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit import figures, identity, pages, report, stats, store
from toolkit.collect import lm_head
from toolkit.generate import Sampling, rollouts
from toolkit.jobs import verdicts
from toolkit.jobs.study import Say
from toolkit.lm import LM, Condition
from toolkit.methods import giraffe
from toolkit.metrics import with_interval
from toolkit.pages import Page, Section, table_html
from toolkit.progress import stage
from toolkit.tasks import lines, lookup, needle
from toolkit.tasks.generators.traces import Habits
from toolkit.types import Problem

TASKS = ("lines", "lookup", "needle")
ROTARY_FORMS = ("linear", "parts", "power", "truncated")
PYTHON = "python"  # the text of this name: Python's language reference, which is part of its standard library
EXACT = Habits(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # no skips, no re-checks, no wrong steps
QUESTION = 64  # tokens that a prompt of lookup may have beside the characters that its length counts
PIECE = 1024  # tokens whose logits are in memory at a time


@dataclass(frozen=True)
class LengthStudy:
    """Settings for measuring a model at several lengths.

    Attributes:
        lengths: Lengths of the prompts: tokens for ``lines`` and ``needle``, characters before the question for ``lookup`` (one character is
            one token of the tiny reasoner).
        task: ``lines`` (records of names and numbers, for language models), ``needle`` (one fact in a long text, easier than ``lines``) or
            ``lookup`` (variables and values, for the tiny reasoner).
        instances: Number of problems per length.
        max_new_tokens: Token budget of a response.
        seed: Seed of the problems.
    """

    lengths: tuple[int, ...]
    task: str = "lines"
    instances: int = 20
    max_new_tokens: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: choose one of {', '.join(TASKS)}.")
        if not self.lengths or min(self.lengths) < 1 or self.instances < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"lengths={self.lengths}, instances={self.instances}, max_new_tokens={self.max_new_tokens}: all must be at least 1."
            )

    def problems(self, lm: LM, length: int) -> list[Problem]:
        """Return the test problems of one length."""
        if self.task == "lines":
            return lines.load(lm, length, self.instances, seed=self.seed)
        if self.task == "needle":
            return [h.problem for h in needle.spread(lm, "test", self.instances, self.seed, lengths=(length,))]
        return lookup.load("test", self.instances, self.seed, context=(length, length))

    def gold(self, problem: Problem) -> str:
        """Return a right response to a problem as text: the answer, or for ``lookup`` a chain of thought with its answer."""
        if self.task != "lookup":
            return problem.answer
        trace = lookup.write_trace(problem, random.Random(0), EXACT)
        return f"<think>{trace.text}</think>{trace.conclusion}"


@torch.inference_mode()
def nll(condition: Condition, prompt: Sequence[int], response: Sequence[int]) -> float:
    """Return the mean negative log-probability per token of a response after a prompt, in nats. Its exponential is the perplexity."""
    with condition.active() as lm:
        ids = torch.tensor([[*prompt, *response]], device=lm.device)
        logits = lm.model(ids[:, :-1], use_cache=False, logits_to_keep=len(response)).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -len(response) :]))


@torch.inference_mode()
def text_nll(condition: Condition, ids: Sequence[int], edges: Sequence[int]) -> list[float]:
    """Return the mean negative log-probability per token of each section of a text, in nats. Section i is ``[edges[i], edges[i + 1])``.

    The text is read in one pass, so a token at position p is predicted from all p tokens before it.

    Args:
        ids: Token ids of the text, ``edges[-1]`` of them at least.
        edges: Ascending positions, from 0 on.

    Raises:
        UnsupportedModelError: the model does more than apply its LM head between its last state and its logits.
    """
    with condition.active() as lm:
        row = torch.tensor(list(ids[: edges[-1]]), device=lm.device)
        states = lm.body(row[None, :-1], use_cache=False).last_hidden_state[0]
        head = lm_head(lm)
        losses = [
            torch.nn.functional.cross_entropy(head(part).float(), target, reduction="none")
            for part, target in zip(states.split(PIECE), row[1:].split(PIECE), strict=True)
        ]
    loss = torch.cat([torch.zeros(1, device=row.device), *losses])  # loss[p]: of the token at position p
    return [float(loss[max(start, 1) : stop].mean()) for start, stop in pairwise(edges)]


def perplexity_text(name: str) -> str:
    """Return the text of a file. The name ``python`` means Python's language reference, which is part of its standard library.

    Raises:
        FileNotFoundError: no such file.
    """
    if name == PYTHON:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    return "\n".join(store.read_lines(store.existing_file(name)))


def length_rows(
    name: str, condition: Condition, study: LengthStudy, length: int, *, out: Path | None = None
) -> list[dict[str, Any]]:
    """Return one row per problem of one length: ``condition, length, problem_id, tokens, correct, nll, seconds``.

    ``correct`` tells whether the greedy response is right; ``nll`` is that of a right response, in nats per token; ``seconds`` is the CPU
    time of the greedy response, prompt included.

    Args:
        name: Name of the condition in the rows.
        condition: Model to measure, in its context every prompt must fit.
        study: Task, number and seed of the problems.
        length: One of the study's lengths.
        out: File in which the rows are kept; an existing one is read and not measured again.
    """
    if out is not None and out.exists():
        return store.read_rows(out)
    sampling = Sampling(temperature=0.0, max_new_tokens=study.max_new_tokens, batch_size=1)
    rows = []
    problems = study.problems(condition.lm, length)
    with stage(f"{name}, {length}", len(problems), "problem") as bar:
        for problem in problems:
            start = time.process_time()
            (response,) = rollouts(condition, [problem], sampling, progress=False)
            seconds = time.process_time() - start
            prompt = list(response.token_ids[: response.prompt_len])
            gold = condition.lm.tokenizer(study.gold(problem), add_special_tokens=False)["input_ids"]
            loss = nll(condition, prompt, gold)
            rows.append(
                {"condition": name, "length": length, "problem_id": problem.id, "tokens": len(prompt), "correct": bool(response.correct), "nll": loss,
                 "seconds": seconds}
            )  # fmt: skip
            bar.update()
    if out is not None:
        store.write_rows(rows, out)
    return rows


def length_table(rows: pd.DataFrame, *, base: str) -> pd.DataFrame:
    """Return the means of ``length_rows`` with 95 % intervals, one row per condition and length, and the differences from ``base``.

    Columns: ``condition, length, n, tokens, seconds`` (means); ``recall, recall_low, recall_high`` (share of right responses, 0 to 1),
    ``nll, nll_low, nll_high`` (nats per token of a right response) and, for both, ``.._change, .._change_low, .._change_high``: the
    difference from ``base`` on the same problems.
    """
    table = []
    for (name, length), group in rows.groupby(["condition", "length"], sort=False):
        of_base = rows[(rows["condition"] == base) & (rows["length"] == length)].set_index("problem_id")
        row: dict[str, Any] = {
            "condition": name,
            "length": length,
            "n": len(group),
            "tokens": group["tokens"].mean(),
            "seconds": group["seconds"].mean(),
        }
        for label, column in (("recall", "correct"), ("nll", "nll")):
            values = group[column].to_numpy(dtype=float)
            change = values - of_base.loc[group["problem_id"], column].to_numpy(dtype=float)
            for key, numbers in ((label, values), (f"{label}_change", change)):
                e = stats.over_problems(numbers, group["problem_id"].to_numpy())
                row |= {key: e.mean, f"{key}_low": e.low, f"{key}_high": e.high}
        table.append(row)
    return pd.DataFrame(table)


# --- Giraffe -----------------------------------------------------------------------------------------------------


def stretched(
    lm: LM, form: str, *, scale: float = 4.0, exponent: float = 0.5, context: int | None = None, trained: int | None = None
) -> LM:
    """Return a copy of a model with the rotary frequencies of one form of Giraffe. All weights are shared.

    Args:
        lm: The model, as it was trained.
        form: ``linear`` or ``parts`` (which read ``scale``), ``power`` (which reads ``exponent``) or ``truncated``.
        scale: Factor by which the context grows.
        exponent: Exponent k of the power basis.
        context: New largest number of tokens of a text; ``None`` multiplies the trained one by ``scale``.
        trained: Length of the texts that the model was trained on, in tokens; ``None`` takes it from the config.

    Raises:
        ValueError: unknown form, or a number that is not positive.
        UnsupportedModelError: the model does not have one set of rotary frequencies, or they were changed already.
    """
    if form not in ROTARY_FORMS:
        raise ValueError(f"form={form!r}: choose one of {', '.join(ROTARY_FORMS)}.")
    theta, base, window = giraffe.trained(lm)
    trained, context = trained or window, context or math.ceil(scale * window)
    match form:
        case "linear":
            return giraffe.with_linear(lm, scale, context=context)
        case "parts" if trained == window:
            return giraffe.with_parts(lm, scale, context=context)
        case "parts":
            return giraffe.with_frequencies(lm, giraffe.by_parts(theta, scale, trained, base), context=context)
        case "power":
            return giraffe.with_frequencies(lm, giraffe.power(theta, exponent), context=context)
    return giraffe.with_frequencies(lm, giraffe.truncated(theta, trained), context=context)


def giraffe_report(
    lm: LM,
    changed: LM,
    study: LengthStudy,
    directory: str | Path,
    *,
    text: str | None = None,
    say: Say = lambda line: None,
    command: str = "",
) -> dict[str, pd.DataFrame]:
    """Save a model with other rotary frequencies, measure it and the trained model at several lengths, and write a report.

    After a stop, call it again with the same arguments: finished lengths are not measured again.

    Args:
        lm: The model, as it was trained.
        changed: The same model with other frequencies, from ``stretched``.
        study: Task and lengths.
        directory: Directory to write to: ``model`` (the changed model, which transformers loads), ``model.json`` (its fingerprint),
            ``giraffe.json`` (tables with provenance), ``report.html`` and ``rows/``.
        text: Name of a text whose perplexity is measured (see ``perplexity_text``), or ``None``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Returns:
        Name -> table: ``lengths`` (see ``length_table``), and with a text ``text``: one row per condition and range of positions, columns
        ``condition, start, stop, nll, perplexity``.

    Raises:
        ValueError: the text is too short for the longest length, or the longest prompt does not fit the changed model's context.
        FileExistsError: the directory holds a model that was changed in another way.
    """
    longest = max(study.lengths) + study.max_new_tokens + QUESTION
    room = changed.context
    if room and longest > room:
        raise ValueError(
            f"--lengths {max(study.lengths)} and a response take up to {longest} tokens, more than the {room} of the changed model's context: "
            "give shorter lengths, or a larger --context or --scale."
        )
    out = store.writable(directory)
    ids = _text_ids(lm, text, max(study.lengths)) if text else []
    _save(changed, out)
    say(f"the changed model is in {out / 'model'}")
    base = _longer(lm, longest)
    rows = []
    conditions = {"as trained": Condition(base), "changed": Condition(changed)}
    code = store.code_of(__name__)
    for length in study.lengths:
        for name, condition in conditions.items():
            of_study = study.task, study.instances, study.seed, study.max_new_tokens
            key = store.key([identity.of_lm(condition.lm), *of_study, length, code])
            say(f"{name}, length {length}")
            rows += length_rows(name, condition, study, length, out=out / "rows" / f"{key}.jsonl")
    tables = {"lengths": length_table(pd.DataFrame(rows), base="as trained")}
    if ids:
        say(f"reading a text of {max(study.lengths)} tokens")
        edges = sorted({0, *study.lengths})
        spans = list(pairwise(edges))
        read = [
            (name, *span, value)
            for name, c in conditions.items()
            for span, value in zip(spans, text_nll(c, ids, edges), strict=True)
        ]
        tables["text"] = pd.DataFrame(read, columns=["condition", "start", "stop", "nll"]).assign(
            perplexity=lambda t: np.exp(t["nll"])
        )
    about = {"study": study, "text": text, "rope_parameters": changed.model.config.get_text_config().rope_parameters}
    records = {name: report.json_records(table) for name, table in tables.items()}
    store.write_json(about | {"provenance": lm.provenance(study.seed)} | records, out / "giraffe.json")
    page = Page(
        title=f"{lm.name} beyond its trained length",
        verdict=verdicts.of_lengths(tables["lengths"], base="as trained", changed="changed"),
        main=Section(
            "Recall by length", "Share of right greedy responses, by prompt length.", (figures.recall_by_length(tables["lengths"]),)
        ),
        table=_length_cells(tables["lengths"]),
        caption="In brackets: 95 % bootstrap intervals over problems. nll is the mean negative log-probability per token of a right response.",
        sections=[Section("A text, by position", f"Perplexity per token of {text}.", html=table_html(_text_cells(tables["text"])))]
        if ids
        else [],
        made=f"{study.instances} problems of {study.task} per length, answered greedily. No weight was changed or trained, only the rotary "
        f"frequencies: {_rotary(changed)}.",
        command=command,
    )
    pages.write(page, out / "report.html")
    return tables


def _rotary(lm: LM) -> str:
    """Return the rotary parameters of a model as text, with four significant digits."""
    values = lm.model.config.get_text_config().rope_parameters
    if values.get("long_factor") == values.get("short_factor"):
        values = {name: value for name, value in values.items() if name != "short_factor"}
    short = {k: ", ".join(f"{x:.4g}" for x in v) if isinstance(v, list) else v for k, v in values.items()}
    return "; ".join(f"{name} {value}" for name, value in short.items())


def _length_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``length_table`` as a table of texts, for the page: one row per condition and length."""
    rows = {}
    for row in table.to_dict("records"):
        recall, nll = ((row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in ("recall", "nll"))
        rows[f"{row['condition']}, {row['length']:,}"] = {
            "prompt tokens": f"{row['tokens']:.0f}",
            "recall, percent": with_interval(*recall, "share"),
            "nll, nats per token": with_interval(*nll, "nats"),
            "seconds per response": f"{row['seconds']:.2f}",
        }
    return pd.DataFrame(rows).T.rename_axis("condition, length")


def _text_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexity of a text as a table of texts: one row per range of positions, one column per condition."""
    rows = table.assign(
        positions=[f"{a:,} to {b:,}" for a, b in zip(table["start"], table["stop"], strict=True)],
        cell=table["perplexity"].map("{:.2f}".format),
    )
    return (
        rows.pivot(index="positions", columns="condition", values="cell")
        .reindex(rows["positions"].unique())
        .rename_axis(columns=None)
    )


def _save(changed: LM, out: Path) -> None:
    """Save the changed model in ``out / "model"``, unless it is there. Raise FileExistsError if another one is."""
    about = out / "model.json"
    remedy = "Choose another --out, or remove it first."
    if about.exists() and store.read_json(about, {"fingerprint": str}, remedy=remedy)["fingerprint"] != changed.fingerprint:
        raise FileExistsError(f"{out} holds a model that was changed in another way. {remedy}")
    store.write_json({"fingerprint": changed.fingerprint}, about)
    if not (out / "model").exists():
        changed.save(out / "model")


def _text_ids(lm: LM, text: str, longest: int) -> list[int]:
    ids = lm.tokenizer(perplexity_text(text), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < longest:
        raise ValueError(f"--text {text} has {len(ids)} tokens, fewer than the longest length, {longest}: give a longer text.")
    return list(ids)


def _longer(lm: LM, context: int) -> LM:
    """Return the model with room for prompts of ``context`` tokens in its config; its frequencies are those of training."""
    window = giraffe.trained(lm)[2]
    return lm if context <= window else giraffe.with_linear(lm, 1.0, context=context)
