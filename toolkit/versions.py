"""Code that depends on the versions of other libraries. No other module checks versions."""

from __future__ import annotations

from typing import Any

import transformers


def unpacked_gguf() -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` with which the weights of a GGUF file are dequantised when they are loaded.

    Since transformers 5.22, they otherwise stay quantised on a GPU for which transformers has kernels. Older versions always dequantise
    them, so the arguments are empty.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
