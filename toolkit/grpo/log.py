"""The log of a training run: rewards, lengths and entropies of every step, results on held-out problems, and alarms.

During training, one JSON object per optimizer step is appended to ``log.jsonl``. At the end, the same rows are saved as a parquet table.
``measures`` describes the columns. A value that does not exist is ``null``: for example the mean length of truncated responses in a batch
without any. An alarm is a sentence that warns of a collapse of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from toolkit import generate, store
from toolkit.engines import OWN_LOOP, Engine, OwnLoop
from toolkit.generate import Sampling
from toolkit.grpo.measures import Row, held_out_measures, kl_to
from toolkit.lm import LM, Condition
from toolkit.progress import Stage, stage
from toolkit.tools import Toolbox
from toolkit.types import Problem, Rollout

LOG, TABLE = "log.jsonl", "log.parquet"
Sample = Callable[[Sequence[Problem], Sampling], list[Rollout]]
"""Function from problems and sampling settings to rollouts of the policy in training."""


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which the log of a training run raises an alarm; all are our choice.

    There are four alarms:

    * ``accuracy falls with length``: accuracy has dropped by more than ``accuracy``, and think length by more than the share ``shorter``.
      Both drops are measured on held-out problems, from the first evaluation to the newest. Without held-out problems, the first ``steps``
      training steps are compared with the last ``steps``.
    * ``one answer``: the share of the most common answer in the newest batch exceeds ``one_answer``.
    * ``one class``: on held-out problems with few different gold answers, accuracy is above ``always`` on one of these answers and below
      ``never`` on another. A model that answers "reject" to every application is an example (arXiv:2511.16073). The answer's wording may
      vary, unlike in ``one answer``.
    * ``loops``: the share of looping responses in the newest batch exceeds ``loops``. A response loops if the token limit cut it off in a
      sequence of tokens that repeats (``stats.looping``).

    Attributes:
        accuracy: Drop of accuracy above which the first alarm is possible, as a difference of shares (0.05: five percentage points).
        shorter: Drop of think length above which the first alarm is possible, as a share of the length at the start (0.1: 10 % shorter).
        steps: Number of training steps at each end of the run that are compared if there are no held-out problems.
        one_answer: Largest share of the most common answer without an alarm, among all answers of the batch.
        loops: Largest share of looping responses without an alarm, among all responses of the batch.
        always: Highest accuracy on a gold answer without an alarm.
        never: Lowest accuracy on another gold answer without an alarm.
    """

    accuracy: float = 0.05
    shorter: float = 0.1
    steps: int = 10
    one_answer: float = 0.5
    loops: float = 0.1
    always: float = 0.9
    never: float = 0.1


def alarms(history: Sequence[Mapping[str, Any]], limits: Thresholds = Thresholds()) -> list[str]:
    """Return the alarms that a log raises at its newest row, as sentences. An empty list means no alarm.

    Args:
        history: Rows of the log so far, oldest first.
        limits: Limits beyond which an alarm is raised.
    """
    texts, newest = [], history[-1] if history else {}
    for where, first, last in _ends(history, limits.steps):
        fell, before, now = first["accuracy"] - last["accuracy"], first["think_tokens"], last["think_tokens"]
        if fell > limits.accuracy and now < (1 - limits.shorter) * before:
            texts.append(
                f"accuracy falls with length: {100 * fell:.0f} points lost {where} since the start, think tokens {before:.0f} to {now:.0f}"
            )
    if (newest.get("answers/most_common") or 0.0) > limits.one_answer:
        texts.append(f"one answer: {newest['answers/most_common']:.0%} of all answers are the same")
    low, high = newest.get("held_out/recall_low"), newest.get("held_out/recall_high")
    if low is not None and high is not None and high > limits.always and low < limits.never:
        texts.append(
            f"one class: held-out accuracy is {high:.0%} on problems with one gold answer and {low:.0%} on those with another"
        )
    if (newest.get("loops") or 0.0) > limits.loops:
        texts.append(f"loops: {newest['loops']:.0%} of responses end in a loop")
    return texts


def _ends(history: Sequence[Mapping[str, Any]], steps: int) -> list[tuple[str, Row, Row]]:
    """Return accuracy and think length at the start and at the end of a log: ``[(where, start, now)]``, or ``[]`` if it is too short.

    ``start`` and ``now`` are dicts with the keys ``accuracy`` and ``think_tokens``. If the log has held-out results, they are the first and
    the newest of these. Otherwise they are means over the first and the last ``steps`` training batches. ``where`` is ``"on held-out
    problems"`` or ``"in training"``, for the text of the alarm.
    """
    evaluated = [row for row in history if row.get("held_out/accuracy") is not None]
    names = ("accuracy", "think_tokens")
    if evaluated:
        start, now = ({k: row[f"held_out/{k}"] for k in names} for row in (evaluated[0], evaluated[-1]))
        return [("on held-out problems", start, now)]
    rows = [row for row in history if row.get("accuracy") is not None]
    if len(rows) < 2 * steps:
        return []
    first, last = ({k: sum(row[k] for row in part) / steps for k in names} for part in (rows[:steps], rows[-steps:]))
    return [("in training", first, last)]


class Recorder(TrainerCallback):
    """Callback that writes the log of a run, evaluates the policy on held-out problems at intervals, and raises alarms.

    An alarm is a sentence that warns of a collapse of training. The module ``measures`` describes the columns of the log.

    One column needs care: ``held_out/kl`` is ``KL(policy || initial model)``. It may differ from 0 even before the first update, since the
    initial model runs in the dtype in which it was loaded, and the policy in fp32 or under autocast. In row 0 of the log, before any
    update, the column shows only this effect of the dtypes.

    Args:
        problems: Held-out problems; an empty list turns evaluation off.
        sampling: Sampling settings of the evaluation.
        every: Number of optimizer steps between evaluations; 0 turns evaluation off. Otherwise the policy is also evaluated before the
            first step and after the last.
        path: File of the log, or ``None`` for no file.
        say: Function that is called with the text of an alarm. Later alarms of the same kind are only logged.
        sample: Function that samples rollouts of the policy in training.
        initial: The model before training, for the column ``held_out/kl``; ``None`` leaves this column out. It is also left out if the
            evaluation samples greedily, with top-p or with top-k: the KL is estimated from tokens that are sampled from the full
            distribution.
        engine: Engine that samples the responses of the saved model at the end. If it is not the toolkit's own loop, it also samples those
            of ``initial`` before the first step, and these two evaluations have no ``held_out/kl``.
        tools: Tools that the responses of these models may call, as the policy's may in training; ``None`` means none.

    Attributes:
        rows: Rows of the log so far.
        note: Function that is called with every row, to send it to a tracker. It may be called twice for the last step: see ``finish``.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        every: int,
        path: Path | None,
        say: Callable[[str], None],
        sample: Sample,
        initial: LM | None = None,
        engine: Engine = OWN_LOOP,
        tools: Toolbox | None = None,
    ) -> None:
        self.problems, self.sampling, self.every, self.path, self.say = problems, sampling, every, path, say
        self.sample, self.initial, self.engine, self.tools = sample, initial, engine, tools
        self.rows: list[Row] = []
        self.note: Callable[[Row], None] = lambda row: None
        self._evaluation: Row = {}  # results of the newest step on held-out problems, until the row of that step is written
        self._raised: set[str] = set()  # kinds of alarms that ``say`` was already called with

    def resume(self, step: int) -> None:
        """Read the log of a stopped run. Rows after ``step``, the step of the checkpoint from which the run resumes, are dropped."""
        if self.path is not None and self.path.is_file():
            self.rows = [row for row in read(self.path) if row["step"] <= step]
            store.write_rows(self.rows, self.path)

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.global_step:
            return
        if isinstance(self.engine, OwnLoop):
            evaluation = self._evaluate()  # by every process
        elif state.is_world_process_zero:
            assert self.initial is not None
            evaluation = self._evaluate(Condition(self.initial))
        if state.is_world_process_zero:
            self._write({"step": 0, **evaluation})  # row 0 describes the model before training

    def on_train_end(self, args, state, control, **_) -> None:
        if state.is_world_process_zero and self.path is not None and self.rows:
            store.save_table(pd.DataFrame(self.rows), self.path.with_name(TABLE))

    def on_step_end(self, args, state, control, **_) -> None:
        last = state.global_step >= state.max_steps
        if self.every and (state.global_step % self.every == 0 or last):
            self._evaluation = self._evaluate()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        # transformers also logs a summary at the end of training, without ``loss``.
        if state.is_world_process_zero and logs and "loss" in logs:
            self._write({"step": state.global_step, **logs, **self._evaluation})
            self._evaluation = {}

    def finish(self, saved: Condition, step: int) -> None:
        """Evaluate the saved model on the held-out problems, for the last row of the log. Only the main process calls this.

        The new results replace the held-out results in the row of ``step``, the run's last optimizer step.
        """
        if not (evaluation := self._evaluate(saved)):
            return
        last = self.rows.pop() if self.rows and self.rows[-1]["step"] == step else {"step": step}
        self._add({k: v for k, v in last.items() if k != "alarms"} | evaluation)
        # Written now: if the last row were missing, a resumed run would evaluate another step in its place.
        if self.path is not None:
            store.write_rows(self.rows, self.path)
            store.save_table(pd.DataFrame(self.rows), self.path.with_name(TABLE))

    def _evaluate(self, policy: Condition | None = None) -> Row:
        """Sample responses to the held-out problems, and return the ``held_out/...`` columns of the log.

        Every process evaluates the policy in training on all held-out problems; only the main process logs the results. Other models are
        evaluated by the main process alone.

        Args:
            policy: Policy to evaluate with the engine; ``None`` evaluates the one in training, without the engine.
        """
        if not (self.problems and self.every):
            return {}
        sampling = self.sampling
        recorded = policy is None or isinstance(self.engine, OwnLoop)  # only then are log-probabilities of the tokens at hand
        full = recorded and sampling.temperature > 0 and sampling.top_p == 1 and not sampling.top_k
        initial = self.initial if full else None
        # ``details`` records the log-probabilities that the KL needs.
        sampling = replace(sampling, details=sampling.details or initial is not None)
        if policy is None:
            rollouts = self.sample(self.problems, sampling)
        else:
            rollouts = generate.rollouts(
                replace(policy, tools=self.tools), self.problems, sampling, engine=self.engine, progress=False
            )
        row = held_out_measures(rollouts, self.problems)
        return row if initial is None else row | {"held_out/kl": kl_to(initial, rollouts, sampling.temperature)}

    def _write(self, row: Row) -> None:
        row = self._add(row)
        if self.path is not None:
            store.append_line(row, self.path)

    def _add(self, row: Row) -> Row:
        """Add a row to the log, with its alarms; call ``say`` with each alarm whose kind was not raised before. Return the row."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        row["alarms"] = alarms(self.rows)
        for text in row["alarms"]:
            kind = text.partition(":")[0]  # every alarm begins with its kind and a colon
            if kind not in self._raised:
                self.say(f"step {row['step']}: {text}")
            self._raised.add(kind)
        self.note(row)
        return row


def read(path: str | Path) -> list[Row]:
    """Return the rows of a log file, one dict per line. If a killed run left an incomplete last line, that line is skipped.

    Raises:
        store.DamagedFileError: a line is not a row of a log; the message gives its number.
    """
    rows = store.read_rows(path, {"step": int})
    for number, row in enumerate(rows, 1):
        store.checked(row, Mapping[str, float | list[str] | None], f"{path}, line {number}", "Remove that line.")
    return rows


class Bar(TrainerCallback):
    """Callback that shows a progress bar with step, accuracy, think tokens and reward, in the terminal or a notebook.

    Args:
        name: Text shown left of the bar.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Stage | None = None

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self.bar = stage(self.name, state.max_steps, "step", initial=state.global_step)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix({k: f"{logs[k]:.2f}" for k in ("accuracy", "think_tokens", "reward") if logs.get(k) is not None})

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.close()


class Watch(TrainerCallback):
    """Callback that calls ``show(rows)`` at intervals, for a live figure or your own logger.

    ``rows`` has one dict per optimizer step since training began or was resumed. A dict holds ``step`` and the columns of the training
    batch, without ``held_out/...`` and ``alarms``.

    Args:
        show: Function to call.
        every: Number of optimizer steps between two calls. There is always a call after the last step.
    """

    def __init__(self, show: Callable[[list[Row]], None], every: int = 5) -> None:
        self.show, self.every = show, every
        self.rows: list[Row] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.rows.append({"step": state.global_step, **logs})
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.show(self.rows)
