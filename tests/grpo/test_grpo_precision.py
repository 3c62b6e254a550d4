"""What is trained is what is saved and judged: fp32 weights whatever the model was loaded in, and every loss measured and said."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from toolkit import board, generate, merging, sites, store, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.grpo import measures, parts, policies, recipes, run, saved
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import Run, Trained, train
from toolkit.grpo.trainer import Extras, Trainer
from toolkit.lm import LM, Condition
from toolkit.rounding import rounding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
JUDGED = Sampling(n=2, max_new_tokens=48)
RATE = 1e-6  # of most recipes


@pytest.fixture(scope="module")
def easy():
    return tasks.arithmetic.load("train", 24, operands=(2, 4))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(recipes.plain("correctness"), problems=2, samples=4, max_tokens=48, learning_rate=RATE)


@pytest.fixture(scope="module")
def half() -> LM:
    """The tiny reasoner in bfloat16."""
    return lms.load("tiny-reasoner", dtype=torch.bfloat16, device="cpu")


@pytest.fixture(scope="module")
def full(half) -> LM:
    """The same weights in fp32."""
    model = deepcopy(half.model).float()
    return replace(half, model=model, layout=sites.find(model))


class Ran(NamedTuple):
    done: Trained
    out: Path
    said: list[str]

    @property
    def about(self) -> dict[str, Any]:
        return store.read_json(self.out / "model" / "grpo.json")


KINDS = {"weights": None, "lora": parts.adapter(8)}


@pytest.fixture(scope="module", params=KINDS)
def ran(half, easy, recipe, tmp_path_factory, request) -> Ran:
    """Two steps of a bfloat16 model, of every weight and of an adapter."""
    out, said = tmp_path_factory.mktemp("run") / request.param, []
    plan = Run(out, steps=2, evaluate_every=1, held_out=tuple(easy[:4]), evaluate=JUDGED, micro_batch=16)
    return Ran(train(half, recipe, easy, plan, extras=Extras(train=KINDS[request.param]), say=said.append), out, said)


def trainer_of(lm: LM, recipe: Recipe, problems, out: Path, part: Any = None) -> Trainer:
    args = run.arguments(lm, recipe, Run(out, steps=3, micro_batch=16))
    return Trainer(replace(lm, model=deepcopy(lm.model)), recipe, problems, args, Extras(train=part))


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def flat(model) -> torch.Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in model.parameters()])


def from_checkpoint(half: LM, out: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint says was learned, merged in fp32."""
    checkpoint = run.last_checkpoint(out)
    if not (checkpoint / "adapter_config.json").exists():
        return parameters(lms.load(checkpoint, device="cpu").model)
    base: Any = deepcopy(half.model).float()
    return parameters(PeftModel.from_pretrained(base, checkpoint).merge_and_unload())


# --- training --------------------------------------------------------------------------------------------------


def test_bf16_moves_the_weights_that_fp32_moves(half, full, easy, recipe, tmp_path):
    """Three steps at the recipes' rate on the same rollouts. Adam's first steps are nearly signs of gradients, and rounding of 2^-8 flips
    the signs of the smallest only."""
    trainers = [trainer_of(lm, recipe, easy, tmp_path / str(lm.model.dtype)) for lm in (full, half)]
    draw, drawn = trainers[0].sampler.draw, []
    trainers[0].sampler.draw = lambda ids: drawn.append(draw(ids)) or drawn[-1]
    trainers[1].sampler.draw = lambda ids: drawn.pop(0)
    start, updates = flat(full.model), []
    for trainer in trainers:
        trainer.train()
        updates.append(flat(trainer.model) - start)
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert torch.cosine_similarity(*updates, dim=0) > 0.98
    assert all((update != 0).float().mean() > 0.99 for update in updates)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_samples_under_the_autocast_it_trains_under(half, full, easy, recipe, tmp_path, kind, monkeypatch):
    seen, plain = [], generate.rollouts

    def watched(*args, **kwargs):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(generate, "rollouts", watched)
    for lm in (half, full):
        trainer = trainer_of(lm, recipe, easy, tmp_path / str(lm.model.dtype), KINDS[kind])
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, inputs)
        gap = (trainer._log_probs - inputs["sampling_per_token_logps"])[inputs["completion_mask"].bool()]
        assert (gap.exp() - 1).abs().mean() < (5e-3 if lm is half else 1e-5)  # one rounding to bfloat16 is up to 2^-9
        assert trainer._metrics["train"]["sampler/gap"][0] == pytest.approx(gap.abs().mean().item())
    assert seen == [torch.bfloat16, None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_learns_is_fp32_and_a_frozen_base_stays_as_it_is(half, easy, recipe, tmp_path, kind):
    trainer = trainer_of(half, recipe, easy, tmp_path, KINDS[kind])
    types = {learns: {w.dtype for w in trainer.model.parameters() if w.requires_grad == learns} for learns in (True, False)}
    assert types == {True: {torch.float32}, False: {torch.bfloat16} if kind == "lora" else set()}


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_a_killed_and_resumed_bf16_run_has_the_weights_of_an_uninterrupted_one(half, easy, recipe, ran, tmp_path):
    kind = ran.out.name
    plan = Run(tmp_path / kind, steps=2, save_every=1, evaluate_every=0, micro_batch=16)
    with pytest.raises(KeyboardInterrupt):
        train(half, recipe, easy, plan, extras=Extras(train=KINDS[kind], callbacks=(Kill(),)))
    assert {t.dtype for t in store.read_tensors(next(plan.out.glob("checkpoint-1/*.safetensors")))[0].values()} == {torch.float32}
    resumed = train(half, recipe, easy, plan, extras=Extras(train=KINDS[kind]), resume=True)
    assert resumed.lm.fingerprint == ran.done.lm.fingerprint


@pytest.mark.parametrize(
    ("dtype", "overrides", "message"),
    [
        (torch.float16, {}, "would be trained in float16, in which gradients underflow"),
        (torch.float32, {"fp16": True}, "would be trained in float16, in which gradients underflow"),
        (torch.bfloat16, {"use_transformers_continuous_batching": True}, "casts the weights to bfloat16 in place"),
    ],
)
def test_a_number_type_that_loses_what_is_learned_is_refused(tiny, easy, recipe, tmp_path, dtype, overrides, message):
    lm = replace(tiny, model=deepcopy(tiny.model).to(dtype))
    with pytest.raises(ValueError, match=message):
        train(lm, recipe, easy, Run(tmp_path, steps=1, evaluate_every=0, overrides=overrides))


# --- saving ----------------------------------------------------------------------------------------------------


def test_what_was_learned_is_in_what_is_saved(half, ran):
    written = parameters(lms.load(ran.out / "model", device="cpu").model)
    learned, start = from_checkpoint(half, ran.out), parameters(half.model)
    change = torch.cat([(learned[name] - start[name].float()).flatten() for name in start])
    kept = torch.cat([(written[name] - start[name].float()).flatten() for name in start])
    assert change.norm() > 0
    assert (kept @ change / change.square().sum()).item() == pytest.approx(1, abs=0.01)
    assert (kept - change).norm() < 0.01 * change.norm()
    assert {t.dtype for t in store.read_tensors(ran.out / "model" / "model.safetensors")[0].values()} == {torch.float32}


def test_what_bfloat16_would_have_lost_is_said_and_kept_with_the_model(half, ran):
    lost = rounding(parameters(half.model), from_checkpoint(half, ran.out), torch.bfloat16)
    facts = ran.about["saved"]
    assert (facts["dtype"], facts["kept"], facts["error"], facts["kl"]) == ("float32", 1.0, 0.0, 0.0)
    assert facts["given"] == pytest.approx({"dtype": "bfloat16", "kept": lost.kept, "error": lost.error})
    assert lost.error > 0.5 and any(str(lost) in text for text in ran.said)


def test_a_finished_model_says_how_it_was_trained(ran):
    about, lora = ran.about, ran.out.name == "lora"
    assert (about["dtype"], about["engine"], about["overrides"], about["steps"]) == ("bfloat16", "toolkit", {}, 2)
    settings = {"part": "adapter", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert about["train"] == (settings if lora else {"part": "all"})


def test_the_saved_adapter_is_what_was_trained(ran):
    if ran.out.name != "lora":
        assert not (ran.out / "adapter").exists()
        return
    kept, _ = store.read_tensors(ran.out / "adapter" / "adapter_model.safetensors")
    last, _ = store.read_tensors(run.last_checkpoint(ran.out) / "adapter_model.safetensors")
    assert kept.keys() == last.keys() and all(torch.equal(kept[name], last[name]) for name in last)
    assert not list((ran.out / "adapter").glob("*.bin"))
    assert store.read_json(ran.out / "adapter" / "made_from.json") == store.read_json(ran.out / "model" / "made_from.json")
    base: Any = lms.load("tiny-reasoner", dtype=torch.bfloat16, device="cpu").model.float()
    whole = PeftModel.from_pretrained(base, ran.out / "adapter").merge_and_unload()
    assert torch.equal(flat(whole), flat(ran.done.lm.model))


def test_the_judged_model_is_the_saved_model(half, easy, ran):
    loaded = lms.load(ran.out / "model", device="cpu")
    assert loaded.fingerprint == ran.done.lm.fingerprint == ran.about["fingerprint"] != half.fingerprint == ran.about["parent"]
    rollouts = generate.rollouts(loaded, easy[:4], replace(JUDGED, details=True), progress=False)
    last = json.loads((ran.out / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["held_out/tokens"] == sum(r.response_tokens for r in rollouts) / len(rollouts)
    assert last["held_out/accuracy"] == sum(r.correct for r in rollouts) / len(rollouts)
    by_hand = measures.kl_to(half, rollouts, JUDGED.temperature)  # to every digit, which no other weights or number type would give
    assert last["held_out/kl"] == by_hand
    table = store.read_table(ran.out / "log.parquet")
    assert table["held_out/kl"].tolist()[-1] == by_hand == ran.done.log["held_out/kl"].tolist()[-1]


def unwritten(ran: Ran, folder: Path) -> Run:
    """A run that was killed after its last checkpoint and before its model was written."""
    shutil.copytree(ran.out, folder, ignore=shutil.ignore_patterns("model", "adapter"))
    return Run(folder, steps=2, evaluate_every=0, micro_batch=16)


def test_a_narrower_saved_model_is_measured_and_returned_as_it_is_on_disk(half, easy, recipe, ran, tmp_path):
    said: list[str] = []
    plan = replace(unwritten(ran, tmp_path / "run"), save_dtype=torch.bfloat16)
    done = train(half, recipe, easy, plan, extras=Extras(train=KINDS[ran.out.name]), resume=True, say=said.append)
    written = lms.load(plan.out / "model", dtype=torch.bfloat16, device="cpu")
    assert done.lm.fingerprint == written.fingerprint and done.lm.model.dtype == torch.bfloat16
    start, learned, kept = flat(half.model), flat(ran.done.lm.model), flat(written.model)
    change = learned - start
    facts = store.read_json(plan.out / "model" / "grpo.json")["saved"]
    assert facts["kept"] == pytest.approx(((kept - start) @ change / change.square().sum()).item(), abs=1e-4)
    assert facts["error"] == pytest.approx(((kept - learned).norm() / change.norm()).item(), rel=1e-4)
    assert facts["kept"] < 0.5 and facts["error"] > 0.5 and facts["kl"] > 0
    assert any("bfloat16 keeps" in text and "Save in float32" in text for text in said)


def test_killed_while_the_model_is_written_the_run_ends_with_the_same_model(half, easy, recipe, ran, tmp_path, monkeypatch):
    plan, extras = unwritten(ran, tmp_path / "run"), Extras(train=KINDS[ran.out.name])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saved, "read_back", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        train(half, recipe, easy, plan, extras=extras, resume=True)
    assert not (plan.out / "model" / "config.json").exists()
    assert train(half, recipe, easy, plan, extras=extras, resume=True).lm.fingerprint == ran.done.lm.fingerprint
    assert lms.load(plan.out / "model", device="cpu").fingerprint == ran.done.lm.fingerprint


def test_a_sweep_trains_and_reads_back_the_same_model(half, recipe, tmp_path):
    plan = TrainingPlan(steps=1, pool=8, held_out=2, evaluate_every=0, tiny=False, micro_batch=16, train=parts.adapter(4))
    once, again = (policies.train_policy(half, replace(recipe, max_tokens=96), 0, plan, tmp_path) for _ in range(2))
    assert once.lm.fingerprint == again.lm.fingerprint != half.fingerprint
    assert again.lm.model.dtype == torch.float32 and again.lm.parent == half.fingerprint
    judged = merging.in_type_of(half, again.lm)
    assert judged.model.dtype == torch.bfloat16 and "; bfloat16 keeps" in judged.name and judged.parent == half.fingerprint
    assert merging.in_type_of(half, judged) is judged


@pytest.mark.parametrize("merged", [False, True])
def test_a_board_judges_a_policy_in_the_number_type_of_its_base(half, full, merged, tmp_path, monkeypatch):
    trained = replace(full, model=deepcopy(full.model))
    policy = SimpleNamespace(lm=trained, policy=Condition(trained))
    monkeypatch.setattr(board.Ground, "train", lambda *args, **kwargs: policy)
    own = {"part": None, "learning_rate": None}
    how = {"recipe": recipes.plain("correctness"), "reward": None, "edit": 0.0, "steer": 0.0, "own": own}
    judged = board.spec._trained(board.Ground(half, board.Sizes(), tmp_path), 0, merged=merged, **how).lm
    assert judged.model.dtype == torch.bfloat16 and "; bfloat16 keeps" in judged.name
