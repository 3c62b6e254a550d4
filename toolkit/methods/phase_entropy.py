"""PEAR: phase entropy aware reward (Huang, Lu, Zhang; ICLR 2026), arXiv:2510.08026: its measurements, not its training.

Equations (t over the T tokens of a response, k the position of the closing think tag, z the logits that predict token t):

    H_t     = -sum_v p_v log p_v,   p = softmax(z / temperature), v over the full vocabulary
    H_think = 1/(k-1) sum_{t<k} H_t        H_answer = 1/(T-k) sum_{t>k} H_t
    P       = max(0, H_think - alpha H_answer)

The closing tag is in neither phase; what a model writes before it, an opening tag too, is thinking, and the end-of-sequence token
is answer. Never closed: k = T, no answer (0 in P).

Deviations: means over an empty phase are ``None`` (NaN in tables), never 0. A closing tag of several tokens is left out whole.
Correlations with length have intervals and are also taken within question: the paper shows points, pooled. Entropy filtering
drops think tokens only, then closes the span and lets the model answer: how the paper gets an answer is not stated. Ours: the random
and the length-matched control, entropy by step and by position. *Step entropy* is the sum over a step's tokens, as in arXiv:2508.03346.

Units and signs: nats; positions are tokens. A temperature is part of every entropy: :func:`measured` states it, sampling with
``details`` uses its own.

Cost: sampling with ``details`` records entropies at no extra pass. :func:`measured` is one teacher-forced pass with a KV cache, in
chunks of positions that hold at most ``CHUNK`` logits each. Everything else is arithmetic, but for :func:`filtering`, which samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from toolkit import stats
from toolkit.collect import batch_tokens, logprobs_and_entropies, pad_right
from toolkit.generate import Sampling, batches, continued, prefill
from toolkit.lm import LM, Condition, NoThinkTagsError, halve_on_oom
from toolkit.steps import Step
from toolkit.types import Problem, Rollout

PUBLISHED_ALPHA = 1.0  # weight of the answer's entropy: paper, main runs
PUBLISHED_KEEPS = (1.0, 0.8, 0.6, 0.4, 0.2)  # shares of tokens kept: paper, Qwen3-4B (100 to 20 %)
CHUNK = 2**24  # logits held at a time: 64 MB in fp32, and about three times that while they are reduced
assumed_bins = 20  # bins of relative position: ours
assumed_reach = 5  # problems that must reach a step for its mean to be shown: ours
assumed_answering = Sampling(temperature=0.0, max_new_tokens=256)  # greedy, with room for an answer: ours

Drop = Literal["entropy", "random", "truncate"]
DROPS: tuple[Drop, ...] = ("entropy", "random", "truncate")


class NoEntropiesError(ValueError):
    """Rollouts carry no entropies where they are needed."""


# --- entropies -----------------------------------------------------------------------------------------------


def measured(
    target: LM | Condition, found: Sequence[Rollout], *, temperature: float = 1.0, chunk: int = CHUNK, progress: bool = False
) -> list[Rollout]:
    """The same rollouts with entropies (nats) and log-probabilities of the full softmax of ``target`` at ``temperature``, in order.

    They equal what sampling with ``details`` records (``logprobs`` if nothing was truncated). ``target`` need not be what
    sampled them: this is how an intervention's entropy is measured on the base's own responses. A condition's interventions
    act; its rules and prompt change do not, since the tokens are given.

    Args:
        chunk: Logits held at a time, ``rows * positions * vocab``; at least one position is.

    Raises ValueError if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: entropies need a temperature above 0 (greedy sampling records them at 1).")
    condition = target if isinstance(target, Condition) else Condition(target)
    done: dict[int, Rollout] = {}
    order = sorted(range(len(found)), key=lambda i: len(found[i].token_ids))
    bar = tqdm(total=len(found), desc="entropies", unit="rollout", disable=not progress, leave=False)

    def run(rows: Sequence[int]) -> None:
        with condition.active(), torch.inference_mode():
            scores = _scores(condition.lm, [found[i] for i in rows], temperature, chunk).tolist()
        for i, logprobs, entropies in zip(rows, *scores, strict=True):
            n = found[i].response_tokens
            done[i] = replace(found[i], logprobs=tuple(logprobs[:n]), entropies=tuple(entropies[:n]))
        bar.update(len(rows))

    with bar:
        for batch in batches(order, lambda i: len(found[i].token_ids), batch_tokens(condition.lm)):
            halve_on_oom(batch, run)
    return [done[i] for i in range(len(found))]


def _scores(lm: LM, batch: Sequence[Rollout], temperature: float, chunk: int) -> Float[Tensor, "2 rows response"]:
    """Log-probability and entropy of each response token; prompts left padded, responses right padded, so no column is both."""
    ids = pad_right([r.token_ids[r.prompt_len :] for r in batch], lm)
    found = torch.zeros(2, *ids.shape, device=lm.device)
    cache, logits, mask = prefill(lm, [list(r.token_ids[: r.prompt_len]) for r in batch])
    starts = mask.sum(dim=1)
    last = torch.tensor([len(r.token_ids) - 1 for r in batch], device=lm.device)
    found[:, :, :1] = logprobs_and_entropies(logits[:, None], ids[:, :1], temperature)
    width = max(1, chunk // (len(batch) * logits.shape[-1]))
    for at in range(0, ids.shape[1] - 1, width):
        stop = min(at + width, ids.shape[1] - 1)
        mask = pad(mask, (0, stop - at), value=1)
        # A shorter row's padding stays within the positions that the model has.
        positions = torch.minimum(starts[:, None] + torch.arange(at, stop, device=lm.device), last[:, None])
        part = ids[:, at:stop]
        out = lm.model(input_ids=part, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        found[:, :, at + 1 : stop + 1] = logprobs_and_entropies(out.logits, ids[:, at + 1 : stop + 1], temperature)
    return found


def recorded(rollout: Rollout) -> Float[ndarray, " response"]:
    """The entropies a rollout carries, one a response token.

    Raises:
        NoEntropiesError: it carries none.
    """
    if rollout.entropies is None:
        raise NoEntropiesError(
            f"Rollout {rollout.sample} of problem {rollout.problem_id!r} carries no entropies: sample with Sampling(details=True) (toolkit "
            "rollouts --details), or compute them with phase_entropy.measured(lm, rollouts, temperature=...)."
        )
    return np.array(rollout.entropies)


# --- phases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseMeans:
    """Mean entropy (nats) before and after the closing tag; ``None`` where a phase has no token."""

    think: float | None
    answer: float | None

    def penalty(self, alpha: float = PUBLISHED_ALPHA) -> float:
        """PEAR's P = max(0, H_think - alpha H_answer), a missing phase counting 0."""
        return max(0.0, (self.think or 0.0) - alpha * (self.answer or 0.0))


def phase_means(rollout: Rollout) -> PhaseMeans:
    """PEAR's phase means of one rollout. Raises NoEntropiesError."""
    h, think, answer = recorded(rollout), rollout.think, rollout.answer
    if think is None:  # answered directly
        return PhaseMeans(None, _mean(h))
    if answer is None or answer.start < think.stop:  # never closed, or no tag tells the two apart
        return PhaseMeans(_mean(h), None)
    return PhaseMeans(_mean(h[: think.stop - rollout.prompt_len]), _mean(h[answer.start - rollout.prompt_len :]))


def _mean(values: ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def table(found: Sequence[Rollout]) -> pd.DataFrame:
    """One row per rollout, for tables of one's own and for :func:`correlations`.

    Columns: ``problem_id, sample, correct, closed, think_tokens, response_tokens, entropy`` (mean over the response),
    ``think_entropy, answer_entropy`` (NaN without that phase). Raises NoEntropiesError.
    """
    rows = []
    for r in found:
        h, means = recorded(r), phase_means(r)
        own = {name: getattr(r, name) for name in ("problem_id", "sample", "correct", "closed", "think_tokens", "response_tokens")}
        phases = {"think_entropy": means.think, "answer_entropy": means.answer}
        rows.append(own | {"entropy": float(h.mean())} | {k: np.nan if m is None else m for k, m in phases.items()})
    return pd.DataFrame(rows)


def by_phase(found: Sequence[Rollout], *, seed: int = 0) -> pd.DataFrame:
    """H-bar of each phase over problems, with 95 % intervals, and think minus answer paired within rollouts that have both.

    Columns: ``phase, mean, low, high, rollouts`` with the phases ``think, answer, think - answer``; a phase nobody has is left out.
    """
    rows = table(found)
    rows["think - answer"] = rows["think_entropy"] - rows["answer_entropy"]
    names = {"think": "think_entropy", "answer": "answer_entropy", "think - answer": "think - answer"}
    parts = {phase: rows[[column, "problem_id"]].dropna() for phase, column in names.items()}
    kept = [(phase, *_estimate(part.iloc[:, 0], part["problem_id"], seed), len(part)) for phase, part in parts.items() if len(part)]
    return pd.DataFrame(kept, columns=["phase", "mean", "low", "high", "rollouts"])


def _estimate(values: pd.Series, problems: pd.Series | pd.Index, seed: int) -> tuple[float, float, float]:
    e = stats.over_problems(values.to_numpy(float), problems.to_numpy(), seed=seed)
    return e.mean, e.low, e.high


# --- positions and steps -------------------------------------------------------------------------------------


def by_position(found: Sequence[Rollout], *, bins: int = assumed_bins, seed: int = 0) -> pd.DataFrame:
    """Mean entropy against relative position in the think span (tags excluded), with 95 % intervals over problems (ours).

    Columns: ``position`` (bin centre, 0 to 1), ``mean, low, high, rollouts``. A token fills its share of the span: no bin is empty.

    Raises:
        ValueError: fewer than one bin.
        NoThinkTagsError: no rollout thought.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: need at least 1.")
    parts = []
    for r in found:
        if h := _thinking(r):
            edges = np.linspace(0, len(h), bins + 1)
            total = np.interp(edges, range(len(h) + 1), np.cumsum([0.0, *h]))
            parts.append(pd.DataFrame({"bin": range(bins), "entropy": np.diff(total) / np.diff(edges), "problem_id": r.problem_id}))
    return _binned(parts, "position", lambda i: (i + 0.5) / bins, len(found), seed)


def _thinking(r: Rollout) -> list[float]:
    if r.think is None:
        return []
    return recorded(r)[r.think.start - r.prompt_len : r.think.stop - r.prompt_len].tolist()


def _binned(parts: Sequence[pd.DataFrame], name: str, centre: Callable[[int], float], n: int, seed: int) -> pd.DataFrame:
    if not parts:
        raise NoThinkTagsError(f"None of the {n} rollouts has a think token: load the model with tags=ThinkTags(...).")
    groups = pd.concat(parts).groupby("bin")
    rows = [(centre(i), *_estimate(part["entropy"], part["problem_id"], seed), len(part)) for i, part in groups]
    return pd.DataFrame(rows, columns=[name, "mean", "low", "high", "rollouts"])


StepsOf = Callable[[Rollout], Sequence[Step]]
"""The steps of a rollout, such as ``lambda r: steps.of(lm, r, steps.lines)``."""


def step_entropy(found: Sequence[Rollout], steps_of: StepsOf) -> pd.DataFrame:
    """One row per step of thinking that has a token of its own.

    Columns: ``problem_id, sample, step`` (from 0), ``of`` (steps in that rollout), ``tokens, entropy`` (sum over the step's tokens),
    ``mean`` (nats a token), ``text``. Raises NoEntropiesError.
    """
    rows = []
    for r in found:
        h, own = recorded(r), [s for s in steps_of(r) if len(s.span)]
        for i, step in enumerate(own):
            part = h[step.span.start - r.prompt_len : step.span.stop - r.prompt_len]
            rows.append((r.problem_id, r.sample, i, len(own), len(part), float(part.sum()), float(part.mean()), step.text))
    return pd.DataFrame(rows, columns=["problem_id", "sample", "step", "of", "tokens", "entropy", "mean", "text"])


def by_step(found: Sequence[Rollout], steps_of: StepsOf, *, at_least: int = assumed_reach, seed: int = 0) -> pd.DataFrame:
    """Mean entropy (nats a token) of the first, second, ... step of thinking, with 95 % intervals over problems (ours).

    Columns: ``step`` (from 1), ``mean, low, high, rollouts``: later steps are those of longer thinking, so read the counts.
    Steps that fewer than ``at_least`` problems reach are left out.

    Raises:
        NoThinkTagsError: no rollout has a step.
        ValueError: no step is reached by that many problems.
    """
    rows = step_entropy(found, steps_of)
    part = pd.DataFrame({"bin": rows["step"], "entropy": rows["mean"], "problem_id": rows["problem_id"]})
    reach = part.groupby("bin")["problem_id"].transform("nunique")
    if len(part) and reach.max() < at_least:
        raise ValueError(f"No step is reached by {at_least} problems, at most by {reach.max()}: lower at_least or sample more.")
    return _binned([part[reach >= at_least]] if len(part) else [], "step", lambda i: i + 1, len(found), seed)


def by_mark(rows: pd.DataFrame, marked: Sequence[bool] | ndarray, *, seed: int = 0) -> pd.DataFrame:
    """Entropy (nats a token) of ``marked`` rows of :func:`step_entropy` beside the other steps of the same responses, paired (ours).

    Columns: ``steps, mean, low, high, rollouts`` with the steps ``marked, others, marked - others`` and 95 % intervals over problems. A
    step counts as one whatever its length. Only responses with both kinds count; without any the table is empty.
    """
    kinds = rows.assign(kind=np.where(np.asarray(marked, bool), "marked", "others"))
    wide = kinds.pivot_table(index=["problem_id", "sample"], columns="kind", values="mean").reindex(columns=["marked", "others"])
    wide = wide.dropna().assign(**{"marked - others": lambda w: w["marked"] - w["others"]})
    problems = wide.index.get_level_values("problem_id")
    found = [(str(name), *_estimate(wide[name], problems, seed), len(wide)) for name in wide if len(wide)]
    return pd.DataFrame(found, columns=["steps", "mean", "low", "high", "rollouts"])


def correlations(
    rows: pd.DataFrame, x: str = "entropy", y: str = "response_tokens", *, times: int = stats.RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Pearson and Spearman of two columns of :func:`table`, pooled and within question, with 95 % intervals over problems.

    Columns: ``scope, kind, r, low, high, problems, rollouts``. Rows without either value are left out. Within question needs two
    rollouts of a problem: ``stats.correlation`` raises ValueError otherwise.
    """
    kept = rows.dropna(subset=[x, y])
    a, b, problems = kept[x].to_numpy(float), kept[y].to_numpy(float), kept["problem_id"].to_numpy()
    found = []
    for scope, kind in product(("pooled", "within"), ("pearson", "spearman")):
        e = stats.correlation(a, b, problems, kind=kind, within=scope == "within", times=times, seed=seed)
        found.append((scope, kind, e.mean, e.low, e.high, len(set(problems)), len(kept)))
    return pd.DataFrame(found, columns=["scope", "kind", "r", "low", "high", "problems", "rollouts"])


# --- entropy filtering ---------------------------------------------------------------------------------------


def filtered(rollout: Rollout, keep: float, drop: Drop = "entropy", *, seed: int = 0) -> list[int]:
    """Token ids to answer from: the prompt, a share of the think tokens in their order, and the closing tag.

    ``round(keep * n)`` of the n think tokens stay, whatever ``drop`` is: it drops those of highest entropy (published; the earlier
    of two equals stays), random ones (keyed by seed, problem and sample), or the last ones.

    Raises:
        NoThinkTagsError: the rollout never thought, or never closed its thinking with a tag.
        NoEntropiesError: ``drop="entropy"`` and it carries none.
    """
    if not 0 <= keep <= 1 or drop not in DROPS:
        raise ValueError(f"keep={keep}, drop={drop!r}: need a share 0 <= keep <= 1 and one of {', '.join(DROPS)}.")
    think, answer = rollout.think, rollout.answer
    if think is None or answer is None or answer.start <= think.stop:
        name = f"Rollout {rollout.sample} of problem {rollout.problem_id!r}"
        raise NoThinkTagsError(f"{name} has no think span closed by a tag, so it cannot be filtered: leave it out (filterable).")
    n = len(think)
    kept = round(keep * n)
    match drop:
        case "entropy":
            chosen = np.argsort(_thinking(rollout), kind="stable")[:kept].tolist()
        case "random":
            chosen = random.Random(f"{seed}-{rollout.problem_id}-{rollout.sample}").sample(range(n), kept)
        case "truncate":
            chosen = list(range(kept))
    ids = list(rollout.token_ids)
    return [*ids[: think.start], *(ids[think.start + i] for i in sorted(chosen)), *ids[think.stop : answer.start]]


def filterable(found: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with a non-empty think span closed by a tag."""
    return [r for r in found if r.think_tokens and r.think and r.answer and r.answer.start > r.think.stop]


def filtering(
    target: LM | Condition,
    found: Sequence[Rollout],
    problems: Sequence[Problem],
    *,
    keeps: Sequence[float] = PUBLISHED_KEEPS,
    sampling: Sampling = assumed_answering,
    seed: int = 0,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """The filtering experiment: every closed rollout, every share kept, every way to drop, answered and graded; kept in ``out``.

    Columns: ``drop, keep, problem_id, sample, kept_tokens, correct, answer_tokens``; summarise with :func:`filtering_summary`.

    Raises NoThinkTagsError if no rollout has a think span closed by a tag.
    """
    by_id, usable = {p.id: p for p in problems}, filterable(found)
    if not usable:
        raise NoThinkTagsError(
            f"None of the {len(found)} rollouts has a think span closed by a tag, so nothing can be filtered: raise max_new_tokens, "
            "or load the model with tags=ThinkTags(...)."
        )
    plan = [(drop, float(keep), r) for drop, keep, r in product(DROPS, keeps, usable)]
    asked = [(by_id[r.problem_id], filtered(r, keep, drop, seed=seed)) for drop, keep, r in plan]
    rows = []
    for i, a in enumerate(continued(target, asked, sampling, out=out)):
        drop, keep, r = plan[i // sampling.n]
        rows.append((drop, keep, r.problem_id, r.sample, round(keep * r.think_tokens), a.correct, a.response_tokens))
    return pd.DataFrame(rows, columns=["drop", "keep", "problem_id", "sample", "kept_tokens", "correct", "answer_tokens"])


def filtering_summary(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Accuracy by way and share kept, with 95 % intervals over problems.

    Columns: ``drop, keep, kept_tokens, answer_tokens, accuracy, low, high``; compare with :func:`filtering_effects`.
    """
    found = []
    for (drop, keep), part in rows.groupby(["drop", "keep"]):
        sizes = part[["kept_tokens", "answer_tokens"]].mean()
        found.append((drop, keep, *sizes, *_estimate(part["correct"], part["problem_id"], seed)))
    return pd.DataFrame(found, columns=["drop", "keep", "kept_tokens", "answer_tokens", "accuracy", "low", "high"])


def filtering_effects(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """What dropping the highest entropies gains in accuracy, paired response by response, with 95 % intervals over problems.

    Columns: ``keep, against, difference, low, high``, against the same share dropped at random (``random``), the same share cut off the
    end (``truncate``), and, if all was kept once, all of the thinking (``whole``).
    """
    graded = rows.assign(correct=rows["correct"].astype(float))
    wide = graded.pivot_table(index=["problem_id", "sample"], columns=["drop", "keep"], values="correct")
    problems, found = wide.index.get_level_values("problem_id"), []
    for keep in sorted({float(k) for k in rows["keep"]} - {1.0}, reverse=True):
        for against, cell in {"random": ("random", keep), "truncate": ("truncate", keep), "whole": ("entropy", 1.0)}.items():
            if cell in wide:
                found.append((keep, against, *_estimate(wide["entropy", keep] - wide[cell], problems, seed)))
    return pd.DataFrame(found, columns=["keep", "against", "difference", "low", "high"])
