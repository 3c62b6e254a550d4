"""Sample responses to problems (``rollouts``), or continuations of token ids (``continuations``), and set their spans and grades.

An engine (``engines``) samples the tokens: the toolkit's own loop, or a server. Spans and grades are set in the same way for all engines.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from toolkit import identity, store
from toolkit.engines import OWN_LOOP, Engine, EngineError, Request, Response, Session
from toolkit.lm import LM, Condition
from toolkit.progress import stage
from toolkit.sampling import Sampling
from toolkit.spans import answer_start, spans
from toolkit.tasks.grading import grade
from toolkit.types import Finish, Problem, Rollout, Span, runs_of

__all__ = ["Sampling", "continuations", "rollout_from_tokens", "rollouts", "task_and_split"]

log = logging.getLogger(__name__)


def rollouts(
    target: LM | Condition,
    problems: Sequence[Problem],
    sampling: Sampling = Sampling(),
    *,
    engine: Engine = OWN_LOOP,
    out: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> list[Rollout]:
    """Sample ``sampling.n`` responses to every problem. Return them in the order of the problems; samples of one problem are adjacent.

    Args:
        target: A model or a condition (see ``lm.Condition``). All parts of a condition apply: its interventions (in prefill and decoding),
            its decoding rules and its change of the prompt.
        engine: Program that samples the tokens: by default the toolkit's own loop. ``engines.connect`` returns others.
        out: Directory in which responses are stored as parquet files, in parts, while others are sampled (see ``engines.loop``); ``None``
            to store nothing. An error or Ctrl-C stops the run after all responses that have ended are stored; a killed process loses those
            of the current part. To resume after a stop, repeat the same call: stored rollouts are graded again, but not sampled again. If
            another process samples into the directory, this call waits.
        about: Dict with the ``task``, ``split`` and ``seed`` of the problems, to store with the rollouts in ``out``. Default: task and
            split from the problems' ``meta``.
        progress: True to show a progress bar; a text is its name.

    Raises:
        ValueError: no problems, two problems with the same id, no chat template, or a prompt that together with
            ``sampling.max_new_tokens`` exceeds the model's context.
        store.WrongModelError: ``out`` holds rollouts of another model, other sampling settings or other problems.
        store.DamagedFileError: ``out`` holds a damaged file, or rollouts with token ids that this model does not have.
        engines.EngineError: the engine cannot sample this condition, or stopped answering.
    """
    condition = target if isinstance(target, Condition) else Condition(target)
    rows = _rows(condition.lm, list(zip(problems, _prompts(condition, problems), strict=True)), sampling)
    engine.check(condition, sampling)

    def begin() -> Session:
        return engine.session(condition, [row.request for row in rows], sampling)

    if out is None:
        return list(_sample(condition.lm, rows, begin(), None, progress).values())
    questions = [(p.id, [dict(m) for m in p.messages], p.answer) for p in problems]
    header = _header(condition, questions, sampling) | dict(engine.header) | dict(about or task_and_split(problems))
    return _resumed(condition.lm, rows, begin, (Path(out), header), progress)


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
        out: Directory in which responses are stored, as in ``rollouts``; ``None`` to store nothing. To resume after a stop, repeat the same
            call. In the returned rollouts, ``Rollout.sample`` is the index among the samples of one prompt. In the stored files it is the
            index among all responses of the call, because several prompts may have the same problem.
        progress: True to show a progress bar; a text is its name.

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
    session = OWN_LOOP.session(condition, [row.request for row in rows], sampling)
    if out is None:
        return list(_sample(condition.lm, rows, session, None, progress).values())
    questions = [(problem.id, list(ids), problem.answer) for problem, ids in prompts]
    numbered = [replace(row, name=row.place) for row in rows]
    return _resumed(condition.lm, numbered, lambda: session, (Path(out), _header(condition, questions, sampling)), progress)


def begin_session(target: LM | Condition, problems: Sequence[Problem], sampling: Sampling, engine: Engine) -> Session:
    """Run the checks of ``rollouts``, and return the engine's session, ready to sample. The arguments are those of ``rollouts``."""
    condition = target if isinstance(target, Condition) else Condition(target)
    rows = _rows(condition.lm, list(zip(problems, _prompts(condition, problems), strict=True)), sampling)
    return engine.session(condition, [row.request for row in rows], sampling)


def rollout_from_tokens(
    lm: LM, problem: Problem, prompt: list[int], tokens: list[int], *, sample: int = 0, written: Sequence[int] | None = None
) -> Rollout:
    """Return a ``Rollout`` for a response that was sampled by another program, such as vLLM. Spans and grade are set as in ``rollouts``.

    ``finish`` is ``"stop"`` if the last token is an end-of-sequence token, else ``"length"``. ``logprobs`` and ``entropies`` are ``None``.

    Args:
        lm: The model from which the response was sampled. Its tokenizer and think tags are used.
        problem: The problem that the response answers; used to grade it.
        prompt: Token ids of the prompt.
        tokens: Token ids of the response, with the end-of-sequence token if one was sampled.
        sample: Index of the response among the samples of the problem.
        written: For each token of the response, 1 if the model wrote it and 0 if it belongs to a tool result, as TRL's ``tool_mask``.
            ``None``: the model wrote all of them.

    Raises:
        ValueError: ``written`` has another length than ``tokens``, or the response begins with a tool result.
    """
    if written is not None and (len(written) != len(tokens) or not all(written[:1])):
        raise ValueError(f"written has {len(written)} numbers for {len(tokens)} tokens, expected one per token, the first 1.")
    finish: Finish = "stop" if tokens and tokens[-1] in lm.eos_ids else "length"
    results = tuple(runs_of(written or (), 0))
    return _rollout(lm, _Row(0, problem, prompt, sample, sample), Response(tokens, finish, results=results))


@dataclass(frozen=True)
class _Row:
    """A response to sample.

    Attributes:
        place: Index among all responses of the call.
        problem: The problem that the response answers.
        prompt: Token ids that the response continues.
        sample: Index among the samples of the problem (in ``continuations``: of the prompt). The random numbers depend on it.
        name: Index that is stored as ``Rollout.sample`` in files. In a call of ``rollouts`` it equals the attribute ``sample``. In a call
            of ``continuations`` it equals ``place``, because two prompts of one problem have samples with the same index.
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

    @property
    def request(self) -> Request:
        """The ``Request`` that is passed to an engine to sample this response."""
        return Request(self.prompt, self.problem.id, self.sample)


def _rows(lm: LM, prompts: Sequence[tuple[Problem, list[int]]], sampling: Sampling) -> list[_Row]:
    if not prompts:
        raise ValueError("No problems to sample from: the list is empty.")
    context = lm.context
    longest = max(len(prompt) for _, prompt in prompts)
    if context and longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={sampling.max_new_tokens} it does not fit the context of "
            f"{context} tokens of {lm.name}. Lower max_new_tokens (--max-new-tokens) or leave that problem out."
        )
    pairs = product(prompts, range(sampling.n))
    return [_Row(place, problem, prompt, s, s) for place, ((problem, prompt), s) in enumerate(pairs)]


def _resumed(
    lm: LM, rows: Sequence[_Row], begin: Callable[[], Session], keep: tuple[Path, Mapping[str, Any]], progress: bool | str
) -> list[Rollout]:
    """Return the rollouts of all rows, in order. Only those that are not stored in a directory yet are sampled.

    Args:
        lm: The model.
        rows: The responses to sample.
        begin: Function that returns the engine's session. It is called only if something is left to sample.
        keep: Pair ``(directory, header)``: where rollouts are stored, and a dict of what they depend on, such as model, problems and
            sampling settings. ``store.open_rollouts`` says when stored rollouts fit the header.
        progress: True to show a progress bar.
    """
    out, header = keep
    with store.sampling_lock(out):
        stored = store.open_rollouts(out, {**header, "rollouts": len(rows)}, vocab=lm.vocab_size)
        # A stored rollout's ``sample`` is the ``name`` of its row.
        done = _graded_again(lm, rows, {(r.problem_id, r.sample): r for r in stored}, out)
        todo = [row for row in rows if row.key not in done]
        if len(todo) < len(rows):
            log.info("reusing %s of %s rollouts kept in %s", f"{len(rows) - len(todo):,}", f"{len(rows):,}", out)
        try:
            new = _sample(lm, todo, begin(), out, progress) if todo else {}
        except BaseException as stop:
            stop.add_note(f"{store.count_rollouts(out):,} of {len(rows):,} kept in {out}")
            raise
    return [new.get(row.place) or replace(done[row.key], sample=row.sample) for row in rows]


def _graded_again(
    lm: LM, rows: Sequence[_Row], stored: Mapping[tuple[str, int], Rollout], out: Path
) -> dict[tuple[str, int], Rollout]:
    """Return the stored rollouts of the rows, by ``_Row.key``, with spans and grades computed again. Write those that changed to the files.

    Args:
        lm: The model, whose tokenizer and think tags are used.
        rows: The responses to sample.
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
        results = tuple(Span(s.start - r.prompt_len, s.stop - r.prompt_len) for s in r.results)
        response = Response(list(r.token_ids[r.prompt_len :]), r.finish, r.logprobs, r.entropies, results)
        graded[row.key] = _rollout(lm, replace(row, sample=row.name), response)
    if changed := [r for key, r in graded.items() if r != stored[key]]:
        store.replace_rollouts(changed, out)
        log.warning(
            "%s of %s rollouts kept in %s are graded differently now: their files are rewritten", len(changed), len(graded), out
        )
    return graded


def _sample(lm: LM, rows: Sequence[_Row], session: Session, out: Path | None, progress: bool | str) -> dict[int, Rollout]:
    """Sample all rows, and return a dict ``_Row.place -> rollout`` sorted by place. Finished batches are stored in ``out``, if given."""
    done: dict[int, Rollout] = {}
    short = lm.name.rstrip("/").rpartition("/")[2]  # of a directory or a hub id, the last part
    name = progress if isinstance(progress, str) else f"sampling {short}"[:40]
    bar = stage(name, len(rows), "rollout", show=bool(progress and rows))
    with bar:
        for batch in session.sample([row.request for row in rows], bar.update):
            sampled = {rows[i].place: _rollout(lm, rows[i], response) for i, response in batch}
            if out is not None:
                store.append_rollouts([replace(sampled[rows[i].place], sample=rows[i].name) for i, _ in batch], out)
            done.update(sampled)
    if len(done) < len(rows):
        raise EngineError(f"{len(rows) - len(done)} of {len(rows)} responses did not come. Repeat the call.")
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
        **({"switches": condition.lm.switches} if condition.lm.switches else {}),
        "tags": asdict(condition.lm.tags) if condition.lm.tags else None,
        "problems": hashlib.sha256(json.dumps(questions, sort_keys=True).encode()).hexdigest(),
        "sampling": sampling.identity,
    }


def _rollout(lm: LM, row: _Row, response: Response) -> Rollout:
    problem, prompt = row.problem, row.prompt
    ids = prompt + response.tokens
    results = tuple(Span(len(prompt) + s.start, len(prompt) + s.stop) for s in response.results)
    think, answer = spans(lm, ids, len(prompt), ended=response.finish == "stop", results=results)
    # If the prompt already holds the beginning of the answer (a message that is continued), the whole answer is graded.
    answer_text = lm.text(ids[answer_start(lm, ids, len(prompt), answer) : answer.stop], special=False) if answer else ""
    return Rollout(
        problem_id=problem.id,
        sample=row.sample,
        token_ids=tuple(ids),
        prompt_len=len(prompt),
        think=think,
        answer=answer,
        finish=response.finish,
        text=lm.text(response.tokens),
        correct=answer is not None and grade(problem, answer_text),
        logprobs=tuple(response.logprobs) if response.logprobs else None,
        entropies=tuple(response.entropies) if response.entropies else None,
        results=results,
        after_results=lm.text(response.tokens[response.results[-1].stop :]) if results else "",
    )
