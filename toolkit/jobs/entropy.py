"""Measure the entropy of the model's next-token distribution while it thinks and answers, for the command ``entropy``.

Entropy is measured by phase (thinking or answer) and by step of thinking. It is correlated with length and with right answers. *Filtering*
tests whether the answer needs the think tokens of high entropy: they are dropped, the think span is closed, and the model answers again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit import entropies, figures, generate, pages, report, stats, store, transcript
from toolkit.engines import OWN_LOOP, Engine, OwnLoop
from toolkit.jobs import verdicts
from toolkit.jobs.study import Say, Study
from toolkit.lm import LM
from toolkit.methods import failed_steps, phase_entropy
from toolkit.methods.failed_steps import Chain, ReaderOf
from toolkit.metrics import with_interval
from toolkit.pages import Page, Section, table_html
from toolkit.steps import Step
from toolkit.types import Problem, Rollout

LENGTHS = (("entropy", "response_tokens"), ("think_entropy", "think_tokens"))
"""Pairs ``(entropy, length)`` of columns of ``EntropyTables.rows`` to correlate.

The first pair is of whole responses, as in PEAR (arXiv:2510.08026). The second is of thinking alone.
"""
MEASURES = {
    "fsf": "failed-step fraction",
    "review_ratio": "re-check ratio",
    "think_tokens": "think tokens",
    "think_entropy": "think entropy",
}
"""Columns of ``EntropyTables.rows`` to correlate with right answers -> their names in reports.

The failed-step fraction is the share of the steps of thinking that are wrong or abandoned. A re-check is a step that checks an earlier
step. The re-check ratio is the share of the thinking's characters in re-checks.
"""
PHASES = {"think": "thinking", "answer": "answer", "think - answer": "thinking minus answer"}
GROUPS: Mapping[str, Callable[[Rollout], bool]] = {
    "all": lambda r: True,
    "right": lambda r: r.correct,
    "wrong": lambda r: not r.correct,
}
"""Name of a group of responses -> function that returns True for a response in the group."""


@dataclass(frozen=True)
class EntropySettings:
    """Settings of the entropy measurements.

    Attributes:
        temperature: Sampling temperature, above 0. Entropies are those of the softmax at this temperature.
        split: Split of the problems: ``train``, ``dev`` or ``test``.
        keeps: Shares of think tokens to keep, 0 to 1, when think tokens are dropped and the model answers again. The share 1 (nothing
            dropped) and at least one other are required.
        reader_of: Function from a problem to a ``failed_steps.Reader``: rules that split thinking into steps, and mark those that failed or
            that re-check an earlier step.
    """

    temperature: float = 1.0
    split: str = "test"
    keeps: tuple[float, ...] = phase_entropy.PUBLISHED_KEEPS
    reader_of: ReaderOf = failed_steps.fitting

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: give one above 0. At 0 all samples of a problem are equal, so nothing varies within a "
                "problem, and the entropy is not defined."
            )
        if not all(0 <= keep <= 1 for keep in self.keeps) or not {*self.keeps} > {1.0}:
            raise ValueError(f"keeps={self.keeps}: give shares between 0 and 1, among them 1 and at least one other.")


@dataclass(frozen=True)
class EntropyTables:
    """Results of the entropy measurements: one table per attribute.

    Common columns:

    * Entropies are means in nats per token.
    * ``low, high``: ends of a 95 % interval over problems.
    * ``rollouts, problems``: numbers of rollouts and of problems.
    * ``responses``: a group of responses, ``all``, ``right`` or ``wrong``. Only responses that contain thinking are in a group.
    * ``scope``, of a correlation: ``pooled`` (over all rollouts) or ``within`` (each problem's mean is subtracted first, so that
      differences in difficulty cancel).

    A step of thinking *failed* if it is wrong or abandoned. A step *re-checks* if it checks an earlier one. The rules that mark such steps
    depend on the task (see ``failed_steps.Reader``).

    Attributes:
        rows: One row per rollout. Columns: ``problem_id, sample, correct, closed, think_tokens, response_tokens``; ``entropy`` (of the
            whole response), ``think_entropy, answer_entropy``. Columns on the steps of thinking: ``steps, failed, reviews`` (numbers of
            all, failed and re-checking steps), ``fsf`` (failed-step fraction: share of steps that failed), ``review_ratio`` (share of the
            thinking's characters in re-checking steps) and ``characters`` (length of thinking). In responses without thinking, the columns
            on steps are NaN.
        overall: Means over all rollouts, columns ``metric, mean, low, high``. Metrics: ``correct`` and ``closed`` (shares, 0 to 1),
            ``think_tokens``, ``response_tokens`` and ``entropy`` (of the whole response).
        phases: Entropy by phase, columns ``phase, mean, low, high, rollouts, responses``. Phases: ``think``, ``answer``, and their paired
            difference ``think - answer``.
        positions: Entropy by relative position in the think span (0 to 1), columns ``position, mean, low, high, rollouts, responses``.
        steps: Entropy of the first, second, ... step of thinking, columns ``step`` (from 1), ``mean, low, high, rollouts, responses``. Late
            steps that occur in too few problems are left out (see ``phase_entropy.assumed_min_problems``).
        marked: Entropy of failed or re-checking steps compared with the other steps of the same responses. Columns: ``mark`` (``failed`` or
            ``re-check``), ``mean, low, high, rollouts``, and ``steps``: ``marked`` (steps with this mark), ``others``, or the paired
            difference ``marked - others``.
        lengths: Correlation of an entropy with a length. Columns: ``scope, kind`` (``pearson`` or ``spearman``), ``r, low, high, problems,
            rollouts``, and the names of the two correlated columns of ``rows``: ``x`` (entropy) and ``y`` (length).
        correctness: Correlation of each measure in ``MEASURES`` with right answers, columns ``measure, scope, kind, r, low, high``. The
            measure ``fsf (shuffled)`` is a control: see ``failed_steps.correctness_correlations``.
        choices: Accuracy (0 to 1) of one response per problem, selected by a rule. Columns: ``kept`` (the rule, as text that names the
            selected response, such as "shortest thinking"), ``accuracy, low, high``, and ``gain, gain_low, gain_high`` (accuracy minus the
            mean over all responses).
        filtering: Accuracy of new answers, after some think tokens were dropped and the think span was closed. There is one row per share
            kept and way to drop tokens: highest entropy first, at random, or from the end (see ``phase_entropy.filtering_summary``).
            ``None`` if the model has no closing think tag.
        effects: Accuracy after dropping the tokens of highest entropy minus the accuracy of each control. The controls drop as many tokens
            at random, drop as many from the end, or drop none (see ``phase_entropy.filtering_effects``). ``None`` if ``filtering`` is
            ``None``.
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
    rollouts: Sequence[Rollout] | None = None,
    engine: Engine = OWN_LOOP,
    say: Say = lambda text: None,
    command: str = "",
) -> EntropyTables:
    """Sample responses, record the entropy at every token, write a report, and return its tables.

    After a stop, call it again with the same arguments: finished rollouts are reused.

    Args:
        lm: Model to sample from.
        study: Task, numbers of problems and samples, token budget and seed. If ``rollouts`` is given, samples and token budget are not
            used.
        directory: Directory to write to: ``report.html``, ``entropy.json`` (all tables except ``rows``), ``rows.parquet``, ``rollouts/``
            (if sampled), and ``filtered/`` (new answers that the model gives after some of its think tokens were dropped).
        settings: Temperature, split of the problems (train, dev or test), shares of think tokens to keep, and the rules that split thinking into steps.
        rollouts: Rollouts of the study's problems, with entropies at ``settings.temperature``; ``None`` samples them.
        engine: Program that samples the tokens. Only the toolkit's own loop records entropies; for other engines they are computed
            afterwards. The new answers after dropping think tokens are always sampled by the toolkit's own loop.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Raises:
        ValueError: there is only one sample per problem, which leaves nothing to compare within a problem.
        KeyError: a rollout in ``rollouts`` answers a problem that is not in the study.
        entropies.NoEntropiesError: a rollout in ``rollouts`` has no entropies.
        NoThinkTagsError: no response contains thinking; or, for a model with a closing think tag, no response closed its thinking.
    """
    if rollouts is None and study.samples < 2:
        raise ValueError(f"samples={study.samples}: comparing responses within a problem needs at least 2 samples per problem.")
    out = store.writable(directory)
    problems = study.load(settings.split, lm)
    if rollouts is None:
        say(f"sampling {len(problems)} x {study.samples} responses with their entropies")
        own = isinstance(engine, OwnLoop)  # other engines do not record entropies
        sampling = replace(study.sampling, temperature=settings.temperature, details=own)
        rollouts = generate.rollouts(
            lm, problems, sampling, engine=engine, out=out / "rollouts", about=study.origin(settings.split)
        )
        if not own:
            rollouts = entropies.with_entropies(lm, rollouts, temperature=settings.temperature, progress=True)
    # Split each response into steps, and compute every table that needs no model.
    chains = failed_steps.chains(lm, rollouts, problems, settings.reader_of)
    tables = entropy_tables(rollouts, chains, seed=study.seed)
    # Drop think tokens and let the model answer again; only possible if a tag can close the shortened thinking.
    if lm.tags is not None and lm.tags.close is not None:
        say(f"answering again after dropping think tokens, in three ways, at {len(settings.keeps)} shares of tokens kept")
        answering = replace(phase_entropy.assumed_answering, batch_size=study.batch_size)
        graded = phase_entropy.filtering_experiment(
            lm, rollouts, problems, keeps=settings.keeps, sampling=answering, seed=study.seed, out=out / "filtered"
        )
        summary, effects = (f(graded, seed=study.seed) for f in (phase_entropy.filtering_summary, phase_entropy.filtering_effects))
        tables = replace(tables, filtering=summary, effects=effects)
    about = {
        "task": study.task,
        "split": settings.split,
        "problems": len({r.problem_id for r in rollouts}),
        "rollouts": len(rollouts),
        "temperature": settings.temperature,
        "whole_responses": lm.tags is not None and lm.tags.close is None,
        "reader": getattr(settings.reader_of, "__name__", str(settings.reader_of)),
    }
    written = {
        name: None if table is None else report.json_records(table) for name, table in vars(tables).items() if name != "rows"
    }
    store.write_json({"provenance": lm.provenance(study.seed, **about), **written}, out / "entropy.json")
    store.save_table(tables.rows, out / "rows.parquet")
    sections = _sections(tables, _transcripts(lm, rollouts, chains, problems))
    page = Page(
        title=f"Entropy of the thinking of {lm.name}",
        verdict=verdicts.of_entropy(tables.phases, tables.lengths, tables.correctness, tables.effects),
        main=sections[0],
        table=entropy_headline(tables),
        caption="Means and correlations. In brackets: 95 % bootstrap intervals over problems.",
        sections=sections[1:],
        made=_made(about),
        command=command,
    )
    pages.write(page, out / "report.html")
    return tables


def entropy_tables(rollouts: Sequence[Rollout], chains: Sequence[Chain], *, seed: int = 0) -> EntropyTables:
    """Compute all tables of ``EntropyTables`` except ``filtering`` and ``effects``, which need new answers from a model.

    Args:
        rollouts: Rollouts with the entropy of every token, several per problem.
        chains: Steps of each rollout's thinking, from ``failed_steps.chains``.
        seed: Seed of the bootstrap and of the shuffled controls.

    Raises:
        ValueError: no problem has two rollouts, so that there is nothing to compare within a problem.
        entropies.NoEntropiesError: a rollout has no entropies.
        NoThinkTagsError: no rollout has a step of thinking.
    """
    # One row per rollout. The left merge leaves NaN in the step measures of rollouts without thinking.
    rows = phase_entropy.table(rollouts)
    step_measures = failed_steps.table(rollouts, chains).drop(columns=["correct", "think_tokens"])
    rows = rows.merge(step_measures, on=["problem_id", "sample"], how="left")
    chain_of = {(r.problem_id, r.sample): chain for r, chain in zip(rollouts, chains, strict=True)}
    thought = [r for r, chain in zip(rollouts, chains, strict=True) if chain.texts]

    def steps_of(r: Rollout) -> list[Step]:
        return chain_of[r.problem_id, r.sample].steps

    def for_each_group(measure: Callable[[list[Rollout]], pd.DataFrame]) -> pd.DataFrame:
        """Return the rows of ``measure`` for each group of the responses with thinking. An empty group has no rows."""
        groups = {name: [r for r in thought if belongs(r)] for name, belongs in GROUPS.items()}
        return pd.concat([measure(group).assign(responses=name) for name, group in groups.items() if group], ignore_index=True)

    def by_step(group: list[Rollout]) -> pd.DataFrame:
        # Late steps exist in few problems. The table has the steps that occur in at least ``reach`` problems.
        reach = min(phase_entropy.assumed_min_problems, len({r.problem_id for r in group}))
        return phase_entropy.by_step(group, steps_of, at_least=reach, seed=seed)

    def overall(metric: str) -> tuple[float, float, float]:
        e = stats.over_problems(rows[metric].to_numpy(float), rows["problem_id"].to_numpy(), seed=seed)
        return e.mean, e.low, e.high

    metrics = ("correct", "closed", "think_tokens", "response_tokens", "entropy")
    # Only rollouts with both measures, so that all rules select from the same rollouts.
    complete = rows.dropna(subset=["fsf", "think_entropy"])
    return EntropyTables(
        rows=rows,
        overall=pd.DataFrame([(name, *overall(name)) for name in metrics], columns=["metric", "mean", "low", "high"]),
        phases=for_each_group(lambda group: phase_entropy.by_phase(group, seed=seed)),
        positions=for_each_group(lambda group: phase_entropy.by_position(group, seed=seed)),
        steps=for_each_group(by_step),
        marked=_marked(phase_entropy.step_entropy(thought, steps_of), thought, [chain for chain in chains if chain.texts], seed),
        lengths=pd.concat(
            [phase_entropy.correlations(rows, x, y, seed=seed).assign(x=x, y=y) for x, y in LENGTHS], ignore_index=True
        ),
        correctness=failed_steps.correctness_correlations(complete, tuple(MEASURES), seed=seed),
        choices=_choices(complete, seed),
    )


def _marked(rows: pd.DataFrame, thought: Sequence[Rollout], chains: Sequence[Chain], seed: int) -> pd.DataFrame:
    """Return the table ``EntropyTables.marked``: the entropy of steps that failed or re-check, compared with other steps.

    Args:
        rows: From ``phase_entropy.step_entropy``: one row per step, in the order of ``chains``. Steps without tokens of the model have no row.
        thought: The responses of ``chains``.
        chains: Steps of each response's thinking, with two flags per step: failed, and re-checks an earlier step.
        seed: Seed of the bootstrap.
    """
    # One pair of marks (failed, re-check) per row of ``rows``. Steps without a token of the model have no row, so they are skipped.
    marks = [
        (f, v)
        for r, c in zip(thought, chains, strict=True)
        for f, v, span in zip(c.failed, c.review, c.spans, strict=True)
        if any(r.written[span.start - r.prompt_len : span.stop - r.prompt_len])
    ]
    failed, review = zip(*marks, strict=True)
    parts = {"failed": failed, "re-check": review}
    return pd.concat([phase_entropy.by_mark(rows, mark, seed=seed).assign(mark=name) for name, mark in parts.items()])


def _choices(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the table ``EntropyTables.choices``: the accuracy of one response per problem, selected by a rule.

    Each rule selects the response with the lowest (or highest) value of a measure, such as think entropy. One rule is a control: its
    measure is the failed-step fraction, shuffled over all responses.

    Args:
        rows: One row per response, as in ``EntropyTables.rows``, without NaN in the measures.
        seed: Seed of the shuffle and of the bootstrap.
    """
    rows = rows.sort_values(["problem_id", "sample"])  # so that the shuffle does not depend on the order of rows
    values = {
        "lowest failed-step fraction": rows["fsf"],
        "lowest think entropy": rows["think_entropy"],
        "shortest thinking": rows["think_tokens"],
        "longest thinking": -rows["think_tokens"],  # the lowest value is selected
        "lowest failed-step fraction, shuffled": np.random.default_rng(seed).permutation(rows["fsf"].to_numpy(float)),
    }
    choices = []
    for name, column in values.items():
        accuracy, gain = failed_steps.accuracy_of_lowest(rows.assign(measure=column), "measure", seed=seed)
        choices.append((name, accuracy.mean, accuracy.low, accuracy.high, gain.mean, gain.low, gain.high))
    return pd.DataFrame(choices, columns=["kept", "accuracy", "low", "high", "gain", "gain_low", "gain_high"])


# --- the report ----------------------------------------------------------------------------------------------


def entropy_headline(tables: EntropyTables) -> pd.DataFrame:
    """Return selected results as a table of texts, for the top of the report.

    Index: ``measured`` (name of the result). Column: ``value`` (the number with its 95 % interval). The rows:

    * accuracy and think length;
    * entropy by phase, and its Spearman correlation with response length;
    * the effect on accuracy of dropping the think tokens of highest entropy (if ``tables.effects`` is not ``None``);
    * Spearman correlations of the failed-step fraction and of think entropy with right answers;
    * the accuracy gained if, of each problem's responses, the one with the lowest failed-step fraction or think entropy is selected.
    """
    # Index every table by the columns that identify a row, then look up the rows of the headline.
    overall, phases = tables.overall.set_index("metric"), tables.phases[tables.phases["responses"] == "all"].set_index("phase")
    lengths = tables.lengths[tables.lengths["kind"] == "spearman"].set_index(["x", "scope"])
    correct = tables.correctness[tables.correctness["kind"] == "spearman"].set_index(["measure", "scope"])
    choices = tables.choices.set_index("kept")
    value = {
        "accuracy, percent": _cell(overall.loc["correct"], "share"),
        "think tokens": _cell(overall.loc["think_tokens"], "tokens"),
        **{f"entropy, {PHASES[phase]}, nats per token": _cell(phases.loc[phase], "nats") for phase in phases.index},
        "Spearman correlation of entropy and length of responses, pooled": _cell(lengths.loc[("entropy", "pooled")], "score", "r"),
        "Spearman correlation of entropy and length of responses, within problem": _cell(
            lengths.loc[("entropy", "within")], "score", "r"
        ),
    }
    if tables.effects is not None:
        # The mildest filtering: the largest share kept.
        mildest = tables.effects[tables.effects["keep"] == tables.effects["keep"].max()].set_index("against")
        share = f"{_percent(1 - mildest['keep'].iloc[0])} of think tokens dropped, those of highest entropy"
        for against, name in {"random": "random ones", "whole": "none"}.items():
            value[f"{share} instead of {name}: accuracy gained, points"] = _cell(
                mildest.loc[against], "share", "difference", sign="+"
            )
    for measure in ("fsf", "think_entropy"):
        name = f"Spearman correlation of {MEASURES[measure]} and right answers, within problem"
        value[name] = _cell(correct.loc[(measure, "within")], "score", "r")
    for choice in ("lowest failed-step fraction", "lowest think entropy"):
        value[f"response of {choice} kept instead of a random one: accuracy gained, points"] = _gain(choices.loc[choice])
    return pd.DataFrame({"value": value}).rename_axis("measured")


def _cell(row: Mapping[str, float] | pd.Series, unit: str, mean: str = "mean", *, sign: str = "") -> str:
    """Return an estimate and its interval as text, such as ``0.52 [0.40, 0.63]``. If the estimate is NaN, the text says so.

    Args:
        row: The estimate is ``row[mean]``; the ends of its interval are ``row["low"]`` and ``row["high"]``.
        unit: Unit of the numbers, which sets the number of digits. The unit ``share`` is written in percent.
        mean: Key of the estimate in ``row``.
        sign: ``"+"`` also writes the sign of positive numbers.
    """
    return (
        "undefined (nothing varies)" if np.isnan(row[mean]) else with_interval(row[mean], row["low"], row["high"], unit, sign=sign)
    )


def _gain(choice: pd.Series) -> str:
    """Return the gain of a selection rule as text, with its interval: accuracy of the selected responses minus that of all responses.

    Args:
        choice: Row of ``EntropyTables.choices``. Its ``gain`` is a share; the text is in percentage points.
    """
    return _cell({"mean": choice["gain"], "low": choice["gain_low"], "high": choice["gain_high"]}, "share", sign="+")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _made(about: Mapping[str, Any]) -> str:
    whole = " This model does not mark its thinking, so whole responses count as thinking." if about["whole_responses"] else ""
    return (
        f"{about['rollouts']} responses to {about['problems']} problems of {about['task']} ({about['split']}), sampled at temperature "
        f"{about['temperature']:g}. Entropies are of the full softmax at that temperature, in nats.{whole}"
    )


def _sections(tables: EntropyTables, transcripts: tuple[str, str]) -> list[Section]:
    """Return the sections of the report.

    Args:
        tables: Results of the measurements.
        transcripts: From ``_transcripts``: a sentence that names the responses shown, and their HTML.
    """
    shown, fragments = transcripts

    def by_group(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {str(name): part for name, part in table.groupby("responses", sort=False) if name != "all"}

    lengths = [tables.lengths[(tables.lengths["x"] == x) & (tables.lengths["y"] == y)] for x, y in LENGTHS]
    named = tables.correctness.replace({"measure": MEASURES | {"fsf (shuffled)": "failed-step fraction, shuffled"}})
    return [
        Section(
            "Phases",
            "Mean entropy before and after the closing tag, for correct and wrong responses. The tag itself is in neither phase.",
            (figures.phase_entropy(by_group(tables.phases)),),
        ),
        Section(
            "Where in thinking",
            "Mean entropy by relative position in the think span, and by number of the step; bands are 95 % intervals over problems. Only long "
            "thinking has late steps: hover over a point to see how many responses it is from.",
            tuple(
                figures.entropy_by_position(by_group(table), by=by)
                for table, by in ((tables.positions, "position"), (tables.steps, "step"))
            ),
        ),
        Section(
            "Entropy and length",
            "In the pooled correlation, hard problems can raise both entropy and length. Within problem, the mean of each problem is subtracted, "
            "which removes the effect of its difficulty.",
            tuple(figures.correlation(tables.rows, rollouts, x, y) for rollouts, (x, y) in zip(lengths, LENGTHS, strict=True)),
        ),
        _filtering_section(tables),
        Section(
            "Failed steps and correct answers",
            "Left of 0: responses with more of the measure are more often wrong. As a control, the failed-step fraction is shuffled over all "
            "responses, which must give about 0. The table shows the entropy of failed and of re-checking steps beside the other steps of the "
            "same responses, in nats per token.",
            (figures.coefficients(named, "Correlation with right answers"),),
            table_html(_marked_cells(tables.marked))
            if len(tables.marked)
            else "<p>No response has both marked steps and other steps.</p>",
        ),
        Section(
            "Keeping one response per problem",
            "Accuracy in percent when only one response per problem is kept, and the paired gain over a random response, in points. If responses "
            "tie, their mean counts.",
            html=table_html(_choice_cells(tables.choices)),
        ),
        Section(
            "Transcripts",
            f"{shown} Orange shows entropy, on one scale for all transcripts. Failed steps are found by recomputing lines where that is possible "
            "(arithmetic, lookup, word problems); with --steps cues, and for all other tasks, they are guessed from cue words.",
            html=fragments,
        ),
    ]


def _filtering_section(tables: EntropyTables) -> Section:
    title = "Dropping the highest entropies"
    if tables.filtering is None or tables.effects is None:
        return Section(title, "Not measured: no tag closes this model's thinking, so it cannot answer after shortened thinking.")
    effects = tables.effects.assign(kept=[f"{_percent(keep)} kept" for keep in tables.effects["keep"]])
    cells = effects.assign(cell=[_cell(row, "share", "difference", sign="+") for _, row in effects.iterrows()])
    wide = cells.pivot(index="kept", columns="against", values="cell").reindex(effects["kept"].unique())
    against = {"random": "random tokens dropped", "truncate": "end cut off", "whole": "nothing dropped"}
    return Section(
        title,
        "Some think tokens are dropped, the think span is closed, and the model answers greedily. Does it matter that the dropped tokens "
        "have the highest entropy? The table shows the accuracy after dropping the tokens of highest entropy minus the accuracy of each control "
        "at the same share kept, paired by response, in points.",
        (figures.entropy_filtering(tables.filtering),),
        table_html(wide.rename(columns=against).rename_axis(index="highest entropies dropped, minus", columns=None)),
    )


def _marked_cells(marked: pd.DataFrame) -> pd.DataFrame:
    """Return ``EntropyTables.marked`` as a table of texts such as ``1.2 [1.0, 1.4]``, for reports.

    It has one row per mark (failed, re-check). Columns: ``marked`` (steps with the mark), ``others`` and ``marked - others``.
    """
    cells = {
        f"{mark} ({part['rollouts'].iloc[0]} responses)": {row["steps"]: _cell(row, "nats") for _, row in part.iterrows()}
        for mark, part in marked.groupby("mark")
    }
    return pd.DataFrame(cells).T.rename_axis("steps")


def _choice_cells(choices: pd.DataFrame) -> pd.DataFrame:
    """Return ``EntropyTables.choices`` as a table of texts, for reports.

    It has one row per rule that selects a response. Columns: ``accuracy`` in percent, and ``gain`` (accuracy minus the mean over all
    responses) in percentage points.
    """
    rows = choices.set_index("kept")
    cells = {name: {"accuracy": _cell(row, "share", "accuracy"), "gain": _gain(row)} for name, row in rows.iterrows()}
    return pd.DataFrame(cells).T.rename_axis("response kept")


def _transcripts(lm: LM, rollouts: Sequence[Rollout], chains: Sequence[Chain], problems: Sequence[Problem]) -> tuple[str, str]:
    """Return transcripts of up to three responses: a sentence that names the responses, and their HTML.

    The responses, chosen among those with thinking:

    1. The wrong response with the most failed steps. If no response is wrong, the correct response with the most failed steps.
    2. Among the correct responses to the problem of response 1, the one with the most steps, if there is one.
    3. The response with the highest think entropy.
    """
    by_id, thought = {p.id: p for p in problems}, [i for i, chain in enumerate(chains) if chain.texts]
    # Wrong answers first, then most failed steps, then longest thinking. If no answer is wrong, this is a right one.
    wrong = max(thought, key=lambda i: (not rollouts[i].correct, sum(chains[i].failed), rollouts[i].think_tokens))
    correct = [i for i in thought if rollouts[i].problem_id == rollouts[wrong].problem_id and rollouts[i].correct]
    uncertain = max(thought, key=lambda i: phase_entropy.phase_means(rollouts[i]).think or 0.0)
    # A dict keeps the order and drops a response that was chosen twice.
    chosen = dict.fromkeys([wrong, *sorted(correct, key=lambda i: -len(chains[i].texts))[:1], uncertain])
    top = max(float(entropies.entropies_of(rollouts[i]).max()) for i in chosen) or None  # one colour scale for all transcripts
    parts = [transcript.fragment(lm, rollouts[i], chain=chains[i], problem=by_id[rollouts[i].problem_id], top=top) for i in chosen]
    return _named(rollouts[wrong].correct, bool(correct)), "".join(parts)


def _named(all_right: bool, solved: bool) -> str:
    """Return the sentence that says which responses ``_transcripts`` shows.

    Args:
        all_right: True if no response with thinking is wrong. The first transcript then shows a correct response.
        solved: True if the problem of the first transcript has a correct response.
    """
    first = "No response with thinking is wrong: the correct one" if all_right else "The wrong response"
    second = "the correct response to the same problem with the most steps, " if solved else ""
    return f"{first} with the most failed steps, {second}and the response with the highest think entropy."
