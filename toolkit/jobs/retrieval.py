"""Find retrieval heads, mask them, and compare the loss when thinking with the loss when answering directly: ``toolkit retrieval-heads``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import collect, edits, figures, masks, report, stats, store, tasks
from toolkit.baselines import Budget
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.study import Say
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads
from toolkit.methods.retrieval_heads import HeadMetrics
from toolkit.report import Section
from toolkit.tasks import haystack, lookup, needle, threading
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadScores, Moments, Plan, Problem, Rollout

TASKS = ("lookup", "needle", "threading")
RANKINGS = {"copy, as published": ("copy", False), "write (ours)": ("write", True)}
"""Rankings of the heads: a metric, and True if the needle is the whole needed piece, False if it is only the words of the answer."""


@dataclass(frozen=True)
class Search:
    """Settings for finding retrieval heads and for masking them.

    Attributes:
        task: ``lookup`` (for the tiny reasoner), ``needle`` (facts in filler text) or ``threading`` (chains of keys).
        instances: Number of haystacks: dev split to find heads, as many of the test split to mask them.
        lengths: Prompt lengths in tokens; empty means five lengths up to the model's context. Not used by ``lookup``.
        counts: Numbers of heads to mask.
        ops: Forms of masking to try at the largest count. The published form (``uniform``) is always used.
        draws: Number of random controls per mask, with heads of the same layers.
        max_new_tokens: Token budget of a response.
    """

    task: str = "lookup"
    instances: int = 100
    lengths: tuple[int, ...] = ()
    counts: tuple[int, ...] = (1, 2, 3, 4)
    ops: tuple[str, ...] = masks.ABLATIONS
    draws: int = 3
    max_new_tokens: int = 120
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no needle in its prompts: choose one of {', '.join(TASKS)}.")
        if wrong := set(self.ops) - set(masks.ABLATIONS):
            raise ValueError(f"ops={', '.join(wrong)}: choose from {', '.join(masks.ABLATIONS)}.")
        if self.instances < 1 or self.draws < 1 or not self.counts or min(self.counts) < 1:
            raise ValueError(f"instances={self.instances}, draws={self.draws}, counts={self.counts}: all must be at least 1.")

    @property
    def sampling(self) -> Sampling:
        """Sampling settings: greedy, as published."""
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def haystacks(self, lm: LM, split: str) -> list[Haystack]:
        """Return the haystacks of a split for ``lm``, with the positions of their needles. Errors as in ``tasks.haystack``."""
        match self.task:
            case "lookup":
                return [haystack.locate_lookup(lm, p) for p in lookup.load(split, self.instances, self.seed)]
            case "needle":
                return needle.spread(lm, split, self.instances, self.seed, lengths=self.lengths)
        sizes = self.lengths or haystack.lengths(lm)
        each = max(1, round(self.instances / len(sizes) / len(threading.MIX)))
        return threading.grid(lm, sizes, threading.MIX, split=split, n=each, seed=self.seed)


@dataclass(frozen=True)
class RetrievalMeasurement:
    """Retrieval metrics of every head on haystacks.

    Attributes:
        haystacks: The haystacks.
        rollouts: The model's greedy answers.
        measured: Metrics of every head and example, by ranking (see :data:`RANKINGS`).
    """

    haystacks: Sequence[Haystack]
    rollouts: Sequence[Rollout]
    measured: Mapping[str, HeadMetrics]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Head scores by ranking."""
        return {name: retrieval_heads.scores(self.measured[name], metric) for name, (metric, _) in RANKINGS.items()}

    def recall(self) -> pd.DataFrame:
        """Return the share of haystacks answered correctly by prompt length and needle depth.

        Columns: ``length`` (tokens; quintiles for ``lookup``), ``depth`` (of the first needed piece, 0 to 1), ``correct``, ``n``.
        """
        by_id = {h.problem.id: h for h in self.haystacks}
        rows = []
        for r in self.rollouts:
            h = by_id[r.problem_id]
            n, meta = len(h.prompt_ids), h.problem.meta
            rows.append((meta.get("length", n), meta.get("depth", h.needed[0].start / n), r.correct))
        cells = pd.DataFrame(rows, columns=["length", "depth", "correct"])
        for name, most in (("length", 8), ("depth", 11)):
            if cells[name].nunique() > most:
                cells[name] = pd.qcut(cells[name], 5, duplicates="drop").map(lambda bin: round(bin.mid, 2)).astype(float)
        return cells.groupby(["length", "depth"])["correct"].agg(correct="mean", n="size").reset_index()


def measure_retrieval(lm: LM, search: Search, *, out: Path | None = None, say: Say = lambda text: None) -> RetrievalMeasurement:
    """Answer the dev haystacks greedily, and measure the retrieval metrics of every head while it answers.

    Args:
        out: Directory to keep the rollouts in.
    """
    haystacks = search.haystacks(lm, "dev")
    say(f"answering {len(haystacks)} haystacks of up to {max(len(h.prompt_ids) for h in haystacks)} tokens")
    answers = rollouts(lm, [h.problem for h in haystacks], search.sampling, out=out)
    say("measuring every head at the generated tokens")
    measured = {
        whole: retrieval_heads.measure(
            lm, retrieval_heads.examples(haystacks, answers, whole=whole), success=lambda e: bool(e.rollout.correct)
        )
        for whole in (False, True)
    }
    return RetrievalMeasurement(haystacks, answers, {name: measured[whole] for name, (_, whole) in RANKINGS.items()})


def top_heads(measurement: RetrievalMeasurement, count: int = 10) -> pd.DataFrame:
    """Return the best heads of each ranking.

    Columns: ``ranking, rank, layer, head, score``, and ``given_success``, the score over correctly answered haystacks only.
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        measured = measurement.measured[name]
        score = retrieval_heads.scores(measured, metric)
        on_success = retrieval_heads.scores(measured, metric, when="success") if any(measured.success) else None
        for rank, (layer, head) in enumerate(score.ranked()[:count], 1):
            given_success = np.nan if on_success is None else float(on_success.score[layer, head])
            rows.append((name, rank, layer, head, float(score.score[layer, head]), given_success))
    return pd.DataFrame(rows, columns=["ranking", "rank", "layer", "head", "score", "given_success"])


def sparsity(measurement: RetrievalMeasurement, name: str) -> pd.DataFrame:
    """Return the shares of heads with a published score above 0.1, above 0.5 and at zero, beside those of published models.

    Args:
        name: Name of this model in the table.
    """
    shares = retrieval_heads.statistics(measurement.measured["copy, as published"].select("copy"))
    rows = {name: (shares["share_retrieval"], shares["share_strong"], shares["share_zero"]), **retrieval_heads.PUBLISHED_SHARES}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["above 0.1", "above 0.5", "zero"]).rename_axis("model")


def stability(measurement: RetrievalMeasurement, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Return the overlap of the top heads on n examples with the top heads on all examples (in-sample).

    Columns: ``ranking, n, overlap``.
    """
    rows = []
    for name, (metric, _) in RANKINGS.items():
        values = measurement.measured[name].select(metric)
        for n in (1, 3, 10, 30, 100):
            if n <= len(values):
                rows.append((name, n, retrieval_heads.stability(values, n, count, seed=seed)))
    return pd.DataFrame(rows, columns=["ranking", "n", "overlap"])


# --- masking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """A mask on the top ``count`` heads of a ranking: ``op`` and ``during`` as in ``masks.masking``."""

    ranking: str
    count: int
    op: str = "uniform"
    during: str = "newest"

    def __str__(self) -> str:
        return f"{self.ranking}: {self.count} heads, {self.op}, {DURING[self.during]}"


DURING = {"newest": "decode only", "all": "prefill too"}


def planned_masks(search: Search) -> list[Mask]:
    """Return the published form of masking (uniform, decode only) at every count, and every other form at the largest count."""
    curve = [Mask(ranking, count) for ranking, count in product(RANKINGS, search.counts)]
    forms = [Mask(r, max(search.counts), op, during) for r, op, during in product(RANKINGS, search.ops, DURING)]
    return list(dict.fromkeys([*curve, *forms]))


def reference(lm: LM, rollouts: Sequence[Rollout]) -> Moments:
    """Return the mean output of every head over all positions of prompts and responses, for mean ablation."""
    everywhere = collect.Positions("prompt and response", lambda r: range(len(r.token_ids)))
    return collect.moments(lm, rollouts, lambda r: "all", kinds=("z",), positions=everywhere)


def controls(plan: Plan, lm: LM, draws: int, seed: int) -> list[Plan]:
    """Return up to ``draws`` different plans with random heads of the same layers; none if the plan has more than half of all heads."""
    if 2 * len(plan.heads) > lm.layout.n_layers * lm.layout.n_heads:
        return []
    drawn = [edits.random_heads(plan, lm.layout, seed=seed + draw) for draw in range(draws)]
    return list({frozenset(p.heads): p for p in drawn}.values())


def masking_effects(
    lm: LM,
    measurement: RetrievalMeasurement,
    search: Search,
    problems: Sequence[Problem],
    chosen: Sequence[Mask],
    *,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure accuracy and length with heads masked, beside random heads of the same layers.

    Args:
        problems: Test problems, greedily answered.
        chosen: The masks.
        out: Directory to keep rollouts in.

    Returns:
        Columns ``ranking, heads, op, during``; ``accuracy, low, high`` of the masked model; ``random, random_low, random_high`` of all its
        controls together (NaN without any); ``lost`` (base minus masked) and ``more_than_random`` (random minus masked), paired by
        problem, with ``_low, _high``; ``draws``; ``tokens`` and ``random_tokens``, mean response lengths. Intervals are 95 %, over
        problems and, for the controls, over draws (see ``toolkit.stats.seeds``); with fewer than ``stats.FEW_SEEDS`` draws they are not
        reliable.
    """
    base = _outcomes(lm, Condition(lm), problems, search.sampling, out and out / "base")
    done: dict[tuple, ndarray] = {}
    rows = []

    def run(plan: Plan, mask: Mask) -> ndarray:
        act = masks.masking(plan, mask.op, during=mask.during, reference=means if mask.op == "mean" else None)
        key = (frozenset(plan.heads), mask.op, mask.during)
        if key not in done:  # two rankings may choose the same heads
            where = out and out / f"{mask.op}-{mask.during}-{'-'.join(f'{i}.{j}' for i, j in sorted(plan.heads))}"
            done[key] = _outcomes(lm, Condition(lm, (act,)), problems, search.sampling, where)
        return done[key]

    means = reference(lm, measurement.rollouts) if any(m.op == "mean" for m in chosen) else None
    scores = measurement.scores
    for mask in chosen:
        plan = retrieval_heads.mask_plan(scores[mask.ranking], mask.count)
        top = run(plan, mask)
        noise = [run(control, mask) for control in controls(plan, lm, search.draws, search.seed)]
        rows.append((mask.ranking, mask.count, mask.op, DURING[mask.during], *_judged(base, top, noise, search.seed)))
    return pd.DataFrame(rows, columns=["ranking", "heads", "op", "during", *JUDGED])


def _outcomes(lm: LM, condition: Condition, problems: Sequence[Problem], sampling: Sampling, out: Path | None) -> ndarray:
    """``[2, problems, samples]``: correct (1 or 0), and response tokens."""
    answers = rollouts(condition, problems, sampling, out=out)
    return np.array([[r.correct for r in answers], [r.response_tokens for r in answers]], float).reshape(2, len(problems), -1)


JUDGED = (
    "accuracy", "low", "high", "random", "random_low", "random_high", "lost", "lost_low", "lost_high",
    "more_than_random", "more_than_random_low", "more_than_random_high", "draws", "tokens", "random_tokens",
)  # fmt: skip


def _judged(base: ndarray, top: ndarray, noise: Sequence[ndarray], seed: int) -> tuple[float | int, ...]:
    """The columns ``JUDGED`` of one mask, from outcomes of base, of the masked top heads, and of each random control."""
    accuracy, lost = _share_correct([top[0]], seed), _difference([base[0]], [top[0]], seed)
    random = more = NOTHING
    if noise:
        random = _share_correct([x[0] for x in noise], seed)
        more = _difference([x[0] for x in noise], [top[0]], seed)
    tokens = float(np.mean([x[1] for x in noise])) if noise else np.nan
    return (*accuracy, *random, *lost, *more, len(noise), float(top[1].mean()), tokens)


NOTHING = (np.nan,) * 3


def _share_correct(draws: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Share of correct answers with its interval; each draw is ``[problems, samples]``."""
    e = stats.mean_effect(_means(draws), seed=seed).within((0.0, 1.0))
    return e.mean, e.low, e.high


def _difference(a: Sequence[ndarray], b: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Draws of ``a`` minus draws of ``b``, paired by problem; a single draw on one side is compared with all draws of the other."""
    e = stats.mean_effect(_means(a) - _means(b), seed=seed).within((-1.0, 1.0))
    return e.mean, e.low, e.high


def _means(draws: Sequence[ndarray]) -> ndarray:
    """``[draws, problems]``: means over samples."""
    return np.stack([x.mean(axis=1) for x in draws])


MODES = {"thinking": (), "answering directly": (Budget(0),)}


def thinking_or_not(
    lm: LM, plan: Plan, problems: Mapping[str, Sequence[Problem]], sampling: Sampling, *, draws: int = 3, out: Path | None = None
) -> pd.DataFrame:
    """Measure whether masking a plan's heads hurts thinking more than answering directly, and how it changes think length.

    Heads are masked in the published form (uniform, decode only). To answer directly, the think span is closed at once.

    Args:
        plan: The heads to mask.
        problems: Problems by task.
        draws: Number of random controls.
        out: Directory to keep rollouts in.

    Returns:
        Columns ``task, mode, masked`` (``nothing``, ``top``, ``random``), ``accuracy, low, high``, ``lost`` (nothing masked minus masked)
        with ``lost_low, lost_high``, and ``think_tokens``. For each task, rows with the mode ``thinking - directly`` hold the difference
        of the two losses, for ``top`` and for ``random``.
    """
    random = controls(plan, lm, draws, sampling.seed)
    plans: dict[str, Sequence[Plan | None]] = {"nothing": [None], "top": [plan], "random": random}
    rows = []
    for task, questions in problems.items():
        correct: dict[tuple[str, str], list[ndarray]] = {}  # (mode, masked) -> [problems, samples] per draw
        for (mode, rules), (name, masked_plans) in product(MODES.items(), plans.items()):
            answers = []
            for i, p in enumerate(masked_plans):
                act = () if p is None else (masks.masking(p, "uniform", during="newest"),)
                where = out and out / f"{task}-{mode}-{name}{i}".replace(" ", "-")
                answers.append(rollouts(Condition(lm, act, rules=rules), questions, sampling, out=where))
            if not answers:  # no controls
                continue
            draw_outcomes = [np.array([r.correct for r in draw], float).reshape(len(questions), -1) for draw in answers]
            correct[mode, name] = draw_outcomes
            length = float(np.mean([r.think_tokens for draw in answers for r in draw]))
            lost = _difference(correct[mode, "nothing"], draw_outcomes, sampling.seed)
            rows.append((task, mode, name, *_share_correct(draw_outcomes, sampling.seed), *lost, length))
        thinking, directly = MODES
        for name in [name for name in ("top", "random") if (thinking, name) in correct]:
            # The loss when thinking minus the loss when answering directly, from one table of outcomes per draw.
            before, after = (_means(correct[thinking, m]) - _means(correct[directly, m]) for m in ("nothing", name))
            more = stats.mean_effect(before - after, seed=sampling.seed).within((-2.0, 2.0))
            rows.append((task, "thinking - directly", name, *NOTHING, more.mean, more.low, more.high, np.nan))
    columns = ["task", "mode", "masked", "accuracy", "low", "high", "lost", "lost_low", "lost_high", "think_tokens"]
    return pd.DataFrame(rows, columns=columns)


# --- the report ------------------------------------------------------------------------------------------------


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
