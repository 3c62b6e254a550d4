"""Entropy measurements of PEAR: phase entropy aware reward (Huang, Lu, Zhang; ICLR 2026), arXiv:2510.08026. Its reward is
``rewards.pear``.

Equations (t: index over the T tokens of a response; k: position of the closing think tag; z: the logits that predict token t):

    H_t     = -sum_v p_v log p_v,   p = softmax(z / temperature), v over the full vocabulary
    H_think = 1/(k-1) sum_{t<k} H_t        H_answer = 1/(T-k) sum_{t>k} H_t
    P       = max(0, H_think - alpha H_answer)

The closing tag belongs to neither phase. All tokens before it, an opening tag included, are thinking. The end-of-sequence token is
part of the answer. If thinking is never closed, k = T and there is no answer; in P, H_answer then counts as 0.

Entropy filtering, the paper's second experiment, drops the think tokens of highest entropy and lets the model answer from the rest.

Deviations: the mean over an empty phase is ``None`` (NaN in tables), never 0. A closing tag of several tokens is left out entirely.
Correlations with length have intervals and are also computed within a problem; the paper shows pooled points. Entropy filtering here
drops think tokens only, then closes the span and lets the model answer; the paper does not say how it gets an answer. Not in the paper:
the two controls of filtering (tokens dropped at random, and tokens cut off the end), entropy by step, and entropy by position. *Step
entropy* is the sum over a step's tokens, as in arXiv:2508.03346.

Units and signs: entropies in nats; positions and lengths in tokens. Every entropy depends on a temperature: an argument of
``toolkit.entropies.with_entropies``, or the sampling temperature if sampling recorded the entropy.

Cost: sampling with ``details`` records entropies without an extra pass. ``with_entropies`` is one teacher-forced pass with a KV
cache, in chunks of at most ``CHUNK`` logits. Everything else is arithmetic, except ``filtering_experiment``, which samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy import ndarray

from toolkit import stats
from toolkit.entropies import entropies_of
from toolkit.generate import Sampling, continuations
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.steps import Step
from toolkit.types import Problem, Rollout

PUBLISHED_ALPHA = 1.0  # weight of the answer's entropy: paper, main runs
PUBLISHED_KEEPS = (1.0, 0.8, 0.6, 0.4, 0.2)  # shares of tokens kept: paper, Qwen3-4B (100 to 20 %)
assumed_bins = 20  # bins of relative position: ours
assumed_min_problems = 5  # smallest number of problems whose responses have a step, for the mean of this step: ours
assumed_answering = Sampling(temperature=0.0, max_new_tokens=256)  # greedy, long enough for an answer: ours

Drop = Literal["entropy", "random", "truncate"]
DROPS: tuple[Drop, ...] = ("entropy", "random", "truncate")


# --- phases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseMeans:
    """Mean entropy (nats per token) of a response before and after the closing think tag; ``None`` for a phase without tokens.

    >>> PhaseMeans(think=0.5, answer=0.25).penalty()
    0.25
    """

    think: float | None
    answer: float | None

    def penalty(self, alpha: float = PUBLISHED_ALPHA) -> float:
        """Return P = max(0, H_think - alpha H_answer), by which PEAR lowers the reward; a missing phase counts as 0."""
        return max(0.0, (self.think or 0.0) - alpha * (self.answer or 0.0))


def phase_means(rollout: Rollout) -> PhaseMeans:
    """Return the mean entropy of one rollout before and after its closing think tag.

    Raises:
        NoEntropiesError: The rollout carries no entropies.
    """
    h, think, answer = entropies_of(rollout), rollout.think, rollout.answer
    if think is None:  # an answer without thinking
        return PhaseMeans(None, _mean(h))
    if answer is None or answer.start < think.stop:  # never closed, or no tag separates the phases
        return PhaseMeans(_mean(h), None)
    return PhaseMeans(_mean(h[: think.stop - rollout.prompt_len]), _mean(h[answer.start - rollout.prompt_len :]))


def _mean(values: ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def table(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Return one row per rollout, for ``correlations`` and for your own tables.

    Columns: ``problem_id, sample, correct``; ``closed`` (whether the think span was closed); ``think_tokens, response_tokens``; and the
    mean entropies ``entropy`` (whole response), ``think_entropy, answer_entropy`` in nats per token (NaN for a phase without tokens).

    Raises:
        NoEntropiesError: A rollout carries no entropies.
    """
    rows = []
    for r in rollouts:
        h, means = entropies_of(r), phase_means(r)
        facts = {
            name: getattr(r, name) for name in ("problem_id", "sample", "correct", "closed", "think_tokens", "response_tokens")
        }
        phases = {"think_entropy": means.think, "answer_entropy": means.answer}
        rows.append(facts | {"entropy": float(h.mean())} | {k: np.nan if m is None else m for k, m in phases.items()})
    return pd.DataFrame(rows)


def by_phase(rollouts: Sequence[Rollout], *, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy (nats per token) of thinking, of the answer, and of their difference, one row each.

    Columns: ``phase`` (``think``, ``answer`` or ``think - answer``), ``mean, low, high`` (95 % interval over problems), ``rollouts`` (their
    number). The difference is over the rollouts that have both phases. A phase that no rollout has is left out.
    """
    rows = table(rollouts)
    rows["think - answer"] = rows["think_entropy"] - rows["answer_entropy"]
    names = {"think": "think_entropy", "answer": "answer_entropy", "think - answer": "think - answer"}
    parts = {phase: rows[[column, "problem_id"]].dropna() for phase, column in names.items()}
    means = [
        (phase, *_estimate(part.iloc[:, 0], part["problem_id"], seed), len(part)) for phase, part in parts.items() if len(part)
    ]
    return pd.DataFrame(means, columns=["phase", "mean", "low", "high", "rollouts"])


def _estimate(values: pd.Series, problems: pd.Series | pd.Index, seed: int) -> tuple[float, float, float]:
    e = stats.over_problems(values.to_numpy(float), problems.to_numpy(), seed=seed)
    return e.mean, e.low, e.high


# --- positions and steps -------------------------------------------------------------------------------------


def by_position(rollouts: Sequence[Rollout], *, bins: int = assumed_bins, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy (nats per token) by relative position in the think span, tags excluded (not in the paper).

    Columns: ``position`` (centre of the bin, 0 to 1), ``mean, low, high`` (95 % interval over problems), ``rollouts`` (their number). A
    token counts in every bin that its share of the span overlaps, so no bin is empty, even if there are fewer tokens than bins.

    Args:
        bins: Number of bins of equal width.

    Raises:
        ValueError: ``bins`` is below 1.
        NoThinkTagsError: No rollout has a think token.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: need at least 1.")
    parts = []
    for r in rollouts:
        if h := _think_entropies(r):
            # Differences of the interpolated cumulative sum: a bin gets a fraction of each token that it overlaps.
            edges = np.linspace(0, len(h), bins + 1)
            total = np.interp(edges, range(len(h) + 1), np.cumsum([0.0, *h]))
            parts.append(pd.DataFrame({"bin": range(bins), "entropy": np.diff(total) / np.diff(edges), "problem_id": r.problem_id}))
    return _binned(parts, "position", lambda i: (i + 0.5) / bins, len(rollouts), seed)


def _think_entropies(r: Rollout) -> list[float]:
    """Return the entropies of the think tokens; empty without a think span."""
    if r.think is None:
        return []
    return entropies_of(r)[r.think.start - r.prompt_len : r.think.stop - r.prompt_len].tolist()


def _binned(parts: Sequence[pd.DataFrame], name: str, centre: Callable[[int], float], n: int, seed: int) -> pd.DataFrame:
    """Return one row per bin: its centre, the mean entropy with its interval, and the number of rollouts."""
    if not parts:
        raise NoThinkTagsError(f"None of the {n} rollouts has a think token: load the model with tags=ThinkTags(...).")
    groups = pd.concat(parts).groupby("bin")
    rows = [(centre(i), *_estimate(part["entropy"], part["problem_id"], seed), len(part)) for i, part in groups]
    return pd.DataFrame(rows, columns=[name, "mean", "low", "high", "rollouts"])


StepsOf = Callable[[Rollout], Sequence[Step]]
"""Function from a rollout to its steps, such as ``lambda r: steps.think_steps(lm, r, steps.lines)``."""


def step_entropy(rollouts: Sequence[Rollout], steps_of: StepsOf) -> pd.DataFrame:
    """Return one row per step of thinking that has at least one token.

    Columns: ``problem_id, sample``; ``step`` (index in the rollout, from 0), ``of`` (number of steps in the rollout); ``tokens`` (their
    number); ``entropy`` (nats, sum over the step's tokens), ``mean`` (nats per token); ``text``.

    Args:
        steps_of: Function that splits a rollout's thinking into steps.

    Raises:
        NoEntropiesError: A rollout carries no entropies.
    """
    rows = []
    for r in rollouts:
        h, steps = entropies_of(r), [s for s in steps_of(r) if len(s.span)]
        for i, step in enumerate(steps):
            part = h[step.span.start - r.prompt_len : step.span.stop - r.prompt_len]
            rows.append((r.problem_id, r.sample, i, len(steps), len(part), float(part.sum()), float(part.mean()), step.text))
    return pd.DataFrame(rows, columns=["problem_id", "sample", "step", "of", "tokens", "entropy", "mean", "text"])


def by_step(rollouts: Sequence[Rollout], steps_of: StepsOf, *, at_least: int = assumed_min_problems, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy (nats per token) of the first, second, ... step of thinking, one row per step (not in the paper).

    Columns: ``step`` (from 1), ``mean, low, high`` (95 % interval over problems), ``rollouts`` (number of rollouts that have this step).
    Later steps exist only in longer thinking, so their means are over fewer rollouts.

    Args:
        steps_of: Function that splits a rollout's thinking into steps.
        at_least: Smallest number of problems: a step that occurs in responses to fewer problems is left out.

    Raises:
        NoThinkTagsError: No rollout has a step.
        ValueError: No step occurs in responses to ``at_least`` problems.
    """
    rows = step_entropy(rollouts, steps_of)
    part = pd.DataFrame({"bin": rows["step"], "entropy": rows["mean"], "problem_id": rows["problem_id"]})
    problems = part.groupby("bin")["problem_id"].transform("nunique")
    if len(part) and problems.max() < at_least:
        raise ValueError(
            f"No step is reached in responses to {at_least} problems, only to {problems.max()}: lower at_least, or sample more problems."
        )
    return _binned([part[problems >= at_least]] if len(part) else [], "step", lambda i: i + 1, len(rollouts), seed)


def by_mark(rows: pd.DataFrame, marked: Sequence[bool] | ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Return the entropy (nats per token) of marked steps, of other steps of the same responses, and the difference (not in the paper).

    Columns: ``steps`` (``marked``, ``others`` or the paired difference ``marked - others``), ``mean, low, high`` (95 % interval over
    problems), ``rollouts`` (their number). All steps have equal weight, whatever their length. Only responses with both kinds of steps
    count; if there are none, the table is empty.

    Args:
        rows: From ``step_entropy``.
        marked: One flag per row, for example whether the step re-checks an earlier one.
        seed: Seed of the bootstrap.
    """
    kinds = rows.assign(kind=np.where(np.asarray(marked, bool), "marked", "others"))
    wide = kinds.pivot_table(index=["problem_id", "sample"], columns="kind", values="mean").reindex(columns=["marked", "others"])
    wide = wide.dropna().assign(**{"marked - others": lambda w: w["marked"] - w["others"]})
    problems = wide.index.get_level_values("problem_id")
    means = [(str(name), *_estimate(wide[name], problems, seed), len(wide)) for name in wide if len(wide)]
    return pd.DataFrame(means, columns=["steps", "mean", "low", "high", "rollouts"])


def correlations(
    rows: pd.DataFrame, x: str = "entropy", y: str = "response_tokens", *, times: int = stats.RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Return the Pearson and Spearman correlations of two columns of ``table``: by default, of entropy and response length.

    Columns: ``scope`` (``pooled`` over all rollouts, or ``within``: each problem's means are subtracted first, so that difficulty cancels);
    ``kind`` (``pearson`` or ``spearman``); ``r``; ``low, high`` (95 % interval over problems); ``problems`` and ``rollouts`` (their
    numbers). Rows in which one of the two values is NaN are left out.

    Args:
        rows: From ``table``.
        x: One column of ``rows``.
        y: The other column.
        times: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: No problem has two rollouts, which the scope ``within`` needs.
    """
    complete = rows.dropna(subset=[x, y])
    a, b, problems = complete[x].to_numpy(float), complete[y].to_numpy(float), complete["problem_id"].to_numpy()
    estimates = []
    for scope, kind in product(("pooled", "within"), ("pearson", "spearman")):
        e = stats.correlation(a, b, problems, kind=kind, within=scope == "within", times=times, seed=seed)
        estimates.append((scope, kind, e.mean, e.low, e.high, len(set(problems)), len(complete)))
    return pd.DataFrame(estimates, columns=["scope", "kind", "r", "low", "high", "problems", "rollouts"])


# --- entropy filtering ---------------------------------------------------------------------------------------


def filtered_prompt(rollout: Rollout, keep: float, drop: Drop = "entropy", *, seed: int = 0) -> list[int]:
    """Return a prefix for the model to continue: token ids of the prompt, of the kept think tokens in order, and of the closing tag.

    ``round(keep * n)`` of the n think tokens are kept.

    Args:
        rollout: Response with a closed think span.
        keep: Share of think tokens to keep, 0 to 1.
        drop: Which tokens to drop. ``"entropy"``: those of highest entropy (as published; of tokens with equal entropy, the earlier one is
            kept). ``"random"``: random tokens, seeded by ``seed``, problem and sample. ``"truncate"``: the last tokens.
        seed: Seed of ``"random"``.

    Raises:
        NoThinkTagsError: The rollout has no think span, or did not close it with a tag.
        NoEntropiesError: ``drop="entropy"``, and the rollout carries no entropies.
        ValueError: ``keep`` or ``drop`` is invalid.
    """
    if not 0 <= keep <= 1 or drop not in DROPS:
        raise ValueError(f"keep={keep}, drop={drop!r}: need a share 0 <= keep <= 1 and one of {', '.join(DROPS)}.")
    think, answer = rollout.think, rollout.answer
    if think is None or answer is None or answer.start <= think.stop:
        name = f"Rollout {rollout.sample} of problem {rollout.problem_id!r}"
        raise NoThinkTagsError(
            f"{name} has no think span closed by a tag, so it cannot be filtered: select rollouts with filterable()."
        )
    n = len(think)
    kept = round(keep * n)
    match drop:
        case "entropy":
            chosen = np.argsort(_think_entropies(rollout), kind="stable")[:kept].tolist()
        case "random":
            chosen = random.Random(f"{seed}-{rollout.problem_id}-{rollout.sample}").sample(range(n), kept)
        case "truncate":
            chosen = list(range(kept))
    ids = list(rollout.token_ids)
    return [*ids[: think.start], *(ids[think.start + i] for i in sorted(chosen)), *ids[think.stop : answer.start]]


def filterable(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts with a non-empty think span that is closed by a tag."""
    return [r for r in rollouts if r.think_tokens and r.think and r.answer and r.answer.start > r.think.stop]


def filtering_experiment(
    target: LM | Condition,
    rollouts: Sequence[Rollout],
    problems: Sequence[Problem],
    *,
    keeps: Sequence[float] = PUBLISHED_KEEPS,
    sampling: Sampling = assumed_answering,
    seed: int = 0,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Drop think tokens in three ways and for each share in ``keeps``, let the model answer, and return one row per answer.

    Columns: ``drop`` (which tokens were dropped, see ``filtered_prompt``), ``keep`` (share of think tokens kept), ``problem_id, sample``,
    ``kept_tokens`` (number of think tokens kept), ``correct``, ``answer_tokens`` (length of the answer). ``filtering_summary`` summarises
    the table.

    Args:
        target: Model, or model with interventions, that answers.
        rollouts: Responses with entropies; responses without a closed think span are left out.
        problems: The problems of the rollouts.
        keeps: Shares of think tokens to keep.
        sampling: How the answers are sampled.
        seed: Seed of the random control.
        out: Folder in which the answers are stored; a rerun resumes from them.

    Raises:
        NoThinkTagsError: No rollout has a think span that is closed by a tag.
    """
    by_id, usable = {p.id: p for p in problems}, filterable(rollouts)
    if not usable:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts has a think span closed by a tag, so nothing can be filtered: raise max_new_tokens, "
            "or load the model with tags=ThinkTags(...)."
        )
    plan = [(drop, float(keep), r) for drop, keep, r in product(DROPS, keeps, usable)]
    prompts = [(by_id[r.problem_id], filtered_prompt(r, keep, drop, seed=seed)) for drop, keep, r in plan]
    rows = []
    for i, a in enumerate(continuations(target, prompts, sampling, out=out)):
        drop, keep, r = plan[i // sampling.n]
        rows.append((drop, keep, r.problem_id, r.sample, round(keep * r.think_tokens), a.correct, a.response_tokens))
    return pd.DataFrame(rows, columns=["drop", "keep", "problem_id", "sample", "kept_tokens", "correct", "answer_tokens"])


def filtering_summary(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the accuracy for each way of dropping think tokens and each share kept, one row each.

    Columns: ``drop`` (which tokens were dropped), ``keep`` (share kept), ``kept_tokens, answer_tokens`` (means), ``accuracy, low, high``
    (95 % interval over problems). For paired comparisons use ``filtering_effects``.

    Args:
        rows: From ``filtering_experiment``.
        seed: Seed of the bootstrap.
    """
    summary = []
    for (drop, keep), part in rows.groupby(["drop", "keep"]):
        sizes = part[["kept_tokens", "answer_tokens"]].mean()
        summary.append((drop, keep, *sizes, *_estimate(part["correct"], part["problem_id"], seed)))
    return pd.DataFrame(summary, columns=["drop", "keep", "kept_tokens", "answer_tokens", "accuracy", "low", "high"])


def filtering_effects(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the accuracy after dropping the tokens of highest entropy minus the accuracy of each control, paired by response.

    Columns: ``keep`` (share of think tokens kept), ``against`` (the control), ``difference, low, high`` (95 % interval over problems). The
    controls are: as many tokens dropped at random (``random``), as many tokens cut off the end (``truncate``), and the whole thinking
    (``whole``, if the share 1 was run). A negative difference means that the control answers better.

    Args:
        rows: From ``filtering_experiment``.
        seed: Seed of the bootstrap.
    """
    graded = rows.assign(correct=rows["correct"].astype(float))
    wide = graded.pivot_table(index=["problem_id", "sample"], columns=["drop", "keep"], values="correct")
    problems, effects = wide.index.get_level_values("problem_id"), []
    for keep in sorted({float(k) for k in rows["keep"]} - {1.0}, reverse=True):
        for against, cell in {"random": ("random", keep), "truncate": ("truncate", keep), "whole": ("entropy", 1.0)}.items():
            if cell in wide:
                effects.append((keep, against, *_estimate(wide["entropy", keep] - wide[cell], problems, seed)))
    return pd.DataFrame(effects, columns=["keep", "against", "difference", "low", "high"])
