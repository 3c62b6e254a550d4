"""GGUF control vector, for ``llama-server --control-vector FILE``. See ``vectors.save_gguf``.

llama.cpp adds the tensor ``direction.k`` to the output of block k at every position of prompt and response. It ignores metadata. The format
has no field for a scale, so the vectors are multiplied by the strength. ``--control-vector-scaled`` multiplies them by a further factor.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import vectors
from toolkit.exports.base import Settings, steered
from toolkit.lm import LM
from toolkit.types import Direction


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write ``strength * direction`` as a GGUF control vector. For errors see ``base.steered`` and ``vectors.save_gguf``."""
    chosen = steered(lm, direction, settings, "gguf")
    return vectors.save_gguf(chosen, out, lm=lm, scale=settings.strength, drop_layer_0=settings.drop_layer_0)
