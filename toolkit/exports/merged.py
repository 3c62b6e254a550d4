"""A checkpoint with a head edit in its weights, which every loader of Hugging Face checkpoints reads at full speed."""

from __future__ import annotations

from pathlib import Path

from toolkit import edits, report, store
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Plan


def write(lm: LM, plan: Plan, out: Path, settings: Settings) -> Path:
    """Write the edited checkpoint, its plan and its model card into the directory ``out``. For errors see ``edits.apply``."""
    edited = edits.apply(lm, plan)
    with store.atomic_directory(out) as partial:
        edited.save(partial)
        store.save(plan, partial / "plan.safetensors")
        store.write_text(report.plan_card(lm.name, plan, "merged"), partial / "README.md")
    return out
