"""``toolkit grpo``: the list, a run that ends in an ordinary model, settings, and errors before any work."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from trl import GRPOConfig
from typer.testing import CliRunner

from toolkit import cli, rewards, store
from toolkit import lm as lms
from toolkit.grpo import log, recipes
from toolkit.grpo.run import OWNED, Trained
from toolkit.jobs import grpo as jobs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
SMALL = ("-n", "16", "--set", "problems=2", "--set", "samples=4", "--set", "max_tokens=80", "--steps", "2", "--evaluate-every", "1")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["grpo", *map(str, arguments)])


def test_the_list_names_every_reward_and_recipe_with_its_paper():
    listed = json.loads(run("--list", "--json").stdout)
    assert {row["name"] for row in listed} == {*rewards.ALL, *recipes.ALL}
    papers = {row["name"]: row["paper"] for row in listed}
    assert papers["dler"] == "2510.15110" and papers["drpo"] == "2510.04474" and papers["correctness"] == ""
    assert all(row["pays"] for row in listed)


def test_the_list_is_printed_without_the_libraries_that_train():
    code = (
        "import sys; from toolkit.cli import app; app(['grpo', '--list', '--json'], standalone_mode=False); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "correctness" in done.stdout and "toolkit.grpo.recipes" in done.stderr.split()
    assert not {"transformers", "trl", "peft", "accelerate", "datasets"} & {*done.stderr.split()}


def test_a_run_writes_a_model_a_log_and_json(tmp_path):
    result = run("--reward", "hapo", *SMALL, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    trained = lms.load(tmp_path / "run" / "model", device="cpu")
    assert printed["fingerprint"] == trained.fingerprint and printed["recipe"]["name"] == "hapo"
    assert [row["step"] for row in printed["log"]] == [0, 1, 2] == [row["step"] for row in log.read(tmp_path / "run" / "log.jsonl")]
    assert "held_out/accuracy" in printed["log"][-1]
    again = run("--reward", "hapo", *SMALL, "--out", tmp_path / "run", "--resume")
    assert again.exit_code == 1 and "this run is finished" in str(again.exception)


def test_a_bfloat16_adapter_is_kept_merged_in_the_type_asked_for_and_its_loss_is_printed(tmp_path):
    out = tmp_path / "run"
    result = run(
        "--train",
        "adapter",
        "--dtype",
        "bfloat16",
        "--save-dtype",
        "bfloat16",
        *SMALL,
        "--steps",
        "1",
        "--evaluate-every",
        "0",
        "--out",
        out,
        "--json",
    )
    assert result.exit_code == 0, result.output
    written = lms.load(out / "model", dtype=torch.bfloat16, device="cpu")
    assert json.loads(result.stdout)["fingerprint"] == written.fingerprint
    assert {t.dtype for t in store.read_tensors(out / "model" / "model.safetensors")[0].values()} == {torch.bfloat16}
    assert {t.dtype for t in store.read_tensors(out / "adapter" / "adapter_model.safetensors")[0].values()} == {torch.float32}
    facts = store.read_json(out / "model" / "grpo.json")["saved"]
    printed = " ".join(result.stderr.split())
    assert f"bfloat16 keeps {facts['kept']:.1%} of the change, with an error of {facts['error']:.1%} of its size" in printed


def test_settings_reach_recipe_reward_and_trl():
    recipe, rest = jobs.adjust_recipe(
        recipes.hapo(), {"problems": "8", "learning_rate": "1", "reward.weight": "0.5", "beta": "0.01"}
    )
    assert (recipe.problems, recipe.learning_rate, recipe.options, rest) == (8, 1.0, {"weight": 0.5}, {"beta": 0.01})
    with pytest.raises(ValueError, match="Unknown setting 'nonsense'"):
        jobs.adjust_recipe(recipes.hapo(), {"nonsense": "1"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "reward.foo",
            "1",
            r"Unknown setting 'reward.foo' of the reward 'truncation': its options are reward.target, reward.beyond",
        ),
        ("reward.target", "4k", r"reward.target='4k': expected a number"),
        ("reward.target", "true", r"reward.target=True: expected a number"),
        ("max_tokens", "4k", r"max_tokens='4k': expected a whole number"),
        ("problems", "true", r"problems=True: expected a whole number"),
        ("learning_rate", "fast", r"learning_rate='fast': expected a number"),
        ("epsilon", "abc", r"epsilon='abc': expected a number"),
        ("delta", "abc", r"delta='abc': expected a number or null"),
        ("top_k", "1.5", r"top_k=1.5: expected a whole number"),
        ("gradient_checkpointing", "yes", r"gradient_checkpointing='yes': expected true or false"),
        ("loss_type", "5", r"loss_type=5: expected a text"),
    ],
)
def test_a_setting_of_an_unknown_name_or_another_type_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        jobs.adjust_recipe(recipes.art(), {name: value})


def test_an_unknown_option_of_a_reward_without_options_is_refused():
    with pytest.raises(ValueError, match=r"'reward.x' of the reward 'correctness': it has no options"):
        jobs.adjust_recipe(recipes.find("correctness"), {"reward.x": "1"})


PLAIN = (bool, int, float, str, type(None))


@pytest.mark.parametrize("name", rewards.ALL)
def test_every_option_of_a_reward_takes_its_default_and_no_other_type(name):
    parameters = inspect.signature(rewards.ALL[name].make).parameters.values()
    defaults = {f"reward.{p.name}": p.default for p in parameters if type(p.default) in PLAIN}
    adjusted, _ = jobs.adjust_recipe(recipes.plain(name), {option: json.dumps(value) for option, value in defaults.items()})
    assert adjusted.options == {option.removeprefix("reward."): value for option, value in defaults.items()}
    for p in parameters:  # a number where a text or an object is expected, else a text
        with pytest.raises(ValueError, match=rf"^reward.{p.name}=.*: expected "):
            jobs.adjust_recipe(recipes.plain(name), {f"reward.{p.name}": "1" if type(p.default) is str else "wrong"})


def test_every_field_of_trls_config_takes_its_default():
    fields = {f.name: f.default for f in dataclasses.fields(GRPOConfig) if type(f.default) in PLAIN[:4]}
    free = {name: value for name, value in fields.items() if name not in {*OWNED, *jobs.RECIPE_NUMBERS}}
    _, rest = jobs.adjust_recipe(recipes.find("correctness"), {name: json.dumps(value) for name, value in free.items()})
    assert len(rest) > 50 and rest == free
    more = {"scale_rewards": "false", "lr_scheduler_type": "linear", "generation_kwargs": '{"num_beams": 3}', "delta": "null"}
    assert jobs.adjust_recipe(recipes.find("correctness"), more)[1]["scale_rewards"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give the directory of the run"),
        (("--out", "x", "--reward", "nonsense"), "Unknown reward or recipe 'nonsense'"),
        (("--out", "x", "--scale", "large"), "choose auto, tiny or paper"),
        (("--out", "x", "--set", "problems"), "give NAME=VALUE"),
        (("--out", "x", "--set", "samples=1"), "samples=1"),
        (("--out", "x", "--set", "epsilon=abc"), "epsilon='abc': expected a number"),
        (("--out", "x", "--reward", "dler", "--set", "reward.foo=1"), "Unknown setting 'reward.foo' of the reward 'dler'"),
        (("--out", "x", "--set", "output_dir=elsewhere"), "Use --out instead"),
        (("--out", "x", "--rank", "4"), "--rank needs --train adapter"),
        (("--out", "x", "--train", "nonsense"), "choose all, adapter"),
        (("--out", "x", "--train", "heads"), "--plan"),
        (("--out", "x", "--train", "vector"), "learning_rate=RATE"),
        (
            ("--out", "x", "--train", "vector", "--set", "learning_rate=1", "--save-dtype", "bfloat16"),
            "--save-dtype is not used with --train vector",
        ),
        (("--out", "x", "--set", "updates=0"), "updates=0: give a whole number"),
        (("--out", "x", "--set", "reward.nonsense=1"), "nonsense"),
        (("--out", "x", "--scale", "paper", "--set", "max_tokens=9000"), "does not fit the context"),
        (("--out", "x", "--reward", "ruler", *SMALL), "target"),
        (("--out", "x", "--reward", "l1_max", *SMALL), "--set reward.budget=N"),
        (("--out", "x", "--reward", "pear", "--training-engine", "trl", *SMALL), "engine='toolkit' records them"),
    ],
)
def test_what_cannot_work_is_one_readable_error(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in " ".join((result.output + str(result.exception)).replace("│", " ").split())
    assert not list(tmp_path.glob("x/checkpoint*"))


def test_a_server_for_evaluations_that_are_switched_off_is_refused_before_anything_connects(tmp_path):
    result = run("--reward", "hapo", "--engine", "http://127.0.0.1:9", "--evaluate-every", 0, "--out", tmp_path / "run")
    assert result.exit_code == 2 and "leave one of them out" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_training_that_evaluates_nothing_compares_batches_and_one_batch_is_one_column():
    batches = pd.DataFrame({"step": [0, 1, 2], "accuracy": 0.5, "think_tokens": [9.0, 8, 7], "tokens": 20.0, "truncated": 0.0})
    for log_, columns, words in (
        (batches, [1, 2], "first and last training batch"),
        (batches[:2], [1], "the only training batch"),
    ):
        done = object.__new__(Trained)  # only its log is read
        object.__setattr__(done, "log", log_)
        assert list(jobs.before_and_after(done).columns) == columns and words in jobs.compared(done)
        page = jobs.training_page(done, recipes.hapo(), "base", judging="")
        assert page.caption.lower().startswith(words) and ("nothing is compared" in page.verdict[0]) == (len(columns) == 1)


@pytest.mark.parametrize(
    ("train", "message"),
    [("vector", "--train vector needs --set learning_rate=RATE"), ("heads", "--train heads: choose all, adapter or vector")],
)
def test_a_board_refuses_a_part_without_a_learning_rate_and_a_part_that_needs_a_plan(train, message, tmp_path):
    result = CliRunner().invoke(cli.app, ["board", "--train", train, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
