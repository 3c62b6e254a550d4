"""What ``load`` accepts, ``save`` keeps: load(save(edit(load(x)))) computes what edit(load(x)) does, adapters merged."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from families import CONFIGS, family, tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, LlamaConfig, SiglipVisionConfig

from toolkit import adapters, checkpoints, edits, shipped, store, vectors
from toolkit import lm as lms
from toolkit.lm import LM, ThinkTags
from toolkit.sites import UnsupportedModelError
from toolkit.types import Direction, HeadEdit, Plan

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 45)[None]


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def shaken(model, seed: int = 0):
    """Every weight at random, so that nothing is zero or equal by chance; tied weights stay tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator).to(value))
    return model


def saved(model, path, **how):
    model.save_pretrained(path, **how)
    tokenizer().save_pretrained(path)
    return path


def base_of(tmp_path, *, tied: bool, dtype: torch.dtype = torch.float32):
    config = copy.deepcopy(CONFIGS["qwen3"])
    config.tie_word_embeddings = tied
    from transformers import AutoModelForCausalLM

    return saved(shaken(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).to(dtype), tmp_path / "base")


def adapted(base, path, config, *, named: str | None = None):
    """Save an adapter on a base; returns the logits of the model with the adapter beside its weights, in fp32."""
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".default" in name and "magnitude" not in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(path)
    if named is not None:
        about = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**about, "base_model_name_or_path": named}))
    return logits(model.eval())


def lora(*targets: str, **more):
    return peft.LoraConfig(r=4, target_modules=list(targets) or "all-linear", task_type="CAUSAL_LM", **more)


KINDS = {
    "queries and values": lambda: lora("q_proj", "v_proj"),
    "every linear layer": lora,
    "DoRA": lambda: lora(use_dora=True),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "head saved whole": lambda: lora("q_proj", modules_to_save=["lm_head"]),
    "embedding saved whole": lambda: lora("q_proj", modules_to_save=["embed_tokens"]),
    "embedding and head adapted": lambda: lora("q_proj", "embed_tokens", "lm_head"),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


def plan_of(lm: LM) -> Plan:
    v = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(2))
    direction = Direction(v, "resid_mid", "think", "x", 1, 1, lm.provenance())
    return Plan((HeadEdit(1, 2, "project_out", 1.0),), direction, "one head", lm.provenance())


def edited(lm: LM) -> LM:
    return edits.apply(lm, plan_of(lm))


def assert_whole(lm: LM, tmp_path, dtype: torch.dtype = torch.float32) -> None:
    """Saved and loaded again, an edited model computes the same, bit by bit, and has the same fingerprint."""
    changed = edited(lm)
    assert not torch.equal(logits(changed.model), logits(lm.model))
    again = lms.load(changed.save(tmp_path / "edited"), device="cpu", dtype=dtype)
    assert torch.equal(logits(again.model), logits(changed.model))
    assert again.fingerprint == changed.fingerprint


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_is_merged_and_its_edit_is_saved(kind, tied, tmp_path):
    base = base_of(tmp_path, tied=tied)
    wanted = adapted(base, tmp_path / "adapter", KINDS[kind]())
    lm = lms.load(tmp_path / "adapter", device="cpu")
    assert not torch.allclose(wanted, logits(lms.load(base, device="cpu").model), atol=1e-2)
    torch.testing.assert_close(logits(lm.model), wanted, atol=1e-4, rtol=1e-4)
    assert all(weight.requires_grad for weight in lm.model.parameters())
    assert_whole(lm, tmp_path)


def test_an_adapter_is_merged_in_fp32_and_rounded_once(tmp_path):
    base = base_of(tmp_path, tied=False, dtype=torch.bfloat16)
    adapted(base, tmp_path / "adapter", lora())
    exact, rounded = (lms.load(tmp_path / "adapter", device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(exact.model.parameters(), rounded.model.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)
    assert exact.fingerprint != rounded.fingerprint
    assert_whole(rounded, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("named", ["relative to the adapter", "relative to the working directory", "absolute"])
def test_the_base_of_an_adapter_is_found(named, tmp_path, monkeypatch):
    base = base_of(tmp_path, tied=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    adapter = tmp_path / "deep" / "adapter"
    where = {"relative to the adapter": "../../base", "relative to the working directory": "base", "absolute": str(base)}[named]
    wanted = adapted(base, adapter, lora(), named=where)
    torch.testing.assert_close(logits(lms.load(adapter, device="cpu").model), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["tiny-reasoner", "a GGUF file", "an adapter"])
def test_whatever_can_be_loaded_can_be_the_base_of_an_adapter(base, tmp_path, monkeypatch):
    source = base
    if base == "an adapter":
        source = str(tmp_path / "first")
        adapted(base_of(tmp_path, tied=False), source, lora("q_proj"))
    elif base == "a GGUF file":
        (tmp_path / "small.gguf").touch()
        source = str(tmp_path / "small.gguf")
        monkeypatch.setattr(checkpoints, "_gguf", lambda *about: (family("llama").model, tokenizer()))
    lm = lms.load(source, device="cpu")
    again = lms.load(vectors.save_adapter(lm, plan_of(lm), tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(again.model), logits(edits.apply(lm, plan_of(lm)).model), atol=1e-3, rtol=1e-3)


def test_adapters_that_are_each_others_base_are_refused(tmp_path):
    base = base_of(tmp_path, tied=False)
    adapted(base, tmp_path / "a", lora("q_proj"), named="../b")
    adapted(base, tmp_path / "b", lora("q_proj"), named="../a")
    with pytest.raises(UnsupportedModelError, match=r".* is an adapter of .*: set base_model_name_or_path") as caught:
        lms.load(tmp_path / "a", device="cpu")
    assert len(str(caught.value)) <= 400


def test_an_adapter_beside_whole_weights_is_refused(tmp_path):
    base = base_of(tmp_path, tied=False)
    adapted(base, tmp_path / "adapter", lora())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((tmp_path / "adapter" / name).read_bytes())
    with pytest.raises(UnsupportedModelError, match="holds a complete model and an adapter: move adapter_config"):
        lms.load(base, device="cpu")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/nowhere/base", "is an adapter of '/nowhere/base', which is not a model directory.*set base_model_name_or_path"),
        ("owner/never-seen", "No directory or hub model 'owner/never-seen' in the cache of this machine"),
        ("", "names no base model"),
    ],
)
def test_a_base_that_is_missing_is_one_sentence(named, said, tmp_path):
    adapted(base_of(tmp_path, tied=False), tmp_path / "adapter", lora(), named=named)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        lms.load(tmp_path / "adapter", device="cpu")
    assert len(str(caught.value)) <= 400


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapted(base_of(tmp_path, tied=False), tmp_path / "adapter", lora(), named=str(family("gpt2").save(tmp_path / "other")))
    with pytest.raises((store.DamagedFileError, UnsupportedModelError), match="adapter") as caught:
        lms.load(tmp_path / "adapter", device="cpu")
    assert len(str(caught.value)) <= 400


def test_an_adapter_that_is_no_change_of_weights_is_refused(tmp_path):
    adapted(
        base_of(tmp_path, tied=False), tmp_path / "adapter", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(
        (store.DamagedFileError, UnsupportedModelError), match=r"PROMPT_TUNING.*does not change weights, so it cannot be merged"
    ):
        lms.load(tmp_path / "adapter", device="cpu")


class Elsewhere:
    """A model on a device that this machine does not have."""

    device = torch.device("cuda")
    config = CONFIGS["qwen3"]

    def __call__(self, input_ids):
        raise LookupError(f"given ids on {input_ids.device}")


def test_a_merge_is_checked_on_the_device_of_the_model(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "arange", lambda n, device=None: made.append(device) or torch.zeros(n, dtype=torch.long))
    with pytest.raises(LookupError):
        adapters._merge(Elsewhere(), "adapter")
    assert made == [Elsewhere.device]


def test_the_fp64_sum_of_a_shipped_adapter_is_taken_on_the_cpu_and_the_model_comes_back(monkeypatch):
    moves, model = [], family("llama").model
    monkeypatch.setattr(type(model), "device", Elsewhere.device)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: moves.append(str(device)) or model)
    monkeypatch.setattr(adapters, "merge", lambda model, *a, **k: moves.append("merged") or model)
    shipped.merge(model, Path("folder"), torch.float32)
    assert moves == ["cpu", "merged", "cuda"]


def test_without_peft_one_line_says_what_to_install(tmp_path, monkeypatch):
    adapted(base_of(tmp_path, tied=False), tmp_path / "adapter", lora())
    monkeypatch.setattr("toolkit.adapters.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"is a PEFT adapter, which needs peft: pip install 'reasoning-length-toolkit\[rl\]'"):
        lms.load(tmp_path / "adapter", device="cpu")


# --- other directories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_directory_keeps_what_was_computed(name, dtype, tmp_path):
    path = saved(family(name).model.to(dtype), tmp_path / "model", max_shard_size="20KB")
    assert (path / checkpoints.INDEX).is_file()
    assert_whole(lms.load(path, device="cpu", dtype=dtype), tmp_path, dtype)


def multimodal(path):
    """A tiny Gemma 3 that reads images too, with the files of its processor."""
    common = {
        k: v
        for k, v in CONFIGS["llama"].to_dict().items()
        if k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    text = Gemma3TextConfig(
        **common, num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=16, query_pre_attn_scalar=12, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=None, eos_token_id=4,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=102,
        boi_token_index=101,
        eoi_token_index=100,
    )
    saved(shaken(Gemma3ForConditionalGeneration(config)), path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 4}))
    return path


def test_a_multimodal_directory_keeps_its_processor_and_its_own_files(tmp_path):
    path = multimodal(tmp_path / "model")
    (path / "LICENSE").write_text("terms")
    (path / "README.md").write_text("numbers of these weights")
    lm = lms.load(path, device="cpu", tags=ThinkTags(None, None))
    assert_whole(lm, tmp_path)
    kept = {file.name for file in (tmp_path / "edited").iterdir()}
    assert {file.name for file in path.iterdir()} - kept == {"README.md"}
    assert json.loads((tmp_path / "edited" / "processor_config.json").read_text())["image_seq_length"] == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_a_multimodal_model_is_merged(tmp_path):
    path = multimodal(tmp_path / "model")
    wanted = adapted(path, tmp_path / "adapter", lora("q_proj", "v_proj"))
    lm = lms.load(tmp_path / "adapter", device="cpu", tags=ThinkTags(None, None))
    torch.testing.assert_close(logits(lm.model), wanted, atol=1e-4, rtol=1e-4)
    assert_whole(lm, tmp_path)
    assert (tmp_path / "edited" / "preprocessor_config.json").is_file()


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    lm = family("llama")
    monkeypatch.setattr(type(lm.tokenizer), "save_pretrained", lambda self, path: sys.exit("killed"))
    with pytest.raises(SystemExit):
        lm.save(tmp_path / "model")
    monkeypatch.undo()
    assert not any((tmp_path / "model").glob("*"))
    assert torch.equal(logits(lms.load(lm.save(tmp_path / "model"), device="cpu").model), logits(lm.model))


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Put a saved model into a cache of the hub, as ``owner/name``; returns its snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return saved(family("llama").model, repository / "snapshots" / ("a" * 40), max_shard_size="20KB")


def test_the_files_of_a_hub_id_are_checked_where_they_are_on_disk(on_hub):
    assert lms.load("owner/name", device="cpu").fingerprint == family("llama").fingerprint
    (on_hub / "made_from.json").write_text(json.dumps([{"task": "t", "problem_ids": ["0" * 16]}]))
    assert lms.load("owner/name", device="cpu").made_from[0]["task"] == "t"
    config = json.loads((on_hub / "config.json").read_text())
    (on_hub / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers is '1000000000', expected a whole number of at most"):
        lms.load("owner/name", device="cpu")
    (on_hub / "config.json").write_text(json.dumps(config))
    index = on_hub / checkpoints.INDEX
    index.write_text(index.read_text().replace("model-00002", "../../model-00002"))
    with pytest.raises(UnsupportedModelError, match="a file outside its directory: refused"):
        lms.load("owner/name", device="cpu")


def test_a_config_with_fewer_layers_than_weights_is_refused(tmp_path):
    path = family("llama").save(tmp_path / "model")
    config = LlamaConfig.from_pretrained(path)
    config.num_hidden_layers = 2
    config.save_pretrained(path)
    with pytest.raises(
        UnsupportedModelError, match=r"holds weights that the model of its config.json does not have.*model\.layers\.2"
    ):
        lms.load(path, device="cpu")
