"""The command ``export``: every format can be written from the command line, and bad input is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from toolkit import cli, exports, store
from toolkit import lm as lms
from toolkit.types import Direction, HeadEdit, Plan


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory):
    """A folder with a direction at the output of the blocks, one at another site, and a plan of one head edit."""
    path = tmp_path_factory.mktemp("inputs")
    vector = torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, "resid_post", "think", "by hand", 1, 1, tiny.provenance())
    store.save(direction, path / "v.safetensors")
    store.save(Direction(vector, "resid_mid", "think", "by hand", 1, 1, tiny.provenance()), path / "mid.safetensors")
    store.save(Plan((HeadEdit(1, 0, "project_out", 1.0),), direction, "by hand", tiny.provenance()), path / "plan.safetensors")
    return path


def source(row: exports.Format, inputs) -> tuple:
    """Options that give a format what it takes."""
    return {
        "direction": ("-v", inputs / "v.safetensors", *(("--layers", "1-3") if "layers" in row.options else ())),
        "plan": ("--plan", inputs / "plan.safetensors", *(("--base", "qwen3") if row.name == "ollama" else ())),
        "problems": ("-t", "arithmetic", "-n", "3"),
    }[row.takes]


def test_every_command_that_loads_a_model_can_allow_its_own_code_to_run():
    from typer.main import get_command

    for name, command in get_command(cli.app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert name == "push" or "--trust-remote-code" in options, name  # push uploads a folder and loads no model


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("command", ["export", "import", "demo", "replicate"])
def test_the_permission_reaches_the_loaded_model(command, allowed, inputs, tmp_path, monkeypatch):
    given = []

    def load(*args, **kwargs):
        given.append(kwargs["trust_remote_code"])
        raise ValueError("not loaded here")

    monkeypatch.setattr(lms, "load", load)
    store.write_json({}, tmp_path / "v.svec")
    plans = Path(__file__).parents[2] / "plans"
    arguments = {
        "export": ("-v", inputs / "v.safetensors", "--to", "gguf", "--drop-layer-0", "-o", tmp_path / "v.gguf"),
        "import": (tmp_path / "v.svec", "--from", "svec", "-o", tmp_path / "v.safetensors"),
        "demo": ("-o", tmp_path / "demo"),
        "replicate": (plans / "tiny-reasoner.toml", "-o", tmp_path / "replicated"),
    }[command]
    result = run(command, *arguments, *(["--trust-remote-code"] if allowed else []))
    assert "not loaded here" in result.output + repr(result.exception)
    assert given == [allowed]


@pytest.mark.parametrize("row", exports.FORMATS, ids=lambda row: row.name)
def test_every_format_is_written_as_the_table_says(inputs, tmp_path, row):
    result = run("export", "--to", row.name, *source(row, inputs), "-o", tmp_path / "x")
    assert result.exit_code == 0, result.output + repr(result.exception)
    if row.files == exports.ONE_FILE:
        assert (tmp_path / "x").is_file()
        return
    there = {file.relative_to(tmp_path / "x").as_posix() for file in (tmp_path / "x").rglob("*") if file.is_file()}
    named = {part.strip(" `") for part in row.files.split(",")}
    assert {name for name in named if "." in name} - {"direction.gguf"} <= there
    about = tmp_path / "x" / "about.json"
    assert not about.exists() or json.loads(about.read_text())["format"] == row.name


def test_a_strength_of_minus_a_half_shortens(inputs, tmp_path):
    assert (
        run("export", "--to", "safetensors", "-v", inputs / "v.safetensors", "--strength", "-0.5", "-o", tmp_path / "x").exit_code
        == 0
    )
    tensors, header = store.read_tensors(tmp_path / "x")
    assert torch.equal(tensors["direction.2"], -0.5 * store.load(inputs / "v.safetensors", Direction).vector[2])
    assert header["sign"] == "+ = shorter"


def test_the_list_names_every_format(inputs):
    result = run("export", "--list")
    assert result.exit_code == 0
    assert all(f"  {row.name}: " in result.output for row in exports.FORMATS)


def test_with_json_the_list_an_export_an_import_and_a_dry_push_say_what_is_where(inputs, tmp_path):
    listed = json.loads(run("export", "--list", "--json").stdout)
    assert [row["name"] for row in listed] == [row.name for row in exports.FORMATS] and all(row["checked"] for row in listed)
    file, again = tmp_path / "v.gguf", tmp_path / "again.safetensors"
    written = json.loads(
        run("export", "-v", inputs / "v.safetensors", "--to", "gguf", "--drop-layer-0", "-o", file, "--json").stdout
    )
    assert written == {"out": str(file), "to": "gguf"} and file.is_file()
    read = json.loads(run("import", file, "--from", "gguf", "-o", again, "--json").stdout)
    norms = store.load(again, Direction).norms
    assert read["out"] == str(again) and [row["norm"] for row in read["layers"]] == pytest.approx(norms.tolist())
    assert run("export", "-v", inputs / "v.safetensors", "--to", "folder", "-o", tmp_path / "folder", "--json").exit_code == 0
    planned = json.loads(run("push", tmp_path / "folder", "me/vector", "--dry-run", "--json").stdout)
    assert planned["sent"] is False and planned["address"] is None and planned["repo"] == "me/vector" and planned["card"]
    assert {row["file"]: row["bytes"] for row in planned["files"]}["README.md"] == (
        tmp_path / "folder" / "README.md"
    ).stat().st_size


def test_an_export_without_a_format_or_a_file_says_so(tmp_path):
    for given in (("-o", tmp_path / "x"), ("--to", "gguf")):
        result = run("export", *given)
        assert result.exit_code == 2 and "--to" in result.output and "--out" in result.output


def test_the_help_names_every_format():
    words = " ".join(run("export", "--help").output.replace("\u2502", " ").split())
    assert all(row.name in words for row in exports.FORMATS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--to", "onnx", "-v", "v.safetensors"), "Unknown format 'onnx': choose one of safetensors, gguf"),
        (("--to", "gguf", "-v", "v.safetensors"), "Choose --layers 1-3, or leave it out with --drop-layer-0"),
        (("--to", "hotwire", "-v", "mid.safetensors"), "this direction was made at resid_mid"),
        (("--to", "vllm-lens", "-v", "v.safetensors", "--during", "newest"), "cannot say during='newest'"),
        (("--to", "vllm-lens", "-v", "v.safetensors", "--strength", "0"), "steers nothing"),
        (("--to", "vllm-lens", "-v", "v.safetensors", "--layers", "9"), "has layers 0..3"),
        (("--to", "hotwire", "-v", "v.safetensors", "-o", "."), "not empty"),
        (("--to", "adapter", "--plan", "v.safetensors"), "Plan"),
        (("--to", "adapter", "--plan", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--to", "inspect", "-t", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--to", "inspect", "--split", "spring"), "spring"),
        (("--to", "inspect", "--think", "<think>"), 'give "response", or the two tags'),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(inputs, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("toolkit.lm.load", lambda *a, **k: pytest.fail("a model was loaded"))
    before = sorted(inputs.iterdir())
    result = run("export", *(() if "-o" in arguments else ("-o", tmp_path / "x")), *arguments)
    assert result.exit_code != 0
    assert says in " ".join((str(result.exception) + result.output).replace("\u2502", " ").split())
    assert sorted(inputs.iterdir()) == before and not (tmp_path / "x").exists()
