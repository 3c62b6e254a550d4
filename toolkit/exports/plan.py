"""A folder for the Hugging Face Hub with a plan of head edits and a model card."""

from __future__ import annotations

from pathlib import Path

from toolkit import edits, report, store
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Plan


def write(lm: LM, plan: Plan, out: Path, settings: Settings) -> Path:
    """Write ``plan.safetensors`` and the card into the directory ``out``. For errors see ``edits.check_plan``."""
    edits.check_plan(lm, plan)
    with store.atomic_directory(out) as partial:
        store.save(plan, partial / "plan.safetensors")
        store.write_text(report.plan_card(lm.name, plan, "plan"), partial / "README.md")
    return out
