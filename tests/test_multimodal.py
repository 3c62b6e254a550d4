"""The text part of multimodal models: found, sampled, steered, edited, and saved with everything else of the checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from families import tokenizer
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from toolkit import edits, families, sites
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.types import Direction, HeadEdit, Plan, Problem

PROBLEMS = [Problem(f"p{i}", ({"role": "user", "content": text},), "3") for i, text in enumerate(["1+1=?", "17+5-9+23=?"])]
SAMPLING = Sampling(n=2, max_new_tokens=12, details=True)
ENCODER = {  # sizes of the part that reads images; as many blocks as the text part has, so that neither can be taken for the other
    "depth": 4, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "out_hidden_size": 32, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    "embed_dim": 32, "attention_heads": 4, "head_dim": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "vision_output_dim": 32,
    "projector_input_dim": 32, "projector_output_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
TOKENS = {
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4, "image_token_index": 90, "image_token_id": 90, "video_token_id": 91,
    "vision_start_token_id": 92, "vision_end_token_id": 93, "boi_token_index": 94, "eoi_token_index": 95, "audio_token_id": 96,
}  # fmt: skip
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
# Model type -> entries of its text part (and its model type, if it is not the default).
TEXT: dict[str, dict[str, Any]] = {"qwen2_5_vl": ROTARY, "mistral3": {"model_type": "ministral3"}}


def had(cls: type, entries: dict[str, Any]) -> dict[str, Any]:
    """The entries that a config class has."""
    known = (
        {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls.__init__).parameters)
    )
    return {name: value for name, value in entries.items() if name in known}


@cache
def wrapper(model_type: str) -> LM:
    cls, default = CONFIG_MAPPING[model_type], CONFIG_MAPPING[model_type]()
    parts = {}
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if "text" in name:
            entries = dict(TEXT.get(model_type, {}))
            parts[name] = zoo.config(entries.pop("model_type", part.model_type), **entries)
        elif part is not None:
            parts[name] = type(part)(**had(type(part), ENCODER))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(cls(**parts, **had(cls, TOKENS)), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape) * (0.3 if value.ndim >= 2 else 0.1)
            value.copy_(noise) if value.ndim >= 2 and "norm" not in name else value.add_(noise)
    return lms.wrap(model.eval(), tokenizer(), name=f"tiny {model_type}")


def plan(lm: LM) -> Plan:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    v = Direction(vector, "resid_mid", "think", "random", 1, 1, lm.provenance())
    layer = lm.layout.attention_layers[1]
    return Plan((HeadEdit(layer, 0, "project_out", 1.0), HeadEdit(layer, 3, "project_out", 0.5)), v, "two heads", lm.provenance())


def logprobs(condition: Condition | LM) -> torch.Tensor:
    return torch.tensor([x for r in rollouts(condition, PROBLEMS, SAMPLING, progress=False) for x in r.logprobs])


@pytest.mark.parametrize("model_type", families.MULTIMODAL)
def test_the_text_part_of_a_multimodal_model_qualifies_and_is_the_one_found(model_type):
    lm = wrapper(model_type)
    lms.qualify(lm)
    inside = {id(module) for module in sites.text_model(lm.model).modules()}
    assert all(id(block.block) in inside for block in lm.layout.blocks)
    assert (0 in lm.layout.heads) == (model_type in families.HYBRID)
    assert lm.body(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, lm.layout.d_model)


@pytest.mark.parametrize("model_type", families.MULTIMODAL)
def test_sampled_log_probabilities_are_those_of_one_pass(model_type):
    lm = wrapper(model_type)
    for r in rollouts(lm, PROBLEMS, SAMPLING, progress=False):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([r.token_ids]), use_cache=False).logits[0, r.prompt_len - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(r.logprobs), expected, atol=1e-4)


@pytest.mark.parametrize("model_type", families.MULTIMODAL)
def test_an_edited_multimodal_model_is_saved_with_its_encoder_and_its_processor(model_type, tmp_path):
    source = wrapper(model_type).save(tmp_path / "source")
    (source / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor"}))
    lm = lms.load(source)
    assert type(lm.model) is type(wrapper(model_type).model) and lm.fingerprint == wrapper(model_type).fingerprint
    edited = edits.apply(lm, plan(lm))
    assert torch.allclose(logprobs(edited), logprobs(Condition(lm, (edits.RuntimeEdit(plan(lm)),))), atol=1e-4)
    one, other = logprobs(edited), logprobs(lm)
    assert one.shape != other.shape or not torch.allclose(one, other, atol=1e-2)
    saved = edited.save(tmp_path / "saved")
    assert lms.load(saved).fingerprint == edited.fingerprint
    assert (saved / "preprocessor_config.json").read_text() == (source / "preprocessor_config.json").read_text()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, saved))
    assert after["architectures"] == before["architectures"]
