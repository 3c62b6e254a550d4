"""Stage *train*: the mid reasoner (``data/mid-reasoner/train.py``) is trained, saved in pieces, joined, loaded and sampled."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from ledger import Check, Value
from safetensors.torch import load_file

from toolkit import generate, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling

# The processes that make data import the script by its name, so its directory must be on the path.
sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "mid-reasoner"))

import join
import train as mid

RESERVED = 30.0  # seconds of the stage for saving and sampling
TOY = {
    "layers": 2, "d_model": 64, "d_mlp": 64, "heads": 4, "head_dim": 32, "batch_tokens": 1024, "chunk": 64, "workers": 1, "seconds": 5.0, "piece": "60KB", "compile": False,
}  # fmt: skip


@dataclass
class Setting:
    small: bool
    out: Path
    ends: float
    device: torch.device

    @cached_property
    def settings(self) -> Any:
        return mid.Settings(**TOY) if self.small else mid.Settings(seconds=3600.0)

    @cached_property
    def joined(self) -> Path:
        """The model directory made of the pieces. It does not come back from a borrowed machine: the pieces do."""
        import tempfile

        return join.join(self.out, Path(tempfile.mkdtemp()) / mid.NAME)


def setting(*, small: bool, out: Path, ends: float) -> Setting:
    return Setting(small, out, ends, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def training(s: Setting) -> dict[str, Value]:
    for old in s.out.glob(f"{mid.NAME}*"):
        old.unlink()
    facts = mid.train(s.settings, s.out, device=s.device, deadline=s.ends - RESERVED, say=lambda text: print(text, flush=True))
    settings = s.settings
    return {
        "weights (millions)": facts["weights"] / 1e6,
        "attention heads": settings.layers * settings.heads,
        "d_model": settings.d_model,
        "tokens (millions)": (facts["tokens"] / 1e6, f"{facts['steps']} steps in {facts['seconds']:.0f} s"),
        "tokens per second": (facts["tokens"] / facts["seconds"], f"compiled: {facts['compiled']}"),
        "share of time spent waiting for data": (facts["waited"] / facts["seconds"], f"{settings.workers} processes"),
        "loss at the end (nats)": facts["final_loss"],
    }


def pieces(s: Setting) -> dict[str, Value]:
    found = sorted(s.out.glob(f"{mid.NAME}-*.safetensors"))
    whole, held = load_file(s.joined / "model.safetensors"), {}
    for piece in found:
        held |= load_file(piece)
    differ = sum(name not in held or not torch.equal(held[name], value) for name, value in whole.items())
    return {
        "largest piece (MiB)": (max(piece.stat().st_size for piece in found) / 2**20, f"{len(found)} pieces"),
        "pieces joined: weights that differ": differ + len(set(held) ^ set(whole)),
    }


def sampled(s: Setting) -> dict[str, Value]:
    lm = lms.load(s.joined, device=s.device)
    rollouts = generate.rollouts(
        lm, tasks.load("tiny", "test", 4 if s.small else 200), Sampling(n=2, max_new_tokens=30 if s.small else 400), progress=False
    )
    return {
        "accuracy on test problems": (
            mean(r.correct for r in rollouts),
            f"{len(rollouts)} responses; first: {rollouts[0].text[:200]!r}",
        ),
        "think spans closed": mean(r.closed for r in rollouts),
        "think tokens, mean": mean(r.think_tokens for r in rollouts),
    }


CHECKS: Mapping[str, Check] = {"training": training, "pieces": pieces, "sampled": sampled}
