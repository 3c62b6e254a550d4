"""``toolkit dto``: it writes the job's pairs and the trained model, and options that nothing reads are refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from toolkit import cli, store


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_command_writes_pairs_and_a_trained_model(tmp_path):
    pytest.importorskip("trl")
    size = (
        "-n",
        4,
        "-k",
        2,
        "--max-new-tokens",
        100,
        "--segments",
        "lines",
        "--probes",
        2,
        "--completions",
        2,
        "--answer-tokens",
        10,
    )
    result = run("dto", "-o", tmp_path, *size, "--steps", 1, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    pairs = store.read_rows(tmp_path / "pairs.jsonl")
    assert told["responses"] == 8 and told["pairs"] == len(pairs) > 0
    assert told["path_tokens"] < told["tokens"]
    assert {"prompt", "chosen", "rejected"} <= pairs[0].keys()
    assert (tmp_path / "trained" / "model" / "model.safetensors").is_file()


def test_a_rate_without_steps_is_refused_before_any_work(tmp_path):
    result = run("dto", "-o", tmp_path / "out", "--rate", 1e-3)
    assert result.exit_code != 0 and "--rate" in f"{result.output} {result.exception}"
    assert not (tmp_path / "out").exists()
