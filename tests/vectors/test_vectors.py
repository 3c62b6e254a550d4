"""Vectors and edits as files: what is written here is read by the rules of others, and theirs is read here or refused by name."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import pickle
import re
import struct
import sys
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from families import COMMON, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from toolkit import collect, edits, report, store, vectors
from toolkit import lm as lms
from toolkit.generate import Sampling, rollouts
from toolkit.lm import LM, Condition
from toolkit.sites import KINDS
from toolkit.store import DamagedFileError, ForeignFileError, WrongModelError
from toolkit.types import Direction, HeadEdit, Plan
from toolkit.vectors import ExportError
from toolkit.vectors.weights import _last_bias

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS_OF_DIRECTIONS = [kind for kind in KINDS if kind != "z"]


def direction_of(lm: LM, kind: str = "resid_post", *, seed: int = 0, dtype=torch.float32, first: int = 0) -> Direction:
    """A random direction; layers before ``first`` are zero."""
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(seed)).to(dtype)
    vector[:first] = 0
    return Direction(vector, kind, "think", "mean_difference", 7, 5, lm.provenance(3, split="dev", shares=[0.5, 0.25]))


def plan_of(lm: LM, heads, *, strength: float = 0.8, kind: str = "resid_mid", seed: int = 0) -> Plan:
    chosen = tuple(HeadEdit(layer, head, "project_out", strength) for layer, head in heads)
    return Plan(chosen, direction_of(lm, kind, seed=seed), f"by hand, seed {seed}", lm.provenance())


def all_heads(lm: LM) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(lm.layout.n_layers) for head in range(lm.layout.n_heads)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def same(a: Direction, b: Direction) -> bool:
    """Equal in every field, the vector bit by bit."""
    return same_bits(a.vector, b.vector) and replace(a, vector=b.vector) == b


def change(path, *, header=None, tensors=None):
    """Write a safetensors file again with other metadata (``None`` removes a field) or tensors."""
    with safe_open(path, framework="pt") as file:
        old, found = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new = {k: v for k, v in {**old, **(header or {})}.items() if v is not None}
    save_file({**found, **(tensors or {})}, path, metadata=new)
    return path


# --- our own container ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "tiny-reasoner"])
def test_a_direction_comes_back_bit_by_bit_with_all_it_says(family, dtype, model_of, tmp_path):
    lm = model_of(family)
    for kind in KINDS_OF_DIRECTIONS:
        value = direction_of(lm, kind, dtype=dtype)
        path = vectors.save(value, tmp_path / f"{kind}.safetensors", lm=lm)
        assert same(vectors.load(path), value) and same(vectors.load(path, lm), value)


def test_a_direction_without_seed_revision_or_notes_comes_back(llama, tmp_path):
    value = replace(direction_of(llama), provenance=replace(llama.provenance(), revision=None, seed=None, notes={}))
    assert same(vectors.load(vectors.save(value, tmp_path / "v", lm=llama), llama), value)
    value = replace(value, provenance=replace(value.provenance, revision="0a1b", seed=0))
    assert same(vectors.load(vectors.save(value, tmp_path / "v", lm=llama), llama), value)


def test_a_strided_view_is_saved_as_what_it_shows(llama, tmp_path):
    wide = torch.randn(llama.layout.d_model, llama.layout.n_layers)
    value = replace(direction_of(llama), vector=wide.T)
    assert torch.equal(vectors.load(vectors.save(value, tmp_path / "v", lm=llama)).vector, wide.T)


def test_the_header_says_what_others_need_to_know(tiny, tmp_path):
    path = vectors.save(direction_of(tiny), tmp_path / "v.safetensors", lm=tiny, metrics={"think_tokens": -0.3})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        assert sorted(file.keys()) == [f"direction.{layer}" for layer in range(tiny.layout.n_layers)]
        assert file.get_tensor("direction.1").shape == (tiny.layout.d_model,)
    expected = {
        "base_model": "tiny-reasoner", "fingerprint": tiny.fingerprint, "model_type": "qwen3", "site": "resid_post",
        "n_layers": str(tiny.layout.n_layers), "hidden_size": str(tiny.layout.d_model), "apply_site": "resid_post",
        "method": "mean_difference", "norm": "raw", "sign": "+ = longer", "think_format": "<think>,</think>", "n_pos": "7",
        "n_neg": "5", "seed": "3", "positions": "think",
    }  # fmt: skip
    assert expected.items() <= header.items()
    assert json.loads(header["metrics_json"]) == {"think_tokens": -0.3}
    assert header["tool"].startswith("reasoning-length-toolkit ") and re.match(r"\d{4}-\d\d-\d\dT", header["created"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_vectors_are_said_to_be_unit_and_others_are_not(llama, tmp_path, dtype):
    value = direction_of(llama, dtype=dtype, first=1)
    for vector, norm in ((value.unit(), "unit"), (value.vector, "raw"), (1.1 * value.unit(), "raw")):
        path = vectors.save(replace(value, vector=vector), tmp_path / "v", lm=llama)
        assert store.read_tensors(path)[1]["norm"] == norm
        assert same_bits(vectors.load(path, llama).vector, vector)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("write", "read"), [(vectors.save, vectors.load), (vectors.save_gguf, vectors.load_gguf)])
def test_unit_vectors_of_every_type_come_back_from_both_formats(llama, tmp_path, write, read, dtype):
    """In bf16 a unit vector has norm 1 to about 0.4 % only. GGUF files, which hold F32, were refused for that."""
    value = direction_of(llama, dtype=dtype, first=1)
    value = replace(value, vector=value.unit())
    found = read(write(value, tmp_path / "v", lm=llama), llama)
    assert torch.equal(found.vector.float(), value.vector.float()) and replace(found, vector=value.vector) == value


@pytest.mark.parametrize("scale", [0.25, -0.5, 3.0])
def test_a_baked_scale_is_in_the_numbers_and_is_divided_out_again(llama, tmp_path, scale):
    value = direction_of(llama)
    tensors, header = store.read_tensors(path := vectors.save(value, tmp_path / "v", lm=llama, scale=scale))
    assert torch.equal(tensors["direction.2"], scale * value.vector[2])
    assert (header["norm"], header["sign"]) == ("dose", "+ = longer" if scale > 0 else "+ = shorter")
    again = vectors.load(path, llama)
    assert torch.allclose(again.vector, value.vector, rtol=1e-6)
    assert replace(again, vector=value.vector) == value


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_a_scale_that_leaves_nothing_sound_is_refused(llama, tmp_path, scale):
    with pytest.raises(ValueError, match=rf"scale={scale} times this direction is not finite, or zero"):
        vectors.save(direction_of(llama), tmp_path / "v", lm=llama, scale=scale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [vectors.save, vectors.save_gguf], ids=["safetensors", "gguf"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_not_written(llama, tmp_path, write, bad):
    value = direction_of(llama, first=1)
    value.vector[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        write(value, tmp_path / "v", lm=llama)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [vectors.save, vectors.save_gguf], ids=["safetensors", "gguf"])
def test_a_direction_of_other_weights_is_not_written_as_this_models(llama, model_of, tiny, tmp_path, write):
    with pytest.raises(WrongModelError, match=r"made from tiny llama.*those of tiny mistral.*edits\.transfer"):
        write(direction_of(llama, first=1), tmp_path / "v", lm=model_of("mistral"))
    with pytest.raises(WrongModelError, match="has 3 layers of width 32"):
        write(direction_of(tiny, first=1), tmp_path / "v", lm=llama)


@pytest.mark.parametrize(("write", "read"), [(vectors.save, vectors.load), (vectors.save_gguf, vectors.load_gguf)])
def test_a_file_is_read_for_its_model_and_its_children_only(llama, model_of, tmp_path, write, read):
    path = write(direction_of(llama, first=1), tmp_path / "v", lm=llama)
    edited = edits.apply(llama, plan_of(llama, [(1, 1)]))
    assert torch.equal(read(path, edited).vector, direction_of(llama, first=1).vector)
    twin = replace(llama, model=copy.deepcopy(llama.model), name="twin")
    next(twin.model.parameters()).data[0, 0] += 1
    with pytest.raises(WrongModelError, match=r"made from tiny llama.*those of twin"):
        read(path, replace(twin))
    with pytest.raises(WrongModelError):
        read(path, model_of("tiny-reasoner"))


FIELDS = (
    "base_model", "fingerprint", "template_hash", "n_layers", "hidden_size", "site", "apply_site", "positions", "method", "norm",
    "scale", "sign", "n_pos", "n_neg", "notes_json", "tool",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_that_lacks_a_field_is_an_error_that_names_it(llama, tmp_path, field):
    path = change(vectors.save(direction_of(llama), tmp_path / "v", lm=llama), header={field: None})
    with pytest.raises(DamagedFileError, match=f"missing or cannot be read: KeyError\\('{field}'\\)"):
        vectors.load(path)


@pytest.mark.parametrize(
    "field",
    [
        {"n_layers": "three"},
        {"n_pos": "7.5"},
        {"scale": "big"},
        {"notes_json": "{"},
        {"notes_json": '{"a": NaN}'},
        {"notes_json": '{"a": 1, "a": 2}'},
        {"site": "resid"},
        {"seed": "x"},
    ],
    ids=str,
)
def test_a_header_that_cannot_be_read_is_an_error(llama, tmp_path, field):
    path = change(vectors.save(direction_of(llama), tmp_path / "v", lm=llama), header=field)
    with pytest.raises(DamagedFileError, match="a field of its header is missing or cannot be read"):
        vectors.load(path)


@pytest.mark.parametrize(
    "field",
    [
        {"norm": "unit"}, {"norm": "dose"}, {"norm": "l2"}, {"sign": "+ = shorter"}, {"apply_site": "attn_out"}, {"scale": "2.0"},
        {"scale": "0.0", "norm": "dose", "sign": "+ = shorter"}, {"scale": "nan", "norm": "dose", "sign": "+ = shorter"},
        {"scale": "inf", "norm": "dose"},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(llama, tmp_path, field):
    path = change(vectors.save(direction_of(llama), tmp_path / "v", lm=llama), header=field)
    with pytest.raises(ForeignFileError, match=r"says .*, but site resid_post, scale .* and the numbers mean"):
        vectors.load(path)


@pytest.mark.parametrize("header", [{"format": "pt"}, {"format": None}, {"format_version": "2"}], ids=str)
def test_another_format_is_refused(llama, tmp_path, header):
    path = change(vectors.save(direction_of(llama), tmp_path / "v", lm=llama), header=header)
    with pytest.raises(ForeignFileError, match=r"v has the format .*, not 'reasoning-length-vector' 1"):
        vectors.load(path)


def test_a_file_of_the_store_is_refused_with_the_function_that_reads_it(llama, tmp_path):
    with pytest.raises(ForeignFileError, match=r"Files written by store\.save are read by store\.load"):
        vectors.load(store.save(direction_of(llama), tmp_path / "v"))


NOT_ROWS = {
    "another name": ({"vector": torch.ones(32)}, ForeignFileError, "tensor 'vector': expected only direction.<layer>"),
    "no layer": ({"direction.x": torch.ones(32)}, ForeignFileError, "'direction.x'"),
    "negative layer": ({"direction.-1": torch.ones(32)}, ForeignFileError, "'direction.-1'"),
    "too deep": ({"direction.3": torch.ones(32)}, WrongModelError, "for layer 3; the model has layers 0..2"),
    "too wide": ({"direction.1": torch.ones(64)}, WrongModelError, r"\(64,\) for layer 1.*of width 32"),
    "two axes": ({"direction.1": torch.ones(1, 32)}, WrongModelError, r"\(1, 32\) for layer 1"),
    "NaN": ({"direction.1": torch.full((32,), math.nan)}, DamagedFileError, "NaN or infinity at layer 1"),
    "two types": ({"direction.1": torch.ones(32).half()}, ForeignFileError, "layer 1 is torch.float16"),
    "integers": ({f"direction.{k}": torch.ones(32).long() for k in range(3)}, ForeignFileError, "torch.int64"),
}


@pytest.mark.parametrize("case", NOT_ROWS)
def test_tensors_that_are_no_rows_of_the_model_are_refused(llama, tmp_path, case):
    tensors, error, message = NOT_ROWS[case]
    path = change(vectors.save(direction_of(llama), tmp_path / "v", lm=llama), tensors=tensors)
    with pytest.raises(error, match=message):
        vectors.load(path, llama)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_a_truncated_container_is_an_error(llama, tmp_path, share):
    path = vectors.save(direction_of(llama), tmp_path / "v", lm=llama)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DamagedFileError, match="not a complete safetensors file"):
        vectors.load(path)


READERS = {
    "load": vectors.load,
    "load_gguf": vectors.load_gguf,
    "load_thinkedit": lambda path, lm: vectors.load_thinkedit(path, lm, part="attn"),
    "load_hidden_directions": vectors.load_hidden_directions,
    "load_svec": vectors.load_svec,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_does_not_exist(llama, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"No file at .*none"):
        READERS[name](tmp_path / "none", llama)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe" * 200, b"GGUF", b"PK", b"{}", b"[1]"], ids=lambda content: repr(content[:4]))
def test_noise_is_an_error_of_the_store(llama, tmp_path, name, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(store.StoreError, match="x "):
        READERS[name](tmp_path / "x", llama)


# --- GGUF: written here, read by the rules of others ---------------------------------------------------------


def repeng_reads(path) -> tuple[str, dict[int, np.ndarray]]:
    """What repeng takes from a file: the architecture and the hint must be there, every tensor's name ends in its layer."""
    reader = gguf.GGUFReader(path)
    text = {k: bytes(f.parts[-1]).decode() for k, f in reader.fields.items() if f.types == [gguf.GGUFValueType.STRING]}
    assert text["general.architecture"] == "controlvector"
    rows = {}
    for tensor in reader.tensors:
        kind, layer = tensor.name.split(".")
        assert kind == "direction"
        rows[int(layer)] = np.array(tensor.data)
    return text["controlvector.model_hint"], rows


def llama_cpp_reads(path, scale: float = 1.0) -> np.ndarray:
    """What llama.cpp takes from a file's bytes: ``[layers - 1, width]`` from layer 1 on; refuses what it refuses."""
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
        length = take("Q")
        return take(f"{length}s").decode()

    fields = {}
    for _ in range(n_fields):
        name, kind = text(), take("I")
        fields[name] = {4: lambda: take("I"), 8: text}[kind]()  # 4 is uint32, 8 a string
    infos = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    start = at + -at % 32
    stored: dict[int, np.ndarray] = {}
    for name, shape, kind, offset in infos:
        found = re.fullmatch(r"direction\.(\d+)", name)
        assert found and int(found[1]) > 0, f"{name}: not a layer from 1 on"
        assert kind == 0 and len(shape) == 1, f"{name}: not 1-D F32"
        stored[int(found[1])] = scale * np.frombuffer(data, "<f4", shape[0], start + offset)
    (width,) = {len(row) for row in stored.values()}
    assert fields["general.architecture"] == "controlvector" and isinstance(fields["controlvector.layer_count"], int)
    total = np.zeros((max(stored), width), "f4")
    for k, row in stored.items():
        total[k - 1] += row
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeng_and_llama_cpp_read_the_numbers_that_were_written(any_lm, tmp_path, dtype):
    value = direction_of(any_lm, dtype=dtype, first=1)
    path = vectors.save_gguf(value, tmp_path / "v.gguf", lm=any_lm)
    hint, rows = repeng_reads(path)
    assert hint == any_lm.model.config.model_type
    assert sorted(rows) == list(range(1, any_lm.layout.n_layers))
    for k, row in rows.items():
        assert row.dtype == np.float32 and np.array_equal(row, value.vector[k].float().numpy())
    assert np.array_equal(llama_cpp_reads(path), value.vector[1:].float().numpy())


def test_the_fields_have_the_types_that_others_expect(llama, tmp_path):
    path = vectors.save_gguf(direction_of(llama, first=1), tmp_path / "v.gguf", lm=llama, scale=-0.5)
    reader = gguf.GGUFReader(path)
    types = {name: field.types for name, field in reader.fields.items()}
    assert types["general.architecture"] == types["controlvector.model_hint"] == [gguf.GGUFValueType.STRING]
    assert types["controlvector.layer_count"] == [gguf.GGUFValueType.UINT32]
    assert reader.fields["controlvector.layer_count"].contents() == llama.layout.n_layers - 1
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and t.shape.tolist() == [32] for t in reader.tensors)
    own = {name for name in types if not name.startswith(("GGUF.", "general.architecture"))}
    assert all(name.startswith(("controlvector.", "toolkit.")) for name in own)
    said = {name: reader.fields[f"toolkit.{name}"].contents() for name in ("site", "norm", "method", "base_model", "scale")}
    assert said == {"site": "resid_post", "norm": "dose", "method": "mean_difference", "base_model": "tiny llama", "scale": "-0.5"}


def test_what_llama_cpp_does_with_the_file_is_what_steering_does_here(lm, tmp_path, rollout_of):
    """Row k added to the output of block k at every position, against run-time steering with the direction."""
    value, rollout = direction_of(lm, first=1), rollout_of(12)
    rows = llama_cpp_reads(vectors.save_gguf(value, tmp_path / "v.gguf", lm=lm), scale=0.3)

    def add(row):
        def hook(module, args, output):
            return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

        return hook

    handles = [lm.layout.blocks[k].block.register_forward_hook(add(torch.from_numpy(row.copy()))) for k, row in enumerate(rows, 1)]
    try:
        theirs = collect.logits(lm, rollout)
    finally:
        for handle in handles:
            handle.remove()
    ours = collect.logits(lm, rollout, edits.steering(value, 0.3))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - collect.logits(lm, rollout)).abs().max() > 1e-2 * theirs.abs().max()


def test_a_control_vector_comes_back_with_its_provenance(any_lm, tmp_path):
    value = direction_of(any_lm, first=1)
    assert same(vectors.load_gguf(vectors.save_gguf(value, tmp_path / "v.gguf", lm=any_lm), any_lm), value)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8), sign=st.sampled_from([-1.0, 1.0]))
def test_twice_the_vector_is_the_vector_at_twice_the_scale(llama, tmp_path, seed, exponent, sign):
    scale = sign * 2.0**exponent
    value = direction_of(llama, seed=seed, first=1)
    path = vectors.save_gguf(value, tmp_path / "v.gguf", lm=llama, scale=scale)
    assert np.array_equal(llama_cpp_reads(path), llama_cpp_reads(vectors.save_gguf(value, tmp_path / "w", lm=llama), scale))
    scaled = replace(value, vector=scale * value.vector)
    assert np.array_equal(llama_cpp_reads(path), llama_cpp_reads(vectors.save_gguf(scaled, tmp_path / "w", lm=llama)))
    assert torch.equal(vectors.load_gguf(path, llama).vector, value.vector), "a power of two is divided out exactly"


@pytest.mark.parametrize("kind", [kind for kind in KINDS_OF_DIRECTIONS if kind != "resid_post"])
def test_a_direction_of_another_site_is_no_control_vector(llama, tmp_path, kind):
    with pytest.raises(ExportError, match=f"added to the output of a block, but this direction was made at {kind}"):
        vectors.save_gguf(direction_of(llama, kind), tmp_path / "v.gguf", lm=llama)
    assert not list(tmp_path.iterdir())


def test_a_vector_at_layer_0_is_dropped_only_when_asked(llama, tmp_path):
    value = direction_of(llama)
    with pytest.raises(ExportError, match=r"Layer 0 has a vector \(norm [\d.]+\).*drop_layer_0=True"):
        vectors.save_gguf(value, tmp_path / "v.gguf", lm=llama)
    again = vectors.load_gguf(vectors.save_gguf(value, tmp_path / "v.gguf", lm=llama, drop_layer_0=True), llama)
    assert not again.vector[0].any() and torch.equal(again.vector[1:], value.vector[1:])


def test_what_f32_cannot_hold_or_what_lies_at_layer_0_alone_is_refused(llama, tmp_path):
    huge = replace(direction_of(llama, first=1), vector=direction_of(llama, first=1).vector.double() * 1e39)
    alone = direction_of(llama)
    alone.vector[1:] = 0
    for value in (huge, alone):
        with pytest.raises(ExportError, match="not finite, or all zero"):
            vectors.save_gguf(value, tmp_path / "v.gguf", lm=llama, drop_layer_0=True)


def test_without_the_package_gguf_the_error_says_how_to_get_it(llama, tmp_path, monkeypatch):
    path = vectors.save_gguf(direction_of(llama, first=1), tmp_path / "v.gguf", lm=llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for act in (lambda: vectors.load_gguf(path, llama), lambda: vectors.save_gguf(direction_of(llama, first=1), path, lm=llama)):
        with pytest.raises(ImportError, match=r"pip install 'reasoning-length-toolkit\[gguf\]'"):
            act()


# --- GGUF: written by others, read here ----------------------------------------------------------------------


def their_gguf(path, rows, *, arch="controlvector", hint: str | None = "llama", count=gguf.GGUFWriter.add_uint32, **fields):
    """A control vector of another tool, written from the documented fields."""
    writer = gguf.GGUFWriter(path, arch)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    if count is not None:
        count(writer, "controlvector.layer_count", len(rows))
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    for name, row in rows.items():
        writer.add_tensor(name if isinstance(name, str) else f"direction.{name}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*layers: int, width: int = 32) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(width).astype("f4") for k in layers}


WRITERS = {
    "repeng": {},
    "llama.cpp": {"count": gguf.GGUFWriter.add_int32},
    "steerkit": {"hint": None, "count": None, "hook_site": "resid_post", "model__id": "x"},
    "EasySteer": {"controlvector__method": "caa"},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_control_vector_of_another_tool_becomes_a_direction(llama, tmp_path, writer):
    rows = numbers(1)
    value = vectors.load_gguf(their_gguf(tmp_path / "v.gguf", rows, **WRITERS[writer]), llama)
    assert torch.equal(value.vector[1], torch.from_numpy(rows[1])) and not value.vector[[0, 2]].any()
    assert (value.kind, value.estimator, value.positions) == ("resid_post", "imported from GGUF", "unknown")
    assert value.provenance.fingerprint == llama.fingerprint
    assert value.provenance.notes == {"source": "GGUF: v.gguf", "norm": "raw", "model_hint": WRITERS[writer].get("hint", "llama")}
    edits.steering(value, 1.0)(llama)


def test_an_imported_vector_of_the_last_layer_carries_a_note_and_one_of_this_toolkit_does_not(llama, tmp_path):
    """repeng computes it from ``hidden_states[-1]``, which is after the final norm."""
    theirs = their_gguf(tmp_path / "theirs.gguf", numbers(1, llama.layout.n_layers - 1))
    ours = vectors.save_gguf(direction_of(llama, first=1), tmp_path / "ours.gguf", lm=llama)
    last = svec(tmp_path / "v.svec", llama, directions={"2": [[1.0] * 32]})
    for value in (vectors.load_gguf(theirs, llama), vectors.load_svec(last, llama)):
        assert value.provenance.notes["last_layer"] == "may be measured after the final norm, and added before it"
    assert "last_layer" not in vectors.load_gguf(ours, llama).provenance.notes
    without = svec(tmp_path / "w.svec", llama, directions={"1": [[1.0] * 32]})
    assert "last_layer" not in vectors.load_svec(without, llama).provenance.notes


@pytest.mark.parametrize(
    ("family", "hint"),
    [("mistral", "llama"), ("gpt_neox", "gptneox"), ("gemma3", "gemma3"), ("qwen3", "qwen3"), ("qwen3", "Qwen3")],
)
def test_the_name_that_llama_cpp_gives_a_family_is_known(model_of, tmp_path, family, hint):
    assert vectors.load_gguf(their_gguf(tmp_path / "v", numbers(1), hint=hint), model_of(family)).vector[1].any()


def test_a_control_vector_for_another_family_is_read_only_when_said_so(llama, tmp_path):
    path = their_gguf(tmp_path / "v", numbers(1), hint="qwen2")
    with pytest.raises(WrongModelError, match=r"for models of type 'qwen2', tiny llama is 'llama'.*model_hint='qwen2'"):
        vectors.load_gguf(path, llama)
    assert vectors.load_gguf(path, llama, model_hint="qwen2").vector[1].any()


NOT_CONTROL_VECTORS = {
    "layer 0": (numbers(0, 1), {}, ForeignFileError, "direction.0 is 1-D float32.*start at direction.1"),
    "two axes": ({1: np.ones((1, 32), "f4")}, {}, ForeignFileError, "direction.1 is 2-D"),
    "F16": ({1: np.ones(32, "f2")}, {}, ForeignFileError, "direction.1 is 1-D float16"),
    "too wide": (numbers(1, width=64), {}, WrongModelError, "of width 32"),
    "too narrow": (numbers(1, width=16), {}, WrongModelError, "of width 32"),
    "too deep": (numbers(1, 3), {}, WrongModelError, "for layer 3; the model has layers 0..2"),
    "NaN": ({2: np.full(32, np.nan, "f4")}, {}, DamagedFileError, "NaN or infinity at layer 2"),
    "another name": ({"token_embd.weight": np.ones(32, "f4")}, {}, ForeignFileError, "'token_embd.weight'"),
    "empty": ({}, {}, ForeignFileError, "holds no direction"),
    "a model": (numbers(1), {"arch": "llama"}, ForeignFileError, "architecture 'llama', not a control vector"),
    "read elsewhere": (numbers(1), {"hint": None, "hook_site": "hook_resid_mid"}, ForeignFileError, "of hook_resid_mid"),
    "says another site": (numbers(1), {"toolkit__site": "resid_mid"}, ForeignFileError, "of resid_mid"),
    "says too little": (numbers(1), {"toolkit__norm": "raw"}, DamagedFileError, "missing or cannot be read"),
}


@pytest.mark.parametrize("case", NOT_CONTROL_VECTORS)
def test_what_llama_cpp_would_not_take_or_not_fit_is_refused(llama, tmp_path, case):
    rows, options, error, message = NOT_CONTROL_VECTORS[case]
    path = their_gguf(tmp_path / "v.gguf", rows, **options)
    with pytest.raises(error, match=f"v.gguf.*{message}"):
        vectors.load_gguf(path, llama)


def test_a_control_vector_truncated_anywhere_is_an_error(llama, tmp_path):
    path = their_gguf(tmp_path / "v.gguf", numbers(1, 2))
    content = path.read_bytes()
    for length in range(0, len(content) - 32, 5):  # the last bytes may be padding
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match="not a complete GGUF file"):
            vectors.load_gguf(path, llama)


# --- directions of other tools -------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "kind"), [("attn", "resid_mid"), ("mlp", "resid_post")])
def test_a_direction_of_thinkedit_lives_where_its_authors_read_it(llama, tmp_path, part, kind):
    found = torch.randn(3, 1, 32)
    for name, said in ((f"model_thinking_length_direction_gsm8k_{part}.pt", {}), ("renamed.pt", {"part": part})):
        torch.save(found, tmp_path / name)
        value = vectors.load_thinkedit(tmp_path / name, llama, **said)
        assert same_bits(value.vector, found[:, 0]) and value.kind == kind
        assert value.estimator == "imported from ThinkEdit" and value.provenance.notes["source"] == f"ThinkEdit: {name}"
        assert ("final norm" in value.provenance.notes.get("last_layer", "")) == (part == "mlp")


def test_a_direction_of_thinkedit_edits_the_heads_as_its_authors_do(llama, tmp_path):
    """``W_o[:, h] -= w * v (v^T W_o[:, h])`` with ``v = -direction / |direction|``: the formula of formats.md."""
    found, strength, head = torch.randn(3, 1, 32), 0.7, llama.layout.head(1, 2)
    torch.save(found, tmp_path / "d_attn.pt")
    value = vectors.load_thinkedit(tmp_path / "d_attn.pt", llama)
    plan = Plan((HeadEdit(1, 2, "project_out", strength),), value, "theirs", llama.provenance())
    W = llama.layout.W_O(1).detach().clone()
    v = -found[1, 0] / found[1, 0].norm()
    W[:, head] -= strength * torch.outer(v, v @ W[:, head])
    assert torch.allclose(edits.apply(llama, plan).layout.W_O(1), W, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_thinkedits_attention_direction_means_another_site_in_post_norm_families(model_of, tmp_path, family):
    torch.save(torch.randn(3, 1, 32), tmp_path / "d_attn.pt")
    with pytest.raises(WrongModelError, match=r"which in tiny .* is attn_out and not the residual stream"):
        vectors.load_thinkedit(tmp_path / "d_attn.pt", model_of(family))


def test_hidden_directions_are_outputs_of_blocks(llama, tmp_path):
    found = torch.randn(3, 32)
    torch.save(found, tmp_path / "v.pt")
    value = vectors.load_hidden_directions(tmp_path / "v.pt", llama)
    assert same_bits(value.vector, found) and value.kind == "resid_post"
    torch.save({"v": found[1].clone()}, tmp_path / "v.pt")
    assert "last_layer" not in vectors.load_hidden_directions(tmp_path / "v.pt", llama, layer=1).provenance.notes
    value = vectors.load_hidden_directions(tmp_path / "v.pt", llama, layer=2)
    assert "final norm" in value.provenance.notes["last_layer"]
    assert torch.equal(value.vector[2], found[1]) and not value.vector[:2].any()


def read_thinkedit(path, lm):
    return vectors.load_thinkedit(path, lm, part="mlp")


NOT_THEIRS = {
    "ThinkEdit without its axis": (read_thinkedit, torch.ones(3, 32), ForeignFileError, r"\(3, 32\); ThinkEdit's files are"),
    "ThinkEdit, wide": (read_thinkedit, torch.ones(3, 1, 64), WrongModelError, "of width 32"),
    "ThinkEdit, deep": (read_thinkedit, torch.ones(4, 1, 32), WrongModelError, "has 4 layers, tiny llama has 3"),
    "ThinkEdit, shallow": (read_thinkedit, torch.ones(2, 1, 32), WrongModelError, "has 2 layers, tiny llama has 3"),
    "ThinkEdit, NaN": (read_thinkedit, torch.full((3, 1, 32), math.nan), DamagedFileError, "NaN or infinity at layer 0"),
    "ThinkEdit, integers": (read_thinkedit, torch.ones(3, 1, 32).long(), ForeignFileError, "int64"),
    "ThinkEdit, unnamed": (vectors.load_thinkedit, torch.ones(3, 1, 32), ForeignFileError, "does not end in _attn or _mlp"),
    "two tensors": (read_thinkedit, {"a": torch.ones(3), "b": torch.ones(3)}, ForeignFileError, "holds a dict, not one tensor"),
    "a list": (vectors.load_hidden_directions, [1.0, 2.0], ForeignFileError, "holds a list, not one tensor"),
    "[hidden] without a layer": (vectors.load_hidden_directions, torch.ones(32), ForeignFileError, r"\(32,\) and layer=None"),
    "ThinkEdit's": (vectors.load_hidden_directions, torch.ones(3, 1, 32), ForeignFileError, "are ThinkEdit's"),
    "hidden, embedding included": (vectors.load_hidden_directions, torch.ones(4, 32), WrongModelError, "has 4 layers"),
    "hidden, transposed": (vectors.load_hidden_directions, torch.ones(32, 3), WrongModelError, "has 32 layers"),
}


@pytest.mark.parametrize("case", NOT_THEIRS)
def test_a_pt_file_that_does_not_fit_is_refused(llama, tmp_path, case):
    read, found, error, message = NOT_THEIRS[case]
    torch.save(found, tmp_path / "v.pt")
    with pytest.raises(error, match=message):
        read(tmp_path / "v.pt", llama)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_single_vector_at_a_layer_that_does_not_exist_is_refused(llama, tmp_path, layer):
    torch.save(torch.ones(32), tmp_path / "v.pt")
    with pytest.raises(WrongModelError, match=f"for layer {layer}; the model has layers 0..2"):
        vectors.load_hidden_directions(tmp_path / "v.pt", llama, layer=layer)
    torch.save(torch.ones(3, 32), tmp_path / "v.pt")
    with pytest.raises(ForeignFileError, match=rf"\(3, 32\) and layer={layer}"):
        vectors.load_hidden_directions(tmp_path / "v.pt", llama, layer=layer)


class Trap:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"])
@pytest.mark.parametrize("read", [read_thinkedit, vectors.load_hidden_directions])
def test_a_pickle_is_refused_and_its_code_does_not_run(llama, tmp_path, read, write):
    path = tmp_path / "v.pt"
    write({"direction": torch.ones(3, 32), "trap": Trap(tmp_path / "ran")}, path)
    with pytest.raises(ForeignFileError, match=r"v\.pt is not a torch.save archive of tensors and plain containers.*: refused"):
        read(path, llama)
    assert not (tmp_path / "ran").exists()


def svec(path, lm: LM, **changes):
    rows = {"1": [[0.5] * 32], "2": [[-0.25] * 32]}
    path.write_text(
        json.dumps({"model_type": lm.model.config.model_type, "directions": rows, "explained_variances": {}, **changes})
    )
    return path


def test_an_svec_file_of_one_direction_a_layer_becomes_a_direction(llama, tmp_path):
    value = vectors.load_svec(svec(tmp_path / "v.svec", llama), llama)
    assert value.kind == "resid_post" and value.vector[:, 0].tolist() == [0.0, 0.5, -0.25]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"directions": {"1": [[1.0] * 32] * 2}}, ForeignFileError, r"\{1: \(2, 32\)\}: expected one per layer"),
        ({"directions": {"1": [1.0] * 32}}, ForeignFileError, r"\{1: \(32,\)\}: expected one per layer"),
        ({"directions": {"1": [[1.0], [1.0, 2.0]]}}, ForeignFileError, "not a .svec file"),
        ({"directions": {"x": [[1.0] * 32]}}, ForeignFileError, "not a .svec file"),
        ({"directions": None}, ForeignFileError, "not a .svec file"),
        ({"directions": {}}, ForeignFileError, "holds no direction"),
        ({"num_heads": 4, "head_dim": 8}, ForeignFileError, "expected one per layer"),
        ({"model_type": "qwen2"}, WrongModelError, "for models of type 'qwen2', tiny llama is 'llama'"),
        ({"directions": {"1": [[1.0] * 31]}}, WrongModelError, "of width 32"),
        ({"directions": {"3": [[1.0] * 32]}}, WrongModelError, "for layer 3"),
        ({"directions": {"1": [[math.nan] * 32]}}, DamagedFileError, "it holds NaN, which is not a JSON number"),
    ],
    ids=str,
)
def test_an_svec_file_that_does_not_fit_is_refused(llama, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        vectors.load_svec(svec(tmp_path / "v.svec", llama, **changes), llama)


@dataclass
class SteeringVector:
    """As the library steering-vectors has it."""

    layer_activations: dict[int, Tensor]
    layer_type: str


@pytest.mark.parametrize(
    ("layer_type", "module"),
    [("decoder_block", lambda b: b.block), ("self_attn", lambda b: b.attention), ("mlp", lambda b: b.mlp)],
)
def test_a_steering_vector_does_here_what_it_does_there(lm, rollout_of, layer_type, module):
    """The library adds it to what the module of its layer type puts out."""
    row, rollout = torch.randn(32, generator=torch.Generator().manual_seed(0)), rollout_of(10)

    def add(module, args, output):
        return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

    handle = module(lm.layout.blocks[1]).register_forward_hook(add)
    try:
        theirs = collect.logits(lm, rollout)
    finally:
        handle.remove()
    for found in (SteeringVector({1: row}, layer_type), {"layer_activations": {1: row}, "layer_type": layer_type}):
        ours = collect.logits(lm, rollout, edits.steering(vectors.from_steering_vectors(found, lm), 1.0))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (theirs - collect.logits(lm, rollout)).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (
            SteeringVector({1: torch.ones(32)}, "input_layernorm"),
            ForeignFileError,
            "layer_type 'input_layernorm'.*cannot be at the output of a norm",
        ),
        (SteeringVector({1: torch.ones(32)}, "post_attention_layernorm"), ForeignFileError, "'post_attention_layernorm'"),
        (SteeringVector({}, "mlp"), ForeignFileError, "SteeringVector holds no direction"),
        (SteeringVector({1: [1.0]}, "mlp"), ForeignFileError, "expected tensors layer_activations"),
        (SteeringVector({1: torch.ones(33)}, "mlp"), WrongModelError, "of width 32"),
        (SteeringVector({9: torch.ones(32)}, "mlp"), WrongModelError, "for layer 9"),
        (SteeringVector({1: torch.full((32,), math.inf)}, "mlp"), DamagedFileError, "NaN or infinity at layer 1"),
        (torch.ones(3, 32), ForeignFileError, "This Tensor has layer_type None"),
        ({"directions": {}}, ForeignFileError, "This dict has layer_type None"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_steering_vector_that_does_not_fit_is_refused(llama, found, error, message):
    with pytest.raises(error, match=message):
        vectors.from_steering_vectors(found, llama)


# --- a plan as an adapter ------------------------------------------------------------------------------------


def adapted(lm: LM, directory, name: str = "default"):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(lm.model), directory, adapter_name=name).eval()


@torch.no_grad()
def logits(model, ids) -> Tensor:
    return model(input_ids=ids).logits


def layers_of(model) -> set[str]:
    """Names of the modules that an adapter sits in."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


@pytest.mark.parametrize("kind", ["resid_mid", "attn_out"])
def test_an_adapter_equals_the_edit_loaded_and_merged(any_lm, ids, tmp_path, kind):
    plan = plan_of(any_lm, [(1, 0), (1, 3), (2, 1)], kind=kind)
    wanted = logits(edits.apply(any_lm, plan).model, ids)
    model = adapted(any_lm, vectors.save_adapter(any_lm, plan, tmp_path / "a"))
    names = {id(m): name for name, m in any_lm.model.named_modules()}
    assert layers_of(model) == {names[id(any_lm.layout.blocks[layer].out)] for layer in (1, 2)}
    base, scale = logits(any_lm.model, ids), wanted.abs().max()
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5 * scale
    assert (base - wanted).abs().max() > 1e-3 * scale, "the edit did nothing, so nothing was compared"
    merged = model.merge_and_unload()
    assert (logits(merged, ids) - wanted).abs().max() <= 1e-5 * scale
    theirs, ours = merged.state_dict(), edits.apply(any_lm, plan).model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-6) for name in ours)
    untouched = [name for name, value in any_lm.model.state_dict().items() if torch.equal(value, ours[name])]
    assert all(torch.equal(theirs[name], ours[name]) for name in untouched)


def test_every_head_of_every_layer_fits_into_one_adapter(any_lm, ids, tmp_path):
    plan = plan_of(any_lm, all_heads(any_lm))
    wanted = logits(edits.apply(any_lm, plan).model, ids)
    found = logits(adapted(any_lm, vectors.save_adapter(any_lm, plan, tmp_path / "a")), ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_several_edits_of_one_head_compose_in_an_adapter_as_in_weights(llama, ids, tmp_path):
    chosen = tuple(HeadEdit(1, 2, "project_out", s) for s in (0.5, 0.25, -0.3))
    plan = Plan(chosen, direction_of(llama, "resid_mid"), "composed", llama.provenance())
    wanted = logits(edits.apply(llama, plan).model, ids)
    found = logits(adapted(llama, vectors.save_adapter(llama, plan, tmp_path / "a")), ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("share", [-1.0, 0.0, 0.5, 2.0])
def test_the_scale_of_an_adapter_is_strength(model_of, ids, tmp_path, family, share):
    lm = model_of(family)
    heads = [(0, 1), (2, 0)]
    model = adapted(lm, vectors.save_adapter(lm, plan_of(lm, heads, strength=0.6), tmp_path / "a"))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", share)
    wanted = logits(edits.apply(lm, plan_of(lm, heads, strength=0.6 * share)).model, ids)
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_of_different_heads_stack_with_weights(model_of, ids, tmp_path, family):
    lm = model_of(family)
    first, second = plan_of(lm, [(1, 0)], strength=1.0), plan_of(lm, [(1, 2), (2, 1)], strength=1.0, seed=1)
    model = adapted(lm, vectors.save_adapter(lm, first, tmp_path / "a"), "a")
    model.load_adapter(vectors.save_adapter(lm, second, tmp_path / "b"), "b")
    model.base_model.set_adapter(["a", "b"])

    def in_weights(*shares: float) -> Tensor:
        edited = lm
        for plan, share in zip((first, second), shares, strict=True):
            weaker = tuple(replace(edit, strength=share * edit.strength) for edit in plan.edits)
            edited = edits.apply(edited, replace(plan, edits=weaker, provenance=edited.provenance()))
        return logits(edited.model, ids)

    both = in_weights(1.0, 1.0)
    assert (logits(model, ids) - both).abs().max() <= 1e-5 * both.abs().max()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    mixed = in_weights(0.5, 0.25)
    assert (logits(model, ids) - mixed).abs().max() <= 1e-5 * mixed.abs().max()
    assert (mixed - both).abs().max() > 1e-3 * both.abs().max()


def test_an_adapter_is_a_small_plain_folder_that_says_what_it_is(tiny, tmp_path):
    directory = vectors.save_adapter(tiny, plan_of(tiny, all_heads(tiny)), tmp_path / "a")
    files = {file.name: file.stat().st_size for file in directory.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"} and sum(files.values()) <= 20_000
    config = json.loads((directory / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny-reasoner", "r": 1, "lora_alpha": 1,
        "lora_dropout": 0.0, "target_modules": [f"model.layers.{layer}.self_attn.o_proj" for layer in range(tiny.layout.n_layers)],
        "bias": "none", "use_rslora": False, "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
    assert expected.items() <= config.items()
    tensors, header = store.read_tensors(directory / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (1, tiny.layout.n_heads * tiny.layout.head_dim)
    assert tensors[f"{name}.lora_B.weight"].shape == (tiny.layout.d_model, 1)
    assert header["fingerprint"] == tiny.fingerprint and json.loads(header["edits"])[0]["op"] == "project_out"


def bad_plan(lm: LM, *edits_: HeadEdit) -> Plan:
    return Plan(edits_, direction_of(lm, "resid_mid"), "bad", lm.provenance())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (HeadEdit(1, 2, "scale", 0.5), ExportError, r"Head 1\.2 is edited by 'scale', whose change has rank 8.*edits\.apply"),
        (HeadEdit(3, 0, "project_out", 1.0), IndexError, r"layers 0\.\.2"),
        (HeadEdit(0, 4, "project_out", 1.0), IndexError, r"heads 0\.\.3"),
        (None, ExportError, "'bad' edits no head"),
    ],
)
def test_a_plan_that_is_no_adapter_is_refused_and_leaves_nothing(llama, tmp_path, edit, error, message):
    with pytest.raises(error, match=message):
        vectors.save_adapter(llama, bad_plan(llama, *([edit] if edit else [])), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_models_plan_is_refused(llama, model_of, tmp_path):
    with pytest.raises(WrongModelError, match=r"made from tiny llama.*those of tiny mistral"):
        vectors.save_adapter(model_of("mistral"), plan_of(llama, [(0, 0)]), tmp_path / "a")


# --- steering that lives in biases ---------------------------------------------------------------------------


def with_biases(name: str, model_of) -> LM:
    """Families that have biases where steering needs them, some of them only if their config asks for it."""
    if name == "llama with biases":
        config = LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)
    elif name == "gemma2 with biases":
        config = Gemma2Config(**COMMON, head_dim=12, query_pre_attn_scalar=12, attention_bias=True)
    else:
        return model_of(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.add_(0.3 * torch.randn(value.shape)) if "norm" not in key else None
    return lms.wrap(model, tokenizer(), name=f"tiny {name}")


STEERABLE = [
    *((name, kind) for name in ("gpt2", "gpt_neox", "gpt_neox_sequential", "llama with biases")
      for kind in ("attn_out", "resid_mid", "mlp_out", "resid_post")),
    ("gemma2 with biases", "attn_out"),
]  # fmt: skip


@pytest.mark.parametrize("layers", [None, [2], [1, 1]], ids=str)
@pytest.mark.parametrize(("name", "kind"), STEERABLE)
def test_baked_steering_equals_run_time_steering(model_of, rollout_of, name, kind, layers):
    lm, rollout = with_biases(name, model_of), rollout_of(20)
    value, before = direction_of(lm, kind), {k: v.clone() for k, v in lm.model.state_dict().items()}
    changed = vectors.bake(lm, value, -0.4, layers=layers)
    wanted = collect.logits(lm, rollout, edits.steering(value, -0.4, layers=layers))
    assert (collect.logits(changed, rollout) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (collect.logits(lm, rollout) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    mine, theirs = dict(lm.model.named_parameters()), dict(changed.model.named_parameters())
    own = [key for key in mine if mine[key].data_ptr() != theirs[key].data_ptr()]
    assert mine.keys() == theirs.keys() and len(own) == (3 if layers is None else 1) and all(key.endswith("bias") for key in own)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items()), "the base model was modified"
    assert changed.parent == lm.fingerprint != changed.fingerprint


def test_a_baked_model_is_an_ordinary_checkpoint_that_keeps_its_steering(model_of, problems_of, tmp_path):
    lm = model_of("gpt2")
    value, sampling, problems = direction_of(lm), Sampling(max_new_tokens=16, seed=1), problems_of(3)
    again = lms.load(vectors.bake(lm, value, 0.5).save(tmp_path / "m"), device="cpu")
    steered = rollouts(Condition(lm, (edits.steering(value, 0.5),)), problems, sampling, progress=False)
    assert [r.token_ids for r in rollouts(again, problems, sampling, progress=False)] == [r.token_ids for r in steered]
    assert [r.token_ids for r in rollouts(lm, problems, sampling, progress=False)] != [r.token_ids for r in steered]


def test_baked_at_strength_0_is_the_base_model(model_of):
    assert vectors.bake(model_of("gpt2"), direction_of(model_of("gpt2")), 0.0).fingerprint == model_of("gpt2").fingerprint


def test_baked_doses_add_up_and_cancel(model_of, rollout_of):
    lm = model_of("gpt_neox")
    value, rollout = direction_of(lm), rollout_of(10)
    twice = vectors.bake(vectors.bake(lm, value, 0.25), edits.transfer(value, vectors.bake(lm, value, 0.25)), 0.25)
    wanted = collect.logits(vectors.bake(lm, value, 0.5), rollout)
    assert (collect.logits(twice, rollout) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    half = vectors.bake(lm, value, 0.25)
    back = vectors.bake(half, edits.transfer(value, half), -0.25)
    base = collect.logits(lm, rollout)
    assert (collect.logits(back, rollout) - base).abs().max() <= 1e-5 * base.abs().max()


UNSTEERABLE = [
    *((name, kind, "has no bias there") for name in ("llama", "qwen2", "qwen3", "tiny-reasoner") for kind in ("resid_mid", "resid_post")),
    *((name, kind, "normalises the output") for name in ("gemma2", "olmo2", "gemma2 with biases") for kind in ("resid_mid", "resid_post")),
    ("gpt2", "resid_pre", "has no bias there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "why"), UNSTEERABLE)
def test_where_no_bias_can_do_it_the_error_says_so_and_what_to_do(model_of, name, kind, why):
    lm = with_biases(name, model_of)
    with pytest.raises(ExportError, match=rf"{why}.*{kind} of layer 0 cannot.*edits\.steering.*vectors\.save_gguf"):
        vectors.bake(lm, direction_of(lm, kind), 0.5)


def test_baked_refuses_what_steering_refuses(model_of, tiny):
    lm = model_of("gpt2")
    value = direction_of(lm)
    with pytest.raises(IndexError, match="Layer 3 does not exist"):
        vectors.bake(lm, value, 0.5, layers=[3])
    with pytest.raises(ValueError, match="strength=nan"):
        vectors.bake(lm, value, math.nan)
    with pytest.raises(WrongModelError, match="has 3 layers of width 32"):
        vectors.bake(lm, direction_of(tiny), 0.5)
    with pytest.raises(WrongModelError, match="made from tiny llama"):
        vectors.bake(lm, direction_of(model_of("llama")), 0.5)


def test_a_bias_counts_only_if_it_reaches_the_output_as_it_is():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    assert _last_bias(plain, 8) is plain[2].bias
    assert _last_bias(nn.Sequential(plain, nn.Dropout(0.0).eval()), 8) is plain[2].bias
    for mlp in (
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False)),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, bias=False)),
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)),
    ):
        assert _last_bias(mlp, 8) is None


# --- a folder for the hub ------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_folder_holds_a_card_the_vector_and_a_control_vector(tiny, tmp_path):
    value = direction_of(tiny, first=1)
    table = pd.DataFrame({"accuracy": ["99.0"], "think tokens": ["20.1 (-3.0)"]}, index=["steered"])
    card = report.vector_card(value, table=table, figures=["dose.html"])
    directory = vectors.save_folder(value, tmp_path / "v", lm=tiny, card=card, figures={"dose.html": "<p>dose</p>"})
    assert {file.name for file in directory.iterdir()} == {"README.md", "direction.safetensors", "direction.gguf", "dose.html"}
    assert same(vectors.load(directory / "direction.safetensors", tiny), value)
    assert same(vectors.load_gguf(directory / "direction.gguf", tiny), value)
    text = (directory / "README.md").read_text()
    head = front_matter(text)
    assert head["base_model"] == "tiny-reasoner" and head["library_name"] == "reasoning-length-toolkit"
    assert "steering-vector" in head["tags"] and head["pipeline_tag"] == "text-generation"
    for part in ("20.1 (-3.0)", "dose.html", tiny.fingerprint, "7 long and 5 short", "+ is longer"):
        assert part in text, part
    assert sum(file.stat().st_size for file in directory.iterdir()) < 20_000


def test_the_commands_of_the_card_run(tiny, tmp_path, monkeypatch):
    value = direction_of(tiny)
    monkeypatch.chdir(vectors.save_folder(value, tmp_path / "v", lm=tiny, card=report.vector_card(value)))
    text = pathlib.Path("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    found: dict = {}
    exec(code, found)
    assert same(found["direction"], value) and found["shorter"].during[0].strength < 0
    assert "Nothing has been measured" in text


def test_a_name_with_a_colon_stays_one_yaml_value(llama):
    value = replace(direction_of(llama), provenance=replace(llama.provenance(), model="a: b #c"))
    assert front_matter(report.vector_card(value))["base_model"] == "a: b #c"


@pytest.mark.parametrize(
    "name",
    ["tiny-reasoner", "owner/model-1.5B", "a: b #c", 'say "x"', "it's", "true", "12", "line\nbreak", "\u2603 \U0001f600", "- a"],
)
def test_the_card_of_an_edited_model_names_any_base_as_one_yaml_string(llama, name):
    plan = Plan((HeadEdit(0, 0, "scale", 1.0),), None, "p", llama.provenance())
    empty = pd.DataFrame()
    assert front_matter(report.model_card(name, plan, empty, empty, on="."))["base_model"] == name


@pytest.mark.parametrize(
    ("kind", "first", "drop", "there"),
    [("resid_post", 0, False, False), ("resid_post", 0, True, True), ("resid_post", 1, False, True), ("resid_mid", 1, True, False)],
)
def test_a_folder_has_a_control_vector_only_where_one_can_say_it(llama, tmp_path, kind, first, drop, there):
    value = direction_of(llama, kind, first=first)
    directory = vectors.save_folder(value, tmp_path / "v", lm=llama, card="", drop_layer_0=drop)
    assert (directory / "direction.gguf").exists() == there
    assert same(vectors.load(directory / "direction.safetensors", llama), value)


def test_a_folder_that_holds_something_is_not_touched(llama, tmp_path):
    (tmp_path / "mine").write_text("x")
    for act in (
        lambda: vectors.save_folder(direction_of(llama), tmp_path, lm=llama, card=""),
        lambda: vectors.save_adapter(llama, plan_of(llama, [(0, 0)]), tmp_path),
    ):
        with pytest.raises(FileExistsError, match="is not empty: choose another directory"):
            act()
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_fails_half_way_leaves_no_file(llama, tmp_path):
    value = direction_of(llama, first=1)
    value.vector[2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        vectors.save_folder(value, tmp_path / "v", lm=llama, card="written first")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    value.vector[2] = 1
    assert vectors.save_folder(value, tmp_path / "v", lm=llama, card="").is_dir()


@pytest.mark.parametrize("name", ["../x.html", "a/b.svg", "README.md", "direction.gguf", ".hidden", ""])
def test_a_figure_cannot_overwrite_or_leave_the_folder(llama, tmp_path, name):
    with pytest.raises(ValueError, match="Figures cannot be called"):
        vectors.save_folder(direction_of(llama), tmp_path / "v", lm=llama, card="", figures={name: "x"})
    assert not list(tmp_path.iterdir())
