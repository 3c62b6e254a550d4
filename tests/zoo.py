"""Tiny random models of every causal language model in transformers that can be made small, from configs: no hub, a second each at most.

``families.py`` holds the few families on which most tests run; this file is for tests over all of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from families import tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from toolkit import lm as lms
from toolkit.lm import LM

BASE: dict[str, Any] = {
    # sizes
    "vocab_size": 103, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 48, "ffn_dim": 48, "d_model": 32,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4, "rotary_dim": 4, "partial_rotary_factor": 0.5,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_layer_start_index": 0, "expert_ffn_hidden_size": 24, "num_dense_layers": 1,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # layers without heads
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    "linear_num_heads": 4, "linear_head_dim": 8, "block_auto_adjust_ff_dim": False,
    # Gemma
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 103, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 48, "residual_multiplier": 0.22},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoe": {"residual_multiplier": 0.22}, "granitemoeshared": {"residual_multiplier": 0.22}, "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3}, "lfm2": {"layer_types": ["conv", "full_attention"] * 2}, "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": HYBRID, "qwen3_5_text": HYBRID, "qwen3_5_moe_text": HYBRID, "olmo_hybrid": HYBRID, "minimax": HYBRID,
    "deepseek_v2": LATENT, "deepseek_v3": {**LATENT, "head_dim": 8}, "youtu": LATENT, "glm4_moe_lite": LATENT, "axk1": LATENT, "kimi_linear": LATENT,
    "minicpm3": LATENT, "longcat_flash": LATENT, "cwm": {"bos_token_id": 1}, "zaya": {"num_experts_per_tok": 1}, "afmoe": {"global_attn_every_n_layers": 2},
}  # fmt: skip


def config(model_type: str, **entries: Any) -> Any:
    """A tiny config of a model type: the entries of ``BASE`` and ``MORE`` that it has, and the given ones."""
    cls = CONFIG_MAPPING[model_type]
    known = (
        {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls.__init__).parameters)
    )
    names = getattr(cls, "attribute_map", {}) or {}
    wanted = BASE | MORE.get(model_type, {}) | entries
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size")
    had = {key: value for key, value in wanted.items() if key in known or key in tokens}
    # A config may have the entry under another name: give it once.
    return cls(**{key: value for key, value in had.items() if names.get(key) not in had})


def model_of_type(model_type: str, *, seed: int = 0, **entries: Any) -> LM:
    """A random model, with weights large enough that every part matters. Tensors that scale a block's output are not 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(model_type, **entries), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape) * (0.3 if value.ndim >= 2 else 0.1)
            value.copy_(noise) if value.ndim >= 2 and "norm" not in name else value.add_(noise)
        for name, value in model.named_buffers():
            if name.endswith("layer_scalar"):
                value.fill_(0.8)
    return lms.wrap(model.eval(), tokenizer(), name=f"tiny {model_type}")
