"""A head edit for Ollama: a GGUF LoRA and a ``Modelfile`` (Ollama's documentation of the Modelfile).

In the Modelfile, ``FROM`` names the base model and ``ADAPTER`` the GGUF file beside it; only one adapter is possible. The adapter is a GGUF
file because Ollama reads that for all model families, and adapters in safetensors only for a few. Ollama has no control vectors, so
directions cannot be exported to it. Template and parameters are those of the base model. Ollama cuts prompts to ``num_ctx`` tokens without
a message, so set a large ``num_ctx`` for long thinking.
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
        ExportError: ``settings.base`` is missing or has several lines; or as in ``gguf_lora.write``.
        WrongModelError: as in ``gguf_lora.write``.
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
