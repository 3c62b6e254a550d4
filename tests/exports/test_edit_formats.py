"""A head edit in the formats of other tools: read by llama.cpp's rules from the bytes, by peft and by transformers, it equals the edit."""

from __future__ import annotations

import copy
import re
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import yaml
from families import COMMON, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Olmo3Config, PretrainedConfig

from toolkit import edits, exports, store
from toolkit import lm as lms
from toolkit.exports import gguf_lora
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.sites import Layout
from toolkit.store import WrongModelError
from toolkit.types import Direction, HeadEdit, Plan
from toolkit.vectors import ExportError
from toolkit.vectors.gguf import LLAMA_CPP

KNOWN = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "gpt2": "gpt2",
    "phi3": "phi3", "gpt_neox": "gptneox", "olmo2": "olmo2", "tiny-reasoner": "qwen3",
}  # fmt: skip
"""Family -> architecture in llama.cpp, from the list in its ``convert_hf_to_gguf.py``."""
PLANS = [row.name for row in exports.FORMATS if row.takes == "plan"]
BASE = {"ollama": "qwen3:0.6b"}


def plan_of(lm: LM, heads=((1, 0), (1, 3), (2, 1)), *, op: str = "project_out", strength: float = 0.8) -> Plan:
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, "resid_mid", "think", "mean_difference", 7, 5, lm.provenance(3))
    return Plan(tuple(HeadEdit(layer, head, op, strength) for layer, head in heads), direction, "by hand", lm.provenance())


def written(lm: LM, name: str, path: Path, plan: Plan | None = None, base: str | None = None) -> Path:
    return exports.find(name).write(lm, plan or plan_of(lm), path, Settings(base=base or BASE.get(name)))


def gguf_bytes(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and F32 tensors (in torch's order of axes) of a GGUF file, from its bytes."""
    data = path.read_bytes()
    magic, version, n_tensors, n_fields = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    at = 24

    def take(form: str):
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    fields = {}
    for _ in range(n_fields):
        name, kind = text(), take("I")
        fields[name] = {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[kind]()  # uint32, float32, string
    infos = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    start = at + -at % 32
    tensors = {}
    for name, shape, kind, offset in infos:
        assert kind == 0, f"{name} is not F32"
        tensors[name] = np.frombuffer(data, "<f4", int(np.prod(shape)), start + offset).reshape(shape[::-1])
    return fields, tensors


def llama_cpp_loads(path: Path, base: dict[str, torch.Tensor], arch: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """What llama.cpp makes of a LoRA: base tensor -> what is added to it. Refuses what ``llama-adapter.cpp`` refuses."""
    fields, tensors = gguf_bytes(path)
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora", "not an adapter"
    assert fields["general.architecture"] == arch, "model arch and LoRA arch mismatch"
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        stem, _, part = name.rpartition(".")
        assert part in ("lora_a", "lora_b"), f"{name} has unexpected suffix"
        pairs.setdefault(stem, {})[part] = value
    added = {}
    for name, pair in pairs.items():
        a, b = pair["lora_a"], pair["lora_b"]  # KeyError: missing a component
        assert name in base, f"{name} does not exist in base model"
        out, inputs = base[name].shape
        assert a.shape[1] == inputs and b.shape[0] == out and a.shape[0] == b.shape[1], "incorrect shape"
        rank, alpha = b.shape[1], fields["adapter.lora.alpha"]
        added[name] = (scale * alpha / rank if alpha else scale) * torch.from_numpy(b.copy()) @ torch.from_numpy(a.copy())
    return added


def projections(lm: LM) -> dict[str, torch.Tensor]:
    """llama.cpp's name of each output projection -> its weight ``[outputs, inputs]``."""
    return {f"blk.{layer}.attn_output.weight": lm.layout.W_O(layer).detach() for layer in range(lm.layout.n_layers)}


@pytest.mark.parametrize("family", KNOWN)
def test_what_llama_cpp_adds_to_the_weights_is_what_the_edit_adds(model_of, tmp_path, family):
    lm = model_of(family)
    base = projections(lm)
    added = llama_cpp_loads(written(lm, "gguf-lora", tmp_path / "a.gguf"), base, KNOWN[family])
    wanted = projections(edits.apply(lm, plan_of(lm)))
    assert set(added) == {"blk.1.attn_output.weight", "blk.2.attn_output.weight"}
    for name, change in added.items():
        assert torch.allclose(base[name] + change, wanted[name], atol=1e-6)
        assert (wanted[name] - base[name]).abs().max() > 1e-3, "the edit did nothing"


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_rank_is_1_and_alpha_over_rank_is_1_however_many_heads_a_layer_has(llama, tmp_path, heads):
    plan = plan_of(llama, [(1, head) for head in range(heads)])
    fields, tensors = gguf_bytes(written(llama, "gguf-lora", tmp_path / "a.gguf", plan))
    assert fields["adapter.lora.alpha"] == 1.0 and tensors["blk.1.attn_output.weight.lora_b"].shape == (llama.layout.d_model, 1)
    change = llama_cpp_loads(tmp_path / "a.gguf", projections(llama), "llama")["blk.1.attn_output.weight"]
    assert torch.allclose(change, edits.apply(llama, plan).layout.W_O(1) - llama.layout.W_O(1), atol=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 2.0])
def test_llama_cpps_scale_is_strength(llama, tmp_path, scale):
    path = written(llama, "gguf-lora", tmp_path / "a.gguf")
    weaker = projections(edits.apply(llama, plan_of(llama, strength=0.8 * scale)))
    for name, change in llama_cpp_loads(path, projections(llama), "llama", scale).items():
        assert torch.allclose(projections(llama)[name] + change, weaker[name], atol=1e-6)


def test_the_package_gguf_reads_the_adapter(llama, tmp_path):
    reader = gguf.GGUFReader(written(llama, "gguf-lora", tmp_path / "a.gguf"))
    assert reader.fields["general.architecture"].contents() == "llama"
    shapes = {t.name: [int(n) for n in t.shape] for t in reader.tensors}
    inputs, out = llama.layout.heads[1] * llama.layout.head_dims[1], llama.layout.d_model
    assert shapes["blk.1.attn_output.weight.lora_a"] == [inputs, 1] and shapes["blk.1.attn_output.weight.lora_b"] == [1, out]


def base_gguf(path: Path, lm: LM, arch: str, *, skip: str = "", wide: int = 0) -> Path:
    tensors = {name: np.zeros((w.shape[0] + wide, w.shape[1]), "f4") for name, w in projections(lm).items() if name != skip}
    return store.write_gguf(arch, {}, tensors, path)


def test_names_and_shapes_are_checked_against_the_base_file(llama, tmp_path):
    base = str(base_gguf(tmp_path / "base.gguf", llama, "llama"))
    written(llama, "gguf-lora", tmp_path / "a.gguf", base=base)
    for file, says in (
        (base_gguf(tmp_path / "b", llama, "qwen2"), "holds a model of architecture 'qwen2', tiny llama is 'llama'"),
        (base_gguf(tmp_path / "c", llama, "llama", skip="blk.2.attn_output.weight"), "blk.2.attn_output.weight not at all"),
        (
            base_gguf(tmp_path / "d", llama, "llama", wide=8),
            r"blk.1.attn_output.weight \(40, 32\), tiny llama has \(32, 32\) there",
        ),
    ):
        with pytest.raises(WrongModelError, match=says):
            written(llama, "gguf-lora", tmp_path / "x.gguf", base=str(file))
    (tmp_path / "noise").write_bytes(b"GGUFxxxx")
    with pytest.raises(store.DamagedFileError, match="not a complete GGUF file"):
        written(llama, "gguf-lora", tmp_path / "x.gguf", base=str(tmp_path / "noise"))
    assert not (tmp_path / "x.gguf").exists()


def of_type(lm: LM, config: PretrainedConfig) -> LM:
    """The model with the config of another type."""
    model = copy.copy(lm.model)
    model.config = config
    return replace(lm, model=model)


def test_every_name_of_an_architecture_is_one_that_llama_cpp_has():
    assert set(LLAMA_CPP.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("model_type", "arch"),
    [("olmo3", "olmo2"), ("ministral3", "mistral3"), ("bamba", "granitehybrid"), ("hunyuan_v1_dense", "hunyuan-dense"),
     ("qwen3_5_text", "qwen35"), ("gemma4_text", "gemma4"), ("glm4_moe_lite", "deepseek2"), ("internlm3", "llama"), ("glm", "chatglm")],
)  # fmt: skip
def test_the_architecture_is_llama_cpps_where_it_has_another_name(model_type, arch, llama, monkeypatch):
    monkeypatch.setattr(Layout, "attention_layers", (1,))
    assert gguf_lora.architecture(of_type(llama, AutoConfig.for_model(model_type))) == arch


@pytest.mark.parametrize(
    ("layers", "experts", "arch"), [((1,), 8, "granitehybrid"), ((0, 1, 2), 8, "granitemoe"), ((0, 1, 2), 0, "granite")]
)
def test_a_granite_hybrid_without_state_space_layers_is_the_plain_granite(layers, experts, arch, llama, monkeypatch):
    monkeypatch.setattr(Layout, "attention_layers", layers)
    config = AutoConfig.for_model("granitemoehybrid", num_experts_per_tok=experts)
    assert gguf_lora.architecture(of_type(llama, config)) == arch


def test_an_edit_of_olmo_3_is_written_for_its_gguf_file(tmp_path):
    lm = lms.wrap(AutoModelForCausalLM.from_config(Olmo3Config(**COMMON)), tokenizer(), name="tiny olmo3")
    base = str(base_gguf(tmp_path / "base.gguf", lm, "olmo2"))
    assert llama_cpp_loads(written(lm, "gguf-lora", tmp_path / "a.gguf", base=base), projections(lm), "olmo2")


def test_a_model_type_without_a_name_is_recognised_by_the_tensors_of_its_gguf_file(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_lora, "model_types", lambda lm: {"brand_new"})
    written(llama, "gguf-lora", tmp_path / "a.gguf", base=str(base_gguf(tmp_path / "base.gguf", llama, "qwen2")))
    assert llama_cpp_loads(tmp_path / "a.gguf", projections(llama), "qwen2")
    with pytest.raises(WrongModelError, match=r"attn_output.weight \(40, 32\)"):
        written(llama, "gguf-lora", tmp_path / "b.gguf", base=str(base_gguf(tmp_path / "wide.gguf", llama, "qwen2", wide=8)))


def test_a_model_type_without_a_name_in_llama_cpp_is_refused(llama, monkeypatch):
    monkeypatch.setattr(gguf_lora, "model_types", lambda lm: {"brand_new"})
    with pytest.raises(ExportError, match=r"llama.cpp's name for models of type 'llama' is not known here.*--base FILE"):
        gguf_lora.architecture(llama)


def test_a_modelfile_names_the_base_and_the_adapter_beside_it(tiny, tmp_path):
    path = written(tiny, "ollama", tmp_path / "x")
    lines = [line for line in (path / "Modelfile").read_text().splitlines() if line and not line.startswith("#")]
    commands = dict(line.split(" ", 1) for line in lines)
    assert commands == {"FROM": "qwen3:0.6b", "ADAPTER": "./adapter.gguf"}
    assert llama_cpp_loads(path / commands["ADAPTER"], projections(tiny), "qwen3")


def test_a_modelfile_for_a_gguf_file_names_it_by_its_full_path(llama, tmp_path, monkeypatch):
    base_gguf(tmp_path / "base.gguf", llama, "llama")
    monkeypatch.chdir(tmp_path)
    path = written(llama, "ollama", tmp_path / "x", base="base.gguf")
    assert f"FROM {tmp_path / 'base.gguf'}\n" in (path / "Modelfile").read_text()


def test_ollama_without_a_base_is_refused(llama, tmp_path):
    for base in (None, "", "a\nFROM b"):
        with pytest.raises(ExportError, match="give --base, a name in Ollama or a GGUF file"):
            exports.find("ollama").write(llama, plan_of(llama), tmp_path / "x", Settings(base=base))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_the_adapter_is_loaded_by_peft_and_has_a_card(tiny, ids, tmp_path):
    path = written(tiny, "adapter", tmp_path / "x")
    wanted = edits.apply(tiny, plan_of(tiny)).model(input_ids=ids % 60).logits
    from toolkit.shipped import path_of

    base = AutoModelForCausalLM.from_pretrained(path_of("tiny-reasoner"), dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(base, path)(input_ids=ids % 60).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(tiny.model(input_ids=ids % 60).logits, wanted, atol=1e-2)
    assert card(path, plan_of(tiny))["base_model_relation"] == "adapter" and card(path, plan_of(tiny))["library_name"] == "peft"


@torch.no_grad()
def test_the_merged_checkpoint_is_loaded_by_transformers_and_has_plan_and_card(tiny, ids, tmp_path):
    path = written(tiny, "merged", tmp_path / "x")
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids % 60).logits
    assert torch.allclose(found, edits.apply(tiny, plan_of(tiny)).model(input_ids=ids % 60).logits, atol=1e-5)
    assert same(store.load(path / "plan.safetensors", Plan), plan_of(tiny))
    assert (
        card(path, plan_of(tiny))["base_model_relation"] == "finetune"
        and card(path, plan_of(tiny))["library_name"] == "transformers"
    )


def same(a: Plan, b: Plan) -> bool:
    return a.edits == b.edits and a.name == b.name and torch.equal(a.direction.vector, b.direction.vector)


def card(path: Path, plan: Plan) -> dict:
    """Front matter of a card, after checking that it lists the edited heads."""
    text = (path / "README.md").read_text()
    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert found["base_model"] == "tiny-reasoner" and found["tags"] == ["reasoning-length"]
    rows = re.findall(r"^\| \d+ \| (\d+) \| (\d+) \| (\w+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [(int(layer), int(head), op, float(s)) for layer, head, op, s in rows] == [
        (edit.layer, edit.head, edit.op, edit.strength) for edit in plan.edits
    ]
    assert "Nothing has been measured" in text
    return found


def test_a_plan_goes_into_a_folder_with_a_card(tiny, tmp_path):
    path = written(tiny, "plan", tmp_path / "x")
    assert {file.name for file in path.iterdir()} == {"README.md", "plan.safetensors"}
    assert same(store.load(path / "plan.safetensors", Plan), plan_of(tiny)) and card(path, plan_of(tiny))


@pytest.mark.parametrize("name", ["adapter", "gguf-lora", "ollama"])
def test_an_edit_of_full_rank_is_no_adapter(llama, tmp_path, name):
    with pytest.raises(ExportError, match=r"does not fit into an adapter of rank 1\. Write the whole model"):
        written(llama, name, tmp_path / "x", plan_of(llama, op="scale"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_another_model_is_refused(llama, model_of, tmp_path, name):
    with pytest.raises(WrongModelError, match="was made from tiny llama"):
        written(model_of("mistral"), name, tmp_path / "x", plan_of(llama))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in PLANS if name != "gguf-lora"])
def test_a_directory_with_files_is_not_overwritten(tiny, tmp_path, name):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        written(tiny, name, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
