"""Retrieval heads: find them, mask them, and ask what thinking loses that answering does not: ``toolkit retrieval-heads``."""

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
from toolkit.methods.retrieval_heads import Measured
from toolkit.report import Section
from toolkit.tasks import haystack, lookup, needle, threading
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadScores, Moments, Plan, Problem, Rollout

TASKS = ("lookup", "needle", "threading")
RANKINGS = {"copy, as published": ("copy", False), "write (ours)": ("write", True)}
"""How the masked heads are ranked: a metric, and whether the needle is the whole needed piece or the words of the answer alone."""


@dataclass(frozen=True)
class Search:
    """How retrieval heads are looked for, and how they are put to the test.

    Attributes:
        task: ``lookup`` (the tiny reasoner's), ``needle`` (facts in filler) or ``threading`` (chains of keys).
        instances: Haystacks of the dev split that heads are found on, and as many of the test split that they are masked on.
        lengths: Prompt lengths in tokens; none: five up to the model's context. ``lookup`` has lengths of its own.
        counts: How many heads are masked.
        ops: Other forms of masking that are tried at the largest count; the published one (``uniform``) is always.
        draws: Layer-matched random controls of each mask.
        max_new_tokens: Budget of a response.
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
            raise ValueError(f"task={self.task!r} has no needle to be found: choose one of {', '.join(TASKS)}.")
        if wrong := set(self.ops) - set(masks.ABLATIONS):
            raise ValueError(f"ops={', '.join(wrong)}: choose from {', '.join(masks.ABLATIONS)}.")
        if self.instances < 1 or self.draws < 1 or not self.counts or min(self.counts) < 1:
            raise ValueError(f"instances={self.instances}, draws={self.draws}, counts={self.counts}: all must be at least 1.")

    @property
    def sampling(self) -> Sampling:
        """Greedy, as published."""
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, seed=self.seed, batch_size=self.batch_size)

    def haystacks(self, lm: LM, split: str) -> list[Haystack]:
        """The located haystacks of a split, sized for ``lm``; errors as in ``tasks.haystack``."""
        match self.task:
            case "lookup":
                return [haystack.locate_lookup(lm, p) for p in lookup.load(split, self.instances, self.seed)]
            case "needle":
                return needle.spread(lm, split, self.instances, self.seed, lengths=self.lengths)
        sizes = self.lengths or haystack.lengths(lm)
        each = max(1, round(self.instances / len(sizes) / len(threading.MIX)))
        return threading.grid(lm, sizes, threading.MIX, split=split, n=each, seed=self.seed)


@dataclass(frozen=True)
class Found:
    """What every head did on the haystacks: ``measured`` by ranking (see :data:`RANKINGS`), and what the answers were."""

    haystacks: Sequence[Haystack]
    rollouts: Sequence[Rollout]
    measured: Mapping[str, Measured]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """The score of each ranking."""
        return {name: retrieval_heads.scores(self.measured[name], metric) for name, (metric, _) in RANKINGS.items()}

    def recall(self) -> pd.DataFrame:
        """Share of haystacks answered rightly. Columns: ``length`` (quintiles of tokens for ``lookup``), ``depth`` (of the first needed
        piece), ``correct``, ``n``."""
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


def look(lm: LM, search: Search, *, out: Path | None = None, say: Say = lambda text: None) -> Found:
    """Answer the dev haystacks greedily and measure every head while the answers are emitted."""
    hidden = search.haystacks(lm, "dev")
    say(f"answering {len(hidden)} haystacks of up to {max(len(h.prompt_ids) for h in hidden)} tokens")
    found = rollouts(lm, [h.problem for h in hidden], search.sampling, out=out)
    say("measuring every head where tokens are emitted")
    measured = {
        whole: retrieval_heads.measure(
            lm, retrieval_heads.examples(hidden, found, whole=whole), success=lambda e: bool(e.rollout.correct)
        )
        for whole in (False, True)
    }
    return Found(hidden, found, {name: measured[whole] for name, (_, whole) in RANKINGS.items()})


def top_heads(found: Found, count: int = 10) -> pd.DataFrame:
    """The best heads of each ranking. Columns: ``ranking, rank, layer, head, score``, and ``given_success``: over successes only."""
    rows = []
    for name, (metric, _) in RANKINGS.items():
        score = retrieval_heads.scores(found.measured[name], metric)
        gated = retrieval_heads.scores(found.measured[name], metric, when="success") if any(found.measured[name].success) else None
        for rank, (layer, head) in enumerate(score.ranked()[:count], 1):
            given = np.nan if gated is None else float(gated.score[layer, head])
            rows.append((name, rank, layer, head, float(score.score[layer, head]), given))
    return pd.DataFrame(rows, columns=["ranking", "rank", "layer", "head", "score", "given_success"])


def sparsity(found: Found, name: str) -> pd.DataFrame:
    """Shares of heads above 0.1, above 0.5 and at zero, by the published score, beside the published models'."""
    own = retrieval_heads.statistics(found.measured["copy, as published"].of("copy"))
    rows = {name: (own["share_retrieval"], own["share_strong"], own["share_zero"]), **retrieval_heads.PUBLISHED_SHARES}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["above 0.1", "above 0.5", "zero"]).rename_axis("model")


def stability(found: Found, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Overlap of the top heads of n examples with those of all (in-sample). Columns: ``ranking, n, overlap``."""
    rows = []
    for name, (metric, _) in RANKINGS.items():
        values = found.measured[name].of(metric)
        for n in (1, 3, 10, 30, 100):
            if n <= len(values):
                rows.append((name, n, retrieval_heads.stability(values, n, count, seed=seed)))
    return pd.DataFrame(rows, columns=["ranking", "n", "overlap"])


# --- masking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    """One test: the top ``count`` heads of a ranking, masked by ``op`` during ``during`` (see ``masks.masking``)."""

    ranking: str
    count: int
    op: str = "uniform"
    during: str = "newest"

    def __str__(self) -> str:
        return f"{self.ranking}: {self.count} heads, {self.op}, {DURING[self.during]}"


DURING = {"newest": "decode only", "all": "prefill too"}


def masks_of(search: Search) -> list[Mask]:
    """The published form (uniform, decode only) at every count and for every ranking, then every other form at the largest count."""
    curve = [Mask(ranking, count) for ranking, count in product(RANKINGS, search.counts)]
    forms = [Mask(r, max(search.counts), op, during) for r, op, during in product(RANKINGS, search.ops, DURING)]
    return list(dict.fromkeys([*curve, *forms]))


def reference(lm: LM, found: Sequence[Rollout]) -> Moments:
    """Mean output of every head over all positions of prompts and responses: what mean ablation puts in a head's place."""
    everywhere = collect.Positions("prompt and response", lambda r: range(len(r.token_ids)))
    return collect.moments(lm, found, lambda r: "all", kinds=("z",), positions=everywhere)


def controls(plan: Plan, lm: LM, draws: int, seed: int) -> list[Plan]:
    """Up to ``draws`` different random plans of ``edits.random_heads``; none if more than half of all heads are targets."""
    if 2 * len(plan.heads) > lm.layout.n_layers * lm.layout.n_heads:
        return []
    drawn = [edits.random_heads(plan, lm.layout, seed=seed + draw) for draw in range(draws)]
    return list({frozenset(p.heads): p for p in drawn}.values())


def masked(
    lm: LM, found: Found, search: Search, problems: Sequence[Problem], chosen: Sequence[Mask], *, out: Path | None = None
) -> pd.DataFrame:
    """Accuracy and length with heads masked, beside layer-matched random heads.

    Columns: ``ranking, heads, op, during``; ``accuracy, low, high`` of the masked model and ``random, random_low, random_high`` of its
    controls together (NaN without any); ``lost`` (base minus masked) and ``more_than_random`` (random minus masked), both paired by
    problem, each with ``_low, _high`` (95 %, over problems and, for what is random, over ``draws`` of it: see ``toolkit.stats.seeds``. Below
    ``stats.FEW_SEEDS`` draws do not judge by them); ``tokens`` and ``random_tokens``, mean response length.
    """
    base = _outcomes(lm, Condition(lm), problems, search.sampling, out and out / "base")
    done: dict[tuple, ndarray] = {}
    rows = []

    def run(plan: Plan, mask: Mask) -> ndarray:
        act = masks.masking(plan, mask.op, during=mask.during, reference=means if mask.op == "mean" else None)
        key = (frozenset(plan.heads), mask.op, mask.during)
        if key not in done:  # two rankings may name the same heads
            where = out and out / f"{mask.op}-{mask.during}-{'-'.join(f'{i}.{j}' for i, j in sorted(plan.heads))}"
            done[key] = _outcomes(lm, Condition(lm, (act,)), problems, search.sampling, where)
        return done[key]

    means = reference(lm, found.rollouts) if any(m.op == "mean" for m in chosen) else None
    scores = found.scores
    for mask in chosen:
        plan = retrieval_heads.mask_plan(scores[mask.ranking], mask.count)
        top = run(plan, mask)
        noise = [run(control, mask) for control in controls(plan, lm, search.draws, search.seed)]
        rows.append((mask.ranking, mask.count, mask.op, DURING[mask.during], *_judged(base, top, noise, search.seed)))
    return pd.DataFrame(rows, columns=["ranking", "heads", "op", "during", *JUDGED])


def _outcomes(lm: LM, condition: Condition, problems: Sequence[Problem], sampling: Sampling, out: Path | None) -> ndarray:
    """``[2, problems, samples]``: right or not, and response tokens."""
    found = rollouts(condition, problems, sampling, out=out)
    return np.array([[r.correct for r in found], [r.response_tokens for r in found]], float).reshape(2, len(problems), -1)


JUDGED = (
    "accuracy", "low", "high", "random", "random_low", "random_high", "lost", "lost_low", "lost_high",
    "more_than_random", "more_than_random_low", "more_than_random_high", "draws", "tokens", "random_tokens",
)  # fmt: skip


def _judged(base: ndarray, top: ndarray, noise: Sequence[ndarray], seed: int) -> tuple[float | int, ...]:
    own, unmasked = _of_share([top[0]], seed), _of_change([base[0]], [top[0]], seed)
    random, more = (
        (_of_share([x[0] for x in noise], seed), _of_change([x[0] for x in noise], [top[0]], seed)) if noise else (NOTHING, NOTHING)
    )
    tokens = float(np.mean([x[1] for x in noise])) if noise else np.nan
    return (*own, *random, *unmasked, *more, len(noise), float(top[1].mean()), tokens)


NOTHING = (np.nan,) * 3


def _of_share(draws: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Share of right answers of some draws of ``[problems, samples]``, with its interval."""
    e = stats.mean_effect(_means(draws), seed=seed).within((0.0, 1.0))
    return e.mean, e.low, e.high


def _of_change(a: Sequence[ndarray], b: Sequence[ndarray], seed: int) -> tuple[float, float, float]:
    """Draws of a minus draws of b, paired by problem; either may be one for all."""
    e = stats.mean_effect(_means(a) - _means(b), seed=seed).within((-1.0, 1.0))
    return e.mean, e.low, e.high


def _means(draws: Sequence[ndarray]) -> ndarray:
    """``[draws, problems]``: means over samples."""
    return np.stack([x.mean(axis=1) for x in draws])


MODES = {"thinking": (), "answering directly": (Budget(0),)}


def thinking_or_not(
    lm: LM, plan: Plan, problems: Mapping[str, Sequence[Problem]], sampling: Sampling, *, draws: int = 3, out: Path | None = None
) -> pd.DataFrame:
    """Does masking a plan's heads hurt thinking more than answering directly, and what does it do to think length?

    The published form of masking (uniform, decode only), on every set of problems, thinking and with the think span closed at once.

    Returns:
        Columns ``task, mode, masked`` (``nothing``, ``top``, ``random``), ``accuracy, low, high``, ``lost`` against nothing masked with
        ``lost_low, lost_high``, and ``think_tokens``; and for each task a row with the mode ``thinking - directly`` whose ``lost``
        is the difference of the two losses, of ``top`` and of ``random``.
    """
    random = controls(plan, lm, draws, sampling.seed)
    plans: dict[str, Sequence[Plan | None]] = {"nothing": [None], "top": [plan], "random": random}
    rows = []
    for task, asked in problems.items():
        right: dict[tuple[str, str], list[ndarray]] = {}  # an array per draw
        for (mode, rules), (name, some) in product(MODES.items(), plans.items()):
            found = []
            for i, p in enumerate(some):
                act = () if p is None else (masks.masking(p, "uniform", during="newest"),)
                where = out and out / f"{task}-{mode}-{name}{i}".replace(" ", "-")
                found.append(rollouts(Condition(lm, act, rules=rules), asked, sampling, out=where))
            if not found:
                continue
            right[mode, name] = own = [np.array([r.correct for r in f], float).reshape(len(asked), -1) for f in found]
            length = float(np.mean([r.think_tokens for f in found for r in f]))
            lost = _of_change(right[mode, "nothing"], own, sampling.seed)
            rows.append((task, mode, name, *_of_share(own, sampling.seed), *lost, length))
        thinking, directly = MODES
        for name in [name for name in ("top", "random") if (thinking, name) in right]:
            # The loss when thinking minus the loss when answering directly, from one table of outcomes per draw.
            before, after = (_means(right[thinking, m]) - _means(right[directly, m]) for m in ("nothing", name))
            more = stats.mean_effect(before - after, seed=sampling.seed).within((-2.0, 2.0))
            rows.append((task, "thinking - directly", name, *NOTHING, more.mean, more.low, more.high, np.nan))
    columns = ["task", "mode", "masked", "accuracy", "low", "high", "lost", "lost_low", "lost_high", "think_tokens"]
    return pd.DataFrame(rows, columns=columns)


# --- all of it -------------------------------------------------------------------------------------------------


def retrieval_report(lm: LM, search: Search, directory: str | Path, *, say: Say = lambda text: None) -> dict[str, pd.DataFrame]:
    """Find retrieval heads, test them, write everything down.

    Writes ``copy.safetensors`` and ``write.safetensors`` (head scores), ``copy_examples.json`` (per example, in the form of the released
    files), ``retrieval.json`` (every table, with provenance), ``report.html`` and the rollouts into ``directory``; given again after
    a kill, finished rollouts are kept. Returns the tables by name.
    """
    out = store.writable(directory)
    found = look(lm, search, out=out / "rollouts" / "dev", say=say)
    for name, (metric, _) in RANKINGS.items():
        store.save(found.scores[name], out / f"{metric}.safetensors")
    lists = retrieval_heads.to_lists(found.measured["copy, as published"].of("copy"))
    store.write_json(lists, out / "copy_examples.json")
    hidden = [h.problem for h in search.haystacks(lm, "test")]
    chosen = masks_of(search)
    say(
        f"masking heads in {len(chosen)} ways, each with {search.draws} layer-matched random controls, on {len(hidden)} other haystacks"
    )
    tables = {
        "recall": found.recall(),
        "heads": top_heads(found),
        "sparsity": sparsity(found, Path(lm.name).name).reset_index(),
        "stability": stability(found, max(search.counts), seed=search.seed),
        "masking": masked(lm, found, search, hidden, chosen, out=out / "rollouts" / "masked"),
    }
    if lm.tags is not None and lm.tags.close is not None and search.task == "lookup":
        say("masking while thinking and while answering directly")
        plan = retrieval_heads.mask_plan(found.scores["write (ours)"], max(search.counts))
        both = {name: tasks.load(name, "test", search.instances, search.seed) for name in ("lookup", "arithmetic")}
        sampling = replace(search.sampling, temperature=1.0, n=2, max_new_tokens=2 * search.max_new_tokens)
        tables["thinking"] = thinking_or_not(lm, plan, both, sampling, draws=search.draws, out=out / "rollouts" / "thinking")
    about = {"search": search, "provenance": lm.provenance(search.seed)}
    store.write_json(about | {name: report.json_records(table) for name, table in tables.items()}, out / "retrieval.json")
    report.write_page(
        f"Retrieval heads of {lm.name}",
        f"{len(found.haystacks)} haystacks of {search.task}, answered greedily; heads masked on {len(hidden)} others.",
        tables["heads"].round(3).set_index("ranking"),
        _sections(found, tables),
        out / "report.html",
    )
    return tables


def _sections(found: Found, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    maps = tuple(figures.head_scores(score).update_layout(title_text=name) for name, score in found.scores.items())
    sections = [
        Section(
            "What is found",
            "Share of haystacks answered rightly, by length and depth of the needle.",
            (figures.recall(tables["recall"]),),
        ),
        Section(
            "Which heads",
            "As published: share of the answer's tokens that a head attends to most at the very step that emits them. Ours: what it writes "
            "towards the emitted token, read anywhere in the needed piece.",
            maps,
        ),
        Section(
            "How sparse",
            "Shares of heads by the published score, beside seven published models.",
            (figures.sparsity(tables["sparsity"]),),
        ),
        Section(
            "How stable", "Overlap of the top heads of a few examples with those of all.", (figures.stability(tables["stability"]),)
        ),
        Section(
            "Masking them",
            "Accuracy with the top heads masked, and with as many random heads of the same layers; 95 % intervals over haystacks.",
            (figures.masking_curve(tables["masking"]), figures.masking_forms(tables["masking"])),
        ),
    ]
    if "thinking" in tables:
        sections.append(
            Section("Thinking or answering directly", "Accuracy lost to masking.", (figures.thinking_or_not(tables["thinking"]),))
        )
    return sections
