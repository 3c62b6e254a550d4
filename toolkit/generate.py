"""Sample responses to problems (``rollouts``), or continuations of token ids (``continuations``), and set their spans and grades.

Samples of one problem share one prefill. Responses that have ended leave the batch. A response does not depend on the other responses in
its batch: ``sampling.py`` explains how tokens are drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from toolkit import identity, store
from toolkit.decode import Batch, batches, prefill
from toolkit.lm import LM, Condition, halve_on_oom
from toolkit.sampling import Sampling, Streams, draw
from toolkit.spans import Reader, answer_start, spans
from toolkit.tasks.grading import grade
from toolkit.types import Finish, Problem, Rollout

__all__ = ["Sampling", "continuations", "rollout_from_tokens", "rollouts", "task_and_split"]

log = logging.getLogger(__name__)
COMPACT_EVERY = 8  # on a GPU, steps between checks for rows that have ended (a check synchronises); on a CPU every step is checked
COMPACT_BELOW = (
    0.95  # ended rows are removed only if at most this share of the rows is left, since removing them copies the others' cache
)
# Largest number of padded prompt tokens per batch: in larger batches, extending the longer cache costs more than the additional rows save.
PREFILL_TOKENS = 16384


def rollouts(
    target: LM | Condition,
    problems: Sequence[Problem],
    sampling: Sampling = Sampling(),
    *,
    out: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Rollout]:
    """Sample ``sampling.n`` responses to every problem. Return them in the order of the problems; samples of one problem are adjacent.

    Args:
        target: A model or a condition (see ``lm.Condition``). All parts of a condition apply: its interventions (in prefill and decoding),
            its decoding rules and its change of the prompt.
        out: Directory in which finished batches are stored as parquet files; ``None`` to store nothing. To resume after a stop, repeat the
            same call: stored rollouts are graded again, but not sampled again. If another process samples into the directory, this call
            waits.
        about: Facts about the problems that are stored with the rollouts in ``out``: a dict with ``task``, ``split`` and ``seed``. Default:
            task and split from the problems' ``meta``.
        progress: True to show a progress bar.

    Raises:
        ValueError: no problems, two problems with the same id, no chat template, or a prompt that together with
            ``sampling.max_new_tokens`` exceeds the model's context.
        store.WrongModelError: ``out`` holds rollouts of another model, other sampling settings or other problems.
        store.DamagedFileError: ``out`` holds a damaged file, or rollouts with token ids that this model does not have.
    """
    condition = target if isinstance(target, Condition) else Condition(target)
    rows = _rows(condition.lm, list(zip(problems, _prompts(condition, problems), strict=True)), sampling)
    if out is None:
        return list(_sample(condition, rows, sampling, None, progress).values())
    questions = [(p.id, [dict(m) for m in p.messages], p.answer) for p in problems]
    header = _header(condition, questions, sampling) | dict(about or task_and_split(problems))
    return _resumed(condition, rows, sampling, (Path(out), header), progress)


def continuations(
    target: LM | Condition,
    prompts: Sequence[tuple[Problem, Sequence[int]]],
    sampling: Sampling = Sampling(),
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> list[Rollout]:
    """Sample ``sampling.n`` continuations of each list of token ids and grade them. Return them in the order of the prompts.

    The random numbers of a continuation depend only on the seed, the problem id and the sample index, as in ``rollouts``. So two prompts of
    the same problem get the same random numbers, and their continuations differ only because the prompts do.

    How a continuation is split into spans depends on the last think tag in the prompt's assistant turn. After a closing tag, the whole
    continuation is the answer and the think span is empty. After an opening tag, the continuation begins with thinking. Without a tag,
    spans are set as in ``rollouts``.

    Args:
        target: A model or a condition. A condition's interventions and decoding rules apply; its change of the prompt does not.
        prompts: Pairs of a problem and the token ids to continue. All of these ids count as prompt tokens (``Rollout.prompt_len``).
        out: Directory in which finished batches are stored; ``None`` to store nothing. To resume after a stop, repeat the same call. In the
            returned rollouts, ``Rollout.sample`` counts the samples of one prompt. In the stored files it counts all responses of the call,
            because several prompts may have the same problem.
        progress: True to show a progress bar.

    Raises:
        ValueError: no prompts, a prompt without tokens or with ids outside the vocabulary, or one that together with
            ``sampling.max_new_tokens`` exceeds the model's context.
        store.WrongModelError, store.DamagedFileError: as in ``rollouts``.
    """
    condition = target if isinstance(target, Condition) else Condition(target)
    vocab = condition.lm.vocab_size
    for problem, ids in prompts:
        wrong = [i for i in ids if not 0 <= i < vocab]
        if wrong or not ids:
            raise ValueError(f"Problem {problem.id!r} cannot go on from token ids {wrong}: give some, each in 0..{vocab - 1}.")
    rows = _rows(condition.lm, [(problem, list(ids)) for problem, ids in prompts], sampling)
    if out is None:
        return list(_sample(condition, rows, sampling, None, progress).values())
    questions = [(problem.id, list(ids), problem.answer) for problem, ids in prompts]
    numbered = [replace(row, name=row.place) for row in rows]
    return _resumed(condition, numbered, sampling, (Path(out), _header(condition, questions, sampling)), progress)


def rollout_from_tokens(lm: LM, problem: Problem, prompt: list[int], tokens: list[int], *, sample: int = 0) -> Rollout:
    """Return the ``Rollout`` of a response that another program, such as vLLM, sampled. Spans and grade are set as in ``rollouts``.

    ``finish`` is ``"stop"`` if the last token is an end-of-sequence token, else ``"length"``. ``logprobs`` and ``entropies`` are ``None``.

    Args:
        lm: The model from which the response was sampled. Its tokenizer and think tags are used.
        problem: The problem that the response answers; used to grade it.
        prompt: Token ids of the prompt.
        tokens: Token ids of the response, with the end-of-sequence token if one was sampled.
        sample: Index of the response among the samples of the problem.
    """
    finish: Finish = "stop" if tokens and tokens[-1] in lm.eos_ids else "length"
    return _rollout(lm, _Raw(_Row(0, problem, prompt, sample, sample), tokens, finish, None, None))


@dataclass(frozen=True)
class _Row:
    """A response to sample.

    Attributes:
        place: Index among all responses of the call.
        problem: The problem that the response answers.
        prompt: Token ids that the response continues.
        sample: Index among the samples of the problem (in ``continuations``: of the prompt). The random numbers depend on it.
        name: Index that is stored as ``Rollout.sample`` in files. It is ``sample`` in ``rollouts``. In ``continuations`` it is ``place``,
            because two prompts of one problem have samples with the same index.
    """

    place: int
    problem: Problem
    prompt: list[int]
    sample: int
    name: int

    @property
    def key(self) -> tuple[str, int]:
        """``(problem id, name)``, which identifies the response in a directory of rollouts."""
        return self.problem.id, self.name


def _rows(lm: LM, prompts: Sequence[tuple[Problem, list[int]]], sampling: Sampling) -> list[_Row]:
    if not prompts:
        raise ValueError("No problems to sample from: the list is empty.")
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) for _, prompt in prompts)
    if context and longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={sampling.max_new_tokens} it does not fit the context of "
            f"{context} tokens. Lower max_new_tokens or leave that problem out."
        )
    pairs = product(prompts, range(sampling.n))
    return [_Row(place, problem, prompt, s, s) for place, ((problem, prompt), s) in enumerate(pairs)]


def _resumed(
    condition: Condition, rows: Sequence[_Row], sampling: Sampling, keep: tuple[Path, Mapping[str, Any]], progress: bool
) -> list[Rollout]:
    """Return the rollouts of all rows, in order. Only those that are not stored in a directory yet are sampled.

    Args:
        keep: Pair of the directory and the header that its rollouts must have.
    """
    out, header = keep
    with store.sampling_lock(out):
        stored = store.open_rollouts(out, {**header, "rollouts": len(rows)}, vocab=condition.lm.vocab_size)
        # A stored rollout's ``sample`` is the ``name`` of its row.
        done = _graded_again(condition.lm, rows, {(r.problem_id, r.sample): r for r in stored}, out)
        todo = [row for row in rows if row.key not in done]
        if len(todo) < len(rows):
            log.info("reusing %s of %s rollouts kept in %s", f"{len(rows) - len(todo):,}", f"{len(rows):,}", out)
        try:
            new = _sample(condition, todo, sampling, out, progress)
        except BaseException as stop:
            stop.add_note(f"{store.count_rollouts(out):,} of {len(rows):,} kept in {out}")
            raise
    return [new.get(row.place) or replace(done[row.key], sample=row.sample) for row in rows]


def _graded_again(
    lm: LM, rows: Sequence[_Row], stored: Mapping[tuple[str, int], Rollout], out: Path
) -> dict[tuple[str, int], Rollout]:
    """Return the stored rollouts of the rows, by ``_Row.key``, with spans and grades computed again. Write those that changed to the files.

    Args:
        stored: The stored rollouts, by the key of their row.
        out: Directory of the stored rollouts.

    Raises:
        store.WrongModelError: a stored rollout has another prompt than its row.
    """
    graded = {}
    for row in rows:
        if (r := stored.get(row.key)) is None:
            continue
        if list(r.token_ids[: r.prompt_len]) != row.prompt:
            raise store.WrongModelError(
                f"{out} holds a response to another prompt of problem {row.problem.id[:60]!r}. Choose another directory."
            )
        raw = _Raw(replace(row, sample=row.name), list(r.token_ids[r.prompt_len :]), r.finish, r.logprobs, r.entropies)
        graded[row.key] = _rollout(lm, raw)
    if changed := [r for key, r in graded.items() if r != stored[key]]:
        store.replace_rollouts(changed, out)
        log.warning(
            "%s of %s rollouts kept in %s are graded differently now: their files are rewritten", len(changed), len(graded), out
        )
    return graded


def _sample(condition: Condition, rows: Sequence[_Row], sampling: Sampling, out: Path | None, progress: bool) -> dict[int, Rollout]:
    """Sample all rows, and return a dict ``_Row.place -> rollout`` sorted by place. Finished batches are stored in ``out``, if given."""
    done: dict[int, Rollout] = {}
    # Prompts of similar length share a batch; the samples of one problem stay together.
    order = sorted(rows, key=lambda row: (len(row.prompt), row.problem.id, row.place))
    bar = tqdm(
        total=len(order), desc=f"rollouts {condition.lm.name}"[:40], unit="rollout", disable=not (progress and order), leave=False
    )

    def run(batch: Sequence[_Row]) -> None:
        with condition.active(), torch.inference_mode():
            raw = list(_decode(condition, batch, sampling))
        sampled = {r.row.place: _rollout(condition.lm, r) for r in raw}
        if out is not None:
            store.append_rollouts([replace(sampled[r.row.place], sample=r.row.name) for r in raw], out)
        done.update(sampled)
        bar.update(len(sampled))

    with bar:
        for batch in batches(order, lambda row: len(row.prompt), PREFILL_TOKENS, most=sampling.batch_size):
            halve_on_oom(batch, run)
    return dict(sorted(done.items()))


def _prompts(condition: Condition, problems: Sequence[Problem]) -> list[list[int]]:
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        repeated = min(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{len(ids) - len(set(ids))} problems share an id with another, such as {repeated!r}: ids must be unique.")
    return [condition.lm.prompt_ids(condition.ask(p.messages) if condition.ask else p.messages) for p in problems]


def task_and_split(problems: Iterable[Problem]) -> dict[str, Any]:
    """Return ``{"task": ..., "split": ...}``, the tasks and splits in the ``meta`` of some problems.

    Several values are joined by "+", as in ``"countdown+lookup"``. A key is left out if any problem has no value for it.
    """
    values = {name: sorted({str(p.meta.get(name, "")) for p in problems}) for name in ("task", "split")}
    return {name: "+".join(each) for name, each in values.items() if all(each)}


def _header(condition: Condition, questions: Sequence[Any], sampling: Sampling) -> dict[str, Any]:
    return {
        "model": condition.lm.name,
        "fingerprint": condition.lm.fingerprint,
        "interventions": identity.describe_interventions(condition),
        "eos_ids": sorted(condition.lm.eos_ids),
        "template": condition.lm.provenance().template_hash,
        **({"switches": dict(condition.lm.template)} if condition.lm.template else {}),
        "tags": asdict(condition.lm.tags) if condition.lm.tags else None,
        "problems": hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest(),
        "sampling": sampling.identity,
    }


@dataclass(frozen=True)
class _Raw:
    """One sampled response, without spans and grade yet. ``finish``, ``logprobs`` and ``entropies`` are the fields of ``Rollout``."""

    row: _Row
    tokens: list[int]
    finish: Finish
    logprobs: Sequence[float] | None
    entropies: Sequence[float] | None


class _Rules:
    """Applies the decoding rules of a condition to one batch. A rule may replace a drawn token by one or more other tokens.

    If there are rules, every row of the batch has a reader and a queue. The reader (``spans.Reader``) knows the phase of the row's response
    (prompt, think or answer). The queue holds tokens that a rule has returned and that are still to be placed.
    """

    def __init__(self, condition: Condition, prompts: Sequence[list[int]]) -> None:
        self.lm, self.rules = condition.lm, condition.rules
        self.readers = [Reader(self.lm, prompt) for prompt in prompts] if self.rules else []
        self.queues: list[list[int]] = [[] for _ in self.readers]

    def __call__(self, tokens: Int[Tensor, " rows"], alive: Sequence[int]) -> Int[Tensor, " rows"]:
        """Return one token per row to append to its response: the drawn token, or one that a rule has put in its place.

        Args:
            tokens: The drawn tokens, one per row that is still decoded. Returned unchanged if there are no rules.
            alive: Index of each of these rows in the original batch.
        """
        if not self.rules:
            return tokens
        placed = [self._one(token, self.readers[row], self.queues[row]) for token, row in zip(tokens.tolist(), alive, strict=True)]
        return torch.tensor(placed, device=tokens.device)

    def _one(self, token: int, reader: Reader, queue: list[int]) -> int:
        # A rule may place several tokens: they wait in the row's queue, and no rule is called until it is empty.
        if not queue:
            instead = next((tokens for rule in self.rules if (tokens := rule(self.lm, reader, token))), None)
            reader.forced += instead is not None
            queue += instead or [token]
        reader.push(queue[0])
        return queue.pop(0)


def _decode(condition: Condition, rows: Sequence[_Row], sampling: Sampling) -> Iterator[_Raw]:
    """Decode one left-padded batch with a KV cache. Yield each response when its row leaves the batch.

    A row has two indices, since ended rows leave the batch. Its original index in ``rows`` is used by ``drawn``, ``details`` and the random
    numbers. Its current place in the batch is used by ``logits``, ``tokens``, ``ended`` and the cache. ``alive`` (and ``at``, its copy on
    the device) maps the current place to the original index.
    """
    lm, budget = condition.lm, sampling.max_new_tokens
    rules = _Rules(condition, [row.prompt for row in rows])
    streams = Streams([(row.problem.id, row.sample) for row in rows], sampling.seed)
    cache, logits, mask = prefill(lm, [row.prompt for row in rows])
    batch = Batch(lm, cache, mask, budget)
    eos = torch.tensor(sorted(lm.eos_ids), device=mask.device)

    # Everything drawn stays on the device until its row leaves, so a step needs no synchronisation.
    drawn = torch.zeros(len(rows), budget, dtype=torch.long, device=mask.device)
    details = torch.zeros(2, *drawn.shape, device=mask.device) if sampling.details else None
    ended = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    alive = list(range(len(rows)))  # original indices, in the order of the batch
    at = torch.arange(len(rows), device=mask.device)  # the same, on the device
    check_every = COMPACT_EVERY if mask.device.type != "cpu" else 1
    for step in range(budget):
        # 1. Draw one token per row; a rule may place another one.
        choice, scores = draw(logits, streams.at(step, alive, at), sampling)
        tokens = rules(choice, alive)

        # 2. Record the token, and its log-probability and entropy.
        drawn[at, step] = tokens
        if details is not None and scores is not None:
            scores[0] = scores[0].where(tokens == choice, 0.0)  # a token that a rule placed has probability 1, so log-probability 0
            details[:, at, step] = scores

        # 3. Every few steps, check which rows have ended. If enough have, yield them and shrink the batch. Until then they are decoded
        #    further, and _raw cuts off the tokens after their end.
        ended = ended | torch.isin(tokens, eos)
        last = step + 1 == budget
        if last or (step + 1) % check_every == 0:
            left = [i for i, e in zip(range(len(alive)), ended.tolist(), strict=True) if not e]
            if last or not left or len(left) <= COMPACT_BELOW * len(alive):
                gone = range(len(alive)) if last else sorted({*range(len(alive))} - {*left})
                yield from (_raw(rows, alive[i], drawn, details, step + 1, lm.eos_ids) for i in gone)
                if last or not left:
                    return
                left = batch.keep(left)  # the batch may reorder its rows
                index = torch.tensor(left, device=mask.device)
                tokens, ended, at = tokens[index], ended[index], at[index]
                alive = [alive[i] for i in left]

        # 4. Feed the tokens to the model; its logits are those of the next step.
        with batch.acting():
            logits = batch.step(tokens)


def _raw(rows: Sequence[_Row], row: int, drawn: Tensor, details: Tensor | None, steps: int, eos_ids: frozenset[int]) -> _Raw:
    """Return the response of one row: its tokens up to and including the first end-of-sequence token, with their details.

    Args:
        row: Original index of the row.
        drawn: Tokens of all rows, ``[rows, steps]``.
        details: Log-probabilities and entropies, ``[2, rows, steps]``, or ``None``.
        steps: Number of decoding steps so far.
        eos_ids: Token ids that end a response.
    """
    tokens = drawn[row, :steps].tolist()
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    stop = ends[0] + 1 if ends else steps
    scores = details[:, row, :stop].tolist() if details is not None else (None, None)
    return _Raw(rows[row], tokens[:stop], "stop" if ends else "length", *scores)


def _rollout(lm: LM, raw: _Raw) -> Rollout:
    problem, prompt = raw.row.problem, raw.row.prompt
    ids = prompt + raw.tokens
    think, answer = spans(lm, ids, len(prompt), ended=raw.finish == "stop")
    # If the prompt already holds the beginning of the answer (a message that is continued), the whole answer is graded.
    answer_text = lm.text(ids[answer_start(lm, ids, len(prompt), answer) : answer.stop], special=False) if answer else ""
    return Rollout(
        problem_id=problem.id,
        sample=raw.row.sample,
        token_ids=tuple(ids),
        prompt_len=len(prompt),
        think=think,
        answer=answer,
        finish=raw.finish,
        text=lm.text(raw.tokens),
        correct=answer is not None and grade(problem, answer_text),
        logprobs=tuple(raw.logprobs) if raw.logprobs else None,
        entropies=tuple(raw.entropies) if raw.entropies else None,
    )
