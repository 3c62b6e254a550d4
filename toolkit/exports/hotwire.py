"""Vector file and request of hotwire (hotwire-vllm 0.1.2, ``_state.py`` and ``_patch.py``).

The server loads every ``NAME.pt`` in the directory ``HOTWIRE_VECTORS`` (``torch.load(weights_only=True)``): a tensor ``[layers, d_model]``,
row l for the output of block l. The field ``vllm_xargs.hotwire`` of a request is a JSON *string*: a list of ``{id, layer, scale}``, where
``id`` is NAME. Every pair of layer and scale takes one of the server's slots; their number is ``HOTWIRE_SLOTS`` (by default 16).

Without hotwire's option ``decode_only``, a vector acts at every position. With the option, it acts at no position of the prompt, not even
at the last one, which predicts the first token of the response. The toolkit's ``during="newest"`` includes this last position, so it cannot
be exported.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from toolkit import store
from toolkit.exports.base import Settings, about, request, rows, steered
from toolkit.lm import LM
from toolkit.types import Direction

NAME = "thinking"  # id of the vector, and name of its file
SLOTS = 16  # default of HOTWIRE_SLOTS


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``vectors/thinking.pt``, ``request.json`` and ``about.json``. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "hotwire")
    vectors = rows(chosen)
    matrix = torch.zeros(chosen.vector.shape)
    for layer, vector in vectors.items():
        matrix[layer] = vector
    spec = [{"id": NAME, "layer": layer, "scale": settings.strength} for layer in vectors]
    slots = f"HOTWIRE_SLOTS={len(spec)} or more, " if len(spec) > SLOTS else ""
    use = (
        f"Start vLLM with {slots}HOTWIRE_VECTORS=DIRECTORY/vectors, and add the fields of request.json to the body of a request. A vector "
        "that the server does not know is ignored with a line in its log: check that the output differs from that with scale 0. Not "
        "tested on a running server."
    )
    with store.atomic_directory(out) as partial:
        store.write_pt(matrix, store.writable(partial / "vectors") / f"{NAME}.pt")
        request(partial, {"vllm_xargs": {"hotwire": json.dumps(spec)}}, about(lm, "hotwire", settings, chosen, use))
    return out
