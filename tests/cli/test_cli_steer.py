"""The steering commands: what they print is what steering does, files come back as they went, errors say what to do."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from toolkit import cli, directions, jobs, store
from toolkit.doses import DoseSweep
from toolkit.phases import Scope
from toolkit.types import Direction


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def vector(tiny, tmp_path_factory):
    """A direction at the output of the blocks, zero at the first."""
    v = torch.randn(tiny.layout.n_layers, tiny.layout.d_model, generator=torch.Generator().manual_seed(0))
    v[0] = 0.0
    path = tmp_path_factory.mktemp("vector") / "v.safetensors"
    return store.save(Direction(v, "resid_post", "think", "by hand", 1, 1, tiny.provenance()), path)


@pytest.mark.parametrize("command", ["steer", "dose", "export", "import", "push"])
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_steer_shows_every_strength_of_every_prompt(vector):
    asked = ("-p", "7+8-3=?", "-p", "9+4=?", "-a", "-2,0,2", "-k", 1, "--max-new-tokens", 60)
    found = json.loads(run("steer", "-v", vector, *asked, "--json").stdout)
    assert [(row["prompt"], row["strength"]) for row in found] == [(p, a) for p in ("7+8-3=?", "9+4=?") for a in (-2, 0, 2)]
    shown = run("steer", "-v", vector, *asked)
    assert shown.exit_code == 0, shown.output
    for row in found:
        assert f"{row['think_tokens']} think tokens" in shown.output


def test_dose_writes_a_page_and_numbers_and_goes_on_when_given_again(vector, tmp_path, monkeypatch):
    asked = (
        "dose",
        "-v",
        vector,
        "-o",
        tmp_path,
        "-a",
        "-1,1",
        "-n",
        6,
        "-k",
        2,
        "--max-new-tokens",
        80,
        "--layers",
        "1-2",
        "-t",
        "arithmetic",
    )
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert {row["direction"] for row in written["doses"]} == {"length direction", "random direction"}
    assert {row["strength"] for row in written["doses"]} == {-1, 0, 1}
    page = (tmp_path / "report.html").read_text()
    assert "usable range" in page and "toolkit dose --vector" in page and "think_tokens_q10" not in page.split("id='figures'")[0]
    hub = tmp_path / "hub"
    assert run("export", "-v", vector, "--to", "folder", "-o", hub, "--doses", tmp_path).exit_code == 0
    assert {"doses.html", "damage.html"} < {path.name for path in hub.iterdir()}
    card = (hub / "README.md").read_text()
    assert "| length direction -1 |" in card and "resid_post, layers (1, 2), everywhere" in card
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = run(*asked)
    assert again.exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    monkeypatch.chdir(tmp_path)  # the next step, as printed, is accepted: it writes runs/vector
    (line,) = re.findall(r"toolkit export .*?(?=  #)", again.output)
    assert run(*shlex.split(line)[1:]).exit_code == 0 and (tmp_path / "runs/vector/README.md").is_file()


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_what_was_exported_comes_back(vector, tmp_path, to, tiny):
    assert run("export", "-v", vector, "--to", to, "-o", tmp_path / "there").exit_code == 0
    result = run("import", tmp_path / "there", "--from", to, "-o", tmp_path / "back.safetensors")
    assert result.exit_code == 0, result.output
    back = store.load(tmp_path / "back.safetensors", Direction, fingerprint=tiny.fingerprint)
    assert torch.equal(back.vector.float(), store.load(vector, Direction).vector.float())
    assert run("import", tmp_path / "there", "--from", to, "--flip", "-o", tmp_path / "flipped.safetensors").exit_code == 0
    flipped = store.load(tmp_path / "flipped.safetensors", Direction)
    assert (directions.cosine(flipped, back)[1:] < -0.999).all()


def test_a_folder_for_the_hub_has_a_card(vector, tmp_path):
    assert run("export", "-v", vector, "--to", "folder", "-o", tmp_path / "hub").exit_code == 0
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "direction.safetensors", "direction.gguf"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-a", "one"), "numbers separated by commas"),
        (("-a", "1", "--layers", "x"), "layers such as"),
        (("-a", "1", "--layers", "1-2-3"), "layers such as"),
        (("-a", "1", "--layers", "3-1"), "layers such as"),
        (("-a", "1", "--layers", "9"), "has layers 0..3"),
        (("-a", "1", "--during", "thinking"), "choose from prompt, think, answer"),
        (("-a", "nan"), "not finite"),
    ],
)
def test_bad_arguments_say_what_to_do(vector, arguments, message):
    result = run("steer", "-v", vector, "-p", "1+1=?", *arguments)
    assert result.exit_code != 0
    assert message in " ".join(f"{result.output} {result.exception}".split())


def test_dose_does_not_guess_where_the_file_of_a_vector_is(tiny, tmp_path, monkeypatch):
    """Only its name is kept; a file of that name in the working directory may be another one."""
    monkeypatch.chdir(tmp_path)
    store.write_text('{"question": "1+1=?", "answer": "2"}\n', tmp_path / "mine.jsonl")
    v = Direction(
        torch.ones(tiny.layout.n_layers, tiny.layout.d_model), "resid_post", "think", "x", 1, 1, tiny.provenance(task="mine.jsonl")
    )
    result = run("dose", "-v", store.save(v, tmp_path / "v.safetensors"), "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "made from problems in a file 'mine.jsonl'" in " ".join(result.output.replace("\u2502", " ").split())


def test_doses_of_another_direction_or_model_do_not_go_into_a_card(tiny, vector, tmp_path):
    v = store.load(vector, Direction)
    made = DoseSweep((-1.0, 1.0), layers=(1, 2, 3), during=Scope.parse("think"))
    jobs.dose_report(tiny, v, jobs.Study("arithmetic", 4, 1, 60), made, tmp_path)
    card = (jobs.vector_folder(tiny, v, tmp_path / "own", tmp_path) / "README.md").read_text()
    assert "layers (1, 2, 3), think" in card and "not recorded" not in card
    with pytest.raises(store.WrongModelError, match="another direction"):
        jobs.vector_folder(tiny, directions.random_like(v, seed=0), tmp_path / "other", tmp_path)
    written = store.read_json(tmp_path / "doses.json")
    store.write_json({**written, "fingerprint": "0" * 64}, tmp_path / "doses.json")
    with pytest.raises(store.WrongModelError, match="other weights"):
        jobs.vector_folder(tiny, v, tmp_path / "other", tmp_path)
    assert not (tmp_path / "other").exists()
    old = {name: written[name] for name in ("usable", "judged_on", "doses")}  # a file of version 0.1.0
    store.write_json(old, tmp_path / "doses.json")
    assert "direction was not recorded" in (jobs.vector_folder(tiny, v, tmp_path / "old", tmp_path) / "README.md").read_text()
