"""Tiny random models of every supported family, made from configs: no hub, a second each at most."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from toolkit import lm as lms
from toolkit.lm import LM

COMMON = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 4,
}
_GPT2 = {"vocab_size": 103, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
_NEOX = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}

CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=16),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=12),
    "gemma2": Gemma2Config(**COMMON, head_dim=12, sliding_window=16, query_pre_attn_scalar=12),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=12, sliding_window=16, query_pre_attn_scalar=12),
    "phi3": Phi3Config(**COMMON),
    "olmo2": Olmo2Config(**COMMON),
    "gpt2": GPT2Config(**_GPT2, bos_token_id=None, eos_token_id=4, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**_NEOX, rotary_pct=0.5),
    "gpt_neox_sequential": GPTNeoXConfig(**_NEOX, rotary_pct=0.5, use_parallel_residual=False),
}
FAMILIES = tuple(CONFIGS)


@cache
def tokenizer():
    """The tiny reasoner's tokenizer: 103 tokens, think tags, chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lms.tiny_reasoner_path())


def family(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LM:
    """A random model of a family, with weights large enough that every part matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.3 if value.ndim >= 2 else 0.1
            noise = torch.randn(value.shape) * scale
            value.copy_(noise if value.ndim >= 2 else value + noise) if "norm" not in key else value.add_(noise)
    return lms.wrap(model.to(dtype), tokenizer(), name=f"tiny {name}")
