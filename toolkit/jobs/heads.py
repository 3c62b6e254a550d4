"""The head atlas, for the command ``toolkit heads``: scores of every attention head by several measures, and the effects of an edit.

A measure that gives every head one number is called a *lens* here. (It has nothing to do with the logit lens.)
"""

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

from toolkit import bridges, entropies, evaluate, figures, generate, masks, needles, origins, pages, report, stats, store
from toolkit.jobs import edit, retrieval, verdicts
from toolkit.jobs.finding import DEMO, OURS, PUBLISHED, EditSettings, find_heads
from toolkit.jobs.study import Say, Study, extraction_rollouts
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.methods import phase_entropy, retrieval_heads
from toolkit.pages import Page, Section
from toolkit.tasks.haystack import Haystack
from toolkit.types import HeadEdit, HeadScores, Plan, Problem, Rollout

FEW = 64  # the score that ablates one head at a time uses 64 to 127 rollouts (all, if there are fewer): ours
SHORT, WRITE, COPY, ENTROPY = "short thinking", "write", "copy", "entropy when masked"


@dataclass(frozen=True)
class Atlas:
    """Scores of every attention head by several lenses (measures that give each head one number), and tables that compare them.

    Attributes:
        scores: Name of a lens -> scores of all heads.
        tables: Name -> table: ``heads`` (one row per head, see ``head_table``), ``overlaps`` (one row per pair of lenses, see
            ``agreement``), and ``conditions`` (effects of the edit and of steering, see ``condition_effects``).
    """

    scores: Mapping[str, HeadScores]
    tables: Mapping[str, pd.DataFrame]

    @property
    def heads(self) -> pd.DataFrame:
        """Table with one row per head: ``head`` ("layer.head"), ``layer``, and the head's score by each lens, one column per lens.

        A lens is a measure that gives each head one number. Rows are sorted by the lens ``short thinking``: the head that writes most
        towards short thinking comes first.
        """
        return self.tables["heads"]

    @property
    def overlaps(self) -> pd.DataFrame:
        """Table with one row per pair of lenses (measures of heads): how well they agree on the highest heads (see ``agreement``)."""
        return self.tables["overlaps"]


def entropy_sensitivity(lm: LM, rollouts: Sequence[Rollout], *, temperature: float = 1.0) -> HeadScores:
    """Return a score for every head: the rise of the entropy of think tokens when the head's output is set to zero at all positions.

    The model reads its own responses, teacher-forced. A score is the mean think entropy with the head ablated minus that of the unchanged
    model, averaged over rollouts, in nats per token. A positive score means that ablation makes the model less certain.

    Args:
        lm: Model to ablate heads in.
        rollouts: Responses of ``lm``.
        temperature: Temperature of the softmax whose entropy is measured.

    Raises:
        NoThinkTagsError: no rollout has a think token.
    """
    thought = [r for r in rollouts if r.think_tokens]
    if not thought:
        raise NoThinkTagsError(f"None of the {len(rollouts)} rollouts has a think token: load the model with tags=ThinkTags(...).")

    def mean(target: LM | Condition) -> float:
        measured = entropies.with_entropies(target, thought, temperature=temperature)
        return float(np.mean([phase_entropy.phase_means(r).think for r in measured]))

    base, about = mean(lm), lm.provenance(temperature=temperature, **origins.record(r.problem_id for r in thought))
    change = lm.layout.table({})
    for layer, head in lm.layout.all_heads:
        plan = Plan((HeadEdit(layer, head, "scale", 1.0),), None, f"head {layer}.{head}", about)  # masked at full strength
        change[layer, head] = mean(Condition(lm, (masks.masking(plan, "zero", during="all"),))) - base
    return HeadScores(change, "entropy_when_masked", "nats per token", about, lm.layout.absent)


def lenses(
    lm: LM, rollouts: Sequence[Rollout], measurement: retrieval.RetrievalMeasurement, settings: EditSettings = DEMO
) -> dict[str, HeadScores]:
    """Score all heads by nine measures, called lenses; return a dict from the name of a lens to the scores of all heads.

    A lens gives each head one number. The lenses ``copy``, ``write`` and ``attention from the question`` come from prompts that hide a
    fact, the *needle* (see ``methods.retrieval_heads``). The others come from ``rollouts``. The first two are scores of ThinkEdit: both
    project the head's output on the direction from long to short thinking.

    * ``short thinking``: our form. Projection in responses with short thinking minus projection in responses with long thinking. For all
      heads, the direction is that of the last layer (see ``thinkedit.contrast_scores``).
    * ``short thinking, published``: projection in responses with short thinking only. The direction is that of the head's own layer (see
      ``thinkedit.head_scores``).
    * ``copy``: share of the answer's distinct tokens that the head copies. A head copies a token if, at the step that generates the token,
      it attends most to this token in the needle.
    * ``write``: how much the head raises the logit of a token of the needle at the step that generates this token, through the position of
      the needle that it attends to most. Mean over the generated tokens of the needle.
    * ``attention from the question``: share of the head's attention that goes to the needle, mean over the question's tokens.
    * ``entropy when masked``: rise of the think entropy when the head is ablated (see ``entropy_sensitivity``), on at most 127 rollouts.
    * ``previous token``, ``duplicate token``, ``induction``: share of the head's attention that lies on this pattern, as TransformerLens
      measures it on at most 31 rollouts, of which only the first 1,024 tokens are read (see ``bridges.detect_heads``).

    Args:
        lm: Model whose heads are scored.
        rollouts: Rollouts of ``lm`` from the train split.
        measurement: Retrieval metrics of every head, from ``retrieval.measure_retrieval``.
        settings: Settings of ThinkEdit, for the scores of short thinking.
    """
    published, ours = (find_heads(lm, rollouts, settings, name).scores for name in (PUBLISHED, OURS))
    whole = measurement.measured["write (ours)"]
    # Every k-th rollout, so that all problems are represented: 16 to 31 rollouts for patterns, 64 to 127 for entropy below.
    patterns = bridges.detect_heads(lm, [r.token_ids for r in rollouts[:: max(1, len(rollouts) // 16)]])
    return {
        SHORT: ours,
        "short thinking, published": published,
        COPY: measurement.scores["copy, as published"],
        WRITE: measurement.scores["write (ours)"],
        "attention from the question": retrieval_heads.scores(whole, "query"),
        ENTROPY: entropy_sensitivity(lm, rollouts[:: max(1, len(rollouts) // FEW)]),
        **patterns,
    }


def agreement(scores: Mapping[str, HeadScores], count: int, *, times: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Test for every pair of lenses (measures that give each head one number) whether both rank the same heads highest.

    If two lenses give high scores to all heads of the same layers, they share top heads for this reason alone. The p-value ``p_in_layer``
    rules this explanation out; ``p`` does not.

    Args:
        scores: Name of a lens -> scores of all heads.
        count: Number of top heads to compare per lens.
        times: Number of random permutations of the heads.
        seed: Seed of the permutations.

    Returns:
        One row per pair of lenses. Columns:

        * ``pair``: ``"LENS / LENS"``.
        * ``shared``: number of heads in the top ``count`` of both lenses. Heads that tie for the last places count as fractions of a head.
        * ``expected``: mean of ``shared`` over random rankings of all heads.
        * ``p``: one-sided p-value of ``shared``: share of random permutations of all heads that share at least as many top heads.
        * ``p_in_layer``: the same for permutations of the heads within each layer.
        * ``spearman``: rank correlation over all heads (NaN if a lens is constant).
        * ``p_spearman, p_spearman_in_layer``: two-sided p-values of ``spearman``, from the same two kinds of permutations.
        * ``p_holm``: ``p_in_layer`` after Holm's correction over all pairs.
    """
    rng = np.random.default_rng(seed)
    present = next(iter(scores.values())).present.numpy()  # a layer may have fewer heads than others, or none
    values = {name: score.score.numpy()[present] for name, score in scores.items()}
    sizes = present.sum(axis=1)
    # Permutations of head indices, [times, heads]: ``free`` over all heads, ``inside`` within each layer only (one array per layer).
    free = rng.permuted(np.tile(np.arange(sizes.sum()), (times, 1)), axis=1)
    starts = np.cumsum(sizes) - sizes
    inside = [rng.permuted(np.tile(np.arange(n), (times, 1)), axis=1) + start for n, start in zip(sizes, starts, strict=True)]
    shuffles = (free, np.concatenate(inside, axis=1))
    rows = []
    for a, b in combinations(values, 2):
        tops = [_top(values[name], count) for name in (a, b)]
        ranks = [pd.Series(values[name]).rank().to_numpy() for name in (a, b)]
        shared, rho = float(tops[0] @ tops[1]), stats.spearman(*ranks)
        p_shared, p_rho = [], []
        for shuffle in shuffles:
            # Shuffle the heads of the second lens: tops[1][shuffle] is [times, heads]. The small constants absorb rounding, so that a
            # permutation with the same value as the data counts as at least as large.
            p_shared.append(stats.permutation_p(tops[1][shuffle] @ tops[0] >= shared - 1e-9))
            centred = [r - r.mean() for r in ranks]
            scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
            larger = np.abs(centred[1][shuffle] @ centred[0] / scale) >= abs(rho) - 1e-12 if scale else None
            p_rho.append(np.nan if larger is None else stats.permutation_p(larger))
        # For two random sets of ``count`` heads out of n, the expected size of the intersection is count^2 / n.
        rows.append((f"{a} / {b}", shared, count**2 / len(free[0]), *p_shared, rho, *p_rho))
    columns = ["pair", "shared", "expected", "p", "p_in_layer", "spearman", "p_spearman", "p_spearman_in_layer"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=stats.holm(table["p_in_layer"].to_numpy()))


def _top(scores: ndarray, count: int) -> ndarray:
    """Return one weight per head: 1 for the ``count`` heads with the highest scores, 0 for the others.

    If heads tie for the last places, each of them gets the same fraction, so that the weights always sum to ``count``.
    """
    cut = np.sort(scores)[-count]
    above, tied = scores > cut, scores == cut
    return above + tied * (count - above.sum()) / tied.sum()


def condition_effects(
    conditions: Mapping[str, Condition],
    study: Study,
    haystacks: Sequence[Haystack],
    heads: Sequence[tuple[int, int]],
    *,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure accuracy, think length, entropy and retrieval of several conditions, and their differences from base.

    Args:
        conditions: Name -> condition; the first is base.
        study: Task, numbers of problems and samples, and seed; its test problems are used.
        haystacks: Problems whose prompts hide the facts needed for the answer, from the test split.
        heads: Heads whose joint effect the metric ``write`` measures, as pairs ``(layer, head)``. The metric is 0 if there are none.
        out: Directory to save rollouts in, from which a repeated call resumes; ``None`` saves nothing.

    Returns:
        One row per condition and metric. Columns: ``condition, metric``; ``mean, low, high``; ``difference, difference_low,
        difference_high`` (condition minus base, paired by problem). ``low`` and ``high`` are the ends of 95 % intervals. Metrics:

        * ``accuracy`` (0 to 1) and ``think_tokens``, on the test problems.
        * ``think_entropy, answer_entropy``: in nats per token, on the test problems.
        * ``retrieved``: share of haystacks answered correctly (0 to 1), with greedy decoding.
        * ``write``: how much ``heads`` together raise the logits of the hidden facts' tokens, at the steps that generate them, by attending
          to these facts. It is measured on the same responses in all conditions: base's greedy responses to the haystacks.
    """
    problems = study.load("test", next(iter(conditions.values())).lm)
    evaluate.check_held_out(conditions, _problems(conditions, study, haystacks), allow=study.allow_overlap)
    greedy = replace(study.sampling, n=1, temperature=0.0)
    questions, base_answers = [h.problem for h in haystacks], None
    values: dict[str, dict[str, ndarray]] = {}
    for name, condition in conditions.items():
        where = None if out is None else out / name.replace(" ", "-").replace(":", "")
        detailed = replace(study.sampling, details=True)
        rollouts = generate.rollouts(condition, problems, detailed, out=where and where / "study")
        answers = generate.rollouts(condition, questions, greedy, out=where and where / "haystacks")
        base_answers = base_answers or answers
        # Every condition reads base's answers, so that its heads are compared on the same text.
        with condition.active():
            measured = retrieval_heads.measure(condition.lm, needles.examples(haystacks, base_answers))
        table = phase_entropy.table(rollouts).groupby("problem_id", sort=False)
        means = table[["correct", "think_tokens", "think_entropy", "answer_entropy"]].mean().reindex([p.id for p in problems])
        # Sum over heads for each example (a needle in a response), then mean over the examples of each problem.
        write = measured.values["write"]
        together = torch.stack([torch.zeros_like(write[:, 0, 0]), *(write[:, i, j] for i, j in heads)]).sum(
            dim=0
        )  # 0 without heads
        wrote = pd.Series(together.numpy()).groupby(list(measured.ids)).mean()
        values[name] = {
            "accuracy": means.pop("correct").to_numpy(float),  # removes the column, so that the next line adds the others
            **{column: means[column].to_numpy(float) for column in means},
            "retrieved": np.array([r.correct for r in answers], float),
            "write": wrote.reindex([p.id for p in questions]).to_numpy(float),
        }
    return _paired(values, study.seed)


def _problems(conditions: Mapping[str, Condition], study: Study, haystacks: Sequence[Haystack]) -> list[Problem]:
    """Return all problems that the conditions are evaluated on: the study's test problems, and the haystacks."""
    return [*study.load("test", next(iter(conditions.values())).lm), *(h.problem for h in haystacks)]


def _paired(values: Mapping[str, Mapping[str, ndarray]], seed: int) -> pd.DataFrame:
    """Compute means and differences from base, with intervals, and return them as the table of ``condition_effects``.

    Args:
        values: Condition -> metric -> one value per problem. The first condition is base. A problem is left out if its value is NaN for
            the condition or for base.
        seed: Seed of the bootstrap.
    """
    base, rows = next(iter(values.values())), []
    for name, by_metric in values.items():
        for metric, per_problem in by_metric.items():
            present = ~(np.isnan(per_problem) | np.isnan(base[metric]))
            a, b = (v[present][None] for v in (per_problem, base[metric]))
            e, d = (stats.mean_effect(a, minus, seed=seed) for minus in (None, b))  # the mean, and the difference from base
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
    rollouts: Sequence[Rollout] | None = None,
    origin: Mapping[str, Any] | None = None,
    say: Say = lambda text: None,
    command: str = "",
) -> Atlas:
    """Score every head by several measures (*lenses*), compare them, and measure the effects of ThinkEdit's edit and of steering.

    A lens gives each head one number. The function ``lenses`` describes all of them.

    After a stop, call it again with the same arguments: finished rollouts are reused.

    Args:
        lm: Model whose heads are scored.
        study: Task, numbers of problems and samples, and seed.
        search: Settings of the prompts that hide a fact, on which retrieval is measured.
        directory: Directory to write to: ``heads.parquet``, ``atlas.json`` (tables with provenance), ``report.html``, and ``rollouts/``.
        rollouts: Rollouts of ``lm`` from the train split. The edit, the steering direction, and all lenses except those of retrieval are
            computed from them. ``None`` samples them.
        origin: ``task``, ``split`` and ``seed`` of ``rollouts``, for the provenance. Not used if ``rollouts`` is ``None``.
        say: Function that is called with one line of progress at a time.
        command: Command that makes the report again, to be shown in it.

    Raises:
        ImportError: TransformerLens is not installed. This is raised before anything is sampled.
        thinkedit.ClassTooSmallError: there are too few rollouts with short or with long thinking. If it is certain, nothing is sampled.
        evaluate.OverlapError: a problem of ``rollouts`` is also among the problems of the evaluation, and ``study.allow_overlap`` is
            False.
    """
    bridges.check_transformer_lens()
    out = store.writable(directory)
    about_rollouts = study.origin("train") if rollouts is None else dict(origin or {})
    rollouts = rollouts or extraction_rollouts(lm, study, out=out / "rollouts" / "train", say=say)
    settings = replace(DEMO, seed=study.seed)
    finding = find_heads(lm, rollouts, settings, OURS, origin=about_rollouts)
    conditions = edit.edit_conditions(lm, {OURS: finding}, replace(settings, draws=1))
    conditions |= edit.steering_conditions(lm, finding.plan.direction or finding.direction, settings)
    haystacks = search.haystacks(lm, "test", max_new_tokens=study.max_new_tokens)
    # Too few rollouts, and an overlap with the training problems, are refused by now, before the long part.
    overlap = evaluate.check_held_out(conditions, _problems(conditions, study, haystacks), allow=study.allow_overlap)
    measurement = retrieval.measure_retrieval(lm, search, out=out / "rollouts" / "haystacks", say=say)
    say(f"masking each of {len(lm.layout.all_heads)} heads, and detecting attention patterns")
    scores = lenses(lm, rollouts, measurement)
    count = max(2, round(0.1 * len(lm.layout.all_heads)))
    say("measuring the effects of ThinkEdit's edit and of steering")
    top = [h for h in scores[WRITE].ranked()[:count] if scores[WRITE].score[h] > 0]  # heads that raise the needle's logits
    tables = {
        "heads": head_table(scores),
        "overlaps": agreement(scores, count, seed=study.seed),
        "conditions": condition_effects(conditions, study, haystacks, top, out=out / "rollouts" / "conditions"),
    }
    store.save_table(tables["heads"], out / "heads.parquet")
    made_from = finding.plan.provenance.notes  # task, split and seed of the rollouts that the edit was made from
    about = {
        "study": study,
        "search": search,
        "top": count,
        "provenance": lm.provenance(study.seed),
        "made_from": made_from,
        "overlap": overlap,
    }
    store.write_json(about | {name: report.json_records(t) for name, t in tables.items()}, out / "atlas.json")
    same = max(overlap.values())  # number of test problems that the edit or direction was also made from
    held_out = f"NOT held out: {same} of these are also test problems here" if same else "none of them a test problem here"
    split = f"Short-thinking heads are computed from {origins.describe(made_from)}, {held_out}; conditions are evaluated on {study.problems} problems of {study.task} (test)."
    how = (
        f"{split} Retrieval is measured on {search.instances} haystacks (prompts that hide a fact) of {search.task}; the edit and steering are "
        "compared with random heads of the same layers and with random directions, one draw of each."
    )
    page = _page(lm, scores, tables, count)
    pages.write(replace(page, made=how, command=command), out / "report.html")
    return Atlas(scores, tables)


def head_table(scores: Mapping[str, HeadScores]) -> pd.DataFrame:
    """Return a table with one row per head, and one column of scores per lens (a measure that gives each head one number).

    Two further columns name the head: ``head`` ("layer.head") and ``layer``. Rows are sorted by the first lens, highest score first.

    Args:
        scores: Name of a lens -> scores of all heads.
    """
    order = next(iter(scores.values())).ranked()
    rows = [(f"{i}.{j}", i, *(float(s.score[i, j]) for s in scores.values())) for i, j in order]
    return pd.DataFrame(rows, columns=["head", "layer", *scores])


def _page(lm: LM, scores: Mapping[str, HeadScores], tables: Mapping[str, pd.DataFrame], count: int) -> Page:
    """Return the page of the atlas, without how it was made. ``count`` is the number of top heads that are compared per score."""
    sections = [
        Section(
            "Scores of every head",
            "Each row is scaled to its largest absolute value. The patterns previous token and duplicate token are measured in the first "
            f"{bridges.assumed_longest:,} tokens of a rollout.",
            (figures.lenses(scores),),
        ),
        Section(
            "Do the scores find the same heads?",
            f"Number of heads that are in the top {count} of both scores. p: probability of at least as many if heads are permuted within their layers. "
            "ρ: Spearman's rank correlation over all heads.",
            (figures.agreement(tables["overlaps"]),),
        ),
        Section(
            "Effects of the edit and of steering",
            "Condition minus base, paired by problem; if an interval contains zero, no effect is detectable at this sample size.",
            tuple(figures.differences(tables["conditions"], m) for m in ("retrieved", "write", "think_entropy", "answer_entropy")),
        ),
    ]
    top = tables["heads"].drop(columns="layer").set_index("head").head(2 * count).round(3)
    caption = "One row per head; heads that write most towards short thinking first."
    verdict = verdicts.of_atlas(tables["overlaps"], tables["conditions"], count)
    return Page(title=f"Heads of {lm.name}", verdict=verdict, main=sections[0], table=top, caption=caption, sections=sections[1:])
