"""Request of vllm-lens (UKGovernmentBEIS/vllm-lens 1.3.0, ``_helpers/types.py`` and ``_helpers/_serialize.py``).

The field ``vllm_xargs.apply_steering_vectors`` is a JSON *string*: a list of steering vectors with the fields ``activations``
``[layers, d_model]``, ``layer_indices``, ``scale``, ``norm_match``, ``position_indices``. A tensor is
``{data, dtype, original_dtype, shape}`` with ``data`` in base64. The plug-in can also read zstd-compressed data (field ``compression``).
The export does not compress, so it needs no further package.

Without ``position_indices``, a vector acts at every position of prompt and response. ``position_indices`` are absolute positions, so the
format cannot express ``during="newest"``: the last position of a prompt, whatever its length, and every later one.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit import store
from toolkit.exports.base import Settings, about, request, rows, steered
from toolkit.lm import LM
from toolkit.types import Direction

USE = (
    "Start `vllm serve MODEL` with the package vllm-lens installed, and add the fields of request.json to the body of a request to "
    "/v1/completions or /v1/chat/completions. vllm-lens forces eager mode. Not tested on a running server."
)


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``request.json`` and ``about.json``. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "vllm-lens")
    vectors = rows(chosen)
    vector = {
        "activations": _on_the_wire(torch.stack(list(vectors.values()))),
        "layer_indices": list(vectors),
        "scale": settings.strength,
        "norm_match": False,
        "position_indices": None,
    }
    with store.atomic_directory(out) as partial:
        body = {"vllm_xargs": {"apply_steering_vectors": json.dumps([vector])}}
        request(partial, body, about(lm, "vllm-lens", settings, chosen, USE))
    return out


def _on_the_wire(tensor: Tensor) -> dict[str, Any]:
    """Return an fp32 tensor as the JSON object that the plug-in reads."""
    data = base64.b64encode(tensor.numpy().astype("<f4").tobytes()).decode("ascii")
    return {"data": data, "dtype": "float32", "original_dtype": "torch.float32", "shape": list(tensor.shape)}
