"""The toolkit's own file of a direction, with a header that names site, positions, scale and sign. See ``vectors.save``."""

from __future__ import annotations

from pathlib import Path

from toolkit import vectors
from toolkit.exports.base import Settings, steered
from toolkit.lm import LM
from toolkit.types import Direction


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write ``strength * direction`` as a safetensors file. Layers that are not steered are zero. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "safetensors")
    return vectors.save(chosen, out, lm=lm, scale=settings.strength, during=settings.during)
