"""Sampling: ``rollouts(condition, problems, sampling) -> [Rollout]``; ``continued`` goes on from token ids instead of prompts.
Spans, finish, grade and length are fixed here, once.

Each rollout draws from its own stream of random numbers, keyed by (seed, problem id, sample): it comes out the same whatever the
batch size, the order of the problems, or the rows beside it. Finished rows leave the batch. Samples of a problem share one prefill.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from toolkit import identity, store
from toolkit.decode import Batch
from toolkit.lm import LM, Condition, halve_on_oom
from toolkit.phases import Reader, answer_start, spans
from toolkit.tasks.grading import grade
from toolkit.types import Finish, Problem, Rollout

log = logging.getLogger(__name__)
COMPACT_EVERY = 8  # on a GPU, decode steps between looks at which rows have finished: one synchronisation each; on a CPU each step
KEPT = 0.95  # finished rows leave when no more than this share of a batch goes on: to leave copies the cache of the others
PREFILL_TOKENS = 16384  # padded prompt tokens of a batch: a longer cache costs more to extend than more rows save


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        n: Samples a problem.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps everything.
        top_k: 0 keeps everything.
        max_new_tokens: Budget of a response, think tags and end-of-sequence included.
        seed: Seed of every stream.
        details: Whether to keep log-probabilities and full-softmax entropies.
        batch_size: Rows decoded together (halved when memory runs out); never changes what is sampled.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0
    details: bool = False
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"n={self.n}, max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size}: all must be at least 1."
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}: "
                "need temperature >= 0, 0 < top_p <= 1, top_k >= 0."
            )

    @property
    def identity(self) -> dict:
        """Everything that decides what is sampled (the batch size does not)."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}


def rollouts(
    target: LM | Condition,
    problems: Sequence[Problem],
    sampling: Sampling = Sampling(),
    *,
    out: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Rollout]:
    """Sample ``sampling.n`` responses to every problem, ordered by problem and sample.

    Args:
        target: A model, or a condition whose interventions act in prefill and decode.
        out: Directory to stream finished batches to (parquet parts). The same call given again after a stop goes on; its header must
            match, and what is kept is graded again. If another process samples into it, this one waits and takes what that one finished.
        about: ``task``, ``split`` and ``seed`` of the problems for the header of ``out``; default: what the problems' meta tells.

    Raises:
        ValueError: no problems, two problems with one id, no chat template, or a prompt that leaves no room in the context.
        store.WrongModelError: ``out`` holds rollouts of another model, sampling or problem set.
        store.DamagedFileError: ``out`` holds a file that cannot be rollouts of this model.
    """
    condition = target if isinstance(target, Condition) else Condition(target)
    rows = _rows(condition.lm, list(zip(problems, _prompts(condition, problems), strict=True)), sampling)
    if out is None:
        return list(_sample(condition, rows, sampling, None, progress).values())
    asked = [(p.id, [dict(m) for m in p.messages], p.answer) for p in problems]
    return _kept(
        condition, rows, sampling, (Path(out), _header(condition, asked, sampling) | dict(about or facts(problems))), progress
    )


def continued(
    target: LM | Condition,
    prompts: Sequence[tuple[Problem, Sequence[int]]],
    sampling: Sampling = Sampling(),
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> list[Rollout]:
    """Go on from token ids instead of a chat prompt: ``sampling.n`` responses to each, graded by its problem, in the order given.

    The random numbers are those of :func:`rollouts`: prompts of one problem share them, so that only what was changed in a prompt
    differs. A condition's interventions and rules act; its change of the prompt does not. ``prompt_len`` of a result counts all the
    given tokens. As in any prompt the last tag in the assistant's turn counts: after a closing one the think span is empty and the response
    is the answer; after an opening one the response goes on thinking. ``out`` is as in :func:`rollouts`; in its files ``sample`` is the
    place among all responses that were asked for.

    Raises:
        ValueError: no prompts, one without tokens or with ids the model does not have, or one that leaves no room in the context.
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
    asked = [(problem.id, list(ids), problem.answer) for problem, ids in prompts]
    named = [replace(row, name=row.place) for row in rows]
    return _kept(condition, named, sampling, (Path(out), _header(condition, asked, sampling)), progress)


def graded(lm: LM, problem: Problem, prompt: list[int], tokens: list[int], *, sample: int = 0) -> Rollout:
    """A rollout from tokens that another engine drew: spans, finish and grade are fixed as for our own."""
    finish: Finish = "stop" if tokens and tokens[-1] in lm.eos_ids else "length"
    return _rollout(lm, _Raw(_Row(0, problem, prompt, sample, sample), tokens, finish, None, None))


@dataclass(frozen=True)
class _Row:
    """A response to sample: its place among all that were asked for, its problem, the tokens it goes on from, its sample index, and
    the number that it has among the kept rollouts of its problem."""

    place: int
    problem: Problem
    prompt: list[int]
    sample: int
    name: int

    @property
    def key(self) -> tuple[str, int]:
        """Names it among the rollouts of a directory."""
        return self.problem.id, self.name


def _rows(lm: LM, asked: Sequence[tuple[Problem, list[int]]], sampling: Sampling) -> list[_Row]:
    if not asked:
        raise ValueError("No problems to sample from: the list is empty.")
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) for _, prompt in asked)
    if context and longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={sampling.max_new_tokens} it does not fit the context of "
            f"{context} tokens. Lower max_new_tokens or leave that problem out."
        )
    pairs = product(asked, range(sampling.n))
    return [_Row(place, problem, prompt, s, s) for place, ((problem, prompt), s) in enumerate(pairs)]


def _kept(
    condition: Condition, rows: Sequence[_Row], sampling: Sampling, keep: tuple[Path, Mapping[str, Any]], progress: bool
) -> list[Rollout]:
    """The rollouts of all rows in their order. Those in the directory of ``keep``, under its header, are not sampled again."""
    out, header = keep
    with store.sampling_lock(out):
        there = store.open_rollouts(out, {**header, "rollouts": len(rows)}, vocab=condition.lm.vocab_size)
        done = _graded_again(condition.lm, rows, {(r.problem_id, r.sample): r for r in there}, out)
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
    lm: LM, rows: Sequence[_Row], kept: Mapping[tuple[str, int], Rollout], out: Path
) -> dict[tuple[str, int], Rollout]:
    """The kept rollouts of the rows. What was drawn stays; spans and grade are those of the present code and problems, in the files too.

    Raises:
        store.WrongModelError: one answers another prompt.
    """
    found = {}
    for row in rows:
        if (r := kept.get(row.key)) is None:
            continue
        if list(r.token_ids[: r.prompt_len]) != row.prompt:
            raise store.WrongModelError(
                f"{out} holds a response to another prompt of problem {row.problem.id[:60]!r}. Choose another directory."
            )
        raw = _Raw(replace(row, sample=row.name), list(r.token_ids[r.prompt_len :]), r.finish, r.logprobs, r.entropies)
        found[row.key] = _rollout(lm, raw)
    if changed := [r for key, r in found.items() if r != kept[key]]:
        store.replace_rollouts(changed, out)
        log.warning(
            "%s of %s rollouts kept in %s are graded otherwise now: their files are rewritten", len(changed), len(found), out
        )
    return found


def _sample(condition: Condition, rows: Sequence[_Row], sampling: Sampling, out: Path | None, progress: bool) -> dict[int, Rollout]:
    """The rollouts of all rows by place, in order; finished batches are appended to ``out``."""
    done: dict[int, Rollout] = {}
    # Prompts of like length share a batch; the samples of one problem stay together.
    order = sorted(rows, key=lambda row: (len(row.prompt), row.problem.id, row.place))
    bar = tqdm(
        total=len(order), desc=f"rollouts {condition.lm.name}"[:40], unit="rollout", disable=not (progress and order), leave=False
    )

    def run(batch: Sequence[_Row]) -> None:
        with condition.active(), torch.inference_mode():
            raw = list(_decode(condition, batch, sampling))
        found = {r.row.place: _rollout(condition.lm, r) for r in raw}
        if out is not None:
            store.append_rollouts([replace(found[r.row.place], sample=r.row.name) for r in raw], out)
        done.update(found)
        bar.update(len(found))

    with bar:
        for batch in batches(order, lambda row: len(row.prompt), PREFILL_TOKENS, most=sampling.batch_size):
            halve_on_oom(batch, run)
    return dict(sorted(done.items()))


def batches(items: Sequence[Any], length: Callable[[Any], int], tokens: int, *, most: int | None = None) -> list[list[Any]]:
    """Cut items sorted by length into batches of at most ``tokens`` padded tokens and ``most`` items (at least one each)."""
    found: list[list[Any]] = []
    for item in items:
        last = found[-1] if found else None
        if last and (len(last) + 1) * length(item) <= tokens and (most is None or len(last) < most):
            last.append(item)
        else:
            found.append([item])
    return found


def _prompts(condition: Condition, problems: Sequence[Problem]) -> list[list[int]]:
    ids = [p.id for p in problems]
    if len(set(ids)) < len(ids):
        repeated = min(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{len(ids) - len(set(ids))} problems share an id with another, such as {repeated!r}: ids must be unique.")
    return [condition.lm.prompt_ids(condition.ask(p.messages) if condition.ask else p.messages) for p in problems]


def facts(problems: Iterable[Problem]) -> dict[str, Any]:
    """``task`` and ``split`` of problems, as far as their meta tells; several are joined by +."""
    told = {name: sorted({str(p.meta.get(name, "")) for p in problems}) for name in ("task", "split")}
    return {name: "+".join(values) for name, values in told.items() if all(values)}


def _header(condition: Condition, asked: Sequence[Any], sampling: Sampling) -> dict[str, Any]:
    return {
        "model": condition.lm.name,
        "fingerprint": condition.lm.fingerprint,
        "interventions": identity.describe_interventions(condition),
        "eos_ids": sorted(condition.lm.eos_ids),
        "template": condition.lm.provenance().template_hash,
        **({"switches": dict(condition.lm.template)} if condition.lm.template else {}),
        "tags": asdict(condition.lm.tags) if condition.lm.tags else None,
        "problems": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "sampling": sampling.identity,
    }


@dataclass(frozen=True)
class _Raw:
    row: _Row
    tokens: list[int]
    finish: Finish
    logprobs: Sequence[float] | None
    entropies: Sequence[float] | None


class _Streams:
    """Uniform numbers of each row, drawn from its own counter-based generator in blocks."""

    BLOCK = 256

    def __init__(self, keys: Sequence[tuple[str, int]], seed: int) -> None:
        digests = [hashlib.sha256(f"{seed}|{problem}|{sample}".encode()).digest() for problem, sample in keys]
        self.generators = [np.random.Generator(np.random.Philox(key=int.from_bytes(d[:16], "big"))) for d in digests]
        self.block: Tensor | None = None

    def at(self, step: int, rows: Sequence[int], at: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The step's numbers for the given original rows, which ``at`` holds on the device (steps are asked for in order, rows only
        ever leave)."""
        if step % self.BLOCK == 0:
            drawn = np.zeros((self.BLOCK, len(self.generators)))
            for row in rows:
                drawn[:, row] = self.generators[row].random(self.BLOCK)
            self.block = torch.from_numpy(drawn).to(at.device, torch.float32)
        assert self.block is not None
        return self.block[step % self.BLOCK].index_select(0, at)


class _Rules:
    """The rules of a condition at work on a batch: what they place instead of the tokens drawn."""

    def __init__(self, condition: Condition, prompts: Sequence[list[int]]) -> None:
        self.lm, self.rules = condition.lm, condition.rules
        self.readers = [Reader(self.lm, prompt) for prompt in prompts] if self.rules else []
        self.queues: list[list[int]] = [[] for _ in self.readers]

    def __call__(self, tokens: Int[Tensor, " rows"], alive: Sequence[int]) -> Int[Tensor, " rows"]:
        """The tokens placed for the original rows ``alive``; the same tensor if there are no rules."""
        if not self.rules:
            return tokens
        placed = [self._one(token, self.readers[row], self.queues[row]) for token, row in zip(tokens.tolist(), alive, strict=True)]
        return torch.tensor(placed, device=tokens.device)

    def _one(self, token: int, reader: Reader, queue: list[int]) -> int:
        if not queue:
            instead = next((found for rule in self.rules if (found := rule(self.lm, reader, token))), None)
            reader.forced += instead is not None
            queue += instead or [token]
        reader.push(queue[0])
        return queue.pop(0)


def _decode(condition: Condition, rows: Sequence[_Row], sampling: Sampling) -> Iterator[_Raw]:
    """Decode one batch with a KV cache, left padded; yields rows as they leave the batch."""
    lm, budget = condition.lm, sampling.max_new_tokens
    rules = _Rules(condition, [row.prompt for row in rows])
    alive = list(range(len(rows)))
    streams = _Streams([(row.problem.id, row.sample) for row in rows], sampling.seed)
    cache, logits, mask = prefill(lm, [row.prompt for row in rows])
    batch = Batch(lm, cache, mask, budget)
    eos = torch.tensor(sorted(lm.eos_ids), device=mask.device)
    drawn = torch.zeros(len(rows), budget, dtype=torch.long, device=mask.device)
    details = torch.zeros(2, *drawn.shape, device=mask.device) if sampling.details else None
    ended = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    at = torch.arange(len(rows), device=mask.device)
    look = COMPACT_EVERY if mask.device.type != "cpu" else 1
    for step in range(budget):
        choice, scores = draw(logits, streams.at(step, alive, at), sampling)
        tokens = rules(choice, alive)
        drawn[at, step] = tokens
        if details is not None and scores is not None:
            scores[0] = scores[0].where(tokens == choice, 0.0)  # a forced token is certain
            details[:, at, step] = scores
        ended = ended | torch.isin(tokens, eos)
        last = step + 1 == budget
        if last or (step + 1) % look == 0:
            left = [i for i, e in zip(range(len(alive)), ended.tolist(), strict=True) if not e]
            if last or not left or len(left) <= KEPT * len(alive):
                gone = range(len(alive)) if last else sorted({*range(len(alive))} - {*left})
                yield from (_raw(rows, alive[i], drawn, details, step + 1, lm.eos_ids) for i in gone)
                if last or not left:
                    return
                left = batch.keep(left)
                index = torch.tensor(left, device=mask.device)
                tokens, ended, at = tokens[index], ended[index], at[index]
                alive = [alive[i] for i in left]
        with batch.acting():
            logits = batch.step(tokens)


def prefill(lm: LM, prompts: Sequence[list[int]]) -> tuple[DynamicCache, Float[Tensor, "rows vocab"], Int[Tensor, "rows width"]]:
    """Prefill each distinct prompt once; cache, next-token logits and mask are repeated for its samples."""
    first: dict[tuple[int, ...], int] = {}
    which = [first.setdefault(tuple(p), len(first)) for p in prompts]
    width = max(map(len, prompts))
    ids = torch.full((len(first), width), lm.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for prompt, row in first.items():
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = DynamicCache(config=lm.model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # By index and not as a slice: torch multiplies a slice of a bf16 sequence as a batch, with a copy of the LM head for every row.
    last = torch.tensor([width - 1], device=lm.device)
    out = lm.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last
    )
    index = torch.tensor(which, device=lm.device)
    cache.batch_select_indices(index)
    return cache, out.logits[:, -1][index], mask[index]


def draw(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], sampling: Sampling
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "2 rows"] | None]:
    """Draw one token a row by inverting the cumulative distribution at ``uniform``.

    Returns the tokens and, if ``sampling.details``, their log-probability under the (truncated) sampling distribution
    and the entropy in nats of the full softmax at the sampling temperature (at temperature 1 when greedy).
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logp = torch.log_softmax(scaled, dim=-1)
    probs = logp.exp()
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        kept = _truncated(probs, sampling)
        cdf = kept.cumsum(dim=-1)
        total = cdf[:, -1:]
        # Rounding must not push the target to the total, past the last token that can be drawn.
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cdf, target, right=True).squeeze(1)
        if kept is not probs:
            logp = torch.where(kept > 0, logp, -torch.inf) - total.log()
    if not sampling.details:
        return tokens, None
    chosen = logp.gather(1, tokens[:, None]).squeeze(1)
    return tokens, torch.stack([chosen, torch.special.entr(probs).sum(dim=-1)])


def _truncated(probs: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    # A token stays if the mass before it is still below top_p, so the first always stays.
    ordered = ordered * keep
    keep &= (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True) < sampling.top_p
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep)


def _raw(rows: Sequence[_Row], row: int, drawn: Tensor, details: Tensor | None, steps: int, eos_ids: frozenset[int]) -> _Raw:
    tokens = drawn[row, :steps].tolist()
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    stop = ends[0] + 1 if ends else steps
    kept = details[:, row, :stop].tolist() if details is not None else (None, None)
    return _Raw(rows[row], tokens[:stop], "stop" if ends else "length", *kept)


def _rollout(lm: LM, raw: _Raw) -> Rollout:
    problem, prompt = raw.row.problem, raw.row.prompt
    ids = prompt + raw.tokens
    think, answer = spans(lm, ids, len(prompt), ended=raw.finish == "stop")
    # An answer that a continued message begins is graded whole.
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
