"""Steering spec of EasySteer, version 2 (ZJU-REAL/EasySteer, ``docs/user-guide/openai-server.md`` and ``steering.md``).

Fields of the spec. ``source`` is the path on the server of a GGUF control vector (``vectors.save_gguf``). ``apply`` says at which positions
the vector acts: ``prompt`` or ``generation`` with the value ``all``, or selected positions. ``prompt_positions: [-1]`` with
``generation: all`` is the toolkit's ``during="newest"``: the prompt's last position and every generated token. ``scale`` is the strength.
``normalize`` is false.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit import store, vectors
from toolkit.exports.base import ABOUT, Settings, about, rows, steered
from toolkit.lm import LM
from toolkit.types import Direction

VECTOR = "direction.gguf"
APPLY: dict[str, dict[str, Any]] = {
    "all": {"prompt": "all", "generation": "all"},
    "newest": {"prompt_positions": [-1], "generation": "all"},
}
"""Positions of steering (``Settings.during``) -> value of EasySteer's field ``apply``."""
USE = (
    "Start the server in this directory: `vllm serve MODEL --enable-steer-vector --steering-config spec.json`; or send the content of "
    "spec.json as the field `steering` of a request. `source` is a path on the server. Not tested on a running server."
)


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``direction.gguf``, ``spec.json`` and ``about.json``. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "easysteer")
    layers = [layer for layer in rows(chosen) if layer > 0 or not settings.drop_layer_0]
    vector = {
        "source": VECTOR,
        "algorithm": "direct",
        "scale": settings.strength,
        "layers": layers,
        "normalize": False,
        "apply": APPLY[settings.during],
        "name": "thinking",
    }
    with store.atomic_directory(out) as partial:
        vectors.save_gguf(chosen, partial / VECTOR, lm=lm, drop_layer_0=settings.drop_layer_0)
        store.write_json({"vectors": [vector]}, partial / "spec.json")
        store.write_json({**about(lm, "easysteer", settings, chosen, USE), "layers": layers}, partial / ABOUT)
    return out
