"""Everything that is measured of one condition and one seed, reduced to one value a problem and metric.

Two tables and a note make a :class:`Result`: ``rows``, one a main rollout (what is not a mean is computed from them), ``points``, one a
problem and metric (what is a mean over problems), and ``about`` (costs, the condition in words, and what has no problems).
Units: lengths are tokens, entropies nats a token, shares of 1; projections and pushes are of the residual stream's norm there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray

from toolkit import collect, evaluate, identity, stats, store
from toolkit.board.ground import Ground
from toolkit.board.spec import Spec
from toolkit.collect import MLP
from toolkit.generate import Sampling, rollouts
from toolkit.jobs.edit import OURS
from toolkit.lm import LM, Condition
from toolkit.methods import failed_steps, phase_entropy, retrieval_heads
from toolkit.tasks import execution, haystack, running_sum
from toolkit.types import Problem, Rollout

ROWS, POINTS, ABOUT = "rows.parquet", "points.parquet", "about.json"
IN_ROWS = {
    "problem_id": str, "sample": int, "task": str, "correct": bool, "think_tokens": int, "response_tokens": int, "closed": bool,
    "looping": bool, "finish": str, "no_think": bool,
}  # fmt: skip
IN_POINTS = {"metric": str, "problem_id": str, "value": float}
IN_SHIFT = dict.fromkeys(("cosine", "low", "high", "random", "size"), float)
IN_ABOUT = {
    "name": str, "seed": int, "model": str, "fingerprint": str, "parent": str | None, "interventions": list[str], "tokens": int,
    "seconds": float | None, "parameters_changed": int, "training_steps": int, "shift": Mapping[str, float],
}  # fmt: skip
PERMUTED = 500  # shuffles of the length classes behind the random directions of a cosine: ours
WRITERS = 4  # heads whose retrieval is followed


@dataclass(frozen=True)
class Result:
    """What was measured of one condition and one seed."""

    rows: pd.DataFrame
    points: pd.DataFrame
    about: Mapping[str, Any]


def result(ground: Ground, spec: Spec, seed: int) -> Result | None:
    """What was measured before, or ``None``. Errors as :func:`read`."""
    return read(place(ground, spec, seed))


def read(folder: Path) -> Result | None:
    """The result in a folder, or ``None``. Raises store.DamagedFileError if it is not whole: says what to remove."""
    if not is_measured(folder):
        return None
    remedy = f"Remove {folder} and run the board again: only this result is measured anew."
    rows = store.read_table(folder / ROWS, IN_ROWS, remedy=remedy)
    about = store.read_json(folder / ABOUT, IN_ABOUT, remedy=remedy)
    if about["shift"]:  # empty where nothing moved
        store.checked(about["shift"], IN_SHIFT, f"{folder / ABOUT}, shift", remedy)
    return Result(rows, store.read_table(folder / POINTS, IN_POINTS, remedy=remedy), about)


def is_measured(folder: Path) -> bool:
    """Whether a folder holds a whole result."""
    return (folder / ABOUT).exists()


def unrecorded(ground: Ground) -> list[Path]:
    """Results that do not say what code made them."""
    return [path.parent for path in (ground.out / "results").glob(f"*/{ABOUT}") if not path.with_name(store.MADE_BY).exists()]


def place(ground: Ground, spec: Spec, seed: int) -> Path:
    """Folder of a result."""
    return ground.out / "results" / spec.key(ground, seed)


def measure(ground: Ground, spec: Spec, seed: int, references: References) -> Path:
    """Measure one condition from one seed and keep the result, in the folder that is returned; rollouts that were finished before a kill are kept."""
    condition = spec.make(ground, seed)
    evaluate.check_held_out(
        {spec.name: condition},
        [*ground.problems, *ground.unseen],
        remedy="Leave it out, or make it from problems of the train split.",
    )
    basis = spec.basis(ground, seed, made=condition)
    folder = ground.out / "results" / basis.key
    # On a CPU other work on the machine must not count.
    clock = time.process_time if ground.lm.device.type == "cpu" else time.perf_counter
    began = clock()
    sampled = folder / f"rollouts-{condition.lm.fingerprint[:12]}"
    whole = not sampled.exists()
    found = rollouts(condition, ground.problems, ground.sampling, out=sampled, progress=False)
    seconds = clock() - began
    rows = _rows(condition.lm, found, ground.problems)
    parts = [_main_points(rows), _unseen(ground, condition), _mechanism(ground, condition, found, references)]
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
        "seconds": round(seconds, 2) if whole else None,  # those of a process that was stopped are not known
        "parameters_changed": _changed(ground.lm, condition.lm),
        "training_steps": spec.steps(ground),
        "shift": references.shift(condition),
        "made_by": basis.made_by,
    }
    basis.write(folder)
    store.write_json(about, folder / ABOUT)  # last: a folder that has it is whole
    store.remove(sampled)
    return folder


def _rows(lm: LM, found: Sequence[Rollout], problems: Sequence[Problem]) -> pd.DataFrame:
    """The columns of a report, and ``no_think``, ``answer``, ``text``, phase entropies, failed steps and re-checks of each rollout."""
    table = evaluate.table(found, problems)
    entropies = phase_entropy.table(found)
    chains = failed_steps.chains(lm, found, problems, failed_steps.fitting)
    spoken = [lm.text(r.token_ids[r.answer.start : r.answer.stop], special=False).strip() if r.answer else None for r in found]
    return table.assign(
        no_think=[r.think_tokens == 0 for r in found],
        think_entropy=entropies["think_entropy"],
        answer_entropy=entropies["answer_entropy"],
        failed=[failed_steps.failed_step_fraction(c) for c in chains],
        review=[failed_steps.review_ratio(c) for c in chains],
        answer=spoken,
        text=[r.text if r.sample == 0 else None for r in found],
    )


MEANS = {
    "accuracy": "correct", "think_tokens": "think_tokens", "response_tokens": "response_tokens", "looping": "looping", "no_think": "no_think",
    "think_entropy": "think_entropy", "answer_entropy": "answer_entropy", "failed_steps": "failed", "review": "review",
}  # fmt: skip


def _main_points(rows: pd.DataFrame) -> pd.DataFrame:
    means = rows.groupby("problem_id", sort=False)[list(MEANS.values())].mean()
    values = {metric: means[column] for metric, column in MEANS.items()}
    values["never_closed"] = 1 - rows.groupby("problem_id", sort=False)["closed"].mean()
    trained_on = rows.groupby("problem_id", sort=False)["task"].first()
    for task in sorted(set(trained_on)):
        values[f"accuracy_{task}"] = values["accuracy"][trained_on == task]
    return pd.concat([points(metric, series) for metric, series in values.items()], ignore_index=True)


def points(metric: str, values: pd.Series) -> pd.DataFrame:
    """One row a problem of a metric; problems without a value are left out."""
    kept = values.dropna().astype(float)
    return pd.DataFrame({"metric": metric, "problem_id": kept.index.astype(str), "value": kept.to_numpy()})


def _unseen(ground: Ground, condition: Condition) -> pd.DataFrame:
    """Tasks never trained on: accuracy of each, and step accuracy on chains beyond what the tiny reasoner saw."""
    sampling = Sampling(1, temperature=0.0, max_new_tokens=ground.sizes.unseen_tokens)
    found = rollouts(condition, ground.unseen, sampling, progress=False)
    table = evaluate.table(found, ground.unseen).set_index("problem_id")
    parts = [points(f"accuracy_{task}", own["correct"]) for task, own in table.groupby("task", sort=False)]
    chains = {
        p.id: running_sum.of(condition.lm, r, p)
        for r, p in zip(found, ground.unseen, strict=True)
        if p.meta.get("task") == "running_sum"
    }
    stated = {i: sum(y is not None for y in e.outputs) for i, e in chains.items()}
    if any(stated.values()):
        p = execution.step_accuracy(list(chains.values())).mean
        parts.append(points("running_sum_step", pd.Series({i: e.step_accuracy for i, e in chains.items()})))
        parts.append(points("running_sum_expected", pd.Series({i: p ** max(n, 1) for i, n in stated.items()})))
    return pd.concat(parts, ignore_index=True)


def _changed(base: LM, own: LM) -> int:
    """Weights that differ from the base model's."""
    theirs = dict(base.model.named_parameters())
    pairs = ((theirs[name], weight) for name, weight in own.model.named_parameters())
    return sum(int((a != b).sum()) for a, b in pairs if a.data_ptr() != b.data_ptr())


# --- mechanism ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """What the inside of every condition is compared with: the base's responses, the states they put it in, its heads.

    Texts are read teacher-forced, at the positions where a line of thinking begins (where our form finds the direction).
    """

    ground: Ground

    @cached_property
    def texts(self) -> list[Rollout]:
        """Base responses that every condition reads."""
        found = [r for r in self.ground.found if r.think_tokens and r.closed]
        return found[:: max(1, len(found) // self.ground.sizes.texts)][: self.ground.sizes.texts]

    @cached_property
    def haystacks(self) -> list[haystack.Haystack]:
        """Haystacks of the test split."""
        return self.ground.search(seed=1).haystacks(self.ground.lm, "test")

    @cached_property
    def base_answers(self) -> list[Rollout]:
        """The base's greedy responses to them."""
        return rollouts(self.ground.lm, [h.problem for h in self.haystacks], self.greedy, progress=False)

    @property
    def greedy(self) -> Sampling:
        """Greedy decoding of the haystacks."""
        return Sampling(temperature=0.0, max_new_tokens=120)

    @cached_property
    def unit(self) -> torch.Tensor:
        """Unit vector of the length direction at the end of the stream, + longer, ``[d_model]``."""
        return self.ground.findings[OURS].direction.unit()[-1].double()

    @cached_property
    def writers(self) -> list[tuple[int, int]]:
        """Heads that write the most towards a retrieved token."""
        return self.ground.retrieval.scores["write (ours)"].ranked()[:WRITERS]

    @cached_property
    def before(self) -> tuple[ndarray, ndarray]:
        """The base's mean state of each text at the end of the stream, ``[texts, d_model]``, and the texts' problems."""
        return self.states(Condition(self.ground.lm))

    def states(self, condition: Condition) -> tuple[ndarray, ndarray]:
        """Mean state of each text at the end of the stream under a condition, and the texts' problems."""
        with condition.active() as lm:
            found = collect.states(lm, self.texts, MLP, positions=collect.step_starts(lm))
        return found.values[:, -1].double().numpy(), found.rows["problem_id"].to_numpy(str)

    @cached_property
    def shuffled(self) -> ndarray:
        """Unit differences of means between random classes of the texts, as large as the length classes: ``[times, d_model]``."""
        values, _ = self.before
        rng, size = np.random.default_rng(0), max(2, len(values) // 5)
        drawn = [rng.permutation(len(values)) for _ in range(PERMUTED)]
        gaps = np.stack([values[order[:size]].mean(axis=0) - values[order[-size:]].mean(axis=0) for order in drawn])
        return gaps / np.linalg.norm(gaps, axis=1, keepdims=True)

    def shift(self, condition: Condition) -> dict[str, float]:
        """Where a condition moves the states of the same texts, at the end of the stream.

        ``cosine`` of the mean move with the length direction (+: where longer thinking is) with its 95 % interval over problems,
        ``random``: the 97.5 % point of |cosine| with differences between random classes, ``size``: norm of the move over that of the
        difference between long and short thinking. Nothing where nothing moves.
        """
        (before, problems), (after, _) = self.before, self.states(condition)
        names, which = np.unique(problems, return_inverse=True)
        counts = np.bincount(which)[:, None]
        moved = np.stack([np.bincount(which, column) for column in (after - before).T], axis=1) / counts
        if np.abs(moved).max() < 1e-9:
            return {}
        u = self.unit.numpy()

        def cosine(index: ndarray) -> ndarray:
            weights = np.stack([np.bincount(row, minlength=len(names)) for row in index]) / len(names)
            mean = weights @ moved
            return mean @ u / np.linalg.norm(mean, axis=1)

        found = stats.bootstrap(cosine, len(names))
        mean = moved.mean(axis=0)
        chance = np.abs(self.shuffled @ (mean / np.linalg.norm(mean)))
        apart = float(self.ground.findings[OURS].direction.norms[-1])
        return {
            "cosine": found.mean, "low": found.low, "high": found.high, "random": float(np.quantile(chance, 0.975)),
            "size": float(np.linalg.norm(mean)) / apart,
        }  # fmt: skip


def _mechanism(ground: Ground, condition: Condition, found: Sequence[Rollout], references: References) -> pd.DataFrame:
    """Projection of its own thinking on the length direction, what its short-thinking heads write, and its retrieval."""
    trained_on = {p.id for p in ground.problems if p.meta.get("task") == ground.sizes.training.task}
    own = [r for r in found if r.think_tokens and r.sample == 0 and r.problem_id in (trained_on or {p.id for p in ground.problems})]
    parts = []
    if own:
        with condition.active() as lm:
            read = collect.states(lm, own, MLP, positions=collect.step_starts(lm))
        along = pd.Series((read.values[:, -1].double() @ references.unit).numpy()).groupby(list(read.rows["problem_id"])).mean()
        parts.append(points("projection", along))
    parts.append(points("short_push", _short_push(condition, references)))
    answers = rollouts(condition, [h.problem for h in references.haystacks], references.greedy, progress=False)
    right = pd.Series([float(r.correct) for r in answers], [r.problem_id for r in answers])
    with condition.active():
        looked = retrieval_heads.measure(condition.lm, retrieval_heads.examples(references.haystacks, references.base_answers))
    wrote = torch.stack([looked.values["write"][:, i, j] for i, j in references.writers]).sum(dim=0)
    parts += [points("retrieved", right), points("retrieval_write", pd.Series(wrote.numpy()).groupby(list(looked.ids)).mean())]
    return pd.concat(parts, ignore_index=True)


def _short_push(condition: Condition, references: References) -> pd.Series:
    """What the base's short-thinking heads write towards short on each text, in total, along the end-of-stream direction."""
    finding = references.ground.findings[OURS]
    with condition.active() as lm:
        read = collect.states(lm, references.texts, lm.layout.contribution_kind, positions=collect.step_starts(lm))
    layout, total = condition.lm.layout, torch.zeros(len(read.values), dtype=torch.float64)
    for layer, head in finding.plan.heads:
        W = layout.W_O(layer).detach()[:, layout.head(head)].cpu().double()
        u = layout.to_attn_out(layer, references.unit)
        total -= read.values[:, layer, layout.head(head)].double() @ W.T @ u
    return pd.Series(total.numpy()).groupby(list(read.rows["problem_id"])).mean()
