"""``toolkit check`` says what a model, problems and rollouts are good for, and its exit status is the answer."""

from __future__ import annotations

import json
from dataclasses import replace

import zoo
from typer.testing import CliRunner

from toolkit import cli, jobs
from toolkit.generate import Sampling, rollouts
from toolkit.tags import ThinkTags
from toolkit.types import Problem

PROBLEMS = [Problem("a", ({"role": "user", "content": "1+2=?"},), "3")]


def run(*args: str):
    return CliRunner().invoke(cli.app, ["check", *args], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_model_that_works_is_a_go_with_its_facts():
    result = run("tiny-reasoner", "--problems", "arithmetic")
    assert result.exit_code == 0 and "\ngo\n" in result.stdout
    for part in (
        "8 of 32 in layers 0-3",
        "thinks between '<think>' and '</think>'",
        "tokens per second",
        "<|user|>",
        "GRPO",
        "e-07",
    ):
        assert part in result.output, part


def test_the_answer_in_json_holds_the_same(tmp_path):
    answer = json.loads(run("tiny-reasoner", "--json").stdout)
    assert answer["go"] is True and answer["faults"] == [] and answer["facts"]["model"]["name"] == "tiny-reasoner"


def test_the_first_bad_line_of_a_problem_file_is_named_and_is_no_go(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "a", "question": "1+1=?", "answer": "2"}\n{"id": "b", "question": "2+2=?", "answer": null}\n')
    result = run("tiny-reasoner", "--problems", str(file))
    assert result.exit_code == 1 and "line 2" in result.output.replace("\n", " ") and "no go" in result.output


def test_rollouts_of_other_weights_are_no_go(tiny, llama, tmp_path):
    rollouts(tiny, PROBLEMS, Sampling(max_new_tokens=4), out=tmp_path / "mine", progress=False)
    assert jobs.check(tiny, rollouts=tmp_path / "mine").go
    found = jobs.check(llama, rollouts=tmp_path / "mine")
    assert not found.go and "not of tiny llama as loaded here, whose weights differ" in found.faults[0]


def test_rollouts_sampled_with_other_think_tags_are_no_go(tiny, tmp_path):
    rollouts(tiny, PROBLEMS, Sampling(max_new_tokens=4), out=tmp_path / "mine", progress=False)
    found = jobs.check(replace(tiny, tags=ThinkTags(None, None)), rollouts=tmp_path / "mine")
    assert not found.go and "sampled with the think tags <think>,</think>" in found.faults[0]


def test_a_model_that_is_refused_is_no_go_with_the_reason(tmp_path):
    zoo.model_of_type("diffllama").save(tmp_path / "model")
    result = run(str(tmp_path / "model"))
    assert result.exit_code == 1 and "each layer attends once" in " ".join(result.output.split())


def test_layers_without_heads_and_what_does_not_work_are_said():
    found = jobs.check(zoo.model_of_type("qwen3_next"))
    assert found.facts["model"]["attention heads"] == "none in layers 0, 2; 4 of 8 in layers 1, 3"
    assert any("2 of 4 layers have no attention heads (Qwen3NextGatedDeltaNet)" in limit for limit in found.limits)
    assert any("latent attention" in limit for limit in jobs.check(zoo.model_of_type("deepseek_v3")).limits)


def test_a_model_without_tags_is_told_how_to_set_them(llama):
    assert any("--think" in limit for limit in jobs.check(replace(llama, tags=None)).limits)


def test_tags_in_brackets_are_printed_and_not_taken_for_markup(tmp_path):
    lm = zoo.model_of_type("llama")
    lm.save(tmp_path / "model")
    result = run(str(tmp_path / "model"), "--think", "[THINK],[/THINK]")
    assert "thinks between '[THINK]' and '[/THINK]'" in result.stdout


def test_the_memory_is_that_of_the_sizes(tiny):
    weights = sum(p.numel() for p in tiny.model.parameters())
    cache = 2 * 32 * 4096 * 2 * 4 * 32 * 4  # keys and values, rows, tokens, key heads, layers, head size, bytes
    kv_heads = tiny.model.config.num_key_value_heads
    expected = (1.1 * weights * 4 + cache * kv_heads / 2) / 1e9
    assert jobs.check(tiny).facts["memory, estimated"]["sampling 32 rows of 4,096 tokens"] == f"{expected:,.2f} GB"
