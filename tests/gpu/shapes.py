"""Models of real size with random weights, made on the device: their speed and memory are those of trained ones, their text is noise."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.needles import Example
from toolkit.types import Direction, Rollout, Span

NEVER = 10**9  # an end token that no model has
_COMMON = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4, "max_position_embeddings": 131072}
_TOY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 16,
}
CONFIGS = {
    "1.5B": lambda small: Qwen2Config(**_COMMON, tie_word_embeddings=True, num_key_value_heads=2, **(_TOY if small else {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12})),
    "4B": lambda small: Qwen3Config(**_COMMON, tie_word_embeddings=True, num_key_value_heads=2 if small else 8, **(_TOY if small else {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "head_dim": 128})),
}  # fmt: skip
"""Shapes of Qwen2-1.5B and Qwen3-4B, or toys of the same architectures."""


def random_model(shape: str, *, small: bool, device: torch.device) -> LM:
    """Return a random model in bf16 whose responses never end by themselves."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[shape](small), dtype=torch.bfloat16)
    lm = lms.wrap(model, AutoTokenizer.from_pretrained(lms.tiny_reasoner_path()), name=f"random {shape}")
    return ending(lm, frozenset({NEVER}))


def ending(lm: LM, eos: frozenset[int]) -> LM:
    """Return the same model with other end tokens.

    The next token of a random model is nearly uniform, so that a share p of the vocabulary as end tokens gives lengths with a geometric law:
    most are short, few are long, the mean is 1 / p.
    """
    same = replace(lm)
    # Hashing gigabytes of random weights would take longer than what is measured.
    same.__dict__.update(eos_ids=eos, fingerprint=f"{lm.name}, not hashed")
    return same


def direction(lm: LM) -> Direction:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0)) * 0.1
    return Direction(vector, "resid_post", "think", "random", 1, 1, lm.provenance())


def bytes_per_step(lm: LM, rows: int, tokens: float) -> float:
    """Return the bytes that a decoding step must at least read: every weight once, and the keys and values of all tokens so far.

    Embeddings are read as the LM head, to which they are tied.
    """
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    cached = 2 * lm.model.config.num_key_value_heads * sum(lm.layout.head_dims) * lm.model.dtype.itemsize
    return weights + rows * tokens * cached


def needle(lm: LM, length: int, *, emitted: int = 16, size: int = 12) -> Example:
    """Return random tokens with a needle in the middle, which is then emitted, among others."""
    draw = random.Random(0)

    def noise(n: int) -> list[int]:
        return [draw.randrange(5, lm.vocab_size) for _ in range(n)]

    ids, at = noise(length), length // 2
    response = [*ids[at : at + size], *noise(emitted - size)]
    return Example(Rollout("r", 0, (*ids, *response), length, None, None, "length", "", True), Span(at, at + size))


def completions(lm: LM, problem_ids: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int) -> list[Rollout]:
    """Return responses of random tokens, all of the same length."""
    draw, made = random.Random(0), []
    for sample, (name, prompt) in enumerate(zip(problem_ids, prompts, strict=True)):
        ids = (*prompt, *(draw.randrange(5, lm.vocab_size) for _ in range(tokens)))
        spans, logprobs = (Span(len(prompt), len(ids)), None), (-math.log(lm.vocab_size),) * tokens
        made.append(Rollout(name, sample, ids, len(prompt), *spans, "length", "", bool(sample % 2), logprobs=logprobs))
    return made
