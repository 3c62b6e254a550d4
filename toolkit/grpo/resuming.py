"""Checkpoints of a run: one is whole or not there, and one that cannot be read is an error that says what to do."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from toolkit import store
from toolkit.store.full import explain_full_disk

STATE = "toolkit.json"  # in every checkpoint, written last: a checkpoint that has it is whole
EARLIER = "Remove that checkpoint and resume: the run goes on from the one before."
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
    """The folder of a run's checkpoint at a step."""
    return Path(out) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of a run, or ``None``."""
    whole = [p.parent for p in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE}")]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint belongs to, and the state of its reward. Raises store.DamagedFileError if that is not whole."""
    return store.read_json(checkpoint / STATE, {"identity": Mapping[str, Any], "reward": Mapping[str, Any]}, remedy=EARLIER)


@contextmanager
def writing(checkpoint: Path, *, main: bool) -> Iterator[None]:
    """Write a checkpoint in the body; if that fails, the half of it that is there is removed.

    Args:
        main: Whether this process is the one that removes.

    Raises:
        DiskFullError: no room for it.
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
    """Load a part of a checkpoint in the body; its failure becomes a DamagedFileError with what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        why = " ".join(str(error).split())[:150]
        raise store.DamagedFileError(f"{checkpoint} cannot be loaded: {type(error).__name__}, {why}. {EARLIER}") from error
