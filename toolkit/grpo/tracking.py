"""Send the log of a training run to a tracker: trackio, wandb or TensorBoard. Nothing is sent unless a tracker is named.

Each row of the training log ``log.jsonl`` is sent when it is written, under the same column names and step, held-out results included. (The
callbacks of transformers rename the columns and never get the held-out results.) Columns whose value is not a number are left out. In the
tracker, the run has the name of its directory. In trackio, six characters follow, so that two directories of one name do not share a run.

A resumed training run continues the same run of the tracker. Steps after the last checkpoint are trained again, and so are sent again. Both
times they have the same values. TensorBoard hides the earlier rows; trackio and wandb show both. If saving changes the model (an adapter is
merged, autocast ends, or weights are rounded), the last step is sent a second time, with the held-out results of the saved model.

Where the data go:

* ``tensorboard`` writes event files into the run's directory.
* ``trackio`` writes to a database on this machine. It sends the data elsewhere only if an environment variable says so:
  ``TRACKIO_SPACE_ID`` (a Hugging Face Space) or ``TRACKIO_SERVER_URL``.
* ``wandb`` sends the data to its service, together with facts about the machine (system, packages, git commit). With
  ``WANDB_MODE=offline`` it writes them into the run's directory instead.

All three were tested only with files on the local disk. Sending to the service of wandb or to a Hugging Face Space was never tested.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from toolkit import store

log = logging.getLogger(__name__)

TRACKERS = ("trackio", "wandb", "tensorboard")
PROJECT = "reasoning-length"  # project in trackio and wandb, unless WANDB_PROJECT names another
MARK = "tracker.json"  # file in a run's directory that says in which run of the tracker a resumed run goes on
Note = Callable[[Mapping[str, Any]], None]
"""Function that sends one row of the log (column name -> value) to the tracker."""


class Tracker(Protocol):
    """A run that is open in a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values (column name -> number) of one step."""

    def close(self) -> None:
        """Send the values that are not sent yet, and end the run."""


def check(tracker: str | None) -> None:
    """Raise an error if a tracker cannot be used. ``None`` means no tracker and raises nothing.

    Raises:
        ValueError: the name is not one of ``TRACKERS``.
        ImportError: the package of the tracker cannot be imported.
    """
    if tracker is None:
        return
    if tracker not in TRACKERS:
        raise ValueError(f"Unknown tracker {tracker!r}: choose one of {', '.join(TRACKERS)}.")
    try:
        importlib.import_module(tracker)
    except ImportError as error:
        raise ImportError(
            f"Tracking with {tracker} needs the package {tracker}, which cannot be imported ({error}): "
            "pip install 'reasoning-length-toolkit[track]'."
        ) from error


@contextmanager
def opened(tracker: str | None, out: Path, first: int) -> Iterator[Note]:
    """Return a context manager that keeps a run open in a tracker. It yields a function that sends one row of the training log.

    If sending a row fails, a warning is logged and nothing more is sent. The training goes on.

    Args:
        tracker: One of ``TRACKERS``, or ``None`` to send nothing.
        out: Directory of the run. Its name is the name of the run.
        first: First step that will be sent. If the run is resumed and later steps were sent before it stopped, they are sent again.

    Raises:
        ValueError: as in ``check``.
        ImportError: as in ``check``.
    """
    if tracker is None:
        yield lambda row: None
        return
    check(tracker)
    openers: Mapping[str, Callable[[Path, int], Tracker]] = {"trackio": _Trackio, "wandb": _Wandb, "tensorboard": _TensorBoard}
    run = openers[tracker](out, first)
    broken = False

    def attempt(send: Callable[[], None]) -> None:
        """Send something, unless sending failed before. The training must not end because a tracker does."""
        nonlocal broken
        if not broken:
            try:
                send()
            except Exception as error:  # noqa: BLE001  # a tracker may raise anything
                broken = True
                log.warning("%s gets no more of this run (%s: %s); log.jsonl has all of it", tracker, type(error).__name__, error)

    try:
        yield lambda row: attempt(lambda: run.log(numbers(row), row["step"]))
    finally:
        attempt(run.close)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the columns of a row of the log that hold a number, without ``step``.

    >>> numbers({"step": 3, "reward": 0.5, "tokens/wrong": None, "alarms": []})
    {'reward': 0.5}
    """
    return {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float) and not isinstance(v, bool)}


def _marked(out: Path, tracker: str) -> str | None:
    """Return the id that a tracker gave to the run in this directory; ``None`` if the run was not sent to this tracker before."""
    path = out / MARK
    mark = (
        store.read_json(path, {"tracker": str, "id": str}, remedy="Remove the file: a new run is begun.") if path.is_file() else {}
    )
    return mark["id"] if mark.get("tracker") == tracker else None


def _mark(out: Path, tracker: str, run: str) -> None:
    store.write_json({"tracker": tracker, "id": run}, out / MARK)


class _TensorBoard:
    def __init__(self, out: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, out: Path, first: int) -> None:
        import trackio

        self.trackio = trackio
        # trackio finds a run by its name, so the name must not be that of another directory's run.
        before = _marked(out, "trackio")
        name, resume = (f"{out.name}-{secrets.token_hex(3)}", "never") if before is None else (before, "allow")
        with redirect_stdout(sys.stderr):  # standard output is for the results of a command
            trackio.init(project=PROJECT, name=name, resume=resume, embed=False, auto_log_cpu=False, auto_log_gpu=False)
        _mark(out, "trackio", name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.trackio.finish()


class _Wandb:
    def __init__(self, out: Path, first: int) -> None:
        import wandb

        name = _marked(out, "wandb") or secrets.token_hex(8)
        _mark(out, "wandb", name)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        quiet = {"console": "off", "save_code": False}  # the log only, not what the terminal shows
        self.run = wandb.init(project=project, name=out.name, id=name, resume="allow", dir=str(out), settings=quiet)
        # wandb refuses steps that it has had, as a resumed run sends. So the step is a value, which the charts use.
        self.run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()
