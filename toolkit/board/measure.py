"""Measure one condition with one seed: answer the board's problems, and compute every metric from the responses and the hidden states.

The ``Result`` consists of two tables and a dict:

* ``rows``: one row per response to a main problem. Metrics that are not means, such as quantiles, are computed from it.
* ``points``: one row per problem and metric, for metrics that are means over problems.
* ``about``: costs, a description of the condition, and how the condition shifts hidden states.

``metrics.METRICS`` describes every metric. Lengths are in tokens, entropies in nats per token, shares from 0 to 1. Four metrics are
explained here. The *length direction* is ThinkEdit's direction of thinking length (arXiv 2503.22048). Hidden states are taken at the end
of the residual stream, at the positions where a line of thinking begins.

* ``projection`` (units of the residual stream): component along the length direction of the hidden states in the thinking that the
  condition itself sampled; + is towards longer thinking.
* ``short_push`` (units of the residual stream): component of the summed output of certain heads along the length direction, times -1; + is
  towards shorter thinking. The heads are those that ThinkEdit edits. All conditions read the same responses of base.
* ``retrieved`` (share): share of prompts with hidden facts (haystacks) that are answered correctly.
* ``retrieval_write`` (logits): summed contribution of base's four top retrieval heads to the logit of a token that is retrieved from a
  haystack. All conditions read the same haystacks and answers of base.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor

from toolkit import collect, evaluate, hooks, identity, needles, stats, store
from toolkit.board.ground import Ground
from toolkit.board.spec import Spec
from toolkit.collect import MLP
from toolkit.exits import EarlyExit
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.finding import OURS, Finding
from toolkit.lm import LM, Condition
from toolkit.methods import code_stop, failed_steps, phase_entropy, retrieval_heads
from toolkit.methods.crest import HeadRotation
from toolkit.methods.rebalance import Confident
from toolkit.steering import Steering
from toolkit.tasks import haystack, running_sum
from toolkit.tasks.grading import execution
from toolkit.types import Problem, Rollout

ROWS, POINTS, ABOUT = "rows.parquet", "points.parquet", "about.json"
SAMPLED = "rollouts-"  # start of the name of a folder of rollouts, which exists only while a result is measured
# Columns, or keys, and their types that a saved file must have. They are checked when the file is read.
IN_ROWS = {
    "problem_id": str, "sample": int, "task": str, "correct": bool, "think_tokens": int, "response_tokens": int, "closed": bool,
    "looping": bool, "leaking": bool, "finish": str, "no_think": bool,
}  # fmt: skip
IN_POINTS = {"metric": str, "problem_id": str, "value": float}
IN_SHIFT = dict.fromkeys(("cosine", "low", "high", "random", "size"), float)
IN_ABOUT = {
    "name": str, "seed": int, "model": str, "fingerprint": str, "parent": str | None, "interventions": list[str], "tokens": int,
    "seconds": float | None, "parameters_changed": int, "training_steps": int, "shift": Mapping[str, float],
}  # fmt: skip
GREEDY = Sampling(temperature=0.0, max_new_tokens=120)  # sampling settings for haystacks
PERMUTED = 500  # number of differences between random groups with which a cosine is compared: our choice
WRITERS = 4  # number of retrieval heads in ``retrieval_write``: our choice


@dataclass(frozen=True)
class Result:
    """Result of one condition with one seed.

    Attributes:
        rows: One row per response to a main problem. It has the columns of ``evaluate.rollout_table`` and:

            * ``no_think``: True if the response has no think token.
            * ``think_entropy, answer_entropy``: mean token entropy of thinking and of the answer, nats.
            * ``failed``: share of the steps of thinking that are wrong or were abandoned (see ``methods.failed_steps``).
            * ``review``: share of the thinking's characters that belong to re-checks of earlier steps. Both are NaN if there is no step.
            * ``answer``: text of the answer; ``None`` if the response has none.
            * ``text``: text of the response, for the first sample of each problem; else ``None``.
        points: One row per problem and metric, with the columns ``metric, problem_id, value``.
        about: Description and costs, with the keys:

            * ``name, seed``: the condition and its seed.
            * ``model``: name of the condition's model. ``fingerprint``: hash of its weights and config. ``parent``: fingerprint of the
              model that it was edited or trained from, or ``None``. ``interventions``: texts that describe what acts on the model.
            * ``tokens``: total length of all responses to the main problems. ``seconds``: time to sample them; ``None`` if sampling was
              stopped and resumed. On a GPU, this is wall-clock time. On a CPU, it is the CPU time of the process.
            * ``parameters_changed``: number of weights that differ from base, and of entries of vectors that steer.
              ``training_steps``: optimizer steps, 0 without training.
            * ``shift``: shift of hidden states (see ``References.shift``).
            * ``made_by``: version of the toolkit and hash of the code.
    """

    rows: pd.DataFrame
    points: pd.DataFrame
    about: Mapping[str, Any]


def read_result(ground: Ground, spec: Spec, seed: int) -> Result | None:
    """Return the saved result of a condition and seed, or ``None`` if it was not measured. A damaged file raises DamagedFileError."""
    return read_folder(result_folder(ground, spec, seed))


def read_folder(folder: Path) -> Result | None:
    """Return the result that ``measure`` saved in a folder. Return ``None`` if the measurement was not completed.

    Raises:
        store.DamagedFileError: a file is damaged; the message says what to remove.
    """
    if not is_measured(folder):
        return None
    remedy = f"Remove {folder} and run the board again: only this result is measured anew."
    rows = store.read_table(folder / ROWS, IN_ROWS, remedy=remedy)
    about = store.read_json(folder / ABOUT, IN_ABOUT, remedy=remedy)
    if about["shift"]:  # empty if no hidden state changed
        store.checked(about["shift"], IN_SHIFT, f"{folder / ABOUT}, shift", remedy)
    return Result(rows, store.read_table(folder / POINTS, IN_POINTS, remedy=remedy), about)


def is_measured(folder: Path) -> bool:
    """Return True if the folder holds a complete result of ``measure``, that is, if the file that ``measure`` writes last exists."""
    return (folder / ABOUT).exists()


def rollouts_of_result(folder: Path) -> list[Path]:
    """Return the folders of rollouts in the folder of a result. ``measure`` removes them at its end; if it was stopped, they remain."""
    return list(folder.glob(f"*{SAMPLED}*"))  # the first * also finds those that are half removed, under a temporary name


def without_code_record(ground: Ground) -> list[Path]:
    """Return the folders of saved results without a record of the code that computed them.

    Older versions of the toolkit wrote no such record. The board does not use these results.
    """
    return [path.parent for path in (ground.out / "results").glob(f"*/{ABOUT}") if not path.with_name(store.MADE_BY).exists()]


def result_folder(ground: Ground, spec: Spec, seed: int) -> Path:
    """Return the folder of a result, named by its cache key. The folder may not exist yet."""
    return ground.out / "results" / spec.key(ground, seed)


def measure(ground: Ground, spec: Spec, seed: int, references: References) -> Path:
    """Measure one condition with one seed, save the result, and return its folder.

    If an earlier measurement was stopped, its saved responses are reused.

    Args:
        ground: Base model, sizes and output directory of the board.
        spec: The condition.
        seed: Random seed of the condition.
        references: Responses, hidden states and heads of base to compare with, from ``measure_references``.

    Raises:
        evaluate.OverlapError: some of the board's test problems were used to edit, steer or train the condition.
    """
    condition = spec.make(ground, seed)
    evaluate.check_held_out(
        {spec.name: condition},
        [*ground.problems, *ground.unseen],
        remedy="Leave it out, or make it from problems of the train split.",
    )
    basis = spec.basis(ground, seed, made=condition)
    folder = ground.out / "results" / basis.key
    # On a CPU, measure process time, so that other work on the machine does not count.
    clock = time.process_time if ground.lm.device.type == "cpu" else time.perf_counter
    began = clock()
    sampled = folder / f"{SAMPLED}{condition.lm.fingerprint[:12]}"
    uninterrupted = not sampled.exists()  # the folder of a stopped measurement is still there
    responses = ground.respond(condition, ground.problems, ground.sampling, out=sampled)
    seconds = clock() - began
    rows = _rows(condition, responses, ground.problems)
    parts = [_main_points(rows), _unseen(ground, condition), _mechanism(ground, condition, responses, references)]
    store.save_table(rows, folder / ROWS)
    store.save_table(pd.concat(parts, ignore_index=True), folder / POINTS)
    about = {
        "name": spec.name,
        "seed": seed,
        "model": condition.lm.name,
        "fingerprint": condition.lm.fingerprint,
        "parent": condition.lm.parent,
        "interventions": identity.describe_interventions(condition),
        "tokens": int(rows["response_tokens"].sum()),
        "seconds": round(seconds, 2) if uninterrupted else None,  # the time of a stopped process is unknown
        "parameters_changed": parameters_changed(ground.lm, condition),
        "training_steps": spec.steps(ground),
        "shift": references.shift(condition),
        "made_by": basis.made_by,
    }
    basis.write(folder)
    store.write_json(about, folder / ABOUT)  # written last: a folder with this file is complete
    store.remove(sampled)
    return folder


def _rows(condition: Condition, responses: Sequence[Rollout], problems: Sequence[Problem]) -> pd.DataFrame:
    """Return one row per response, with the columns that the attribute ``rows`` of ``Result`` lists."""
    lm = condition.lm
    table = evaluate.rollout_table(responses, problems, lm.tags)
    # Tokens of answers that a rule forces to decide on an exit are paid for, though no response shows them.
    for rule in (r for r in condition.rules if isinstance(r, EarlyExit) and isinstance(r.check, code_stop.CodeStop)):
        forced = [code_stop.probe_tokens(lm, rule, r) for r in responses]
        table = table.assign(**{name: table[name] + forced for name in ("think_tokens", "response_tokens")})
    entropies = phase_entropy.table(responses)
    chains = failed_steps.chains(lm, responses, problems, failed_steps.fitting)
    answers = [lm.text(r.token_ids[r.answer.start : r.answer.stop], special=False).strip() if r.answer else None for r in responses]
    return table.assign(
        no_think=[r.think_tokens == 0 for r in responses],
        think_entropy=entropies["think_entropy"],
        answer_entropy=entropies["answer_entropy"],
        # A response without a step has no share of failed steps: 0 would make a model that does not think look careful.
        failed=[failed_steps.failed_step_fraction(c) if c.texts else math.nan for c in chains],
        review=[failed_steps.review_ratio(c) if c.texts else math.nan for c in chains],
        answer=answers,
        text=[r.text if r.sample == 0 else None for r in responses],
    )


MEANS = {
    "accuracy": "correct", "think_tokens": "think_tokens", "response_tokens": "response_tokens", "looping": "looping",
    "leaking": "leaking", "no_think": "no_think",
    "think_entropy": "think_entropy", "answer_entropy": "answer_entropy", "failed_steps": "failed", "review": "review",
}  # fmt: skip
"""Metric -> column of ``Result.rows``. The value of the metric for a problem is the mean of that column over the problem's samples."""


def _main_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the part of ``Result.points`` that is computed from ``Result.rows``.

    Metrics: the keys of ``MEANS``; ``never_closed``, the share of responses that do not close their thinking; and, for every task,
    ``accuracy_TASK``, the accuracy on the problems of that task.
    """
    means = rows.groupby("problem_id", sort=False)[list(MEANS.values())].mean()
    values = {metric: means[column] for metric, column in MEANS.items()}
    values["never_closed"] = 1 - rows.groupby("problem_id", sort=False)["closed"].mean()
    task_of = rows.groupby("problem_id", sort=False)["task"].first()
    for task in sorted(set(task_of)):
        values[f"accuracy_{task}"] = values["accuracy"][task_of == task]
    return pd.concat([points(metric, series) for metric, series in values.items()], ignore_index=True)


def points(metric: str, values: pd.Series) -> pd.DataFrame:
    """Return the values of one metric as a table with the columns ``metric, problem_id, value``; NaN values are left out.

    Args:
        metric: Name of the metric.
        values: One value per problem, indexed by problem id.
    """
    present = values.dropna().astype(float)
    return pd.DataFrame({"metric": metric, "problem_id": present.index.astype(str), "value": present.to_numpy()})


def _unseen(ground: Ground, condition: Condition) -> pd.DataFrame:
    """Return the part of ``Result.points`` for the tasks ``Sizes.unseen``, answered with greedy decoding.

    The metric of every task is ``accuracy_TASK``. The task ``running_sum`` (chains of additions and subtractions) has two more:

    * ``running_sum_step``: share of right steps in a response. A step is right if its total follows from the previous total, even if the
      previous total is wrong.
    * ``running_sum_expected``: p^H, the probability that all H steps of a response are right if each is right with probability p. p is the
      share of right steps in all responses to the task. H is the number of steps in the response, at least 1.
    """
    sampling = Sampling(1, temperature=0.0, max_new_tokens=ground.sizes.unseen_tokens)
    responses = ground.respond(condition, ground.unseen, sampling)
    table = evaluate.rollout_table(responses, ground.unseen, condition.lm.tags).set_index("problem_id")
    parts = [points(f"accuracy_{task}", part["correct"]) for task, part in table.groupby("task", sort=False)]
    chains = {
        p.id: running_sum.read_rollout(condition.lm, r, p)
        for r, p in zip(responses, ground.unseen, strict=True)
        if p.meta.get("task") == "running_sum"
    }
    stated = {i: sum(y is not None for y in e.outputs) for i, e in chains.items()}  # number of steps with a result, per problem
    if any(stated.values()):
        # A chain of n steps is right with probability p^n if each step is right with probability p. p is pooled over all problems. A
        # response without steps counts as one step.
        p = execution.step_accuracy(list(chains.values())).mean
        parts.append(points("running_sum_step", pd.Series({i: e.step_accuracy for i, e in chains.items()})))
        parts.append(points("running_sum_expected", pd.Series({i: p ** max(n, 1) for i, n in stated.items()})))
    return pd.concat(parts, ignore_index=True)


def parameters_changed(base: LM, condition: Condition) -> int:
    """Return the number of weights that differ from those of ``base``, plus the entries, other than 0, of the vectors of interventions."""
    before = dict(base.model.named_parameters())
    pairs = ((before[name], weight) for name, weight in condition.lm.model.named_parameters())
    # Weights in the same memory are shared with base, so they are equal.
    weights = sum(int((a != b).sum()) for a, b in pairs if a.data_ptr() != b.data_ptr())
    vectors: list[Tensor] = []
    for act in condition.during:
        match act:
            case Steering(direction=v, layers=layers):
                vectors.append(v.vector if layers is None else v.vector[list(layers)])
            case Confident(direction=v, layer=layer):
                vectors.append(v.vector[layer])
            case HeadRotation(turns=turns):
                vectors += [turn.vector for turn in turns]
    return weights + sum(int(vector.count_nonzero()) for vector in vectors)


# --- mechanism ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class References:
    """Responses, hidden states and attention heads of base, with which the internals of every condition are compared.

    Every condition reads the same responses of base, teacher-forced. Hidden states are taken at the positions where a line of thinking
    begins, and averaged per response.

    Attributes:
        texts: Responses of base that every condition reads, to problems of the train split.
        haystacks: Prompts with hidden facts, from the test split.
        base_answers: Greedy responses of base to ``haystacks``.
        finding: Result of ``Ground.find_heads``: the direction of thinking length, and the heads that ThinkEdit (our form) edits because
            they write towards short thinking.
        writers: Base's four heads that add most to the logit of a token that is retrieved from a haystack, as pairs ``(layer, head)``.
        before: Mean hidden state of base in each text, at the end of the residual stream: ``[texts, d_model]``.
        problems: Problem id of each text.
        shuffled: Directions that occur by chance, as unit vectors: ``[draws, d_model]``. Each is the difference between the mean hidden
            states of two disjoint random groups of texts. Each group has a fifth of the texts.
    """

    texts: list[Rollout]
    haystacks: list[haystack.Haystack]
    base_answers: list[Rollout]
    finding: Finding
    writers: list[tuple[int, int]]
    before: ndarray
    problems: ndarray
    shuffled: ndarray

    @property
    def unit(self) -> torch.Tensor:
        """Unit vector of thinking length at the end of the residual stream, ``[d_model]``; + is towards longer thinking."""
        return self.finding.direction.unit()[-1].double()

    def shift(self, condition: Condition) -> dict[str, float]:
        """Measure how a condition shifts the hidden states at the end of the residual stream.

        Base and the condition read the same responses of base. The shift is the mean hidden state of the condition minus that of base, at
        the positions where a line of thinking begins.

        Args:
            condition: The condition to compare with base.

        Returns:
            A dict, empty if no hidden state changes.

            * ``cosine``: cosine between the shift and the direction of thinking length; + is towards longer thinking.
            * ``low, high``: 95 % interval of ``cosine`` over problems.
            * ``random``: bound for cosines that occur by chance. A ``cosine`` between ``-random`` and ``random`` may be chance. To compute
              the bound, the direction of thinking length is replaced 500 times by the difference between the mean hidden states of two
              random groups of responses. The bound is the 97.5 % quantile of the absolute cosine between the shift and such a difference.
            * ``size``: norm of the shift, divided by the norm of the direction of thinking length. This direction is the mean over long
              thinking minus the mean over short thinking, not normalised.
        """
        after, _ = _states(condition, self.texts)
        # ``which`` holds the index of each text's problem; ``moved`` the mean shift per problem, [problems, d_model].
        names, which = np.unique(self.problems, return_inverse=True)
        counts = np.bincount(which)[:, None]
        moved = np.stack([np.bincount(which, column) for column in (after - self.before).T], axis=1) / counts
        if np.abs(moved).max() < 1e-9:  # no change but rounding
            return {}
        u = self.unit.numpy()

        def cosine(index: ndarray) -> ndarray:
            # Each row of ``index`` is a resample of the problems; a row of ``weights`` makes its mean a weighted sum.
            weights = np.stack([np.bincount(row, minlength=len(names)) for row in index]) / len(names)
            mean = weights @ moved
            with np.errstate(invalid="ignore"):  # NaN where only problems were drawn in which nothing moved
                return mean @ u / np.linalg.norm(mean, axis=1)

        e = stats.bootstrap(cosine, len(names))
        mean = moved.mean(axis=0)
        chance = np.abs(self.shuffled @ (mean / np.linalg.norm(mean)))
        apart = float(self.finding.direction.norms[-1])  # distance between long and short thinking, in units of the residual stream
        return {
            "cosine": e.mean, "low": e.low, "high": e.high, "random": float(np.quantile(chance, 0.975)),
            "size": float(np.linalg.norm(mean)) / apart,
        }  # fmt: skip


def measure_references(ground: Ground) -> References:
    """Return the responses, hidden states and heads of base with which the internals of every condition are compared."""
    closed = [r for r in ground.sample() if r.think_tokens and r.closed]
    texts = reference_texts(closed, ground.sizes.texts)
    haystacks = ground.search(seed=1).haystacks(ground.lm, "test")  # the heads were found with seed 0 on the dev split
    before, problems = _states(Condition(ground.lm), texts)
    return References(
        texts=texts,
        haystacks=haystacks,
        base_answers=rollouts(ground.lm, [h.problem for h in haystacks], GREEDY, progress=False),
        finding=ground.find_heads(OURS),
        writers=ground.measure_retrieval().scores["write (ours)"].ranked()[:WRITERS],
        before=before,
        problems=problems,
        shuffled=_shuffled(before),
    )


def reference_texts(responses: Sequence[Rollout], count: int) -> list[Rollout]:
    """Return ``count`` responses, or all if there are fewer, evenly spaced: they are from problems throughout the list."""
    return [responses[i] for i in np.linspace(0, len(responses) - 1, min(len(responses), count)).astype(int)]


def _states(condition: Condition, texts: Sequence[Rollout]) -> tuple[ndarray, ndarray]:
    """Return one mean hidden state per text, ``[texts, d_model]``, and the problem id of each text.

    Hidden states are taken at the end of the residual stream, and averaged over the positions where a line of thinking begins.
    """
    with condition.active() as lm:
        states = collect.states(lm, texts, MLP, positions=collect.step_starts(lm))
    return states.values[:, -1].double().numpy(), states.rows["problem_id"].to_numpy(str)


def _shuffled(values: ndarray) -> ndarray:
    """Return 500 random directions as unit vectors, ``[500, d_model]``.

    Each is the difference between the means of two random groups of rows. Each group has a fifth of the rows, but at least two. With four
    or more rows, no row is in both groups.

    Args:
        values: One hidden state per row.
    """
    rng, size = np.random.default_rng(0), max(2, len(values) // 5)
    drawn = [rng.permutation(len(values)) for _ in range(PERMUTED)]
    # The first and the last ``size`` rows of a random order are two groups without a common row.
    gaps = np.stack([values[order[:size]].mean(axis=0) - values[order[-size:]].mean(axis=0) for order in drawn])
    return gaps / np.linalg.norm(gaps, axis=1, keepdims=True)


def _mechanism(ground: Ground, condition: Condition, responses: Sequence[Rollout], references: References) -> pd.DataFrame:
    """Return the part of ``Result.points`` about internals: the metrics ``projection, short_push, retrieved, retrieval_write``.

    The top of this module describes them.
    """
    # First sample of each problem of the training task (of every task, if that task is not among the main ones).
    trained_on = {p.id for p in ground.problems if p.meta.get("task") == ground.sizes.training.task}
    ids = trained_on or {p.id for p in ground.problems}
    first = [r for r in responses if r.think_tokens and r.sample == 0 and r.problem_id in ids]
    parts = []
    if first:
        with condition.active() as lm:
            states = collect.states(lm, first, MLP, positions=collect.step_starts(lm))
        along = pd.Series((states.values[:, -1].double() @ references.unit).numpy())
        parts.append(points("projection", along.groupby(list(states.rows["problem_id"])).mean()))
    parts.append(points("short_push", _short_push(condition, references.texts, references.finding)))
    answers = rollouts(condition, [h.problem for h in references.haystacks], GREEDY, progress=False)
    correct = pd.Series([float(r.correct) for r in answers], [r.problem_id for r in answers])
    parts.append(points("retrieved", correct))
    try:
        parts.append(points("retrieval_write", _retrieval_write(condition, references)))
    except hooks.UnknownPastError as why:
        ground.say(f"retrieval_write is left out: {why}")
    return pd.concat(parts, ignore_index=True)


def _retrieval_write(condition: Condition, references: References) -> pd.Series:
    """Return the metric ``retrieval_write``, one value per haystack. The index of the result is the problem id."""
    # Heads are compared on base's answers, so that every condition reads the same text.
    with condition.active():
        measured = retrieval_heads.measure(condition.lm, needles.examples(references.haystacks, references.base_answers))
    # Sum over the retrieval heads, per example; then the mean over the examples of a haystack.
    wrote = torch.stack([measured.values["write"][:, i, j] for i, j in references.writers]).sum(dim=0)
    return pd.Series(wrote.numpy()).groupby(list(measured.ids)).mean()


def _short_push(condition: Condition, texts: Sequence[Rollout], finding: Finding) -> pd.Series:
    """Return the metric ``short_push``: how strongly the heads that ThinkEdit edits write towards short thinking, one value per problem.

    It is the component of the heads' summed output along the direction of short thinking, in units of the residual stream. It is averaged
    over the positions where a line of thinking begins, and over the texts of a problem. The index of the result is the problem id.

    Args:
        condition: Condition under which the texts are read, teacher-forced.
        texts: Responses of base.
        finding: Result of ``Ground.find_heads``, with the heads and the direction of thinking length. Short thinking is the opposite
            direction.
    """
    unit = finding.direction.unit()[-1].double()
    with condition.active() as lm:
        states = collect.states(lm, texts, lm.layout.contribution_kind, positions=collect.step_starts(lm))
    layout, total = condition.lm.layout, torch.zeros(len(states.values), dtype=torch.float64)
    for layer, head in finding.plan.heads:
        # W: [d_model, head width], output weights of this head; u: the length direction, mapped to the output of attention in this layer.
        W = layout.W_O(layer).detach()[:, layout.head(layer, head)].cpu().double()
        u = layout.to_attn_out(layer, unit)
        # Minus, because + is to mean short thinking, and the length direction points to long thinking.
        total -= states.values[:, layer, layout.head(layer, head)].double() @ W.T @ u
    return pd.Series(total.numpy()).groupby(list(states.rows["problem_id"])).mean()
