"""A folder for the Hugging Face Hub with a direction in two formats and a model card. See ``jobs.vector_folder``."""

from __future__ import annotations

from pathlib import Path

from toolkit import jobs
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Direction


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the folder ``out``. Its model card shows the numbers of ``settings.doses``. For errors see ``vectors.save_folder``."""
    return jobs.vector_folder(lm, direction, out, settings.doses, drop_layer_0=settings.drop_layer_0)
