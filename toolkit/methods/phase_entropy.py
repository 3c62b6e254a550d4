"""Entropy measurements of PEAR: phase entropy aware reward (Huang, Lu, Zhang; ICLR 2026), arXiv:2510.08026.

PEAR is a reward for RL. It penalises responses whose thinking has a high entropy, by the penalty P below. This module measures the
entropies of thinking and of the answer. The reward itself is ``rewards.pear``.

Equations (t = 1 .. T: index of a token of the response; k: index of the closing think tag; z: the logits that predict token t; alpha:
weight of the answer, 1 as published):

    H_t     = -sum_v p_v log p_v,   p = softmax(z / temperature), v over the full vocabulary
    H_think = 1/(k-1) sum_{t<k} H_t        H_answer = 1/(T-k) sum_{t>k} H_t
    P       = max(0, H_think - alpha H_answer)

The two *phases* are thinking and answer. The closing tag belongs to neither. All response tokens before it, an opening tag included, are
thinking. The end-of-sequence token is part of the answer. If thinking is never closed, all tokens are thinking and there is no answer;
H_answer then counts as 0 in P. If thinking is never opened, all tokens are the answer.

*Entropy filtering* is the paper's second experiment: the think tokens of highest entropy are dropped from a response, and the model answers
from the prompt and the think tokens that are left.

Deviations:

* The mean over an empty phase is ``None`` (NaN in tables), not 0. If the closing tag has several tokens, all of them are left out.
* Correlations with length have intervals, and are also computed within problems. The paper only plots all problems together.
* All intervals are 95 % bootstrap intervals. *Over problems* means that whole problems are resampled, each with all its rollouts. Means are
  taken over the rollouts of each problem first, then over problems.
* The paper does not say how the model answers after entropy filtering. Here the kept think tokens are followed by the closing tag, and the
  model continues from there.
* Not in the paper: the two controls of entropy filtering (dropping random tokens, and cutting tokens off the end), entropy by step, and
  entropy by position. *Step entropy* is the sum over the tokens of a step, as in arXiv:2508.03346.

Units and signs: entropies in nats; lengths in tokens. Every entropy depends on the temperature of the softmax. For entropies that were
recorded while sampling, that is the sampling temperature. ``toolkit.entropies.with_entropies``, which computes the entropies of finished
responses, has an argument for it.

Cost: ``Sampling(details=True)`` records entropies while sampling, without an extra pass. ``with_entropies`` needs one teacher-forced pass.
``filtering_experiment`` samples answers. Everything else is arithmetic.
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
from toolkit.types import Problem, Rollout, problems_by_id

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
    """Mean entropies (nats per token) of a response's thinking and of its answer, from ``phase_means``.

    Attributes:
        think: Mean over the tokens before the closing think tag; ``None`` if there are no such tokens.
        answer: Mean over the tokens after the closing think tag; ``None`` if there are no such tokens.

    >>> PhaseMeans(think=0.5, answer=0.25).penalty()
    0.25
    """

    think: float | None
    answer: float | None

    def penalty(self, alpha: float = PUBLISHED_ALPHA) -> float:
        """Return the penalty max(0, think - alpha * answer), in nats per token, on which the reward PEAR (arXiv:2510.08026) is based.

        ``think`` and ``answer`` are the mean entropies of the two phases. One that is ``None`` (no such tokens) counts as 0. ``alpha`` is
        the weight of the answer.
        """
        return max(0.0, (self.think or 0.0) - alpha * (self.answer or 0.0))


def phase_means(rollout: Rollout) -> PhaseMeans:
    """Return the mean entropies (nats per token) of one rollout before and after its closing think tag.

    Only response tokens count: a think span that begins in the prompt is counted from the response's first token. If thinking is never
    closed, all tokens are thinking. If it is never opened, all tokens are the answer. Tokens of tool results never count.

    Raises:
        NoEntropiesError: The rollout has no recorded entropies.
    """
    h, think, answer, own = entropies_of(rollout), rollout.think, rollout.answer, np.array(rollout.written, bool)
    if think is None:  # an answer without thinking
        return PhaseMeans(None, _mean(h[own]))
    if answer is None or answer.start < think.stop:  # never closed, or no tag separates the phases
        return PhaseMeans(_mean(h[own]), None)
    # 0 at least: a negative index would count from the end of the response.
    closed, answered = (max(0, at - rollout.prompt_len) for at in (think.stop, answer.start))
    return PhaseMeans(_mean(h[:closed][own[:closed]]), _mean(h[answered:][own[answered:]]))


def _mean(values: ndarray) -> float | None:
    """Return the mean, or ``None`` if there are no values."""
    return float(values.mean()) if len(values) else None


def table(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Return a table of entropies and lengths, with one row per rollout. ``correlations`` correlates its columns.

    Columns: ``problem_id, sample, correct``; ``closed`` (True if the response has an answer span, because thinking was closed or was never
    opened); ``think_tokens, response_tokens`` (numbers of tokens); ``entropy, think_entropy, answer_entropy`` (means over the whole
    response, over its thinking and over its answer, nats per token; NaN for a phase without tokens). Tokens of tool results count in none of
    these means.

    Raises:
        NoEntropiesError: A rollout has no recorded entropies.
    """
    rows = []
    for r in rollouts:
        h, means = entropies_of(r), phase_means(r)
        facts = {
            name: getattr(r, name) for name in ("problem_id", "sample", "correct", "closed", "think_tokens", "response_tokens")
        }
        phases = {"entropy": _mean(h[np.array(r.written, bool)]), "think_entropy": means.think, "answer_entropy": means.answer}
        rows.append(facts | {k: np.nan if m is None else m for k, m in phases.items()})
    return pd.DataFrame(rows)


def by_phase(rollouts: Sequence[Rollout], *, seed: int = 0) -> pd.DataFrame:
    """Return a table of mean entropies (nats per token), with three rows: thinking, the answer, and thinking minus answer.

    Columns: ``phase`` (``think``, ``answer`` or ``think - answer``); ``mean, low, high`` (95 % interval over problems); ``rollouts``
    (number of rollouts in the row).

    The row ``think - answer`` is the mean of the differences within each rollout that has both phases. A row that no rollout contributes to
    is left out.

    Args:
        rollouts: Rollouts with entropies.
        seed: Seed of the bootstrap.

    Raises:
        NoEntropiesError: A rollout has no recorded entropies.
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
    """Return ``(mean, low, high)`` of one value per rollout, with a 95 % interval over problems."""
    e = stats.over_problems(values.to_numpy(float), problems.to_numpy(), seed=seed)
    return e.mean, e.low, e.high


# --- positions and steps -------------------------------------------------------------------------------------


def by_position(rollouts: Sequence[Rollout], *, bins: int = assumed_bins, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy (nats per token) by relative position in the think span, tags excluded (not in arXiv:2510.08026).

    The table has one row per bin of relative position. Columns: ``position`` (centre of the bin, 0 to 1); ``mean, low, high`` (95 %
    interval over problems); ``rollouts`` (number of rollouts).

    In a span of n tokens, token i = 0 .. n-1 covers the relative positions from i/n to (i+1)/n. A token counts in each bin in proportion to
    the part of this range that lies in the bin. So no bin is empty, even if a span has fewer tokens than there are bins.

    Args:
        rollouts: Rollouts with entropies; those without think tokens are left out.
        bins: Number of bins of equal width.
        seed: Seed of the bootstrap.

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
    """Return the entropies (nats) of the think tokens, tags and tool results excluded; an empty list if there is no think span."""
    if r.think is None:
        return []
    inside = slice(r.think.start - r.prompt_len, r.think.stop - r.prompt_len)
    return entropies_of(r)[inside][np.array(r.written, bool)[inside]].tolist()


def _binned(parts: Sequence[pd.DataFrame], name: str, centre: Callable[[int], float], n: int, seed: int) -> pd.DataFrame:
    """Return mean entropies per bin of thinking, such as a range of relative positions or a step number.

    The table has one row per bin: its centre, its mean entropy with a 95 % interval over problems (columns ``mean, low, high``), and its
    number of ``rollouts``.

    Args:
        parts: Tables with one row per rollout and bin. Columns: ``bin`` (index of the bin), ``entropy``, ``problem_id``.
        name: Name of the column for the centre.
        centre: Function from the index of a bin to its centre.
        n: Number of rollouts, used only in the error message.
        seed: Seed of the bootstrap.

    Raises:
        NoThinkTagsError: ``parts`` is empty.
    """
    if not parts:
        raise NoThinkTagsError(f"None of the {n} rollouts has a think token: load the model with tags=ThinkTags(...).")
    groups = pd.concat(parts).groupby("bin")
    rows = [(centre(i), *_estimate(part["entropy"], part["problem_id"], seed), len(part)) for i, part in groups]
    return pd.DataFrame(rows, columns=[name, "mean", "low", "high", "rollouts"])


StepsOf = Callable[[Rollout], Sequence[Step]]
"""Function from a rollout to its steps, such as ``lambda r: steps.think_steps(lm, r, steps.lines)``."""


def step_entropy(rollouts: Sequence[Rollout], steps_of: StepsOf) -> pd.DataFrame:
    """Return a table of the entropy of each step of thinking, with one row per step that has at least one token of the model.

    Columns: ``problem_id, sample``; ``step`` (index of the step in the rollout, from 0); ``of`` (number of steps in the rollout);
    ``tokens`` (number of tokens in the step); ``entropy`` (sum over the tokens of the step, nats); ``mean`` (mean over its tokens, nats per
    token); ``text`` (text of the step). Tokens of tool results count in none of them, and steps without other tokens not in ``step`` and
    ``of``.

    Args:
        rollouts: Rollouts with entropies.
        steps_of: Function that splits a rollout's thinking into steps.

    Raises:
        NoEntropiesError: A rollout has no recorded entropies.
    """
    rows = []
    for r in rollouts:
        h, own = entropies_of(r), np.array(r.written, bool)
        places = [(s, slice(s.span.start - r.prompt_len, s.span.stop - r.prompt_len)) for s in steps_of(r)]
        parts = [(step, part) for step, place in places if len(part := h[place][own[place]])]
        for i, (step, part) in enumerate(parts):
            rows.append((r.problem_id, r.sample, i, len(parts), len(part), float(part.sum()), float(part.mean()), step.text))
    return pd.DataFrame(rows, columns=["problem_id", "sample", "step", "of", "tokens", "entropy", "mean", "text"])


def by_step(rollouts: Sequence[Rollout], steps_of: StepsOf, *, at_least: int = assumed_min_problems, seed: int = 0) -> pd.DataFrame:
    """Return the mean entropy (nats per token) of the first, second, ... step of thinking, with one row per step number.

    The paper on PEAR does not have this measurement. Columns: ``step`` (step number, from 1; in ``step_entropy``, from 0); ``mean, low,
    high`` (95 % interval over problems); ``rollouts`` (number of rollouts that have this step). Later steps exist only in longer thinking,
    so their means are over fewer rollouts.

    Args:
        rollouts: Rollouts with entropies.
        steps_of: Function that splits a rollout's thinking into steps.
        at_least: Smallest number of problems per row. A step number gets a row only if rollouts of at least this many problems have that
            step.
        seed: Seed of the bootstrap.

    Raises:
        NoThinkTagsError: No rollout has a step.
        ValueError: No step number gets a row: each occurs in the rollouts of fewer than ``at_least`` problems.
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
    """Compare the entropy of the steps that the caller marks with that of the other steps of the same responses.

    The paper on PEAR does not have this measurement. Return a table of means in nats per token, with three rows: ``marked``, ``others`` and
    the difference within each response, ``marked - others``. Columns: ``steps`` (name of the row); ``mean, low, high`` (95 % interval over
    problems); ``rollouts`` (number of rollouts).

    Within a response, all marked steps have equal weight, whatever their length, and so do all others. Only responses with both marked and
    other steps count. If there are none, the table is empty.

    Args:
        rows: One row per step, from ``step_entropy``.
        marked: One flag per row of ``rows``: True to mark the step, for example because it re-checks an earlier one.
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
    """Return a table of the correlations of two columns of ``rows``: by default, of mean entropy and response length.

    The table has four rows: two scopes, each with the correlations ``pearson`` and ``spearman``. The scope ``pooled`` uses all rollouts. In
    the scope ``within``, the means of the rollout's problem are subtracted from both values first, so that difficulty cancels. Problems
    with a single rollout are left out there.

    Columns: ``scope``; ``kind`` (``pearson`` or ``spearman``); ``r`` (the correlation); ``low, high`` (95 % interval over problems);
    ``problems, rollouts`` (how many the scope ``pooled`` uses; all four rows have the same numbers). A rollout in which one of the two
    values is NaN is left out of both scopes.

    Args:
        rows: One row per rollout, from the function ``phase_entropy.table``.
        x: Name of one of the two columns.
        y: Name of the other.
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
    """Return token ids after which the model can answer: prompt, opening tag, the kept think tokens in their order, and closing tag.

    ``round(keep * n)`` of the n think tokens are kept.

    Args:
        rollout: Response with a closed think span.
        keep: Share of think tokens to keep, 0 to 1.
        drop: Which think tokens to drop. ``"entropy"``: those of highest entropy, as published; of tokens with equal entropy, the later
            one is dropped first. ``"random"``: random tokens. ``"truncate"``: the last tokens.
        seed: Seed for ``"random"``, combined with the problem and the sample of the rollout.

    Raises:
        NoThinkTagsError: The rollout has no think span, or none that a tag closes.
        NoEntropiesError: ``drop="entropy"``, and the rollout has no recorded entropies.
        ValueError: ``keep`` is not from 0 to 1, or ``drop`` is unknown.
    """
    if not 0 <= keep <= 1 or drop not in DROPS:
        raise ValueError(f"keep={keep}, drop={drop!r}: need a share 0 <= keep <= 1 and one of {', '.join(DROPS)}.")
    think, answer = rollout.think, rollout.answer
    if think is None or answer is None or answer.start <= think.stop:
        name = f"Rollout {rollout.sample} of problem {rollout.problem_id!r}"
        raise NoThinkTagsError(
            f"{name} has no think span closed by a tag, so it cannot be filtered: select rollouts with filterable()."
        )
    places = [i for i in range(think.start, think.stop) if rollout.written[i - rollout.prompt_len]]  # tool results are dropped
    n = len(places)
    kept = round(keep * n)
    match drop:
        case "entropy":
            # Lowest entropies first; the sort is stable, so of equal ones the earlier token is kept.
            chosen = np.argsort(_think_entropies(rollout), kind="stable")[:kept].tolist()
        case "random":
            chosen = random.Random(f"{seed}-{rollout.problem_id}-{rollout.sample}").sample(range(n), kept)
        case "truncate":
            chosen = list(range(kept))
    ids = list(rollout.token_ids)
    return [*ids[: think.start], *(ids[places[i]] for i in sorted(chosen)), *ids[think.stop : answer.start]]


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
    """Drop think tokens of each response, let the model answer from the rest, and return a table of the answers (entropy filtering).

    The dropped tokens are chosen in three ways: those of highest entropy, random ones, or the last ones. Each response is used once for
    each way and each share in ``keeps``.

    The table has one row per answer. Columns: ``drop`` (which tokens were dropped: ``entropy``, ``random`` or ``truncate``, see
    ``filtered_prompt``); ``keep`` (share of think tokens kept); ``problem_id, sample`` (of the original response); ``kept_tokens`` (number
    of think tokens kept); ``correct`` (grade of the new answer); ``answer_tokens`` (its length). ``filtering_summary`` and
    ``filtering_effects`` evaluate the table.

    Args:
        target: Model, or model with interventions, that answers.
        rollouts: Responses with entropies. Only those that ``filterable`` returns are used: a tag closes their non-empty think span.
        problems: Problems, which must include the problem of every response that is used.
        keeps: Shares of think tokens to keep, 0 to 1 each.
        sampling: How the answers are sampled; the default is greedy.
        seed: Seed of the random choice of tokens.
        out: Folder for the finished answers; the same call resumes from them after a stop. ``None`` stores nothing.

    Raises:
        NoThinkTagsError: None of the responses can be used.
        KeyError: The problem of a response that is used is not among ``problems``.
    """
    usable = filterable(rollouts)
    if not usable:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts has a think span closed by a tag, so nothing can be filtered: raise max_new_tokens, "
            "or load the model with tags=ThinkTags(...)."
        )
    by_id = problems_by_id(problems, usable)
    plan = [(drop, float(keep), r) for drop, keep, r in product(DROPS, keeps, usable)]
    prompts = [(by_id[r.problem_id], filtered_prompt(r, keep, drop, seed=seed)) for drop, keep, r in plan]
    rows = []
    for i, a in enumerate(continuations(target, prompts, sampling, out=out)):
        drop, keep, r = plan[i // sampling.n]  # answers are in the order of the prompts, sampling.n per prompt
        rows.append((drop, keep, r.problem_id, r.sample, round(keep * r.think_tokens), a.correct, a.response_tokens))
    return pd.DataFrame(rows, columns=["drop", "keep", "problem_id", "sample", "kept_tokens", "correct", "answer_tokens"])


def filtering_summary(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return a table of the accuracy after think tokens were dropped, with one row per pair of ``drop`` and ``keep``.

    Columns: ``drop`` (which think tokens were dropped: ``entropy``, those of highest entropy; ``random``, random ones; ``truncate``, the
    last ones); ``keep`` (share of think tokens kept); ``kept_tokens, answer_tokens`` (means per answer); ``accuracy, low, high`` (0 to 1,
    95 % interval over problems). For paired comparisons use ``filtering_effects``.

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
    """Return a table of accuracy differences: after the think tokens of highest entropy were dropped, minus each control.

    There is one row per pair of ``keep`` and ``against``. Columns: ``keep`` (share of think tokens kept, below 1); ``against`` (name of the
    control); ``difference, low, high`` (-1 to 1, paired by response, with a 95 % interval over problems). A negative difference means that
    answers are more often right in the control.

    The controls are ``random`` (as many tokens are dropped at random), ``truncate`` (as many tokens are cut off the end), and ``whole``
    (all think tokens are kept; only if ``rows`` has answers with ``keep=1``).

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
