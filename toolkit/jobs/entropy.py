"""Entropy of thinking: phases, steps, length, filtering, failed steps, and how it goes with right answers: what ``entropy`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import figures, report, stats, store, transcript
from toolkit.generate import rollouts
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.methods import failed_steps, phase_entropy
from toolkit.methods.failed_steps import Chain, ReaderOf
from toolkit.report import Section
from toolkit.steps import Step
from toolkit.types import Problem, Rollout

LENGTHS = (("entropy", "response_tokens"), ("think_entropy", "think_tokens"))  # the paper's pair, and thinking alone
MEASURES = {
    "fsf": "failed-step fraction",
    "review_ratio": "re-check ratio",
    "think_tokens": "think tokens",
    "think_entropy": "think entropy",
}
PHASES = {"think": "thinking", "answer": "answer", "think - answer": "thinking minus answer"}
GROUPS: Mapping[str, Callable[[Rollout], bool]] = {
    "all": lambda r: True,
    "right": lambda r: r.correct,
    "wrong": lambda r: not r.correct,
}


@dataclass(frozen=True)
class EntropySettings:
    """How entropy is measured.

    Attributes:
        temperature: Of sampling, and so of every entropy.
        split: Split of the study's problems.
        keeps: Shares of think tokens that entropy filtering keeps.
        reader_of: How the responses to a problem are read into steps, and which of them failed.
    """

    temperature: float = 1.0
    split: str = "test"
    keeps: tuple[float, ...] = phase_entropy.PUBLISHED_KEEPS
    reader_of: ReaderOf = failed_steps.fitting

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: give one above 0. At 0 the samples of a problem are all alike, so nothing varies within "
                "a question, and their entropies have no temperature."
            )
        if not all(0 <= keep <= 1 for keep in self.keeps) or not {*self.keeps} > {1.0}:
            raise ValueError(f"keeps={self.keeps}: give shares from 0 to 1, among them 1 and at least one other.")


@dataclass(frozen=True)
class EntropyTables:
    """What was measured; the columns of each table are those of the function named.

    Attributes:
        rows: One row a rollout: ``phase_entropy.table``, and where it thought ``failed_steps.table``.
        overall: ``metric, mean, low, high``: accuracy, share closed, lengths and entropy of whole responses.
        phases: ``by_phase``, with a column ``responses``: all that thought, the right or the wrong ones.
        positions: ``by_position``, likewise.
        steps: ``by_step``, likewise.
        marked: ``by_mark`` of failed steps and of re-checks, told apart by the column ``mark``.
        lengths: ``correlations`` of the columns ``x`` and ``y``.
        correctness: ``against_correctness``.
        choices: Accuracy if one response is kept of every problem, and what that gains over any: ``kept, accuracy, low, high, gain,
            gain_low, gain_high``.
        filtering: ``filtering_summary``, or ``None`` if no tag closes the model's thinking, so that nothing can be filtered.
        effects: ``filtering_effects``, or ``None``.
    """

    rows: pd.DataFrame
    overall: pd.DataFrame
    phases: pd.DataFrame
    positions: pd.DataFrame
    steps: pd.DataFrame
    marked: pd.DataFrame
    lengths: pd.DataFrame
    correctness: pd.DataFrame
    choices: pd.DataFrame
    filtering: pd.DataFrame | None = None
    effects: pd.DataFrame | None = None


def entropy_report(
    lm: LM,
    study: Study,
    directory: str | Path,
    *,
    settings: EntropySettings = EntropySettings(),
    found: Sequence[Rollout] | None = None,
    say: Say = lambda text: None,
) -> EntropyTables:
    """Sample with entropies, measure everything about them, and write it down.

    Writes ``report.html``, ``entropy.json``, ``rows.parquet``, ``rollouts/`` and ``filtered/`` (the answers to filtered thinking) into
    ``directory``; given again after a stop, finished ones are kept.

    Args:
        found: Rollouts of the study's problems with entropies at ``settings.temperature``, instead of sampling.

    Raises:
        ValueError: one sample a problem, which leaves nothing to compare within questions.
        KeyError: a given rollout answers another problem than the study's.
        phase_entropy.NoEntropiesError: a given rollout carries no entropies.
        NoThinkTagsError: no response thought; or none closed its thinking, though there is a tag for it.
    """
    if found is None and study.samples < 2:
        raise ValueError(f"samples={study.samples}: comparing responses within a question needs at least 2 samples a problem.")
    out = store.writable(directory)
    problems = study.load(settings.split, lm)
    if found is None:
        say(f"sampling {len(problems)} x {study.samples} responses with their entropies")
        sampling = replace(study.sampling, temperature=settings.temperature, details=True)
        found = rollouts(lm, problems, sampling, out=out / "rollouts", about=study.origin(settings.split))
    chains = failed_steps.chains(lm, found, problems, settings.reader_of)
    tables = entropy_tables(found, chains, seed=study.seed)
    if lm.tags is not None and lm.tags.close is not None:
        say(f"answering again from filtered thinking: {len(settings.keeps)} shares, three ways to drop")
        answering = replace(phase_entropy.assumed_answering, batch_size=study.batch_size)
        graded = phase_entropy.filtering(
            lm, found, problems, keeps=settings.keeps, sampling=answering, seed=study.seed, out=out / "filtered"
        )
        summary, effects = (f(graded, seed=study.seed) for f in (phase_entropy.filtering_summary, phase_entropy.filtering_effects))
        tables = replace(tables, filtering=summary, effects=effects)
    about = {
        "task": study.task,
        "split": settings.split,
        "problems": len({r.problem_id for r in found}),
        "rollouts": len(found),
        "temperature": settings.temperature,
        "whole_responses": lm.tags is not None and lm.tags.close is None,
        "reader": getattr(settings.reader_of, "__name__", str(settings.reader_of)),
    }
    written = {
        name: None if table is None else report.json_records(table) for name, table in vars(tables).items() if name != "rows"
    }
    store.write_json({"provenance": lm.provenance(study.seed, **about), **written}, out / "entropy.json")
    store.save_table(tables.rows, out / "rows.parquet")
    sections = _sections(tables, _transcripts(lm, found, chains, problems))
    report.write_page(f"Entropy of the thinking of {lm.name}", _intro(about), entropy_board(tables), sections, out / "report.html")
    return tables


def entropy_tables(found: Sequence[Rollout], chains: Sequence[Chain], *, seed: int = 0) -> EntropyTables:
    """Every table that takes no model, from rollouts with entropies and their ``failed_steps.chains``.

    Errors as :func:`entropy_report`.
    """
    rows = phase_entropy.table(found)
    read = failed_steps.table(found, chains).drop(columns=["correct", "think_tokens"])
    rows = rows.merge(read, on=["problem_id", "sample"], how="left")
    chain_of = {(r.problem_id, r.sample): chain for r, chain in zip(found, chains, strict=True)}
    thought = [r for r, chain in zip(found, chains, strict=True) if chain.texts]

    def steps_of(r: Rollout) -> list[Step]:
        return chain_of[r.problem_id, r.sample].steps

    def each(measure: Callable[[list[Rollout]], pd.DataFrame]) -> pd.DataFrame:
        groups = {name: [r for r in thought if wanted(r)] for name, wanted in GROUPS.items()}
        return pd.concat([measure(group).assign(responses=name) for name, group in groups.items() if group], ignore_index=True)

    def by_step(group: list[Rollout]) -> pd.DataFrame:
        reach = min(phase_entropy.assumed_reach, len({r.problem_id for r in group}))
        return phase_entropy.by_step(group, steps_of, at_least=reach, seed=seed)

    def overall(metric: str) -> tuple[float, float, float]:
        e = stats.over_problems(rows[metric].to_numpy(float), rows["problem_id"].to_numpy(), seed=seed)
        return e.mean, e.low, e.high

    metrics = ("correct", "closed", "think_tokens", "response_tokens", "entropy")
    own = rows.dropna(subset=["fsf", "think_entropy"])
    return EntropyTables(
        rows=rows,
        overall=pd.DataFrame([(name, *overall(name)) for name in metrics], columns=["metric", "mean", "low", "high"]),
        phases=each(lambda group: phase_entropy.by_phase(group, seed=seed)),
        positions=each(lambda group: phase_entropy.by_position(group, seed=seed)),
        steps=each(by_step),
        marked=_marked(phase_entropy.step_entropy(thought, steps_of), [chain for chain in chains if chain.texts], seed),
        lengths=pd.concat(
            [phase_entropy.correlations(rows, x, y, seed=seed).assign(x=x, y=y) for x, y in LENGTHS], ignore_index=True
        ),
        correctness=failed_steps.against_correctness(own, tuple(MEASURES), seed=seed),
        choices=_choices(own, seed),
    )


def _marked(rows: pd.DataFrame, chains: Sequence[Chain], seed: int) -> pd.DataFrame:
    """Steps that failed, and steps that re-check, each beside the other steps of their responses."""
    marks = [(f, r) for c in chains for f, r, span in zip(c.failed, c.review, c.spans, strict=True) if len(span)]
    failed, review = zip(*marks, strict=True)
    parts = {"failed": failed, "re-check": review}
    return pd.concat([phase_entropy.by_mark(rows, mark, seed=seed).assign(mark=name) for name, mark in parts.items()])


def _choices(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy of each problem's response with the lowest value of several measures, and its gain; shuffled values as the control."""
    rows = rows.sort_values(["problem_id", "sample"])  # what is shuffled does not depend on the order of rows
    values = {
        "lowest failed-step fraction": rows["fsf"],
        "lowest think entropy": rows["think_entropy"],
        "shortest thinking": rows["think_tokens"],
        "longest thinking": -rows["think_tokens"],
        "lowest failed-step fraction, shuffled": np.random.default_rng(seed).permutation(rows["fsf"].to_numpy(float)),
    }
    found = []
    for name, column in values.items():
        own, gain = failed_steps.chosen_by(rows.assign(measure=column), "measure", seed=seed)
        found.append((name, own.mean, own.low, own.high, gain.mean, gain.low, gain.high))
    return pd.DataFrame(found, columns=["kept", "accuracy", "low", "high", "gain", "gain_low", "gain_high"])


# --- as a page -----------------------------------------------------------------------------------------------


def entropy_board(tables: EntropyTables) -> pd.DataFrame:
    """The headline as text cells: one column, ``value``, each with its 95 % interval."""
    overall, phases = tables.overall.set_index("metric"), tables.phases[tables.phases["responses"] == "all"].set_index("phase")
    lengths = tables.lengths[tables.lengths["kind"] == "spearman"].set_index(["x", "scope"])
    correct = tables.correctness[tables.correctness["kind"] == "spearman"].set_index(["measure", "scope"])
    choices = tables.choices.set_index("kept")
    value = {
        "accuracy, percent": _cell(overall.loc["correct"], scale=100),
        "think tokens": _cell(overall.loc["think_tokens"]),
        **{f"entropy, {PHASES[phase]}, nats a token": _cell(phases.loc[phase], digits=3) for phase in phases.index},
        "entropy and length of responses, pooled (Spearman)": _cell(lengths.loc[("entropy", "pooled")], "r", digits=2),
        "entropy and length of responses, within question": _cell(lengths.loc[("entropy", "within")], "r", digits=2),
    }
    if tables.effects is not None:
        first = tables.effects[tables.effects["keep"] == tables.effects["keep"].max()].set_index("against")
        share = f"{_percent(1 - first['keep'].iloc[0])} of think tokens dropped, those of highest entropy"
        for against, name in {"random": "random ones", "whole": "none"}.items():
            value[f"{share} rather than {name}: accuracy, points"] = _cell(first.loc[against], "difference", scale=100, signed=True)
    for measure in ("fsf", "think_entropy"):
        name = f"{MEASURES[measure]} and right answers, within question"
        value[name] = _cell(correct.loc[(measure, "within")], "r", digits=2)
    for kept in ("lowest failed-step fraction", "lowest think entropy"):
        value[f"response of {kept} rather than any: accuracy, points"] = _gain(choices.loc[kept])
    return pd.DataFrame({"value": value}).rename_axis("measured")


def _cell(
    row: Mapping[str, float] | pd.Series, mean: str = "mean", *, scale: int = 1, digits: int = 1, signed: bool = False
) -> str:
    if np.isnan(row[mean]):
        return "undefined (nothing varies)"
    centre, low, high = (f"{scale * row[name]:{'+' if signed else ''}.{digits}f}" for name in (mean, "low", "high"))
    return f"{centre} [{low}, {high}]"


def _gain(choice: pd.Series) -> str:
    return _cell({"mean": choice["gain"], "low": choice["gain_low"], "high": choice["gain_high"]}, scale=100, signed=True)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _intro(about: Mapping[str, Any]) -> str:
    whole = " This model marks no thinking: whole responses count as it." if about["whole_responses"] else ""
    return (
        f"{about['rollouts']} responses to {about['problems']} problems of {about['task']} ({about['split']}), sampled at temperature "
        f"{about['temperature']:g}. Entropies are of the full softmax at that temperature, in nats. In brackets: 95 % intervals by bootstrap "
        f"over problems.{whole}"
    )


def _sections(tables: EntropyTables, transcripts: str) -> list[Section]:
    def by_group(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {str(name): part for name, part in table.groupby("responses", sort=False) if name != "all"}

    lengths = [tables.lengths[(tables.lengths["x"] == x) & (tables.lengths["y"] == y)] for x, y in LENGTHS]
    named = tables.correctness.replace({"measure": MEASURES | {"fsf (shuffled)": "failed-step fraction, shuffled"}})
    return [
        Section(
            "Phases",
            "Mean entropy before and after the closing tag, of right and of wrong responses. The tag itself is in neither phase.",
            (figures.phase_entropy(by_group(tables.phases)),),
        ),
        Section(
            "Where in thinking",
            "By relative position, and by step; bands are 95 % intervals over problems. Later steps are those of longer thinking: hover for "
            "how many responses reach them.",
            tuple(
                figures.entropy_by_position(by_group(table), by=by)
                for table, by in ((tables.positions, "position"), (tables.steps, "step"))
            ),
        ),
        Section(
            "Entropy and length",
            "Pooled, a hard problem can make both larger. Within question each problem's means are subtracted, so how hard it is drops out.",
            tuple(figures.correlation(tables.rows, found, x, y) for found, (x, y) in zip(lengths, LENGTHS, strict=True)),
        ),
        _filtering_section(tables),
        Section(
            "Failed steps and right answers",
            "Left of 0: more of the measure goes with wrong answers. Shuffled, the fraction is dealt out anew among all responses and must "
            "give about 0. The table: entropy of failed and of re-checking steps beside the other steps of the same responses, nats a token.",
            (figures.coefficients(named, "Correlation with right answers"),),
            report.table_html(_marked_cells(tables.marked))
            if len(tables.marked)
            else "<p>No response has marked and other steps.</p>",
        ),
        Section(
            "Keeping one response of several",
            "Accuracy in percent if of every problem's responses one is kept, and what that gains over any of them, paired, in points; "
            "where several tie, the mean over them.",
            html=report.table_html(_choice_cells(tables.choices)),
        ),
        Section(
            "Transcripts",
            "A wrong response with most failed steps, a right one to the same problem, and the least certain thinking of all. Orange is "
            "entropy, on one scale. Lines of arithmetic and lookup are recomputed, so what is marked failed there is wrong for sure; thinking "
            "in prose is read by cue words, which is a guess.",
            html=transcripts,
        ),
    ]


def _filtering_section(tables: EntropyTables) -> Section:
    title = "Dropping the highest entropies"
    if tables.filtering is None or tables.effects is None:
        return Section(
            title, "No tag closes this model's thinking, so nothing could be dropped from it before an answer: not measured."
        )
    effects = tables.effects.assign(kept=[f"{_percent(keep)} kept" for keep in tables.effects["keep"]])
    cells = effects.assign(cell=[_cell(row, "difference", scale=100, signed=True) for _, row in effects.iterrows()])
    wide = cells.pivot(index="kept", columns="against", values="cell").reindex(effects["kept"].unique())
    against = {"random": "random tokens dropped", "truncate": "end cut off", "whole": "nothing dropped"}
    return Section(
        title,
        "Some think tokens are dropped, the span is closed, and the model answers greedily. Does it matter that they are those of highest "
        "entropy? The table: accuracy of dropping those, minus that of each control at the same share kept, paired, in points.",
        (figures.entropy_filtering(tables.filtering),),
        report.table_html(wide.rename(columns=against).rename_axis(index="highest entropies dropped, minus", columns=None)),
    )


def _marked_cells(marked: pd.DataFrame) -> pd.DataFrame:
    cells = {
        f"{mark} ({part['rollouts'].iloc[0]} responses)": {row["steps"]: _cell(row, digits=3) for _, row in part.iterrows()}
        for mark, part in marked.groupby("mark")
    }
    return pd.DataFrame(cells).T.rename_axis("steps")


def _choice_cells(choices: pd.DataFrame) -> pd.DataFrame:
    rows = choices.set_index("kept")
    cells = {name: {"accuracy": _cell(row, "accuracy", scale=100), "gain": _gain(row)} for name, row in rows.iterrows()}
    return pd.DataFrame(cells).T.rename_axis("response kept")


def _transcripts(lm: LM, found: Sequence[Rollout], chains: Sequence[Chain], problems: Sequence[Problem]) -> str:
    """The wrong response with most failed steps, the right one of most steps to the same problem, and the least certain one."""
    by_id, thought = {p.id: p for p in problems}, [i for i, chain in enumerate(chains) if chain.texts]
    first = max(thought, key=lambda i: (not found[i].correct, sum(chains[i].failed), found[i].think_tokens))
    same = [i for i in thought if found[i].problem_id == found[first].problem_id and found[i].correct]
    uncertain = max(thought, key=lambda i: phase_entropy.phase_means(found[i]).think or 0.0)
    shown = dict.fromkeys([first, *sorted(same, key=lambda i: -len(chains[i].texts))[:1], uncertain])
    top = max(float(phase_entropy.recorded(found[i]).max()) for i in shown) or None
    parts = [transcript.fragment(lm, found[i], chain=chains[i], problem=by_id[found[i].problem_id], top=top) for i in shown]
    return "".join(parts)
