"""A head edit for Ollama: a GGUF LoRA and a ``Modelfile`` (Ollama's documentation of the Modelfile).

``FROM`` is the base model, ``ADAPTER`` a file beside the Modelfile; one adapter only. Ollama itself converts adapters in safetensors for a
few families; a GGUF file is read for all. It has no control vectors, so directions cannot be exported to it. Template and parameters are
those of the base model. Ollama cuts a prompt to ``num_ctx`` tokens without saying so: set it for long thinking.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import store
from toolkit.exports import gguf_lora
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Plan
from toolkit.vectors import ExportError

ADAPTER = "adapter.gguf"
MODELFILE = """# {plan}
# ollama create NAME -f Modelfile
FROM {base}
ADAPTER ./{adapter}
# Ollama cuts longer prompts and responses without saying so.
# PARAMETER num_ctx 8192
"""


def write(lm: LM, plan: Plan, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``adapter.gguf`` and ``Modelfile``. ``settings.base`` is a model in Ollama or a GGUF file.

    Raises:
        ExportError: ``settings.base`` is missing or spans several lines; or see ``gguf_lora.write``.
        WrongModelError: see ``gguf_lora.write``.
    """
    if not settings.base or "\n" in settings.base:
        raise ExportError(
            "ollama needs the base model, in which the adapter is loaded: give --base, a name in Ollama or a GGUF file."
        )
    file = Path(settings.base).resolve() if Path(settings.base).is_file() else None
    text = MODELFILE.format(plan=" ".join(plan.name.split()), base=file or settings.base, adapter=ADAPTER)
    with store.atomic_directory(out) as partial:
        gguf_lora.write(lm, plan, partial / ADAPTER, Settings(base=str(file) if file else None))
        store.write_text(text, partial / "Modelfile")
    return out
