"""The model families for which the toolkit is tested, each with a tiny random model (``tests/test_families.py``).

The tests sample batches with a KV cache, with and without steering. The log-probabilities recorded during sampling must equal those of one
teacher-forced pass over each response. Other causal language models of transformers can be loaded too, if their modules match a row of
``sites.ROWS`` and they pass the checks of ``qualify``.
"""

from __future__ import annotations

from collections.abc import Mapping

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "Alibaba": {
        "qwen2": "Qwen 2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen", "qwen2_moe": "Qwen 2 MoE", "qwen3": "Qwen 3", "qwen3_moe": "Qwen 3 MoE",
        "qwen3_next": "Qwen3-Next", "qwen3_5_text": "Qwen 3.5", "qwen3_5_moe_text": "Qwen 3.5 MoE",
    },
    "DeepSeek": {"deepseek_v2": "DeepSeek-V2", "deepseek_v3": "DeepSeek-V3 and R1"},
    "OpenAI": {"gpt_oss": "gpt-oss", "gpt2": "GPT-2"},
    "Google": {
        "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "gemma4_text": "Gemma 4 (without experts)", "vaultgemma": "VaultGemma",
    },
    "Mistral": {"mistral": "Mistral, Magistral", "mixtral": "Mixtral", "ministral": "Ministral", "ministral3": "Ministral 3"},
    "Meta": {"llama": "Llama 1 to 3, DeepSeek-R1-Distill-Llama", "llama4_text": "Llama 4", "cwm": "CWM"},
    "Ai2": {"olmo": "OLMo", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "olmoe": "OLMoE", "flex_olmo": "FlexOLMo"},
    "Microsoft": {"phi": "Phi 1 and 2", "phi3": "Phi 3 and 4", "phimoe": "Phi 3.5 MoE", "bitnet": "BitNet"},
    "Z.ai": {"glm": "GLM-4 (2024)", "glm4": "GLM-4 and GLM-Z1 (2025)", "glm4_moe": "GLM-4.5 to 4.7", "glm4_moe_lite": "GLM-4.7-Flash"},
    "IBM": {
        "granite": "Granite 3", "granitemoe": "Granite MoE", "granitemoeshared": "Granite MoE, shared experts",
        "granitemoehybrid": "Granite 4 (without experts)", "bamba": "Bamba",
    },
    "Liquid": {"lfm2": "LFM2", "lfm2_moe": "LFM2 MoE"},
    "Tencent": {"hunyuan_v1_dense": "Hunyuan", "hunyuan_v1_moe": "Hunyuan MoE", "youtu": "Youtu"},
    "Baidu": {"ernie4_5": "ERNIE 4.5", "ernie4_5_moe": "ERNIE 4.5 MoE"},
    "LG": {"exaone4": "EXAONE 4", "exaone_moe": "EXAONE MoE"},
    "Cohere": {"cohere": "Command R", "cohere2": "Command R7B, Command A"},
    "others": {
        "smollm3": "SmolLM3", "seed_oss": "Seed-OSS", "nemotron": "Nemotron", "minimax_m2": "MiniMax-M2", "mimo_v2_flash": "MiMo-V2-Flash",
        "apertus": "Apertus", "arcee": "Arcee", "afmoe": "Trinity", "dots1": "dots.llm1", "helium": "Helium", "internlm3": "InternLM 3",
        "stablelm": "StableLM", "starcoder2": "StarCoder2", "gpt_bigcode": "StarCoder", "gpt_neox": "GPT-NeoX, Pythia", "persimmon": "Persimmon",
        "nanochat": "nanochat",
    },
}  # fmt: skip
"""Company or group -> ``model_type`` in transformers -> names of the models."""

MULTIMODAL: Mapping[str, str] = {
    "gemma3": "Gemma 3", "gemma4": "Gemma 4 (without experts)", "llama4": "Llama 4", "mistral3": "Mistral Small 3, Magistral, Ministral 3",
    "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_vl_moe": "Qwen3-VL MoE", "qwen3_5": "Qwen 3.5", "qwen3_5_moe": "Qwen 3.5 MoE",
    "internvl": "InternVL", "lfm2_vl": "LFM2-VL", "smolvlm": "SmolVLM", "exaone4_5": "EXAONE 4.5",
}  # fmt: skip
"""``model_type`` -> name, of models that also read images (``tests/test_multimodal.py``).

The toolkit gives these models text only, no images. Edits change the language model in them. Saving keeps the rest of the checkpoint and
the files of its processor.
"""

HYBRID = frozenset(
    (
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "granitemoehybrid",
        "bamba",
        "lfm2",
        "lfm2_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "lfm2_vl",
    )
)
"""Model types in which only some layers have attention heads."""

SUPPORTED = tuple(model_type for types in FAMILIES.values() for model_type in types)
"""All model types in ``FAMILIES``."""
