"""Steering file of lm-evaluation-harness (lm-eval 0.4.13, ``models/hf_steered.py``).

``steer.pt`` is a dict: name of a module below the base model -> ``{steering_vector, steering_coefficient, action, bias, head_index}``.
lm-eval adds ``steering_coefficient * steering_vector`` to the module's output at every position. It loads the file with unrestricted
pickle, which can run code. The exported file holds only tensors, numbers, texts and ``None``, so ``torch.load(weights_only=True)`` can read
it too.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import store
from toolkit.exports.base import ABOUT, Settings, about, rows, steered
from toolkit.lm import LM
from toolkit.types import Direction

FILE = "steer.pt"
USE = "lm_eval --model steered --model_args pretrained=MODEL,steer_path=steer.pt --tasks TASK"


def write(lm: LM, direction: Direction, out: Path, settings: Settings) -> Path:
    """Write the directory ``out`` with ``steer.pt`` and ``about.json``. For errors see ``base.steered``."""
    chosen = steered(lm, direction, settings, "lm-eval-steered")
    names = {id(module): name for name, module in lm.model.base_model.named_modules()}
    config = {
        names[id(lm.layout.blocks[layer].block)]: {
            "steering_vector": vector,
            "steering_coefficient": settings.strength,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, vector in rows(chosen).items()
    }
    with store.atomic_directory(out) as partial:
        store.write_pt(config, partial / FILE)
        store.write_json(about(lm, "lm-eval-steered", settings, chosen, USE), partial / ABOUT)
    return out
