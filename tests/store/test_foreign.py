"""Files of other tools: what is written there is read by the tool, and is never code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from toolkit import store
from toolkit.store import DamagedFileError


def test_a_pt_file_holds_tensors_in_plain_containers(tmp_path):
    value = {"a": {"v": torch.arange(3.0), "k": 0.5, "why": None, "what": "add"}, "b": [torch.ones(2, 2)]}
    path = store.write_pt(value, tmp_path / "x.pt")
    again = torch.load(path, weights_only=True)
    assert torch.equal(again["a"]["v"], value["a"]["v"]) and again["a"]["k"] == 0.5 and again["a"]["why"] is None
    assert torch.equal(store.read_pt(path)["b"][0], torch.ones(2, 2))


def test_equal_content_gives_equal_bytes(tmp_path):
    one, two = (store.write_pt({"v": torch.arange(3.0)}, tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one.read_bytes() == two.read_bytes()


class Anything:
    """An object whose pickle would run code."""


def test_a_pt_file_that_would_need_code_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="more than tensors in plain containers"):
        store.write_pt({"a": Anything()}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_numbers_of_gguf_have_the_types_that_readers_expect(tmp_path):
    path = store.write_gguf("llama", {"a": 7, "b": 1.5, "c": "text"}, {"t": np.zeros((2, 3), "f4")}, tmp_path / "x.gguf")
    fields = gguf.GGUFReader(path).fields
    kinds = gguf.GGUFValueType
    assert {name: fields[name].types for name in "abc"} == {"a": [kinds.UINT32], "b": [kinds.FLOAT32], "c": [kinds.STRING]}


def test_the_header_of_a_gguf_file_names_architecture_and_shapes(tmp_path):
    tensors = {"w": np.zeros((5, 3), "f4"), "b": np.zeros(5, "f4")}
    path = store.write_gguf("qwen3", {}, tensors, tmp_path / "x.gguf")
    assert store.read_gguf_header(path) == ("qwen3", {"w": (5, 3), "b": (5,)})


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 400], ids=["empty", "magic alone", "noise"])
def test_a_header_that_is_not_there_is_damage(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(DamagedFileError, match="not a complete GGUF file"):
        store.read_gguf_header(tmp_path / "x.gguf")
