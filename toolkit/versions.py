"""What differs between the versions of other libraries that the toolkit runs with. No other module looks at versions."""

from __future__ import annotations

from typing import Any

import transformers


def unpacked_gguf() -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` with which a GGUF file becomes plain weights.

    Since transformers 5.22, blocks stay packed on a GPU that has kernels for them, unless the config says otherwise. Before, they never did.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
