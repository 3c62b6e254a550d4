"""A run's directory belongs to one process, its checkpoints are whole or refused, and its log never loses or mixes steps."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig, SchedulerType

from toolkit import store, tasks
from toolkit.generate import Sampling
from toolkit.grpo import batching, checks, log, losses, policies, recipes, resuming, run, saved
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import Run, train
from toolkit.grpo.trainer import Extras
from toolkit.jobs import grpo as jobs
from toolkit.lm import Condition

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
TINY = {"evaluate_every": 0, "micro_batch": 8}


@pytest.fixture(scope="module")
def easy():
    return tasks.arithmetic.load("train", 24, operands=(2, 4))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(recipes.plain("correctness"), problems=2, samples=4, max_tokens=64)


def test_a_second_process_is_refused_and_the_log_of_the_first_stays(tiny, easy, recipe, tmp_path):
    plan = Run(tmp_path / "run", steps=1, **TINY)
    store.write_rows([{"step": 0}], plan.out / log.LOG)
    with store.locked(plan.out / ".training"), pytest.raises(store.StoreError, match=r"Another process is training into .*: wait"):
        train(tiny, recipe, easy, plan, resume=True)
    assert log.read(plan.out / log.LOG) == [{"step": 0}]
    assert train(tiny, recipe, easy, plan, resume=True).log["step"].tolist() == [0, 1]


def test_old_and_half_removed_checkpoints_go_and_the_newest_complete_ones_stay(tmp_path):
    for step in (9, 10, 11, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 12:  # killed while it was written
            (tmp_path / f"checkpoint-{step}" / resuming.STATE).touch()
    (tmp_path / "checkpoint-9" / "x").touch()  # changed last, as by a process that was killed while removing it
    (tmp_path / "checkpoint-9-backup").mkdir()  # a user's copy
    resuming.remove_old(tmp_path, -1)  # transformers' way to keep all: only the incomplete one goes
    assert len(list(tmp_path.glob("checkpoint-??"))) == 2 and (tmp_path / "checkpoint-9").exists()
    resuming.remove_old(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-9-backup"]
    assert resuming.last_checkpoint(tmp_path).name == "checkpoint-11"


# --- the log -----------------------------------------------------------------------------------------------------


def recorder_of(tmp_path, monkeypatch) -> log.Recorder:
    """A recorder with rows 0 to 2."""
    recorder = log.Recorder([], Sampling(), 1, tmp_path / log.LOG, lambda text: None, lambda problems, sampling: [])
    for step in range(3):
        recorder._write({"step": step, "accuracy": 0.5, "held_out/tokens": 30.0})
    monkeypatch.setattr(log.Recorder, "_evaluate", lambda self, saved: {"held_out/tokens": 20.0})
    return recorder


@pytest.mark.parametrize("dies", ["append_line", "write_rows", "save_table"])
def test_killed_while_the_saved_model_is_written_down_the_log_has_its_last_row(tiny, tmp_path, monkeypatch, dies):
    recorder = recorder_of(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(store, dies, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            recorder.finish(Condition(tiny), 2)
    rows = log.read(tmp_path / log.LOG)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["held_out/tokens"] == 30


def test_the_judgement_of_the_saved_model_goes_into_the_row_of_the_last_step_only(tiny, tmp_path, monkeypatch):
    recorder_of(tmp_path, monkeypatch).finish(Condition(tiny), 2)
    rows = log.read(tmp_path / log.LOG)
    assert (rows[2]["accuracy"], rows[2]["held_out/tokens"]) == (0.5, 20)
    (tmp_path / log.LOG).unlink()
    recorder_of(tmp_path, monkeypatch).finish(Condition(tiny), 3)  # its row was lost
    rows = log.read(tmp_path / log.LOG)
    assert rows[2]["held_out/tokens"] == 30 and {k: v for k, v in rows[3].items() if k != "alarms"} == {
        "step": 3,
        "held_out/tokens": 20,
    }


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_is_said_and_leaves_no_half_checkpoint(tiny, easy, recipe, tmp_path, monkeypatch):
    plain, calls = torch.save, []

    def full(value, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(value, path, *args, **kwargs)

    plan = Run(tmp_path / "run", steps=2, save_every=1, **TINY)
    with monkeypatch.context() as patch, pytest.raises(store.DiskFullError, match=r"Cannot write .*checkpoint-2"):
        patch.setattr(torch, "save", full)
        train(tiny, recipe, easy, plan)
    assert calls and [path.name for path in plan.out.glob("checkpoint-*")] == ["checkpoint-1"]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        file = plan.out / "checkpoint-1" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(store.DamagedFileError, match=r"checkpoint-1.*Remove that checkpoint and resume"):
            train(tiny, recipe, easy, plan, resume=True)
        file.write_bytes(whole)
    assert train(tiny, recipe, easy, plan, resume=True).log["step"].tolist() == [0, 1, 2]


def test_a_run_goes_on_from_a_whole_generation_only(tiny, easy, recipe, tmp_path):
    """Three steps of a recipe that uses each generation twice end in the middle of the second generation."""
    twice, plan = replace(recipe, updates=2), Run(tmp_path / "run", steps=3, save_every=1, evaluate_every=0, micro_batch=4)
    train(tiny, twice, easy, plan)
    before = {path: path.stat().st_mtime_ns for path in plan.out.rglob("*")}
    for steps in (3, 4):
        with pytest.raises(
            ValueError, match=r"checkpoint-3 is in the middle .* used for 2 steps.*Remove that checkpoint and resume"
        ):
            train(tiny, twice, easy, replace(plan, steps=steps), resume=True)
    assert {path: path.stat().st_mtime_ns for path in plan.out.rglob("*")} == before
    store.remove(plan.out / "checkpoint-3")  # as the error says
    longer = train(tiny, twice, easy, replace(plan, steps=4), resume=True)
    straight = train(tiny, twice, easy, replace(plan, out=tmp_path / "straight", steps=4))
    assert longer.lm.fingerprint == straight.lm.fingerprint


@pytest.mark.parametrize(
    ("settings", "updates", "every"), [({}, 2, 4), ({"num_iterations": 3}, 1, 3), ({"num_iterations": 2}, 2, 4)]
)
def test_checkpoints_are_written_between_generations(tiny, recipe, tmp_path, settings, updates, every):
    args = run.arguments(tiny, replace(recipe, updates=updates), Run(tmp_path, save_every=3, overrides=settings, micro_batch=4))
    assert args.save_steps == every


def test_weights_that_are_sharded_over_processes_are_refused_before_training():
    with pytest.raises(ValueError, match=r"FSDP shards the weights over processes.*--zero_stage 2"):
        checks.check_unsharded(SimpleNamespace(is_fsdp_enabled=True))
    checks.check_unsharded(SimpleNamespace(is_fsdp_enabled=False))


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        ({"loss": losses.DRPO()}, {}),
        ({"config": {"loss_type": "bnpo"}}, {}),
        ({}, {"loss_type": "bnpo"}),
        ({"config": {"entropy_coef": 0.1}}, {}),
        ({"config": {"use_adaptive_entropy": True}}, {}),
        ({}, {"top_entropy_quantile": 0.2}),
    ],
)
def test_a_run_whose_loss_depends_on_the_micro_batch_is_resumed_with_the_one_it_began_with_and_no_other(tiny, change, overrides):
    plans = [Run(run.Path("x"), micro_batch=n, overrides=overrides) for n in (8, 16)]
    recipe = replace(recipes.plain("correctness"), **change)
    one, other = (run._training_identity(recipe, plan, Extras()) for plan in plans)
    assert {k for k in one if one[k] != other[k]} == {"micro_batch"}
    kept = [TrainingPlan(micro_batch=n, tiny=False, overrides=tuple(overrides.items())) for n in (8, 16)]
    assert len({policies.basis(tiny, recipe, 0, plan).key for plan in kept}) == 2


def test_the_loss_of_a_mixture_of_experts_depends_on_the_micro_batch_unless_the_balance_has_no_weight():
    experts, dense = Qwen3MoeConfig(router_aux_loss_coef=0.001), Qwen3Config()
    recipe, plan = recipes.plain("correctness"), Run(run.Path("x"))
    for overrides, counts in (({}, True), ({"router_aux_loss_coef": 0.1}, True), ({"router_aux_loss_coef": 0.0}, False)):
        identity = run._training_identity(recipe, replace(plan, overrides=overrides), Extras(), experts)
        assert ("micro_batch" in identity) is counts
    assert "micro_batch" not in run._training_identity(recipe, plan, Extras(), dense)
    assert not batching.depends_on_parts({}, Qwen3MoeConfig(router_aux_loss_coef=0.0))


def test_a_run_whose_loss_does_not_depend_on_the_micro_batch_is_resumed_with_any(tiny):
    plans = [Run(run.Path("x"), micro_batch=n, overrides={"loss_type": "grpo"}) for n in (8, 16)]
    plain = [run._training_identity(recipes.plain("correctness"), plan, Extras()) for plan in plans]
    assert plain[0] == plain[1], "whole steps are the same whatever the micro-batch"
    keys = {policies.basis(tiny, recipes.plain("correctness"), 0, TrainingPlan(micro_batch=n)).key for n in (8, 16)}
    assert len(keys) == 1


class Times:
    """A column that multiplies the length of each response by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, drawn):
        return [self.factor * d.rollout.response_tokens for d in drawn]


def test_a_run_is_resumed_with_the_columns_that_it_began_with_and_no_other():
    recipe, plan = recipes.plain("correctness"), Run(run.Path("x"))

    def identity(**columns) -> dict:
        return run._training_identity(recipe, plan, Extras(columns=columns))

    assert identity(score=Times(1.0)) == identity(score=Times(1.0))
    assert identity() != identity(score=Times(1.0)) != identity(score=Times(-1.0))
    assert identity(score=Times(1.0)) != identity(grade=Times(1.0))
    assert "columns" not in identity(), "a run without columns keeps its identity"


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(tiny, easy, recipe, tmp_path):
    plan = Run(tmp_path / "run", steps=2, **TINY)
    identity = {**run.policy_identity(tiny, recipe, easy), **run._training_identity(recipe, plan, Extras())}
    checkpoint = resuming.checkpoint_of(plan.out, 4)
    checkpoint.mkdir(parents=True)
    store.write_json({"global_step": 4}, checkpoint / "trainer_state.json")
    store.write_json({"identity": identity, "reward": {}}, checkpoint / resuming.STATE)
    with pytest.raises(ValueError, match=r"checkpoint-4 has 4 steps, and the run is to end after 2: give at least 4 steps"):
        train(tiny, recipe, easy, plan, resume=True)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, True),
        ({"lr_scheduler_type": "linear"}, True),
        ({"lr_scheduler_type": SchedulerType.COSINE}, True),
    ],
)
def test_the_number_of_steps_may_change_unless_the_learning_rate_depends_on_it(settings, counts):
    plain = recipes.plain("correctness")
    for recipe, overrides in ((plain, settings), (replace(plain, config=settings), {})):
        one, other = (run._training_identity(recipe, Run(run.Path("x"), n, overrides=overrides), Extras()) for n in (4, 8))
        assert {k for k in one if one[k] != other[k]} == ({"steps"} if counts else set())


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", run.OWNED)
def test_a_setting_that_follows_from_the_run_is_refused_with_what_sets_it(tiny, recipe, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} cannot be set for TRL alone: it follows from the run. Use "):
        run.arguments(tiny, recipe, Run(tmp_path, overrides={name: 1}))
    with pytest.raises(ValueError, match=f"{name} cannot be set"):
        jobs.adjust_recipe(recipe, {name: "1"})


def test_two_models_are_compared_at_the_last_positions_of_each_prompt(tiny):
    ids = tiny.prompt_ids([{"role": "user", "content": "+".join("123456789" * 5)}])
    (kept,) = saved._log_probs(tiny, [ids])
    with torch.no_grad():
        whole = tiny.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(ids) > len(kept) == 16
    torch.testing.assert_close(kept, whole[-16:])


# --- curves of a sweep -------------------------------------------------------------------------------------------


def test_a_curve_that_is_marked_stale_is_made_again(tiny, tmp_path):
    plan, own = TrainingPlan(), recipes.find("hapo").scaled()
    about = {
        "kind": "about",
        "recipe": json.loads(json.dumps(own, default=store.jsonable)),
        "seed": 0,
        "fingerprint": tiny.fingerprint,
    }
    rest = [
        {"kind": "step", "step": 0},
        {"kind": "test", "problems": "all", "condition": "base", "metric": "accuracy", "mean": 0.5, "low": 0.4, "high": 0.6},
        {"kind": "outcomes", "problem_id": ["p"], "accuracy": [0.5], "think_tokens": [9.0]},
    ]
    file = tmp_path / "curves" / "hapo-seed0.jsonl"
    basis = jobs._curve_basis(tiny, recipes.find("hapo"), 0, plan, 200)
    for more, kept in (({}, True), ({"stale": "its formula changed"}, False)):
        file.parent.mkdir(exist_ok=True)
        store.write_rows([about | more, *rest], file)
        assert jobs._is_current(file, basis, tiny, own, 0, tmp_path / "stale", lambda text: None) is kept and file.exists() is kept
    assert len(list((tmp_path / "stale").iterdir())) == 1
