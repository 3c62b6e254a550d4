"""What is written down of every step: rewards and their parts, lengths, entropies, held-out accuracy; and alarms of collapse.

One JSON object a line as the run goes on, and the same rows as a parquet table when it ends. Shares are of 1, lengths tokens,
entropies nats a token; a value that does not exist (the length of truncated responses where none was) is ``null``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import TrainerCallback

from toolkit import generate, store
from toolkit.generate import Sampling
from toolkit.grpo.measures import Row, held_out_measures, kl_to
from toolkit.lm import LM
from toolkit.types import Problem, Rollout

LOG, TABLE = "log.jsonl", "log.parquet"
Sample = Callable[[Sequence[Problem], Sampling], list[Rollout]]
"""Draws from the policy in training."""


@dataclass(frozen=True)
class Thresholds:
    """When a run is said to collapse; all ours.

    Attributes:
        accuracy: Fall of held-out accuracy since the start ...
        shorter: ... while think length fell by this share.
        steps: Without held-out problems: means over so many training steps, the first against the newest.
        one_answer: Share of the most common answer.
        loops: Share of responses that end in a loop.
    """

    accuracy: float = 0.05
    shorter: float = 0.1
    steps: int = 10
    one_answer: float = 0.5
    loops: float = 0.1


def alarms(history: Sequence[Mapping[str, Any]], limits: Thresholds = Thresholds()) -> list[str]:
    """What is wrong with a run now, in words; empty if nothing. ``history`` are the rows of its log."""
    found, newest = [], history[-1] if history else {}
    for where, first, last in _ends(history, limits.steps):
        fell, before, now = first["accuracy"] - last["accuracy"], first["think_tokens"], last["think_tokens"]
        if fell > limits.accuracy and now < (1 - limits.shorter) * before:
            found.append(
                f"accuracy falls with length: {100 * fell:.0f} points lost {where} since the start, think tokens {before:.0f} to {now:.0f}"
            )
    if (newest.get("answers/most_common") or 0.0) > limits.one_answer:
        found.append(f"one answer: {newest['answers/most_common']:.0%} of all answers are the same")
    if (newest.get("loops") or 0.0) > limits.loops:
        found.append(f"loops: {newest['loops']:.0%} of responses end in one")
    return found


def _ends(history: Sequence[Mapping[str, Any]], steps: int) -> list[tuple[str, Row, Row]]:
    """Accuracy and think tokens at the start and now, and where: on held-out problems if a row has them, else in training."""
    judged = [row for row in history if row.get("held_out/accuracy") is not None]
    names = ("accuracy", "think_tokens")
    if judged:
        start, now = ({k: row[f"held_out/{k}"] for k in names} for row in (judged[0], judged[-1]))
        return [("on held-out problems", start, now)]
    rows = [row for row in history if row.get("accuracy") is not None]
    if len(rows) < 2 * steps:
        return []
    first, last = ({k: sum(row[k] for row in part) / steps for k in names} for part in (rows[:steps], rows[-steps:]))
    return [("in training", first, last)]


class Recorder(TrainerCallback):
    """Writes the log of a run, judges the policy on held-out problems every so often, and raises alarms.

    Args:
        problems: Held-out problems; none: nothing is judged.
        sampling: How they are sampled.
        every: Steps between judgements; 0 for never.
        path: The file of the log, or ``None``.
        say: Told of alarms.
        sample: Draws from the policy in training.
        given: The model before training, for ``held_out/kl``; ``None`` leaves it out, as does truncated or greedy sampling. It runs in
            the number type it was loaded in, so that row 0 shows what autocast to bfloat16 alone makes of the KL.

    Attributes:
        rows: The log so far.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        every: int,
        path: Path | None,
        say: Callable[[str], None],
        sample: Sample,
        given: LM | None = None,
    ) -> None:
        self.problems, self.sampling, self.every, self.path, self.say = problems, sampling, every, path, say
        self.sample, self.given = sample, given
        self.rows: list[Row] = []
        self._judged: Row = {}
        self._said: set[str] = set()

    def resume(self, step: int) -> None:
        """Take up the log of an earlier sitting; what it wrote after the checkpoint is dropped."""
        if self.path is not None and self.path.is_file():
            self.rows = [row for row in read(self.path) if row["step"] <= step]
            store.write_rows(self.rows, self.path)

    def on_train_begin(self, args, state, control, **_) -> None:
        if not state.global_step:
            judged = self._judge()
            if state.is_world_process_zero:
                self._write({"step": 0, **judged})

    def on_train_end(self, args, state, control, **_) -> None:
        if state.is_world_process_zero and self.path is not None and self.rows:
            store.save_table(pd.DataFrame(self.rows), self.path.with_name(TABLE))

    def on_step_end(self, args, state, control, **_) -> None:
        last = state.global_step >= state.max_steps
        if self.every and (state.global_step % self.every == 0 or last):
            self._judged = self._judge()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._write({"step": state.global_step, **logs, **self._judged})
            self._judged = {}

    def finish(self, saved: LM, step: int) -> None:
        """Judge the model that was saved after its last step, on this process alone, in place of the judgement of that step's row."""
        if not (judged := self._judge(saved)):
            return
        last = self.rows.pop() if self.rows and self.rows[-1]["step"] == step else {"step": step}
        self._add({k: v for k, v in last.items() if k != "alarms"} | judged)
        if self.path is not None:  # at once: a log without its last row would be resumed with that of another step in its place
            store.write_rows(self.rows, self.path)
            store.save_table(pd.DataFrame(self.rows), self.path.with_name(TABLE))

    def _judge(self, saved: LM | None = None) -> Row:
        """Of the policy in training, on every process alike: where weights are sharded, one alone cannot run the model; where not, the
        others would wait. Or of the model that was saved."""
        if not (self.problems and self.every):
            return {}
        how = self.sampling
        given = self.given if how.temperature > 0 and how.top_p == 1 and not how.top_k else None
        how = replace(how, details=how.details or given is not None)
        found = self.sample(self.problems, how) if saved is None else generate.rollouts(saved, self.problems, how, progress=False)
        row = held_out_measures(found, self.problems)
        return row if given is None else row | {"held_out/kl": kl_to(given, found, how.temperature)}

    def _write(self, row: Row) -> None:
        row = self._add(row)
        if self.path is not None:
            store.append_line(row, self.path)

    def _add(self, row: Row) -> Row:
        """Take a row up into the log, with its alarms, and say those that are new."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        row["alarms"] = alarms(self.rows)
        for text in row["alarms"]:
            kind = text.partition(":")[0]
            if kind not in self._said:
                self.say(f"step {row['step']}: {text}")
            self._said.add(kind)
        return row


def read(path: str | Path) -> list[Row]:
    """The rows of a log; a last line torn by a kill is left out. Raises store.DamagedFileError naming a line that is no row of one."""
    rows = store.read_rows(path, {"step": int})
    for number, row in enumerate(rows, 1):
        store.checked(row, Mapping[str, float | list[str] | None], f"{path}, line {number}", "Remove that line.")
    return rows


class Bar(TrainerCallback):
    """A progress bar in the terminal or notebook: steps, accuracy, length, reward."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", leave=False)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix({k: f"{logs[k]:.2f}" for k in ("accuracy", "think_tokens", "reward") if logs.get(k) is not None})

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.close()


class Watch(TrainerCallback):
    """Hands the rows of the log so far to ``show(rows)`` every few steps and at the end: a live figure, a logger of one's own."""

    def __init__(self, show: Callable[[list[Row]], None], every: int = 5) -> None:
        self.show, self.every = show, every
        self.rows: list[Row] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.rows.append({"step": state.global_step, **logs})
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.show(self.rows)
