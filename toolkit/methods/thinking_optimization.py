"""DTO, dynamic thinking pattern optimisation: Don't think longer, think wisely (NeurIPS 2025), arXiv:2505.21765.

Equations (a trajectory's thinking cut at cue words into segments d_1 .. d_n; p_i by sampling):

    p_i = share of M continuations of d_1 .. d_i + exit text that give the gold answer
    i'  = first i with p_i > T;   path = d_1 .. d_i' + closing text + the shortest right one of K completions
    inner segments, neither d_1 nor d_i', that contribute nothing and without which a quick decode is right are dropped
    pairs (path chosen, trajectory rejected) -> SimPO

Deviations: M, T, K and the two texts were not found (``assumed_...``; the text is the closing think tag, which is all that a
model with tags needs). An auxiliary language model names the segments that contribute nothing; here the policy does (ours): a
segment contributes if a later one becomes less likely without it, by more than ``assumed_tolerance``. The quick decode alone would
leave the last line of a chain, from which the answer can be copied. Where no completion is right the next i with p_i > T is tried (ours); where none is left
there is no path. A path counts only if it is right and the trajectory is wrong or longer.

Units and signs: tokens; shares of samples; nats per token. Cost: about n M + K short continuations per trajectory, and for dropping
2 n forward passes and n continuations more.

Training on the pairs is TRL's business; ``pairs`` has its columns::

    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    args = CPOConfig(output_dir, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0)
    data = Dataset.from_pandas(thinking_optimization.pairs(lm, found)[["prompt", "chosen", "rejected"]])
    CPOTrainer(lm.model, args, train_dataset=data, processing_class=lm.tokenizer).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from toolkit import collect, generate, steps
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.steps import Splitter, Step
from toolkit.tasks.grading import grade
from toolkit.types import Problem, Rollout

# Cue words: ours, beside "Wait" and "Alternatively", which the paper names.
assumed_cues = r"(?<!\w)(?:Wait|Alternatively|Hmm|But|However|Let me|Hold on|Actually|Another)\b"
assumed_probes = 8  # M: ours
assumed_threshold = 0.5  # T: ours
assumed_completions = 8  # K: ours
assumed_tolerance = 0.1  # nats per token: ours
assumed_answering = Sampling(max_new_tokens=256)  # room for an answer: ours


@dataclass(frozen=True)
class Settings:
    """How trajectories are optimised.

    Attributes:
        split: Where a segment starts; ``steps.at_cues(assumed_cues)`` if ``None``, ``steps.lines`` for the tiny reasoner.
        exit: Text that ends thinking and begins the answer when probing; ``None`` is the closing think tag.
        closing: The same for the path that is kept.
        probes: M.
        threshold: T, a share: a prefix is an exit if more than this share of its continuations is right.
        completions: K.
        tolerance: Most that the mean log-probability of a later segment may fall without a segment that contributes nothing, nats
            per token.
        answering: How continuations are drawn; its ``n`` does not count.
    """

    split: Splitter | None = None
    exit: str | None = None
    closing: str | None = None
    probes: int = assumed_probes
    threshold: float = assumed_threshold
    completions: int = assumed_completions
    tolerance: float = assumed_tolerance
    answering: Sampling = assumed_answering

    def __post_init__(self) -> None:
        if self.probes < 1 or self.completions < 1 or not 0 <= self.threshold < 1:
            raise ValueError(
                f"probes={self.probes}, completions={self.completions}, threshold={self.threshold}: need at least 1 of each and "
                "0 <= threshold < 1 (a share above 1 is never reached)."
            )


PUBLISHED = Settings()


@dataclass(frozen=True)
class Optimised:
    """A trajectory and what became of it.

    Attributes:
        shares: p_i of each segment; empty where there was nothing to probe.
        cut: i', the last segment kept (from 0), or ``None`` without a path.
        dropped: Inner segments left out: never the first, never the last one kept.
        path: The better trajectory, or ``None``.
    """

    original: Rollout
    segments: tuple[Step, ...]
    shares: tuple[float, ...] = ()
    cut: int | None = None
    dropped: tuple[int, ...] = ()
    path: Rollout | None = None


@dataclass(frozen=True)
class _Work:
    """What continuations are drawn from: the model as it is judged, its problems, and the settings."""

    condition: Condition
    problems: dict[str, Problem]
    how: Settings

    def ids(self, text: str | None) -> list[int]:
        lm = self.condition.lm
        if text is None and (lm.tags is None or lm.tags.close is None):
            raise NoThinkTagsError(
                f"{lm.name} has no closing think tag: give exit=... and closing=..., texts that lead to an answer."
            )
        return list(lm.tokenizer.encode(lm.tags.close if text is None else text, add_special_tokens=False))  # type: ignore[union-attr]

    def tail(self, text: str | None) -> str:
        """The part of a text that already belongs to the answer."""
        tags = self.condition.lm.tags
        return "" if text is None else text.partition(tags.close)[2] if tags and tags.close else text

    def drawn(
        self, prompts: Sequence[tuple[Rollout, list[int]]], n: int, *, text: str | None, greedy: bool = False
    ) -> list[list[Rollout]]:
        """``n`` continuations of each prefix; ``correct`` is graded on the answer that the text began."""
        if not prompts:
            return []
        sampling = replace(self.how.answering, n=n, temperature=0.0 if greedy else self.how.answering.temperature)
        ends, lm = self.ids(text), self.condition.lm
        asked = [(self.problems[r.problem_id], [*ids, *ends]) for r, ids in prompts]
        found = generate.continuations(self.condition, asked, sampling)
        graded = [
            replace(
                c, correct=grade(self.problems[c.problem_id], self.tail(text) + lm.text(c.token_ids[c.prompt_len :], special=False))
            )
            for c in found
        ]
        return [graded[i : i + n] for i in range(0, len(graded), n)]


def segments(lm: LM, rollout: Rollout, split: Splitter | None = None) -> tuple[Step, ...]:
    """The thinking patterns of a trajectory; none if it did not think."""
    return tuple(steps.think_steps(lm, rollout, split or steps.at_cues(assumed_cues)))


def probed(
    target: LM | Condition, found: Sequence[Rollout], problems: Sequence[Problem], how: Settings = PUBLISHED
) -> list[Optimised]:
    """p_i of every segment of every trajectory, in order; a trajectory of one segment or none has nothing to probe.

    Raises:
        KeyError: a trajectory's problem is not among the problems.
        NoThinkTagsError: the model has no closing tag and ``how`` has no text instead.
    """
    work = _working(target, found, problems, how)
    cut = [segments(work.condition.lm, r, how.split) for r in found]
    asked = [(i, step) for i, own in enumerate(cut) if len(own) > 1 for step in own]
    prompts = [(found[i], list(found[i].token_ids[: step.span.stop])) for i, step in asked]
    shares: list[list[float]] = [[] for _ in found]
    for (i, _), drawn in zip(asked, work.drawn(prompts, how.probes, text=how.exit), strict=True):
        shares[i].append(float(np.mean([c.correct for c in drawn])))
    return [Optimised(r, own, tuple(p)) for r, own, p in zip(found, cut, shares, strict=True)]


def exits(shares: Sequence[float], threshold: float = assumed_threshold) -> list[int]:
    """The segments after which an answer would be right often enough: all i with p_i > T, in order."""
    return [i for i, share in enumerate(shares) if share > threshold]


def optimised(
    target: LM | Condition, found: Sequence[Rollout], problems: Sequence[Problem], how: Settings = PUBLISHED
) -> list[Optimised]:
    """Every trajectory with its better path, where there is one, in order. Raises what :func:`probed` does."""
    work = _working(target, found, problems, how)
    done = probed(target, found, problems, how)
    ends = [exits(o.shares, how.threshold) for o in done]
    pending = [i for i, own in enumerate(ends) if own]
    while pending:
        prompts = [(found[i], list(found[i].token_ids[: done[i].segments[ends[i][0]].span.stop])) for i in pending]
        for i, drawn in zip(pending, work.drawn(prompts, how.completions, text=how.closing), strict=True):
            right = [c for c in drawn if c.correct]
            if right:
                best = min(right, key=lambda c: c.response_tokens)
                path = _path(work, done[i], range(ends[i][0] + 1), best.token_ids[best.prompt_len :])
                done[i] = replace(done[i], cut=ends[i][0], path=path)
            else:
                ends[i] = ends[i][1:]
        pending = [i for i in pending if done[i].path is None and ends[i]]
    return [_kept(o) for o in _pruned(work, done)]


def _working(target: LM | Condition, found: Sequence[Rollout], problems: Sequence[Problem], how: Settings) -> _Work:
    by_id = {p.id: p for p in problems}
    if missing := sorted({r.problem_id for r in found} - by_id.keys()):
        raise KeyError(f"{len(missing)} problems of the trajectories are not among the {len(by_id)} given, such as {missing[0]!r}.")
    return _Work(target if isinstance(target, Condition) else Condition(target), by_id, how)


def _thought(o: Optimised, kept: Sequence[int] | range) -> list[int]:
    """Token ids of prompt, what precedes thinking, and the kept segments."""
    ids = o.original.token_ids
    return [*ids[: o.segments[0].span.start], *(t for i in kept for t in ids[o.segments[i].span.start : o.segments[i].span.stop])]


def _path(work: _Work, o: Optimised, kept: Sequence[int] | range, completion: Sequence[int]) -> Rollout:
    """The kept segments, the closing text and a completion as a rollout of its own."""
    n = o.original.prompt_len
    tokens = [*_thought(o, kept)[n:], *work.ids(work.how.closing), *completion]
    problem = work.problems[o.original.problem_id]
    return generate.rollout_from_tokens(
        work.condition.lm, problem, list(o.original.token_ids[:n]), tokens, sample=o.original.sample
    )


def _pruned(work: _Work, done: list[Optimised]) -> list[Optimised]:
    """Inner segments dropped one after the other, wherever they contribute nothing and the answer of a quick decode stays right.

    The first segment opens the thinking and is kept, as is the last one before the exit.
    """
    for at in range(1, max((o.cut or 0 for o in done), default=0)):
        reached = [i for i, o in enumerate(done) if o.path is not None and o.cut is not None and at < o.cut]
        tried = [i for i in reached if not _contributes(work, done[i], at)]
        kept = {i: [j for j in _segments_of(done[i]) if j != at] for i in tried}
        prompts = [(done[i].original, _thought(done[i], kept[i])) for i in tried]
        for i, (quick,) in zip(tried, work.drawn(prompts, 1, text=work.how.exit, greedy=True), strict=True):
            if quick.correct:
                completion = _completion(work, done[i])
                done[i] = replace(done[i], dropped=(*done[i].dropped, at), path=_path(work, done[i], kept[i], completion))
    return done


def _segments_of(o: Optimised) -> list[int]:
    """The segments of a path."""
    return [j for j in range((o.cut or 0) + 1) if j not in o.dropped]


def _contributes(work: _Work, o: Optimised, at: int) -> bool:
    """Whether a later segment of a path becomes less likely without this one, by more than the tolerance."""
    whole = _segments_of(o)
    before, after = (_likelihoods(work, o, kept, at) for kept in (whole, [j for j in whole if j != at]))
    return any(a < b - work.how.tolerance for b, a in zip(before, after, strict=True))


def _likelihoods(work: _Work, o: Optimised, kept: Sequence[int], after: int) -> list[float]:
    """Mean log-probability per token (nats) of each segment beyond ``after``, read behind the segments kept before it."""
    lm, ids, n = work.condition.lm, _thought(o, kept), o.original.prompt_len
    with work.condition.active(), torch.inference_mode():
        logp = collect.logits(lm, replace(o.original, token_ids=tuple(ids))).log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(ids[n:], device=logp.device)[:, None])[:, 0].tolist()
    sizes = [len(o.segments[j].span) for j in kept]
    ends = np.cumsum(sizes) + (o.segments[0].span.start - n)
    return [float(np.mean(chosen[end - size : end])) for j, size, end in zip(kept, sizes, ends, strict=True) if j > after]


def _completion(work: _Work, o: Optimised) -> Sequence[int]:
    """The tokens of a path after its closing text."""
    assert o.path is not None and o.cut is not None
    return o.path.token_ids[len(_thought(o, _segments_of(o))) + len(work.ids(work.how.closing)) :]


def _kept(o: Optimised) -> Optimised:
    """Without its path unless that is right and the trajectory is wrong or longer."""
    better = (
        o.path is not None and o.path.correct and (not o.original.correct or o.path.response_tokens < o.original.response_tokens)
    )
    return o if better else replace(o, cut=None, dropped=(), path=None)


def table(found: Sequence[Optimised]) -> pd.DataFrame:
    """One row a trajectory.

    Columns: ``problem_id, sample, correct, segments, exit`` (segments up to the cut), ``dropped, tokens, path_tokens`` (NaN: no
    path).
    """
    return pd.DataFrame(
        {
            "problem_id": o.original.problem_id,
            "sample": o.original.sample,
            "correct": o.original.correct,
            "segments": len(o.segments),
            "exit": np.nan if o.cut is None else o.cut + 1,
            "dropped": len(o.dropped),
            "tokens": o.original.response_tokens,
            "path_tokens": np.nan if o.path is None else o.path.response_tokens,
        }
        for o in found
    )


def pairs(lm: LM, found: Sequence[Optimised]) -> pd.DataFrame:
    """``problem_id, prompt, chosen, rejected`` (texts with their special tokens) of every path, for TRL's preference trainers."""
    better = [(o.original, o.path) for o in found if o.path is not None and o.path.token_ids != o.original.token_ids]
    return pd.DataFrame(
        [
            (
                worse.problem_id,
                lm.text(worse.token_ids[: worse.prompt_len]),
                lm.text(path.token_ids[path.prompt_len :]),
                lm.text(worse.token_ids[worse.prompt_len :]),
            )
            for worse, path in better
        ],
        columns=["problem_id", "prompt", "chosen", "rejected"],
    )
