"""Retrieval heads: the copy score of every head at 1k, 2k and 4k tokens, beside one full eager pass with ``output_attentions``.

Each measurement is a process of its own, so that its peak memory is its own: ``retrieval.py ours|eager LENGTH``.
"""

from __future__ import annotations

import json
import random
import sys

import torch
from clock import QUICK, Row, apart, median, now, peak, ratio, shares, start, words, write
from models import smol

from toolkit.lm import LM
from toolkit.methods import retrieval_heads
from toolkit.needles import Example
from toolkit.types import Rollout, Span

EMITTED, NEEDLE = 16, 12
LENGTHS = (512,) if QUICK else (1024, 2048, 4096)
TURNS = 1 if QUICK else 2


def example(lm: LM, length: int) -> Example:
    """Random words with a needle in the middle, whose tokens are then emitted, among others."""
    draw = random.Random(0)
    ids = [draw.randrange(1000, 30000) for _ in range(length)]
    at = length // 2
    response = [*ids[at : at + NEEDLE], *[draw.randrange(1000, 30000) for _ in range(EMITTED - NEEDLE)]]
    rollout = Rollout("r", 0, (*ids, *response), length, None, None, "length", "", True)
    return Example(rollout, Span(at, at + NEEDLE))


def ours(lm: LM, e: Example) -> torch.Tensor:
    return retrieval_heads.measure(lm, [e]).values["copy"][0]


@torch.inference_mode()
def eager(lm: LM, e: Example) -> torch.Tensor:
    """The formula on all attention of one pass."""
    ids = torch.tensor([e.rollout.token_ids[:-1]], device=lm.device)
    out = lm.model.base_model(input_ids=ids, output_attentions=True, use_cache=False)
    start, tokens = e.rollout.prompt_len - 1, list(dict.fromkeys(e.rollout.token_ids[e.needle.start : e.needle.stop]))
    emitted = e.rollout.token_ids[e.rollout.prompt_len :]
    copied: list[list[set[int]]] = [[set() for _ in range(lm.layout.n_heads)] for _ in range(lm.layout.n_layers)]
    for layer, weights in enumerate(out.attentions):
        top = weights[0, :, start:].argmax(dim=-1)
        for head, row in enumerate(top.tolist()):
            for at, token in zip(row, emitted, strict=True):
                if token in tokens and e.needle.start <= at < e.needle.stop and e.rollout.token_ids[at] == token:
                    copied[layer][head].add(token)
    return torch.tensor([[len(found) / len(tokens) for found in layer] for layer in copied], dtype=torch.float64)


def alone(what: str, length: int, turns: int) -> None:
    """One process: seconds of every turn, peak memory beyond the loaded model's, and the scores."""
    start()
    lm = smol()
    if what == "eager":
        lm.model.set_attn_implementation("eager")
    e, run = example(lm, length), {"ours": ours, "eager": eager}[what]
    run(lm, example(lm, 64))
    before, seconds = peak(), []
    for _ in range(turns):
        began = now()
        scores = run(lm, e)
        seconds.append(now() - began)
    told = {"seconds": seconds, "peak": peak(), "loaded": before, "scores": scores.tolist()}
    print(json.dumps(told | ({"shares": shares(lambda: run(lm, e))} if what == "ours" else {})))


def free_memory() -> float:
    """MB that may still be used."""
    with open("/proc/meminfo") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("MemAvailable")) / 1024


def main() -> None:
    start()
    rows = []
    for length in LENGTHS:
        needed = 30 * 9 * length**2 * 4 / 2**20 * 1.05 + 2500
        mine = [apart("retrieval.py", "ours", str(length), "1") for _ in range(TURNS)]
        spent = mine[0]["shares"]
        where = f"the pass over the prompt: {words(spent)}"
        if length > 512 and free_memory() < needed:
            why = f"not available: eager needs {needed:.0f} MB, {free_memory():.0f} are free"
            rows.append(Row(f"retrieval heads, SmolLM2, {length} tokens: times faster", None, None, ">= 5", why, where))
            continue
        theirs = [apart("retrieval.py", "eager", str(length), "1") for _ in range(TURNS)]
        a, b = (torch.tensor(found[0]["scores"]) for found in (mine, theirs))
        gate = f"heads whose copy score differs: {int((a != b).sum())} of {a.numel()}"
        assert (a != b).sum() <= 3, gate  # two keys of equal attention
        seconds = [[s for found in each for s in found["seconds"]] for each in (theirs, mine)]
        fastest = ratio(*seconds)[0] / (spent["matrix products"] + spent["attention"])
        where += f"; if only matrix products and attention took time: {fastest:.1f} x"
        rows.append(Row(f"retrieval heads, SmolLM2, {length} tokens: times faster than full eager", *ratio(*seconds), ">= 5" if length == 4096 else None, gate,
                        where, f"{median(seconds[1]):.1f} s against {median(seconds[0]):.1f}"))  # fmt: skip
        memory = mine[0]["peak"] / theirs[0]["peak"]
        rows.append(Row(f"retrieval heads, SmolLM2, {length} tokens: peak memory over full eager", memory, None, "<= 0.4" if length == 4096 else None, gate,
                        "the weights and one pass; attention for a few rows", f"{mine[0]['peak']:.0f} MB against {theirs[0]['peak']:.0f}"))  # fmt: skip
    write("retrieval", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        alone(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
