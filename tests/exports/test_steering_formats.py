"""A direction in the formats of other tools: a reader of each documented layout, applied with plain hooks, steers as we do."""

from __future__ import annotations

import base64
import json
import re
import sys
import types
from contextlib import ExitStack
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from toolkit import edits, exports, store, vectors
from toolkit.exports.base import Settings
from toolkit.lm import LM
from toolkit.types import Direction
from toolkit.vectors import ExportError

STEERED = [row.name for row in exports.FORMATS if row.takes == "direction" and row.name != "folder"]
BLOCK_ONLY = [name for name in STEERED if name != "safetensors"]
STRENGTH = -0.75


def direction_of(lm: LM, kind: str = "resid_post", *, first: int = 1) -> Direction:
    """A random direction; layers before ``first`` are zero."""
    vector = torch.randn(lm.layout.n_layers, lm.layout.d_model, generator=torch.Generator().manual_seed(0))
    vector[:first] = 0
    return Direction(vector, kind, "think", "mean_difference", 7, 5, lm.provenance(3))


def written(lm: LM, name: str, path, **settings):
    value = settings.pop("direction", None) or direction_of(lm)
    return exports.find(name).write(lm, value, path, Settings(**{"strength": STRENGTH, **settings}))


# --- readers of the documented layouts: {layer: vector to add at every position} ---------------------------------


def read_safetensors(path, lm):
    tensors, header = store.read_tensors(path)
    assert header["apply_site"] == "resid_post" and header["apply_during"] == "all"
    return {int(name.removeprefix("direction.")): row for name, row in tensors.items()}


def read_gguf(path, lm):
    return {int(t.name.removeprefix("direction.")): torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def read_vllm_lens(path, lm):
    body = json.loads((path / "request.json").read_text())
    assert body.keys() == {"vllm_xargs"}
    found = {}
    for vector in json.loads(body["vllm_xargs"]["apply_steering_vectors"]):
        wire = vector["activations"]
        assert vector["norm_match"] is False and vector["position_indices"] is None and "compression" not in wire
        rows = np.frombuffer(base64.b64decode(wire["data"]), np.dtype(wire["dtype"])).reshape(wire["shape"])
        for layer, row in zip(vector["layer_indices"], rows, strict=True):
            found[layer] = vector["scale"] * torch.from_numpy(row.copy())
    return found


def read_hotwire(path, lm):
    store_of = {file.stem: torch.load(file, weights_only=True) for file in (path / "vectors").glob("*.pt")}
    body = json.loads((path / "request.json").read_text())
    found = {}
    for entry in json.loads(body["vllm_xargs"]["hotwire"]):
        assert not entry.get("decode_only") and entry["layer"] not in found  # one vector per layer and token
        found[entry["layer"]] = entry["scale"] * store_of[entry["id"]][entry["layer"]]
    return found


def read_easysteer(path, lm):
    spec = json.loads((path / "spec.json").read_text())
    (vector,) = spec["vectors"]
    assert vector["algorithm"] == "direct" and vector["normalize"] is False
    assert vector["apply"] == {"prompt": "all", "generation": "all"}
    rows = read_gguf(path / vector["source"], lm)
    return {layer: vector["scale"] * rows[layer] for layer in vector["layers"]}


def read_lm_eval(path, lm):
    config = torch.load(path / "steer.pt", weights_only=True)
    names = {name: module for name, module in lm.model.base_model.named_modules() if name in config}
    assert names.keys() == config.keys(), "lm-eval: not all hookpoints could be resolved"
    layers = {id(block.block): layer for layer, block in enumerate(lm.layout.blocks)}
    assert all(row["action"] == "add" and row["bias"] is None and row["head_index"] is None for row in config.values())
    return {layers[id(names[name])]: row["steering_coefficient"] * row["steering_vector"] for name, row in config.items()}


class Envoy:
    """A module of nnsight's vLLM: ``output`` is ``(hidden, residual)`` of the running step, here one tensor for each block."""

    def __init__(self, outputs: dict[str, Tensor], path: str = "") -> None:
        self._outputs, self._path = outputs, path

    def __getattr__(self, name):
        return Envoy(self._outputs, f"{self._path}.{name}".lstrip("."))

    def __getitem__(self, index):
        return Envoy(self._outputs, f"{self._path}.{index}")

    @property
    def output(self):
        return (self._outputs[self._path], None)


class PretendedVLLM(Envoy):
    """What ``steer.py`` uses of nnsight: ``trace`` runs its block at once, in two steps of 5 rows (a prompt) and 1 row."""

    last: PretendedVLLM

    def __init__(self, name: str) -> None:
        super().__init__({})
        self.name, self.steps, self.drawn = name, [], types.SimpleNamespace(item=lambda: 3)
        PretendedVLLM.last = self

    samples = property(lambda self: self.drawn)
    tokenizer = property(lambda self: types.SimpleNamespace(decode=lambda ids: f"decoded {ids}"))

    def trace(self, prompt, *, serve, max_tokens, temperature):
        self.asked = (prompt, serve, max_tokens, temperature)
        stack = ExitStack()
        stack.all = self.all
        return stack

    def all(self):
        for step, rows in enumerate((5, 1)):
            self._outputs.clear()
            self._outputs.update({name: torch.zeros(rows, self.width) for name in self.blocks})
            yield step
            self.steps.append(dict(self._outputs))


class Saved(list):
    """nnsight adds ``save`` to every object in a trace."""

    def save(self):
        return self


def run_nnsight(path, lm, monkeypatch, capsys) -> list[dict[str, Tensor]]:
    """Run ``steer.py`` on the pretended server; what was added to every block's output in each step."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    PretendedVLLM.blocks = [names[id(block.block)] for block in lm.layout.blocks]
    PretendedVLLM.width = lm.layout.d_model
    module = types.ModuleType("nnsight.modeling.vllm")
    module.VLLM = PretendedVLLM
    monkeypatch.setitem(sys.modules, "nnsight.modeling.vllm", module)
    monkeypatch.setattr(sys, "argv", ["steer.py", "a prompt", "--max-tokens", "2"])
    program = compile((path / "steer.py").read_text(), str(path / "steer.py"), "exec")
    exec(program, {"__name__": "__main__", "__file__": str(path / "steer.py"), "list": Saved})
    assert PretendedVLLM.last.name == lm.name and PretendedVLLM.last.asked == ("a prompt", "http://127.0.0.1:6677", 2, 0.0)
    assert capsys.readouterr().out == "decoded [3, 3]\n"
    return PretendedVLLM.last.steps


READERS = {
    "safetensors": read_safetensors, "gguf": read_gguf, "vllm-lens": read_vllm_lens, "hotwire": read_hotwire,
    "easysteer": read_easysteer, "lm-eval-steered": read_lm_eval,
}  # fmt: skip


def hooked(lm: LM, added: dict[int, Tensor], ids: Tensor) -> Tensor:
    """Logits with vectors added to the outputs of blocks by plain hooks of torch, at every position."""

    def adding(vector: Tensor):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (output[0] + vector, *output[1:])
            return output + vector

        return hook

    handles = [lm.layout.blocks[layer].block.register_forward_hook(adding(vector)) for layer, vector in added.items()]
    try:
        return lm.model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_what_a_tool_adds_by_the_layout_is_what_we_add(any_lm, ids, tmp_path, name):
    added = READERS[name](written(any_lm, name, tmp_path / "x"), any_lm)
    found = hooked(any_lm, added, ids)
    with edits.steering(direction_of(any_lm), STRENGTH)(any_lm):
        wanted = any_lm.model(input_ids=ids).logits
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * scale
    assert (any_lm.model(input_ids=ids).logits - wanted).abs().max() > 1e-3 * scale, "nothing was steered"


@pytest.mark.parametrize("during", ["all", "newest"])
def test_the_script_for_nnsight_adds_to_the_right_rows_in_every_step(any_lm, tmp_path, monkeypatch, capsys, during):
    path = written(any_lm, "nnsight-serve", tmp_path / "x", during=during)
    prompt, decode = run_nnsight(path, any_lm, monkeypatch, capsys)
    for layer, name in enumerate(PretendedVLLM.blocks):
        row = STRENGTH * direction_of(any_lm).vector[layer]
        assert torch.equal(decode[name], row[None])
        assert torch.equal(prompt[name][-1], row)
        assert torch.equal(prompt[name][:-1], (row if during == "all" else torch.zeros_like(row)).expand(4, -1))


def test_the_strength_is_the_scale_where_a_format_has_one_and_multiplied_in_elsewhere(llama, tmp_path):
    raw = direction_of(llama).vector[1]
    wire = json.loads(
        json.loads((written(llama, "vllm-lens", tmp_path / "a") / "request.json").read_text())["vllm_xargs"][
            "apply_steering_vectors"
        ]
    )
    assert wire[0]["scale"] == STRENGTH
    assert torch.equal(torch.load(written(llama, "hotwire", tmp_path / "b") / "vectors" / "thinking.pt", weights_only=True)[1], raw)
    easy = written(llama, "easysteer", tmp_path / "c")
    assert torch.equal(read_gguf(easy / "direction.gguf", llama)[1], raw)
    assert torch.equal(
        torch.load(written(llama, "lm-eval-steered", tmp_path / "d") / "steer.pt")["layers.1"]["steering_vector"], raw
    )
    assert torch.equal(read_gguf(written(llama, "gguf", tmp_path / "e"), llama)[1], STRENGTH * raw)


@pytest.mark.parametrize("name", READERS)
def test_only_the_chosen_layers_are_steered(llama, tmp_path, name):
    added = READERS[name](written(llama, name, tmp_path / "x", layers=(2,), direction=direction_of(llama, first=0)), llama)
    assert {layer for layer, row in added.items() if row.any()} == {2}
    assert torch.allclose(added[2], STRENGTH * direction_of(llama).vector[2])


def test_easysteers_newest_is_the_last_token_of_the_prompt_and_all_generated_ones(llama, tmp_path):
    (vector,) = json.loads((written(llama, "easysteer", tmp_path / "x", during="newest") / "spec.json").read_text())["vectors"]
    assert vector["apply"] == {"prompt_positions": [-1], "generation": "all"}


@pytest.mark.parametrize("name", [name for name in STEERED if name not in ("safetensors", "gguf")])
def test_the_intervention_is_stored_beside_the_vectors(llama, tmp_path, name):
    about = json.loads((written(llama, name, tmp_path / "x", layers=(1,)) / "about.json").read_text())
    assert (about["during"], about["strength"], about["layers"]) == ("all", STRENGTH, [1])
    assert about["fingerprint"] == llama.fingerprint and about["base_model"] == llama.name
    assert about["sign"] == "a positive strength lengthens thinking" and about["followed"] == exports.find(name).followed


def test_our_own_file_says_at_which_positions_to_add(llama, tmp_path):
    path = written(llama, "safetensors", tmp_path / "x", during="think+answer")
    assert store.read_tensors(path)[1]["apply_during"] == "think+answer"
    assert torch.allclose(vectors.load(path, llama).vector, direction_of(llama).vector)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCK_ONLY)
@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_a_direction_of_another_site_is_refused(llama, tmp_path, name, kind):
    with pytest.raises(ExportError, match=f"output of a block, but this direction was made at {kind}.*export it as safetensors"):
        written(llama, name, tmp_path / "x", direction=direction_of(llama, kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BLOCK_ONLY)
@pytest.mark.parametrize("during", ["newest", "think", "think+answer"])
def test_positions_that_a_format_cannot_say_are_refused(llama, tmp_path, name, during):
    if during in exports.find(name).during:
        written(llama, name, tmp_path / "x", during=during)
        return
    with pytest.raises(ExportError, match=re.escape(f"{name} cannot say during='{during}'")):
        written(llama, name, tmp_path / "x", during=during)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gguf", "easysteer"])
def test_layer_0_in_gguf_is_refused_and_dropped_when_asked(llama, tmp_path, name):
    whole = direction_of(llama, first=0)
    with pytest.raises(ExportError, match=r"layer 1\. Choose --layers 1-2, or leave it out with --drop-layer-0"):
        written(llama, name, tmp_path / "x", direction=whole)
    added = READERS[name](written(llama, name, tmp_path / "y", direction=whole, drop_layer_0=True), llama)
    assert set(added) == {1, 2}


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"strength": 0.0}, ExportError, "steers nothing"),
        ({"strength": float("nan")}, ValueError, "not finite"),
        ({"layers": (0,)}, ExportError, r"zero in all chosen layers \(0\)"),
        ({"layers": (3,)}, IndexError, "has layers 0..2"),
        ({"during": "thinking"}, ValueError, "Unknown phase"),
    ],
    ids=str,
)
def test_settings_that_steer_nothing_or_do_not_exist_are_refused(llama, tmp_path, name, settings, error, says):
    with pytest.raises(error, match=says):
        written(llama, name, tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STEERED)
def test_a_direction_of_another_model_is_refused(llama, model_of, tmp_path, name):
    with pytest.raises(store.WrongModelError, match="made from tiny llama"):
        written(model_of("mistral"), name, tmp_path / "x", direction=direction_of(llama))


@pytest.mark.parametrize("name", [name for name in STEERED if name not in ("safetensors", "gguf")])
def test_a_directory_with_files_is_not_overwritten(llama, tmp_path, name):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        written(llama, name, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_vector_too_large_for_fp32_is_refused(llama, tmp_path):
    value = direction_of(llama)
    huge = replace(value, vector=value.vector.double() * 1e300)
    with pytest.raises(ExportError, match="too large for fp32"):
        written(llama, "hotwire", tmp_path / "x", direction=huge)
