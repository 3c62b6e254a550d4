"""DTO, dynamic thinking pattern optimisation, from: Don't think longer, think wisely (NeurIPS 2025), arXiv:2505.21765.

DTO makes preference pairs for training. A *trajectory* is a sampled response. A *path* is a better response to the same prompt: some
segments of the trajectory's thinking, then a newly sampled answer.

Method. Cue words split the thinking of a trajectory into segments d_1 .. d_n. Two texts can end thinking and begin the answer: the *exit
text* in steps 1 and 4, and the *closing text* in step 3. M, T and K are settings (``DTOSettings``):

    1. p_i  = share of M sampled continuations of d_1 .. d_i + exit text that give the gold answer
    2. i'   = first i with p_i > T
    3. path = d_1 .. d_i' + closing text + the shortest correct one of K sampled completions
    4. each inner segment (neither d_1 nor d_i') is dropped if it contributes nothing and the greedy answer without it is correct
    5. SimPO (a preference loss like DPO, without a reference model) trains on pairs: path chosen, trajectory rejected

Deviations:

* We did not find the paper's values of M, T, K and the two texts; the defaults are ours (``assumed_...``). By default both texts are the
  closing think tag, which is enough for a model with tags.
* In the paper an auxiliary language model says which segments contribute nothing. Here likelihoods of the model itself decide. A segment
  contributes if leaving it out makes a later segment of the path less likely by more than a tolerance. A test of the greedy answer alone is
  too weak: the last line of the thinking often states the answer, so the model can copy it. Then all other lines would be dropped.
* If none of the K completions is correct, the next i with p_i > T is tried (ours). If no i is left, the trajectory has no path.
* A path is kept only if it is correct, and the trajectory is wrong or longer than the path.

Units and signs: lengths in tokens; p_i from 0 to 1; tolerance in nats per token. Cost: about n M + K short continuations per trajectory.
Dropping segments needs up to 2 n more forward passes and n more continuations.

To train on the pairs: ``preferences.train(lm, pairs(lm, results), ...)``, or the command ``toolkit dto --steps``. The table that ``pairs``
returns also has the columns that TRL's trainers of preferences need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from toolkit import entropies, generate, steps
from toolkit.generate import Sampling
from toolkit.lm import LM, Condition, NoThinkTagsError
from toolkit.steps import Splitter, Step
from toolkit.tasks.grading import grade
from toolkit.types import Problem, Rollout

# Cue words: ours, except "Wait" and "Alternatively", which the paper names.
assumed_cues = r"(?<!\w)(?:Wait|Alternatively|Hmm|But|However|Let me|Hold on|Actually|Another)\b"
assumed_probes = 8  # M: ours
assumed_threshold = 0.5  # T: ours
assumed_completions = 8  # K: ours
assumed_tolerance = 0.1  # nats per token: ours
assumed_answering = Sampling(max_new_tokens=256)  # long enough for an answer: ours


@dataclass(frozen=True)
class DTOSettings:
    """Settings of DTO (dynamic thinking pattern optimisation, arXiv:2505.21765).

    DTO splits the thinking of a sampled response, the trajectory, into segments. For each segment it samples answers that follow directly
    after it. The first segment after which enough of these answers are correct ends the thinking of a new response, the path.

    Attributes:
        split: Function from the text of a response's thinking to the character positions at which segments start. ``None`` splits at cue
            words (``steps.at_cues(assumed_cues)``). For the shipped model ``tiny-reasoner`` use ``steps.lines``.
        exit: Text that ends thinking in two tests: whether thinking may end after a segment, and whether a segment may be dropped. The
            answers that are sampled in these tests are only graded; they do not become part of a path. ``None`` is the closing think tag.
        closing: Text that ends thinking in the path. ``None`` is the closing think tag.
        probes: Number of answers that are sampled after each segment to test it (M in the paper).
        threshold: Thinking may end after a segment if the share of correct answers there is above this value; at least 0 and below 1 (T in
            the paper).
        completions: Number of answers that are sampled for the path; the shortest correct one is used (K in the paper).
        tolerance: A segment contributes nothing if leaving it out lowers the mean log-probability of each later segment of the path by at
            most this value, in nats per token.
        answering: How answers are sampled. Its field ``n`` is ignored, since ``probes`` and ``completions`` set the numbers of answers.
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
                f"probes={self.probes}, completions={self.completions}, threshold={self.threshold}: need probes >= 1, "
                "completions >= 1 and 0 <= threshold < 1 (a share cannot exceed 1)."
            )


DEFAULT_SETTINGS = DTOSettings()


@dataclass(frozen=True)
class DTOResult:
    """Result of DTO for one trajectory (a sampled response), with the path if there is one.

    The path is a better response: some segments of the trajectory's thinking, then a newly sampled answer.

    Attributes:
        original: The trajectory.
        segments: Segments of the trajectory's thinking.
        shares: For each segment, the share of correct answers (0 to 1) if thinking ends after the segment. Empty if the trajectory has
            fewer than two segments.
        cut: Index (from 0) of the last segment in the path; ``None`` if there is no path.
        dropped: Indices of the segments before ``cut`` that are left out of the path; never the first segment.
        path: The path. It is correct. If the trajectory is correct too, the path is shorter. ``None`` if no such path was made.
    """

    original: Rollout
    segments: tuple[Step, ...]
    shares: tuple[float, ...] = ()
    cut: int | None = None
    dropped: tuple[int, ...] = ()
    path: Rollout | None = None


@dataclass(frozen=True)
class _Work:
    """Objects that the functions of one run of DTO share: the model with its interventions, the problems by id, and the settings."""

    condition: Condition
    problems: dict[str, Problem]
    settings: DTOSettings

    def ids(self, text: str | None) -> list[int]:
        """Return the token ids of a text that ends thinking (setting ``exit`` or ``closing``); ``None`` is the closing think tag."""
        lm = self.condition.lm
        if text is None and (lm.tags is None or lm.tags.close is None):
            raise NoThinkTagsError(
                f"{lm.name} has no closing think tag: set exit=... and closing=... to texts that lead to an answer."
            )
        return list(lm.tokenizer.encode(lm.tags.close if text is None else text, add_special_tokens=False))  # type: ignore[union-attr]

    def tail(self, text: str | None) -> str:
        """Return the part of ``text`` that belongs to the answer, where ``text`` is the setting ``exit`` or ``closing``.

        It is the part after the closing think tag. If the text does not contain the tag, the part is empty. For a model without tags it is
        the whole text.
        """
        tags = self.condition.lm.tags
        return "" if text is None else text.partition(tags.close)[2] if tags and tags.close else text

    def continuations(
        self, prompts: Sequence[tuple[Rollout, list[int]]], n: int, *, text: str | None, greedy: bool = False, anew: bool = False
    ) -> list[list[Rollout]]:
        """Sample answers: return a list of ``n`` graded continuations for each pair in ``prompts``.

        Args:
            prompts: Pairs of a trajectory (a sampled response) and token ids: its prompt and the part of its thinking that is kept.
            n: Number of continuations per pair.
            text: Text that ends thinking (setting ``exit`` or ``closing``). It is appended to the token ids of each pair; the answer is
                sampled after it. Its part after the closing think tag is graded as part of the answer (see ``tail``).
            greedy: True to decode greedily.
            anew: True to draw other random numbers than without it, so that the answers are independent of earlier ones.
        """
        if not prompts:
            return []
        answering = self.settings.answering
        seed = answering.seed + 1 if anew else answering.seed
        sampling = replace(answering, n=n, temperature=0.0 if greedy else answering.temperature, seed=seed)
        ends, lm = self.ids(text), self.condition.lm
        inputs = [(self.problems[r.problem_id], [*ids, *ends]) for r, ids in prompts]
        sampled = generate.continuations(self.condition, inputs, sampling)
        graded = [
            replace(
                c, correct=grade(self.problems[c.problem_id], self.tail(text) + lm.text(c.token_ids[c.prompt_len :], special=False))
            )
            for c in sampled
        ]
        return [graded[i : i + n] for i in range(0, len(graded), n)]


def segments(lm: LM, rollout: Rollout, split: Splitter | None = None) -> tuple[Step, ...]:
    """Return the segments into which DTO splits the thinking of a rollout; an empty tuple if it has no thinking.

    Args:
        lm: The model whose tokenizer decodes the rollout.
        rollout: The rollout.
        split: Function from a text to the character positions at which segments start; ``None`` splits at cue words.
    """
    return tuple(steps.think_steps(lm, rollout, split or steps.at_cues(assumed_cues)))


def probe(
    target: LM | Condition, rollouts: Sequence[Rollout], problems: Sequence[Problem], settings: DTOSettings = DEFAULT_SETTINGS
) -> list[DTOResult]:
    """Estimate, for every segment of every rollout's thinking, the share of correct answers if thinking ends after the segment.

    This is the first step of ``optimise``. Return one result per rollout, in order. Only its fields ``original``, ``segments`` and
    ``shares`` are set; there is no path yet. ``shares`` is empty for a rollout with fewer than two segments.

    Args:
        target: Model, or model with interventions, that samples the answers.
        rollouts: The rollouts (the trajectories of DTO).
        problems: Problems. That of every rollout must be among them.
        settings: Settings of DTO. Used here: ``split``, ``exit``, ``probes`` and ``answering``.

    Raises:
        KeyError: A rollout's problem is not among ``problems``.
        NoThinkTagsError: The model has no closing think tag, and ``settings.exit`` is ``None``.
    """
    work = _working(target, rollouts, problems, settings)
    parts = [segments(work.condition.lm, r, settings.split) for r in rollouts]
    ends = [(i, segment) for i, own in enumerate(parts) if len(own) > 1 for segment in own]
    prompts = [(rollouts[i], list(rollouts[i].token_ids[: segment.span.stop])) for i, segment in ends]
    shares: list[list[float]] = [[] for _ in rollouts]
    for (i, _), sampled in zip(ends, work.continuations(prompts, settings.probes, text=settings.exit), strict=True):
        shares[i].append(float(np.mean([c.correct for c in sampled])))
    return [DTOResult(r, own, tuple(p)) for r, own, p in zip(rollouts, parts, shares, strict=True)]


def exits(shares: Sequence[float], threshold: float = assumed_threshold) -> list[int]:
    """Return the indices of the segments after which thinking may end, in order: those with a share above ``threshold``.

    The default threshold is 0.5. ``shares`` has, for each segment, the share of correct answers if thinking ends after it
    (``DTOResult.shares``).

    >>> exits([0.25, 0.75, 0.5, 1.0])
    [1, 3]
    """
    return [i for i, share in enumerate(shares) if share > threshold]


def optimise(
    target: LM | Condition, rollouts: Sequence[Rollout], problems: Sequence[Problem], settings: DTOSettings = DEFAULT_SETTINGS
) -> list[DTOResult]:
    """Search for a better response, the path, for each rollout (the trajectory) by DTO. Return one result per rollout, in order.

    A path is the beginning of the trajectory's thinking, without segments that contribute nothing, and a newly sampled correct answer that
    ends by itself. A result has no path in three cases: no segment has a share of correct answers above ``settings.threshold``; no completion was correct; or
    the path is not better than the trajectory. ``pairs`` makes preference pairs for training from the results.

    Args:
        target: Model, or model with interventions, that samples the answers.
        rollouts: The rollouts (the trajectories of DTO).
        problems: Problems. That of every rollout must be among them.
        settings: How thinking is split and shortened, and how answers are sampled.

    Raises:
        KeyError: A rollout's problem is not among ``problems``.
        NoThinkTagsError: The model has no closing think tag, and ``settings.exit`` or ``settings.closing`` is ``None``.
    """
    work = _working(target, rollouts, problems, settings)
    done = probe(target, rollouts, problems, settings)
    # ends: the segments after which each trajectory may end its thinking, tried from the first on until one has a correct completion.
    # pending: indices of the trajectories that have no path yet, but still have such segments.
    ends = [exits(o.shares, settings.threshold) for o in done]
    pending = [i for i, candidates in enumerate(ends) if candidates]
    while pending:
        prompts = [(rollouts[i], list(rollouts[i].token_ids[: done[i].segments[ends[i][0]].span.stop])) for i in pending]
        for i, sampled in zip(
            pending, work.continuations(prompts, settings.completions, text=settings.closing, anew=True), strict=True
        ):
            right = [c for c in sampled if c.correct and c.finish == "stop"]  # an answer that is cut off must not be preferred
            if right:
                best = min(right, key=lambda c: c.response_tokens)
                path = _path(work, done[i], range(ends[i][0] + 1), best.token_ids[best.prompt_len :])
                done[i] = replace(done[i], cut=ends[i][0], path=path)
            else:
                ends[i] = ends[i][1:]
        pending = [i for i in pending if done[i].path is None and ends[i]]
    return [_without_worse_path(o) for o in _pruned(work, done)]


def _working(target: LM | Condition, rollouts: Sequence[Rollout], problems: Sequence[Problem], settings: DTOSettings) -> _Work:
    """Return the shared objects of one run. Raise KeyError if the problem of a trajectory is not among ``problems``."""
    by_id = {p.id: p for p in problems}
    if missing := sorted({r.problem_id for r in rollouts} - by_id.keys()):
        raise KeyError(
            f"{len(missing)} problems of the trajectories are not among the {len(by_id)} given, such as {missing[0]!r}: pass the problems "
            "that were sampled from."
        )
    return _Work(target if isinstance(target, Condition) else Condition(target), by_id, settings)


def _thought(o: DTOResult, kept: Sequence[int] | range) -> list[int]:
    """Return the token ids of the trajectory of ``o`` up to the end of its thinking, with only the segments whose indices are in ``kept``.

    The token ids begin with the prompt, then any response tokens before the thinking, such as the opening tag.
    """
    ids = o.original.token_ids
    return [*ids[: o.segments[0].span.start], *(t for i in kept for t in ids[o.segments[i].span.start : o.segments[i].span.stop])]


def _path(work: _Work, o: DTOResult, kept: Sequence[int] | range, completion: Sequence[int]) -> Rollout:
    """Return a path for the trajectory of ``o``, as a graded rollout.

    Its response is: the trajectory's segments with the indices ``kept``, the closing text, and ``completion`` (token ids of the answer).
    """
    n = o.original.prompt_len
    tokens = [*_thought(o, kept)[n:], *work.ids(work.settings.closing), *completion]
    problem = work.problems[o.original.problem_id]
    return generate.rollout_from_tokens(
        work.condition.lm, problem, list(o.original.token_ids[:n]), tokens, sample=o.original.sample
    )


def _pruned(work: _Work, done: list[DTOResult]) -> list[DTOResult]:
    """Return the results ``done`` with inner segments dropped from their paths. Each segment is tried, from the second on.

    A segment is dropped if it contributes nothing (see ``_contributes``) and the greedy answer without it is correct. The first and the
    last segment of a path always stay. The answer of the path does not change.
    """
    # Try segment number ``at`` of all trajectories together, so that their greedy answers are decoded in one batch.
    for at in range(1, max((o.cut or 0 for o in done), default=0)):
        candidates = [i for i, o in enumerate(done) if o.path is not None and o.cut is not None and at < o.cut]
        tried = [i for i in candidates if not _contributes(work, done[i], at)]
        kept = {i: [j for j in _segments_of(done[i]) if j != at] for i in tried}
        prompts = [(done[i].original, _thought(done[i], kept[i])) for i in tried]
        for i, (quick,) in zip(tried, work.continuations(prompts, 1, text=work.settings.exit, greedy=True), strict=True):
            if quick.correct:
                completion = _completion(work, done[i])
                done[i] = replace(done[i], dropped=(*done[i].dropped, at), path=_path(work, done[i], kept[i], completion))
    return done


def _segments_of(o: DTOResult) -> list[int]:
    """Return the indices of the segments of a trajectory that are in its path."""
    return [j for j in range((o.cut or 0) + 1) if j not in o.dropped]


def _contributes(work: _Work, o: DTOResult, at: int) -> bool:
    """Return True if leaving out segment ``at`` of a path lowers a later segment's mean log-probability by more than the tolerance.

    The log-probabilities are those of the model, in nats per token; the tolerance is ``settings.tolerance``. Only segments of the path are
    considered.
    """
    whole = _segments_of(o)
    # before, after: likelihoods of the later segments with and without the segment.
    before, after = (_likelihoods(work, o, kept, at) for kept in (whole, [j for j in whole if j != at]))
    return any(a < b - work.settings.tolerance for b, a in zip(before, after, strict=True))


def _likelihoods(work: _Work, o: DTOResult, kept: Sequence[int], after: int) -> list[float]:
    """Return the mean log-probability (nats per token) of each segment in ``kept`` whose index is above ``after``.

    The context of a segment is the trajectory up to its thinking (prompt and opening tag), then the segments in ``kept`` before this one.
    """
    if not any(j > after for j in kept):  # then there may be no response token at all
        return []
    n = o.original.prompt_len
    (scored,) = entropies.with_entropies(work.condition, [replace(o.original, token_ids=tuple(_thought(o, kept)))])
    chosen = scored.logprobs or ()
    # chosen: log-probability of each response token. ends: end of each kept segment among the response tokens.
    sizes = [len(o.segments[j].span) for j in kept]
    ends = np.cumsum(sizes) + (o.segments[0].span.start - n)
    return [float(np.mean(chosen[end - size : end])) for j, size, end in zip(kept, sizes, ends, strict=True) if j > after]


def _completion(work: _Work, o: DTOResult) -> Sequence[int]:
    """Return the token ids of a path that come after its closing text: the completion, which gives the answer."""
    assert o.path is not None and o.cut is not None
    return o.path.token_ids[len(_thought(o, _segments_of(o))) + len(work.ids(work.settings.closing)) :]


def _without_worse_path(o: DTOResult) -> DTOResult:
    """Return the result, without its path if the path is not better than the trajectory.

    The path stays only if it is correct, and the trajectory is wrong or longer.
    """
    better = (
        o.path is not None and o.path.correct and (not o.original.correct or o.path.response_tokens < o.original.response_tokens)
    )
    return o if better else replace(o, cut=None, dropped=(), path=None)


def table(results: Sequence[DTOResult]) -> pd.DataFrame:
    """Return a table of the results of DTO, with one row per trajectory (a sampled response).

    Columns: ``problem_id, sample, correct`` (of the trajectory); ``segments`` (number of segments of its thinking); ``exit`` (number of
    segments up to and including the last one in the path); ``dropped`` (how many of these the path leaves out); ``tokens, path_tokens``
    (response lengths of trajectory and path, in tokens). Without a path, ``exit`` and ``path_tokens`` are NaN, and ``dropped`` is 0.

    Args:
        results: From ``optimise``.
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
        for o in results
    )


def pairs(lm: LM, results: Sequence[DTOResult]) -> pd.DataFrame:
    """Return a table for TRL's preference trainers, with one preference pair per trajectory (sampled response) that has a path.

    The path is the better response, in ``DTOResult.path``. Columns: ``problem_id``; and three texts that include the
    special tokens: ``prompt``, ``chosen`` (the path's response) and ``rejected`` (the trajectory's response).

    Args:
        lm: The model whose tokenizer decodes the token ids.
        results: From ``optimise``.
    """
    better = [(o.original, o.path) for o in results if o.path is not None and o.path.token_ids != o.original.token_ids]
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
