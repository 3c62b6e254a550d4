"""Checkpoints of a training run. A run never resumes from an incomplete checkpoint; loading a damaged one raises ``DamagedFileError``."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from toolkit import store
from toolkit.store.full import explain_full_disk

STATE = "toolkit.json"  # in every checkpoint, written last: a checkpoint with this file is complete
KEPT = 2
"""Number of checkpoints that a run keeps by default: the newest to resume from, and one more in case the newest is damaged."""
EARLIER = "Remove that checkpoint and resume: the run continues from the one before."
# Errors that loading a damaged checkpoint can raise.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    AttributeError,
    SafetensorError,
    pickle.UnpicklingError,
)


def checkpoint_of(out: str | Path, step: int) -> Path:
    """Return the path of the checkpoint that a run with the directory ``out`` writes at an optimizer step."""
    return Path(out) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step at which a checkpoint was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(out: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, sorted by step. Other folders, such as a copy ``checkpoint-40-backup``, are ignored."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {folder: int(match[1]) for folder in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (match := named.fullmatch(folder.name))}
    return sorted(steps, key=steps.__getitem__)


def last_checkpoint(out: Path) -> Path | None:
    """Return the path of the newest complete checkpoint in a run's directory, or ``None`` if there is none."""
    return next((folder for folder in reversed(_checkpoints(out)) if (folder / STATE).exists()), None)


def remove_old(out: Path, limit: int | None = None) -> None:
    """Remove the old checkpoints of a run, and all incomplete ones. A checkpoint that cannot be removed stays, without an error.

    transformers would remove by modification time instead, and so could keep a checkpoint that a killed process had half removed.

    Args:
        out: The run's directory.
        limit: Number of newest complete checkpoints to keep, like ``save_total_limit`` of transformers. 0 or less keeps all complete ones;
            ``None`` means ``KEPT``.
    """
    keep = KEPT if limit is None else limit
    complete = [folder for folder in _checkpoints(out) if (folder / STATE).exists()]
    for folder in _checkpoints(out):
        if folder not in (complete[-keep:] if keep > 0 else complete):
            with suppress(OSError):
                store.remove(folder)
    store.tidy(out)  # removes what a process left that was killed while it removed a checkpoint


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return the content of the file that this toolkit adds to a checkpoint: a dict with the keys ``identity`` and ``reward``.

    ``identity`` holds the settings with which the run was started; a run with other settings may not resume from the checkpoint.
    ``reward`` holds the state of a reward that changes during training; for other rewards it is empty.

    Raises:
        store.DamagedFileError: the file is damaged.
    """
    return store.read_json(checkpoint / STATE, {"identity": Mapping[str, Any], "reward": Mapping[str, Any]}, remedy=EARLIER)


@contextmanager
def writing(checkpoint: Path, *, main: bool) -> Iterator[None]:
    """Return a context manager for writing a checkpoint: if its body fails, the incomplete checkpoint is removed.

    Args:
        checkpoint: Folder of the checkpoint.
        main: True if this process removes the incomplete checkpoint, False if it leaves it. If several processes write one checkpoint, pass
            True in exactly one of them.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        with explain_full_disk(checkpoint, checkpoint):
            yield
    except BaseException:
        if main:
            store.remove(checkpoint)
        raise


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Return a context manager for loading part of a checkpoint: an error in its body becomes a DamagedFileError that says what to do.

    An out-of-memory error of the GPU is raised unchanged.

    Args:
        checkpoint: Folder of the checkpoint, for the error message.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        # One line of at most 150 characters.
        why = " ".join(str(error).split())[:150]
        raise store.DamagedFileError(f"{checkpoint} cannot be loaded: {type(error).__name__}, {why}. {EARLIER}") from error


class ResumableTrainer(GRPOTrainer):
    """TRL's trainer, with two additions: checkpoints also store the reward's state and ``identity``, and incomplete ones are removed.

    Attributes:
        args: TRL's config.
        identity: Dict of the run's settings that must be the same when it is resumed; saved in each checkpoint.
        reward: The reward object.
    """

    args: Any
    identity: Mapping[str, Any]
    reward: Any

    def reward_state(self) -> dict:
        """Return the state of a reward that changes during training; an empty dict for other rewards."""
        return self.reward.state_dict() if hasattr(self.reward, "state_dict") else {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = checkpoint_of(self.args.output_dir, self.state.global_step)
        with writing(checkpoint, main=self.args.should_save):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                store.write_json({"identity": dict(self.identity), "reward": self.reward_state()}, checkpoint / STATE)
        if self.args.should_save:  # after the new one is complete, so that an error here cannot remove it
            remove_old(checkpoint.parent, self.args.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)
