"""The models and the traces that are measured with: one of each, made from seeds."""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path

import torch
from clock import DEVICE, OUT, QUICK

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.types import Rollout, Span


def random_model(layers: int, width: int, heads: int, name: str) -> Path:
    """A random Qwen3 with the tiny reasoner's tokenizer, saved once; two processes may want it at the same time."""
    path = OUT / "models" / name
    if (path / "config.json").exists():
        return path
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=103, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=2 * width // heads, max_position_embeddings=8192, pad_token_id=0, bos_token_id=None,
        eos_token_id=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
    )  # fmt: skip
    made = path.with_name(f"{name}.{os.getpid()}")
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    AutoTokenizer.from_pretrained(lms.tiny_reasoner_path()).save_pretrained(made)
    try:
        made.rename(path)
    except OSError:  # the other was first
        shutil.rmtree(made)
    return path


def tiny() -> LM:
    return lms.load("tiny-reasoner", device=DEVICE)


MIDDLE = "3 M" if QUICK else "47 M"


def middle_path() -> Path:
    return random_model(12, 128, 8, "qwen3-3m") if QUICK else random_model(12, 512, 8, "qwen3-47m")


def middle() -> LM:
    """47 M parameters: Qwen3, 12 layers, width 512, 8 heads of 128 (4 for keys). Random: fine for cost, never for quality. In a quick
    run 3 M, width 128."""
    return lms.load(middle_path(), device=DEVICE)


LARGE = "1.3 G"


def large() -> LM:
    """1.3 G parameters, the shape of a model with 1.5 G but for its vocabulary: 28 layers, width 1536, 12 heads of 128 (2 for keys).
    Random, in fp32, and only in memory (5.2 GB)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=103, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=8192, pad_token_id=0, bos_token_id=None, eos_token_id=4, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config)
    return lms.wrap(model, AutoTokenizer.from_pretrained(lms.tiny_reasoner_path()), name="random Qwen2, 1.3 G")


def smol() -> LM:
    """SmolLM2-135M-Instruct, in fp32."""
    return lms.load(lms.smollm2_path(), device=DEVICE, tags=lms.ThinkTags(None, None))


def traces(lm: LM, n: int, *, shortest: int = 64, longest: int = 512, prompt: int = 16, seed: int = 0) -> list[Rollout]:
    """Rollouts of random tokens, 64 to 512 of them (log-uniform), whose response is all thinking but for its end."""
    draw, found = random.Random(seed), []
    for i in range(n):
        length = round(math.exp(draw.uniform(math.log(shortest), math.log(longest))))
        ids = tuple(draw.randrange(5, lm.vocab_size) for _ in range(length))
        think, answer = Span(prompt, length - 8), Span(length - 7, length)
        found.append(Rollout(f"t{i}", 0, ids, prompt, think, answer, "length", "", bool(i % 2)))
    return found


def by_parity(r: Rollout) -> str:
    """Two classes, half of the traces each."""
    return "long" if r.correct else "short"
