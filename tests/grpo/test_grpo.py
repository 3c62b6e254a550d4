"""GRPO on TRL: the gradient is TRL's own, whatever the micro-batch; runs resume to the bit; what cannot work is refused first."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from toolkit import generate, rewards, store, tasks
from toolkit import lm as lms
from toolkit.generate import Sampling
from toolkit.grpo import draws, judge, log, losses, recipes, resuming, run
from toolkit.grpo import trainer as trainer_module
from toolkit.grpo.recipes import Recipe
from toolkit.grpo.run import Run, train
from toolkit.grpo.trainer import Extras, NonFiniteError, Trainer
from toolkit.rewards import MissingColumnError, RewardValues, groups
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.laser import LaserD
from toolkit.rewards.laser_targets import TargetSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="session")
def easy():
    """Short chains that the tiny reasoner gets right about half the time or more."""
    return tasks.arithmetic.load("train", 24, operands=(2, 4))


@pytest.fixture
def small() -> Recipe:
    """Plain GRPO with correctness: 2 problems x 8 samples."""
    return replace(recipes.plain("correctness"), problems=2, samples=8, max_tokens=64, learning_rate=1e-3)


def trainer_of(tiny, recipe, problems, out: Path, extras=Extras(), **plan) -> Trainer:
    plan = Run(out, **{"steps": 2, "micro_batch": 16, **plan})
    args = run.arguments(tiny, recipe, plan)
    return Trainer(replace(tiny, model=run.deepcopy(tiny.model)), recipe, problems, args, extras)


def gradient(trainer: GRPOTrainer) -> torch.Tensor:
    """The gradient of the first optimizer step, flat, before clipping."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batches = iter(trainer.get_train_dataloader())
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(batches))).backward()
        trainer._step += 1
    return torch.cat([w.grad.flatten() for w in trainer.model.parameters()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


# --- the same mathematics as TRL ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_gradient_equals_trls_own_on_identical_rollouts(tiny, easy, small, tmp_path, loss_type):
    small = replace(small, config={"loss_type": loss_type})
    ours = trainer_of(tiny, small, easy, tmp_path, micro_batch=4)
    wanted = gradient(ours)
    drawn = {(d.rollout.problem_id, d.rollout.sample): d.rollout for d in ours.newest.drawn}

    def replay(prompts, trainer):
        found = [drawn[p.id, s] for p in asked for s in range(8)]
        return {
            "prompt_ids": [list(r.token_ids[: r.prompt_len]) for r in found],
            "completion_ids": [list(r.token_ids[r.prompt_len :]) for r in found],
            "logprobs": None,
            "right": [float(r.correct) for r in found],
        }

    asked = [ours.problems[i] for i in ours.train_dataset["problem_id"][:2]]
    args = run.arguments(tiny, small, Run(tmp_path, steps=2, micro_batch=4))
    args.shuffle_dataset = False
    stock = GRPOTrainer(
        model=run.deepcopy(tiny.model),
        reward_funcs=lambda right, **_: right,
        args=args,
        train_dataset=ours.train_dataset,
        processing_class=tiny.tokenizer,
        rollout_func=replay,
    )
    found = gradient(stock)
    assert wanted.abs().max() > 0
    assert cosine(found, wanted) > 0.9999
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=1e-4)


def test_own_advantages_equal_trls_where_they_are_the_same_formula(tiny, easy, small, tmp_path):
    theirs = gradient(trainer_of(tiny, small, easy, tmp_path))
    ours = gradient(trainer_of(tiny, replace(small, advantage="grpo"), easy, tmp_path))
    assert cosine(theirs, ours) > 0.9999 and ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "penalty", "drpo"])
def test_accumulating_eight_micro_batches_equals_one(tiny, easy, small, tmp_path, kind):
    if kind == "drpo":
        small = replace(small, problems=8, samples=2, loss=recipes.drpo().scaled().loss)
    if kind == "penalty":  # no row is left out
        small = replace(small, config={"beta": 0.01})
    one, eight = (gradient(trainer_of(tiny, small, easy, tmp_path, micro_batch=n)) for n in (16, 2))
    assert cosine(one, eight) > 0.9999
    assert eight.norm().item() == pytest.approx(one.norm().item(), rel=1e-4)


PER_PART = {"loss_type": "bnpo"}, {"entropy_coef": 1.0}, {"use_adaptive_entropy": True}, {"top_entropy_quantile": 0.2}


@pytest.mark.parametrize("config", PER_PART, ids=lambda config: next(iter(config)))
def test_rows_are_not_sorted_by_length_if_the_loss_averages_over_the_tokens_of_a_micro_batch(tiny, easy, small, tmp_path, config):
    in_order = [list(range(i, i + 2)) for i in range(0, 16, 2)]
    for settings, kept in ((config, True), ({"beta": 0.01}, False)):  # with a KL penalty no row is left out
        trainer = trainer_of(tiny, replace(small, config=settings), easy, tmp_path, micro_batch=2)
        trainer.model.train()
        trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert ([part["row"].tolist() for part in trainer._buffered_inputs] == in_order) is kept
        lengths = [part["completion_mask"].shape[1] for part in trainer._buffered_inputs]
        assert (lengths == sorted(lengths)) is not kept, "micro-batches are trimmed, but not sorted"


def test_a_mixture_of_experts_keeps_the_order_of_its_rows_and_its_balance_is_not_left_out(tiny, easy, small, tmp_path, monkeypatch):
    """The loss for balance between experts is not linear in the rows. An emulated mixture: only its config differs."""
    monkeypatch.setattr(tiny.model.config, "output_router_logits", False, raising=False)
    monkeypatch.setattr(tiny.model.config, "router_aux_loss_coef", 0.001, raising=False)
    with pytest.raises(ValueError, match=r"mixture of experts.*leaves out: set router_aux_loss_coef to 0"):
        trainer_of(tiny, replace(small, loss=losses.DRPO()), easy, tmp_path)
    trainer = trainer_of(tiny, small, easy, tmp_path, micro_batch=2)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert trainer.aux_loss_enabled and [row for part in trainer._buffered_inputs for row in part["row"].tolist()] == [*range(16)]


def test_the_policy_that_samples_is_the_policy_that_learns(tiny, easy, small, tmp_path):
    """On-policy, the ratio of new to sampling probability is 1 for every token; after the weights move it no longer is."""
    trainer = trainer_of(tiny, small, easy, tmp_path)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    def ratio() -> torch.Tensor:
        with torch.no_grad():
            new = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])[0]
        return (new - inputs["sampling_per_token_logps"]).exp()[inputs["completion_mask"].bool()]

    assert (ratio() - 1).abs().max() < 1e-3
    with torch.no_grad():
        for w in trainer.model.parameters():
            w.mul_(1.01)
    assert (ratio() - 1).abs().max() > 1e-2


@pytest.mark.parametrize("loss", [None, recipes.DRPO()], ids=["plain", "drpo"])
def test_several_updates_share_a_generation_and_use_every_row_once(tiny, easy, small, tmp_path, loss):
    recipe = replace(small, problems=4, samples=4, updates=2, loss=loss)
    trainer = trainer_of(tiny, recipe, easy, tmp_path, micro_batch=4, steps=2)
    trainer.model.train()
    batches, rows = iter(trainer.get_train_dataloader()), []
    for _ in range(4):
        rows.append(trainer._prepare_inputs(next(batches))["row"].tolist())
        trainer._step += 1
    assert sorted(r for part in rows for r in part) == list(range(16))
    assert "old_per_token_logps" in trainer._buffered_inputs[0]
    if loss:
        assert all(len({r // 4 for r in part}) == 1 for part in rows), "a micro-batch holds whole groups"


@pytest.mark.parametrize("reward", ["correctness", "grpo_lambda"])  # the second ranks the groups of a batch
def test_dynamic_sampling_fills_the_batch_with_groups_that_vary(tiny, easy, small, tmp_path, reward):
    recipe = replace(small, reward=reward, problems=4, samples=4, dynamic=draws.Dynamic(rounds=6, most=6))
    trainer = trainer_of(tiny, recipe, easy, tmp_path)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    drawn = trainer.newest.drawn
    groups = [drawn[i : i + 4] for i in range(0, 16, 4)]
    assert all(len({d.rollout.problem_id for d in g}) == 1 for g in groups)
    assert all(draws.Dynamic.keeps(paid) for paid in trainer.newest.scored.values.reshape(4, 4))
    assert trainer.sampler.metrics["dynamic/filled"] == 0 and trainer.sampler.metrics["dynamic/groups_drawn"] > 4


class ByLength(rewards.Correctness):
    """Pays the tokens of groups that are all right, and nothing to others; counts the batches it learned from."""

    needs = frozenset({"correct", "tokens"})

    def __init__(self) -> None:
        self.learned = 0

    def __call__(self, batch):
        self.learned += batch.split == "train"
        return RewardValues.sum(length=batch["tokens"] * (groups.mean(batch["correct"], batch.groups) == 1))


def test_dynamic_sampling_looks_at_the_reward_trained_on_which_learns_from_the_batch_alone(tiny, easy, small, tmp_path):
    recipe, reward = replace(small, problems=2, samples=4, dynamic=draws.Dynamic(rounds=9, most=12)), ByLength()
    trainer = trainer_of(tiny, recipe, easy, tmp_path, Extras(reward=reward), micro_batch=8)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert trainer.sampler.metrics["dynamic/filled"] == 0 and reward.learned == 1
    assert all(d.rollout.correct for d in trainer.newest.drawn), "by correctness every one of these groups would be dropped"
    assert all(len(set(paid)) > 1 for paid in trainer.newest.scored.values.reshape(2, 4).tolist())


def test_dlers_dual_clip_is_a_naive_loop_over_tokens_and_bounds_what_a_negative_advantage_costs(tiny, easy, small, tmp_path):
    config = recipes.dler().config
    clips = {k: config[k] for k in ("epsilon", "epsilon_high", "delta", "loss_type")}
    trainer = trainer_of(tiny, replace(small, config=clips), easy, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = inputs["completion_mask"]
    whole = torch.cat([inputs["prompt_mask"], mask], dim=1)
    with torch.no_grad():
        new = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, mask.shape[1])[0]
    random = torch.Generator().manual_seed(0)
    inputs["old_per_token_logps"] = new - torch.empty(new.shape).uniform_(-4, 4, generator=random)
    inputs["advantages"] = torch.randn(len(ids), generator=random)
    inputs.pop("share", None)
    ratios = (new - inputs["old_per_token_logps"]).exp()

    def term(r: float, a: float) -> float:
        """Verl's, with c = 10: the clipped surrogate, and for a negative advantage no more than ``c |A|``."""
        clipped = max(-a * r, -a * min(max(r, 1 - 0.2), 1 + 0.28))
        return min(clipped, -a * 10) if a < 0 else clipped

    terms = [
        term(ratios[i, t].item(), a)
        for i, a in enumerate(inputs["advantages"].tolist())
        for t in range(mask.shape[1])
        if mask[i, t]
    ]
    inputs["num_items_in_batch"] = mask.sum()
    found = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert ((ratios > 10) & (inputs["advantages"] < 0)[:, None] & mask.bool()).any(), "no ratio was beyond the bound"


def test_laser_d_is_shown_its_monitoring_set_before_the_first_generation_and_every_n_generations(tiny, easy, small, tmp_path):
    targets = TargetSettings(base=16, step=8, longest=64, every=2, samples=4, problems=5)
    recipe = replace(small, reward="laser_d", options={"targets": targets}, updates=2)
    shown: list[tuple[int, list[str], list[int]]] = []

    class Watched(LaserD):
        def monitor(self, batch):
            shown.append((batch.step, sorted(set(batch["problem_id"])), np.bincount(batch.groups).tolist()))
            super().monitor(batch)

    reward = Watched(targets=targets)
    plan = Run(tmp_path / "run", steps=10, evaluate_every=0, save_every=4)
    train(tiny, recipe, easy, plan, extras=Extras(reward=reward))
    assert [step for step, _, _ in shown] == [0, 4, 8], "five generations of two updates each"
    assert len(shown[0][1]) == 5 and all(ids == shown[0][1] for _, ids, _ in shown) and shown[0][2] == [4] * 5
    halves = replace(plan, out=tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train(tiny, recipe, easy, halves, extras=Extras(reward=LaserD(targets=targets), callbacks=(Kill(6),)))
    train(tiny, recipe, easy, halves, extras=Extras(reward=LaserD(targets=targets)), resume=True)
    states = [resuming.state_of(resuming.checkpoint_of(out, 10))["reward"] for out in (plan.out, halves.out)]
    assert states[0] == states[1] != LaserD(targets=targets).state_dict()


def test_modes_ask_half_of_each_group_for_each_and_the_reward_sees_which(tiny, easy, small, tmp_path):
    trainer = trainer_of(tiny, replace(small, modes=draws.Modes(" a", " b")), easy, tmp_path)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch = trainer.newest.batch
    assert batch["mode"].tolist() == (["long"] * 4 + ["short"] * 4) * 2
    assert {d.prompt[-1]["content"][-2:] for d in trainer.newest.drawn} == {" a", " b"}
    keys = [(d.rollout.problem_id, d.rollout.sample) for d in trainer.newest.drawn]
    assert len(set(keys)) == 16 and batch.groups.tolist() == [0] * 8 + [1] * 8


def test_the_switch_loss_of_micro_batches_adds_up_and_moves_the_first_token(tiny, easy, small, tmp_path):
    switch = losses.ModeSwitch("<think>", "7", assumed_margin=50.0, assumed_weight=1.0)
    found = []
    for n in (16, 4):
        plain = replace(small, modes=draws.Modes(" a", " b"))
        with_switch, without = (
            gradient(trainer_of(tiny, r, easy, tmp_path, micro_batch=n)) for r in (replace(plain, switch=switch), plain)
        )
        found.append(with_switch - without)
    assert found[0].norm() > 0.1 and cosine(*found) > 0.9999
    assert found[0].norm().item() == pytest.approx(found[1].norm().item(), rel=1e-3)


@pytest.mark.parametrize(("long", "short"), [("<think>\nLet", "<think>\n\n</think>"), ("7", "")])
def test_two_modes_that_begin_with_the_same_token_are_refused_since_the_loss_has_no_gradient(
    tiny, easy, small, tmp_path, long, short
):
    recipe = replace(small, modes=draws.Modes(" a", " b"), switch=losses.ModeSwitch(long, short))
    with pytest.raises(ValueError, match="must differ, or the loss has no gradient"):
        trainer_of(tiny, recipe, easy, tmp_path)


def test_a_curriculums_budget_is_in_the_prompt_and_in_the_batch(tiny, easy, small, tmp_path):
    recipe = replace(small, curriculum=draws.Curriculum(40, 0.5, every=1, text=" {budget}"))
    trainer = trainer_of(tiny, recipe, easy, tmp_path)
    trainer.model.train()
    trainer.state.global_step = 1
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert set(trainer.newest.batch["budget"]) == {20}
    assert all(d.prompt[-1]["content"].endswith(" 20") for d in trainer.newest.drawn)
    assert tiny.text(trainer._buffered_inputs[0]["prompt_ids"][0].tolist()).count(" 20") == 1


def test_log_probability_without_the_question_equals_a_teacher_forced_pass(tiny, easy, small, tmp_path):
    class Needy(rewards.Correctness):
        needs = frozenset({"correct", "logprob_without"})

    trainer = trainer_of(tiny, small, easy, tmp_path, Extras(reward=Needy()))
    d = trainer.sampler.draw([easy[0].id] * 8)[0]
    response = list(d.rollout.token_ids[d.rollout.prompt_len :])
    prompt = tiny.prompt_ids([{"role": "user", "content": ""}])
    logits = tiny.model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    wanted = [logits[len(prompt) + i - 1, t].item() for i, t in enumerate(response)]
    assert d.logprob_without == pytest.approx(np.mean(wanted), abs=1e-4)
    assert d.logprob_without < np.mean(d.rollout.logprobs)


def test_a_model_with_tags_of_its_own_is_paid_for_what_follows_them(tiny, easy, small, tmp_path):
    """With ``=`` for a closing tag, ``</think>`` is part of the answer."""
    own = replace(tiny, tags=lms.ThinkTags("<think>", "="))
    trainer = trainer_of(own, small, easy, tmp_path)
    drawn = trainer.sampler.draw([easy[0].id] * 8)
    batch = trainer.batch_of(drawn, drawn, 0, "eval")
    closed = [(d.rollout.text, text) for d, text in zip(drawn, batch["answer_text"], strict=True) if d.rollout.closed]
    assert closed and all(response.rpartition("=")[2].startswith(text) for response, text in closed)
    assert any("</think>" in text for _, text in closed)


def test_trls_own_generation_feeds_the_same_reward(tiny, easy, small, tmp_path):
    trainer = trainer_of(tiny, small, easy, tmp_path, Extras(engine="trl"))
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch = trainer.newest.batch
    assert batch.groups.tolist() == [0] * 8 + [1] * 8 and set(batch["finish"]) <= {"stop", "length"}
    assert 0 < batch["correct"].mean() <= 1 and (batch["think_tokens"] < batch["tokens"]).all()


# --- training from start to end -------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Stops a run the hard way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Counting(rewards.Correctness):
    """A stateful reward: what it pays depends on how often it was asked in training."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, batch):
        paid = super().__call__(batch).values * (1 + self.asked % 2)
        self.asked += batch.split == "train"
        return RewardValues.sum(correctness=paid)

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


TIMINGS = ("step_time", "seconds/")


def weights(lm) -> torch.Tensor:
    return torch.cat([w.flatten() for w in lm.model.state_dict().values()])


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(tiny, easy, small, tmp_path):
    plan = Run(
        tmp_path / "whole",
        steps=5,
        save_every=2,
        evaluate_every=2,
        held_out=tuple(easy[:4]),
        evaluate=Sampling(n=2, max_new_tokens=64),
    )
    whole = train(tiny, small, easy, plan, extras=Extras(reward=Counting()))
    halves = replace(plan, out=tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train(tiny, small, easy, halves, extras=Extras(reward=Counting(), callbacks=(Kill(3),)))
    assert [row["step"] for row in log.read(halves.out / log.LOG)] == [0, 1, 2, 3]
    with (halves.out / log.LOG).open("a") as stream:
        stream.write('{"step": 4, "lo')  # a line torn by the kill
    resumed = train(tiny, small, easy, halves, extras=Extras(reward=Counting()), resume=True)
    assert torch.equal(weights(whole.lm), weights(resumed.lm))
    assert not torch.equal(weights(whole.lm), weights(tiny))
    assert set(resumed.log) == set(whole.log) and len(resumed.log) == len(whole.log) == 6
    differing = {name for name in whole.log if not resumed.log[name].equals(whole.log[name].astype(resumed.log[name].dtype))}
    assert all(name.startswith(TIMINGS) for name in differing), "a resumed run may differ in how long it took, and in nothing else"
    tables = [store.read_table(out / log.TABLE) for out in (plan.out, halves.out)]
    assert all(name.startswith(TIMINGS) for name in tables[0] if not tables[1][name].equals(tables[0][name]))


def test_training_does_not_change_the_reward_that_it_is_given_so_that_it_can_be_used_again(tiny, easy, small, tmp_path):
    plan, extras = Run(tmp_path / "run", steps=1, evaluate_every=0), Extras(reward=HAPO())
    before = run._training_identity(small, plan, extras)
    train(tiny, replace(small, problems=1, samples=4), easy[:1], plan, extras=extras)
    assert resuming.state_of(plan.out / "checkpoint-1")["reward"]["history"], "training filled the history of its copy"
    assert extras.reward.history == {} and run._training_identity(small, plan, extras) == before


def test_a_reward_with_a_state_that_cannot_be_copied_is_refused_before_training(tiny, easy, small, tmp_path):
    reward = Counting()
    reward.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"'correctness' has a state.*cannot be copied.*__deepcopy__"):
        train(tiny, small, easy, Run(tmp_path / "run", steps=1, evaluate_every=0), extras=Extras(reward=reward))


def test_a_checkpoint_is_an_ordinary_model_and_the_given_one_is_untouched(tiny, easy, small, tmp_path):
    before = weights(tiny).clone()
    done = train(tiny, small, easy, Run(tmp_path / "run", steps=1, evaluate_every=0))
    assert torch.equal(weights(tiny), before) and "forward" not in vars(done.lm.model)
    loaded = lms.load(tmp_path / "run" / "checkpoint-1", device="cpu")
    assert torch.equal(weights(loaded), weights(done.lm)) and loaded.tags == tiny.tags
    assert done.lm.parent == tiny.fingerprint != done.lm.fingerprint == loaded.fingerprint


def test_lora_trains_an_adapter_that_the_result_has_merged(tiny, easy, small, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    done = train(tiny, small, easy, Run(tmp_path / "run", steps=2, evaluate_every=0), extras=Extras(train=lora))
    changed = {k for k, v in done.lm.model.state_dict().items() if not torch.equal(v, tiny.model.state_dict()[k])}
    assert changed and all("q_proj" in k or "o_proj" in k for k in changed)


def test_kl_to_the_given_model_is_zero_at_first_and_grows(tiny, easy, small, tmp_path):
    done = train(tiny, replace(small, config={"beta": 0.01}), easy, Run(tmp_path / "run", steps=3, evaluate_every=0))
    assert done.log["kl"][1] == pytest.approx(0, abs=1e-6) and done.log["kl"][3] > 1e-5


def test_kl_to_the_given_model_is_logged_on_held_out_problems_whatever_the_loss(tiny, easy, small, tmp_path):
    plan = Run(tmp_path / "run", steps=2, evaluate_every=1, held_out=tuple(easy[:4]), evaluate=Sampling(n=4, max_new_tokens=64))
    found = train(tiny, small, easy, plan)
    kl = found.log["held_out/kl"]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[2] > 1e-4
    # By hand: one forward pass a response through either model.
    rollouts = generate.rollouts(found.lm, easy[:4], Sampling(n=4, max_new_tokens=64), progress=False)

    def scored(lm, r):
        with torch.no_grad():
            logits = lm.model(torch.tensor([r.token_ids])).logits[0].log_softmax(-1)
        return logits[r.prompt_len - 1 : -1].gather(1, torch.tensor(r.token_ids[r.prompt_len :])[:, None])[:, 0]

    by_hand = torch.cat([scored(found.lm, r) - scored(tiny, r) for r in rollouts]).mean().item()
    assert kl[2] == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_drpos_kl_is_logged_zero_on_policy_and_not_after_an_update(tiny, easy, small, tmp_path):
    recipe = replace(small, problems=4, samples=4, updates=2, loss=losses.DRPO())
    found = train(tiny, recipe, easy, Run(tmp_path / "run", steps=2, evaluate_every=0)).log
    assert found["kl"][1] == pytest.approx(0, abs=1e-6) and abs(found["kl"][2]) > 1e-5


def test_every_step_is_logged_with_what_the_reward_was_made_of(tiny, easy, small, tmp_path):
    plan = Run(tmp_path / "run", steps=2, evaluate_every=1, held_out=tuple(easy[:3]), evaluate=Sampling(n=2, max_new_tokens=64))
    found = train(tiny, small, easy, plan).log
    assert found["step"].tolist() == [0, 1, 2]
    wanted = [
        "reward",
        "zero_std",
        "truncated",
        "tokens/correct",
        "entropy/think",
        "grad_norm",
        "reward_std",
        "component/correctness",
        "component/correctness/std",
        "seconds/rollouts",
    ]
    assert found.loc[1:, wanted].notna().all().all()
    assert found["held_out/accuracy"].notna().all()
    table = store.read_table(tmp_path / "run" / "log.parquet")
    assert table["step"].tolist() == [0, 1, 2] and table["reward"].tolist()[1:] == found["reward"].tolist()[1:]


# --- what stops a run -----------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Breaks one weight after a step."""

    def on_step_end(self, args, state, control, model=None, **_):
        with torch.no_grad():
            model.get_output_embeddings().weight[50, 0] = math.nan


class Broken(rewards.Correctness):
    def __call__(self, batch):
        values = super().__call__(batch).values
        values[5] = math.nan
        return RewardValues.sum(correctness=values)


class Steep(torch.autograd.Function):
    """Passes a value on and makes its gradient infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_a_nan_reward_stops_the_run_with_step_and_sample(tiny, easy, small, tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"reward of step 0 is nan for problem 'arithmetic-.*', row 5 of 16.*'correctness': nan"
    ):
        train(tiny, small, easy, Run(tmp_path / "run", steps=2, evaluate_every=0), extras=Extras(reward=Broken()))


def test_a_nan_loss_stops_the_run_with_step_and_sample(tiny, easy, small, tmp_path, monkeypatch):
    trainer, plain = trainer_of(tiny, small, easy, tmp_path, micro_batch=4), Trainer._get_per_token_logps_and_entropies

    def holed(self, model, ids, *args, **named):
        logps, *rest = plain(self, model, ids, *args, **named)
        bad = ids.sum(dim=1) == sum(self.newest.drawn[5].rollout.token_ids)  # padding is token 0
        return logps.masked_fill(bad[:, None], math.nan), *rest

    monkeypatch.setattr(Trainer, "_get_per_token_logps_and_entropies", holed)
    with pytest.raises(NonFiniteError, match=r"loss of step 0 is nan, from problem 'arithmetic-.*', sample") as caught:
        trainer.train()
    assert repr(trainer.newest.drawn[5].rollout.problem_id) in str(caught.value)


def test_broken_weights_stop_the_run_before_they_sample(tiny, easy, small, tmp_path):
    with pytest.raises(ValueError, match=r"After step 1 weight .* holds NaN or infinity: lower the learning rate"):
        train(tiny, small, easy, Run(tmp_path / "run", steps=3, evaluate_every=0), extras=Extras(callbacks=(Poison(),)))


def test_an_infinite_gradient_stops_the_run_before_any_weight_moves(tiny, easy, small, tmp_path, monkeypatch):
    trainer = trainer_of(tiny, small, easy, tmp_path)
    plain = Trainer._get_per_token_logps_and_entropies

    def steep(self, *args, **named):
        logps, *rest = plain(self, *args, **named)
        return Steep.apply(logps), *rest

    monkeypatch.setattr(Trainer, "_get_per_token_logps_and_entropies", steep)
    before = [w.clone() for w in trainer.model.parameters()]
    with pytest.raises(NonFiniteError, match=r"gradient of step 0 has norm .*, from problem"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "plan", "message"),
    [
        ({"max_tokens": 5000}, {}, r"The longest prompt \('arithmetic-.*'\) has .* max_completion_length=5000 .* context of 4096"),
        ({"problems": 25}, {"micro_batch": 200}, "24 training problems, but one step uses 25"),
        ({"max_tokens": 2}, {}, "None of 64 responses to 8 training problems is correct: there is nothing to reinforce"),
        ({}, {"micro_batch": 5}, "cannot be split into micro-batches of 5"),
        ({"loss": recipes.DRPO()}, {"micro_batch": 4}, "needs whole groups"),
        ({"loss": recipes.DRPO(), "config": {"beta": 0.1}}, {"micro_batch": 8}, "has its own KL term"),
        ({"modes": draws.Modes()}, {"engine": "trl"}, 'engine="trl" cannot do'),
        ({}, {"steps": 0}, "max_steps"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tiny, easy, small, tmp_path, change, plan, message):
    extras = Extras(engine=plan.pop("engine", "toolkit"))
    plan = Run(tmp_path / "run", **{"steps": 1, "evaluate_every": 0, **plan})
    with pytest.raises(ValueError, match=message):
        train(tiny, replace(small, **change), easy, plan, extras=extras)


def test_a_reward_without_its_column_is_refused_and_a_supplied_column_reaches_it(tiny, easy, small, tmp_path):
    class Needy(rewards.Correctness):
        needs = frozenset({"correct", "politeness"})

        def __call__(self, batch):
            return RewardValues.sum(politeness=batch["politeness"])

    plan = Run(tmp_path / "run", steps=1, evaluate_every=0)
    with pytest.raises(MissingColumnError, match="politeness"):
        train(tiny, small, easy, plan, extras=Extras(reward=Needy()))
    supplied = Extras(reward=Needy(), columns={"politeness": lambda drawn: [1 / d.rollout.response_tokens for d in drawn]})
    assert train(tiny, small, easy, plan, extras=supplied).log["component/politeness"][1] > 0


class Rising(rewards.Correctness):
    """Pays the place of a response among those to its problem, or the same for all; reads no correctness."""

    needs = frozenset({"tokens"})

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, batch):
        return RewardValues.sum(place=self.factor * (np.arange(len(batch)) % 8))


class RisingAndCorrect(Rising):
    needs = frozenset({"correct", "tokens"})


def test_a_reward_that_varies_is_learned_from_though_no_response_is_correct(tiny, easy, small, tmp_path):
    """Problems of an open question have no right answer. With 2 tokens no response is correct."""
    trainer = trainer_of(tiny, replace(small, max_tokens=2), easy, tmp_path, Extras(reward=Rising(1.0)))
    said: list[str] = []
    run.probe(trainer, said.append)
    assert said == []
    trainer.reward = RisingAndCorrect(1.0)
    run.probe(trainer, said.append)
    assert said == ["none of 64 responses of a first probe is correct: the reward correctness only tells wrong ones apart"]
    for reward, message in (
        (Rising(0.0), "'correctness' gives the 64 responses to 8"),
        (RisingAndCorrect(0.0), "None of 64 responses"),
    ):
        trainer.reward = reward
        with pytest.raises(ValueError, match=rf"{message}.*nothing to reinforce"):
            run.probe(trainer, said.append)
    trainer.reward, trainer.recipe = Rising(1.0), replace(trainer.recipe, loss=losses.DRPO())
    with pytest.raises(ValueError, match=r"None of 64 responses .* is correct: there is nothing to reinforce"):
        run.probe(trainer, said.append)


def test_the_probe_of_two_processes_gets_the_columns_of_both(tiny, easy, small, tmp_path, monkeypatch):
    """The second process is emulated: it has the same responses as the first. Values that are tuples stay tuples."""

    class Needy(rewards.Correctness):
        needs = frozenset({"correct", "nuggets"})

    seen = []
    extras = Extras(reward=Needy(), columns={"nuggets": lambda drawn: seen.append(len(drawn)) or [("a", "b")] * len(drawn)})
    trainer = trainer_of(tiny, small, easy, tmp_path, extras)
    for module in (run, trainer_module):
        monkeypatch.setattr(module, "gather_object", lambda values: [*values, *values])
    batches, batch_of = [], trainer.batch_of
    monkeypatch.setattr(trainer, "batch_of", lambda *args: batches.append(batch_of(*args)) or batches[-1])
    run.probe(trainer, lambda text: None)
    assert seen == [64] and len(batches[0]) == 128 and batches[0]["nuggets"].tolist() == [("a", "b")] * 128


def test_crf_trains_with_a_judge_of_its_own_that_a_resumed_run_keeps(tiny, easy, small, tmp_path):
    recipe = replace(small, reward="crf", samples=4)
    whole = train(tiny, recipe, easy, Run(tmp_path / "whole", steps=2, evaluate_every=0))
    assert (whole.log["component/conciseness"][1:] > 0).all()
    judge = (tmp_path / "whole" / "conciseness.json").read_text()
    train(tiny, recipe, easy, Run(tmp_path / "run", steps=1, save_every=1, evaluate_every=0))
    again = train(tiny, recipe, easy, Run(tmp_path / "run", steps=2, save_every=1, evaluate_every=0), resume=True)
    assert (tmp_path / "run" / "conciseness.json").read_text() == judge
    assert again.log["reward"].tolist()[1:] == whole.log["reward"].tolist()[1:]


@pytest.mark.parametrize("resume", [False, True])
def test_the_judge_of_a_run_that_ended_before_its_first_checkpoint_is_not_used_again(tiny, easy, small, tmp_path, resume):
    """A run with another seed stopped after its judge was trained. No checkpoint says whose judge it is."""
    recipe = replace(small, reward="crf", samples=4)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, recipe, easy, Run(tmp_path / "run", 1, seed=1, evaluate_every=0), extras=Extras(callbacks=(Kill(0),)))
    (tmp_path / "run" / log.LOG).unlink(missing_ok=True)
    stale = (tmp_path / "run" / judge.FILE).read_text()
    for out in ("run", "clean"):
        with pytest.raises(KeyboardInterrupt):
            train(tiny, recipe, easy, Run(tmp_path / out, 1, evaluate_every=0), extras=Extras(callbacks=(Kill(0),)), resume=resume)
    files = [(tmp_path / out / judge.FILE).read_text() for out in ("run", "clean")]
    assert files[0] == files[1] != stale


def test_a_reward_of_entropies_is_refused_where_trl_generates(tiny, easy, small, tmp_path):
    plan = Run(tmp_path / "run", steps=1, evaluate_every=0)
    with pytest.raises(MissingColumnError, match=r"'pear' needs the column '\w+_entropy'"):
        train(tiny, replace(small, reward="pear"), easy, plan, extras=Extras(engine="trl"))


def test_a_foreign_checkpoint_is_refused(tiny, easy, small, tmp_path):
    plan = Run(tmp_path / "run", steps=1, evaluate_every=0)
    train(tiny, small, easy, plan)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tiny, small, easy, plan)
    with pytest.raises(store.WrongModelError, match="differs in recipe"):
        train(tiny, replace(small, learning_rate=1e-4), easy, plan, resume=True)
    with pytest.raises(store.WrongModelError, match="differs in seed"):
        train(tiny, small, easy, replace(plan, seed=1), resume=True)
    with pytest.raises(store.WrongModelError, match="differs in problems"):
        train(tiny, small, easy[1:], plan, resume=True)
