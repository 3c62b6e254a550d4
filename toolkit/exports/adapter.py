"""A PEFT adapter (LoRA of rank 1) of a head edit, with a model card. See ``vectors.save_adapter``.

vLLM loads the directory with ``--enable-lora --lora-modules NAME=DIRECTORY``, SGLang with ``--lora-paths NAME=DIRECTORY``.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import report, store, vectors
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Plan


def write(lm: LM, plan: Plan, out: Path, settings: Settings) -> Path:
    """Write the adapter and its card into the directory ``out``. For errors see ``vectors.save_adapter``."""
    with store.atomic_directory(out) as partial:
        vectors.save_adapter(lm, plan, partial)
        store.write_text(report.plan_card(lm.name, plan, "adapter"), partial / "README.md")
    return out
