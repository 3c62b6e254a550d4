"""One table of every head through every lens, and what an edit does when seen through all of them: ``toolkit heads``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from toolkit import bridges, evaluate, figures, masks, origins, report, stats, store
from toolkit.generate import rollouts
from toolkit.jobs import edit, retrieval
from toolkit.jobs.study import Say, Study, extraction_rollouts
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.methods import phase_entropy, retrieval_heads
from toolkit.report import Section
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadEdit, HeadScores, Plan, Problem, Rollout

FEW = 64  # rollouts that every head is masked on, one head after the other: ours
SHORT, WRITE, COPY, ENTROPY = "short thinking", "write", "copy", "entropy when masked"


@dataclass(frozen=True)
class Atlas:
    """Every head through every lens.

    Attributes:
        scores: Lens -> one number a head.
        tables: ``heads`` (one row a head), ``overlaps`` (pairs of lenses) and ``conditions`` (edits and steering, seen through the lenses).
    """

    scores: Mapping[str, HeadScores]
    tables: Mapping[str, pd.DataFrame]

    @property
    def heads(self) -> pd.DataFrame:
        """One row a head: ``head`` ("layer.head"), ``layer``, and a column a lens; highest short-thinking score first."""
        return self.tables["heads"]

    @property
    def overlaps(self) -> pd.DataFrame:
        """One row a pair of lenses, see :func:`agreement`."""
        return self.tables["overlaps"]


def entropy_sensitivity(lm: LM, found: Sequence[Rollout], *, temperature: float = 1.0) -> HeadScores:
    """Change of mean think entropy (nats a token, + is more uncertain) when a head is silenced everywhere (zero ablation), on the
    model's own responses, teacher-forced; a mean over rollouts.

    Raises NoThinkTagsError if no rollout thought.
    """
    thought = [r for r in found if r.think_tokens]
    if not thought:
        raise NoThinkTagsError(f"None of the {len(found)} rollouts has a think token: load the model with tags=ThinkTags(...).")

    def mean(target: LM | Condition) -> float:
        measured = phase_entropy.measured(target, thought, temperature=temperature)
        return float(np.mean([phase_entropy.phase_means(r).think for r in measured]))

    base, about = mean(lm), lm.provenance(temperature=temperature, **origins.record(r.problem_id for r in thought))
    change = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, dtype=torch.float64)
    for layer in range(lm.layout.n_layers):
        for head in range(lm.layout.n_heads):
            plan = Plan((HeadEdit(layer, head, "scale", 1.0),), None, f"head {layer}.{head}", about)
            change[layer, head] = mean(Condition(lm, (masks.masking(plan, "zero", during="all"),))) - base
    return HeadScores(change, "entropy_when_masked", "nats a token", about)


def lenses(lm: LM, found: Sequence[Rollout], looked: retrieval.Found, settings: edit.Settings = edit.DEMO) -> dict[str, HeadScores]:
    """Every score of every head: short thinking (as published, and ours), retrieval, entropy when masked, and attention patterns."""
    published, ours = (edit.find(lm, found, settings, name).scores for name in (edit.PUBLISHED, edit.OURS))
    whole = looked.measured["write (ours)"]
    patterns = bridges.detect_heads(lm, [r.token_ids for r in found[:: max(1, len(found) // 16)]])
    return {
        SHORT: ours,
        "short thinking, published": published,
        COPY: looked.scores["copy, as published"],
        WRITE: looked.scores["write (ours)"],
        "attention from the question": retrieval_heads.scores(whole, "query"),
        ENTROPY: entropy_sensitivity(lm, found[:: max(1, len(found) // FEW)]),
        **patterns,
    }


def agreement(scores: Mapping[str, HeadScores], count: int, *, times: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Do two lenses see the same heads?

    Columns: ``pair``; ``shared`` of the top ``count`` heads (expected over the order of heads that tie at the cut) and ``expected`` by
    chance; ``p``, one-sided, of as many shared ones when heads are permuted, and ``p_in_layer`` when they are permuted within their layers
    only; ``spearman`` over all heads (NaN for a constant lens) with two-sided ``p_spearman`` and ``p_spearman_in_layer``; ``p_holm``,
    ``p_in_layer`` corrected over all pairs. Lenses that like the same layers share heads by chance, so ``p`` alone says little.
    """
    rng = np.random.default_rng(seed)
    values = {name: score.score.numpy() for name, score in scores.items()}
    layers, heads = next(iter(values.values())).shape
    free = rng.permuted(np.tile(np.arange(layers * heads), (times, 1)), axis=1)
    inside = rng.permuted(np.tile(np.arange(heads), (times, layers, 1)), axis=2) + heads * np.arange(layers)[:, None]
    shuffles = (free, inside.reshape(times, -1))
    rows = []
    for a, b in combinations(values, 2):
        tops = [_top(values[name], count) for name in (a, b)]
        ranks = [pd.Series(values[name].flatten()).rank().to_numpy() for name in (a, b)]
        shared, rho = float(tops[0] @ tops[1]), stats.spearman(*ranks)
        p, q = [], []
        for shuffle in shuffles:
            p.append(stats.permutation_p(tops[1][shuffle] @ tops[0] >= shared - 1e-9))
            centred = [r - r.mean() for r in ranks]
            scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
            q.append(stats.permutation_p(np.abs(centred[1][shuffle] @ centred[0] / scale) >= abs(rho) - 1e-12) if scale else np.nan)
        rows.append((f"{a} / {b}", shared, count**2 / (layers * heads), *p, rho, *q))
    columns = ["pair", "shared", "expected", "p", "p_in_layer", "spearman", "p_spearman", "p_spearman_in_layer"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=stats.holm(table["p_in_layer"].to_numpy()))


def _top(values: ndarray, count: int) -> ndarray:
    """How far each head is among the top ``count``: 1, 0, or the chance of it for heads that tie at the cut."""
    scores = values.flatten()
    cut = np.sort(scores)[-count]
    above, tied = scores > cut, scores == cut
    return above + tied * (count - above.sum()) / tied.sum()


def seen_through(
    judged: Mapping[str, Condition],
    study: Study,
    hidden: Sequence[Haystack],
    heads: Sequence[tuple[int, int]],
    *,
    out: Path | None = None,
) -> pd.DataFrame:
    """What conditions do to retrieval and to phase entropy; the first is the base.

    Columns: ``condition, metric, mean, low, high, difference, difference_low, difference_high`` (paired by problem, 95 %). Metrics: ``accuracy``,
    ``think_tokens``, ``think_entropy``, ``answer_entropy`` on the study's test problems; ``retrieved``, haystacks answered rightly
    (greedy); ``write``, what ``heads`` write towards the answer, together, on the *base's* responses to the haystacks (logits).
    """
    problems = study.load("test", next(iter(judged.values())).lm)
    evaluate.check_held_out(judged, _problems(judged, study, hidden), allow=study.allow_overlap)
    greedy = replace(study.sampling, n=1, temperature=0.0)
    asked, base_answers = [h.problem for h in hidden], None
    values: dict[str, dict[str, ndarray]] = {}
    for name, condition in judged.items():
        where = None if out is None else out / name.replace(" ", "-").replace(":", "")
        found = rollouts(condition, problems, replace(study.sampling, details=True), out=where and where / "study")
        answers = rollouts(condition, asked, greedy, out=where and where / "haystacks")
        base_answers = base_answers or answers
        with condition.active():
            measured = retrieval_heads.measure(condition.lm, retrieval_heads.examples(hidden, base_answers))
        table = phase_entropy.table(found).groupby("problem_id", sort=False)
        means = table[["correct", "think_tokens", "think_entropy", "answer_entropy"]].mean().reindex([p.id for p in problems])
        together = torch.stack([measured.values["write"][:, i, j] for i, j in heads]).sum(dim=0)
        wrote = pd.Series(together.numpy()).groupby(list(measured.ids)).mean()
        values[name] = {
            "accuracy": means.pop("correct").to_numpy(float),
            **{column: means[column].to_numpy(float) for column in means},
            "retrieved": np.array([r.correct for r in answers], float),
            "write": wrote.reindex([p.id for p in asked]).to_numpy(float),
        }
    return _paired(values, study.seed)


def _problems(judged: Mapping[str, Condition], study: Study, hidden: Sequence[Haystack]) -> list[Problem]:
    """The problems that conditions are judged on."""
    return [*study.load("test", next(iter(judged.values())).lm), *(h.problem for h in hidden)]


def _paired(values: Mapping[str, Mapping[str, ndarray]], seed: int) -> pd.DataFrame:
    base, rows = next(iter(values.values())), []
    for name, own in values.items():
        for metric, mine in own.items():
            kept = ~(np.isnan(mine) | np.isnan(base[metric]))
            a, b = (values[kept][None] for values in (mine, base[metric]))
            e, d = (stats.mean_effect(a, minus, seed=seed) for minus in (None, b))
            rows.append((name, metric, e.mean, e.low, e.high, d.mean, d.low, d.high))
    return pd.DataFrame(
        rows, columns=["condition", "metric", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    )


def atlas(
    lm: LM,
    study: Study,
    search: retrieval.Search,
    directory: str | Path,
    *,
    found: Sequence[Rollout] | None = None,
    origin: Mapping[str, Any] | None = None,
    say: Say = lambda text: None,
) -> Atlas:
    """Every head through every lens; overlaps of the lenses; ThinkEdit's edit and steering seen through them.

    Writes ``heads.parquet``, ``atlas.json`` (tables with provenance), ``report.html`` and the rollouts into ``directory``; given again
    after a stop, finished rollouts are kept. ``found`` are rollouts to find short-thinking heads on (default: sampled now), and
    ``origin`` tells their task, split and seed.

    Raises:
        ImportError: TransformerLens is not installed; said before anything is sampled.
    """
    bridges.check_transformer_lens()
    out = store.writable(directory)
    about_found = study.origin("train") if found is None else dict(origin or {})
    found = found or extraction_rollouts(lm, study, out=out / "rollouts" / "train", say=say)
    looked = retrieval.look(lm, search, out=out / "rollouts" / "haystacks", say=say)
    finding = edit.find(lm, found, edit.DEMO, edit.OURS, origin=about_found)
    judged = edit.conditions(lm, {edit.OURS: finding}, replace(edit.DEMO, draws=1))
    judged |= edit.steered(lm, finding.plan.direction or finding.direction, edit.DEMO)
    hidden = search.haystacks(lm, "test")
    # Refused before the long part.
    overlap = evaluate.check_held_out(judged, _problems(judged, study, hidden), allow=study.allow_overlap)
    say(f"masking each of {lm.layout.n_layers * lm.layout.n_heads} heads, and looking at attention patterns")
    scores = lenses(lm, found, looked)
    count = max(2, round(0.1 * lm.layout.n_layers * lm.layout.n_heads))
    say("ThinkEdit's edit and steering, seen through the lenses")
    top = [h for h in scores[WRITE].ranked()[:count] if scores[WRITE].score[h] > 0]
    tables = {
        "heads": table(scores),
        "overlaps": agreement(scores, count, seed=study.seed),
        "conditions": seen_through(judged, study, hidden, top, out=out / "rollouts" / "conditions"),
    }
    store.save_table(tables["heads"], out / "heads.parquet")
    made_from = finding.plan.provenance.notes
    about = {
        "study": study,
        "search": search,
        "top": count,
        "provenance": lm.provenance(study.seed),
        "made_from": made_from,
        "overlap": overlap,
    }
    store.write_json(about | {name: report.records(t) for name, t in tables.items()}, out / "atlas.json")
    same = max(overlap.values())
    held_out = f"NOT held out: {same} of these are among the problems judged on" if same else "none of them judged on"
    split = f"Short-thinking heads are from {origins.describe(made_from)}, {held_out}; conditions are judged on {study.problems} of {study.task} (test)."
    _write_page(lm, scores, tables, (count, split), out / "report.html")
    return Atlas(scores, tables)


def table(scores: Mapping[str, HeadScores]) -> pd.DataFrame:
    """One row a head: ``head``, ``layer``, and a column a lens; highest of the first lens first."""
    order = next(iter(scores.values())).ranked()
    rows = [(f"{i}.{j}", i, *(float(s.score[i, j]) for s in scores.values())) for i, j in order]
    return pd.DataFrame(rows, columns=["head", "layer", *scores])


def _write_page(
    lm: LM, scores: Mapping[str, HeadScores], tables: Mapping[str, pd.DataFrame], size: tuple[int, str], path: Path
) -> None:
    count, split = size
    sections = [
        Section("Every head through every lens", "Each row scaled to its largest absolute value.", (figures.lenses(scores),)),
        Section(
            "Do the lenses see the same heads?",
            f"How many of the top {count} heads two lenses share; a permutation that keeps each head in its layer gives the p-value.",
            (figures.agreement(tables["overlaps"]),),
        ),
        Section(
            "An edit seen through the lenses",
            f"Paired differences to base; where an interval crosses zero, no effect is detectable at this size. {split}",
            tuple(figures.differences(tables["conditions"], m) for m in ("retrieved", "write", "think_entropy", "answer_entropy")),
        ),
    ]
    shown = tables["heads"].drop(columns="layer").set_index("head").head(2 * count).round(3)
    report.page(
        f"Heads of {lm.name}", "One row a head; the heads that push most towards short thinking first.", shown, sections, path
    )
