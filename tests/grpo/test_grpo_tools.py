"""Tools in training: TRL's own tool loop and ours make the same episodes, rewards see the calls, and no result is trained on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import family
from servers import serving
from trl import GRPOConfig, GRPOTrainer

from toolkit import entropies, generate
from toolkit.engines import CannotSampleError, connect
from toolkit.generate import Sampling
from toolkit.grpo import parts, recipes, run
from toolkit.grpo.draws import Drawn
from toolkit.grpo.extras import Extras
from toolkit.grpo.run import Run
from toolkit.grpo.sampler import PolicyView, Sampler
from toolkit.grpo.trainer import Trainer
from toolkit.lm import Condition
from toolkit.rewards import RewardBatch, RewardValues
from toolkit.rewards.sar import SAR
from toolkit.rewards.trl import as_trl
from toolkit.rewards.turns import Protocol
from toolkit.tools import Marks, Tool, Toolbox, calculate
from toolkit.tools.trl import for_trl
from toolkit.types import Problem, Rollout, Span

# Single tokens of the tiny vocabulary: TRL ends a turn only at a token.
BOX = Toolbox((Tool(calculate),), {"calculate": Marks("[", "]")}, Marks("{", "}"), max_calls=2)
CALL = "<think>a[6*7]{42}b[1/0]{error (division by zero): a divisor is 0}c"
SCRIPTS = {
    "two calls": (CALL + "</think>42<|end|>", 120),
    "a call too many": (CALL + "[1+1]", 120),
    "a result that does not fit": (CALL, 40),
    "a result that fits exactly": ("<think>a[6*7]{42}", 11),
    "no call": ("<think>ab</think>42<|end|>", 120),
    "a call after thinking": ("<think>a</think>[6*7]{42}so 7<|end|>", 120),
    "a result faked before its call": ("<think>a</think>{42}b[6*7]{42}so 7<|end|>", 120),
}


def problems() -> list[Problem]:
    """Prompts of one length, so that the position of a token says its place in the script."""
    return [Problem(f"p{i}", ({"role": "user", "content": f"{i}+{i}=?"},), str(2 * i)) for i in (3, 4)]


def scripted(lm, text: str):
    """A copy of the model that writes a text at the start of its response, then what it likes."""
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(lm.prompt_ids(problems()[0].messages))

    def force(module, args, kwargs, out):
        logits = getattr(out, "logits", None)
        if logits is None:  # a training pass of TRL, which computes log-probabilities alone
            return out
        at = kwargs["position_ids"][:, -logits.shape[1] :] + 1 - start  # place in the response of the token that is predicted
        inside = (at >= 0) & (at < len(ids))
        rows, columns = inside.nonzero(as_tuple=True)
        out.logits = logits.clone()
        out.logits[rows, columns, ids[at[inside]]] += 1e4
        return out

    copy = replace(lm, model=deepcopy(lm.model))
    copy.model.register_forward_hook(force, with_kwargs=True)
    return copy


@dataclass
class Spy:
    """A reward that keeps the batch that it gets."""

    name: ClassVar[str] = "spy"
    needs: ClassVar[frozenset[str]] = frozenset({"calls", "result_tokens", "written_tokens", "tokens", "answer_text", "text"})
    batch: Any = None

    def __call__(self, batch: RewardBatch) -> RewardValues:
        self.batch = batch
        return RewardValues.sum(spread=np.arange(len(batch)) % 3.0)


def by_trl(lm, tokens: int, out) -> tuple[list, Spy]:
    """The episodes of TRL's own tool loop, as rollouts, and the reward's view of them."""
    lm, spy, made = replace(lm, model=lm.model), Spy(), []
    speaks = for_trl(lm.tokenizer, BOX)
    lm.model.generation_config.eos_token_id = [*sorted(lm.eos_ids), *speaks.stop_ids]
    args = GRPOConfig(
        output_dir=str(out), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=tokens, report_to=[],
        max_tool_calling_iterations=BOX.max_calls, learning_rate=0.0, use_cpu=True, bf16=False, save_strategy="no", shuffle_dataset=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"prompt": [dict(m) for m in p.messages], "problem_id": p.id} for p in problems()]
    trainer = GRPOTrainer(
        model=lm.model,
        reward_funcs=as_trl(spy),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=speaks.tokenizer,
        tools=speaks.functions,
    )
    generate_ = trainer._generate
    trainer._generate = lambda prompts: made.append(generate_(prompts)) or made[-1]
    trainer.train()
    prompt_ids, completion_ids, masks = made[0][:3]
    rollouts = [
        generate.rollout_from_tokens(lm, problems()[i // 2], prompt, ids, sample=i % 2, written=mask)
        for i, (prompt, ids, mask) in enumerate(zip(prompt_ids, completion_ids, masks, strict=True))
    ]
    return rollouts, spy


@pytest.mark.parametrize("what", SCRIPTS)
def test_trl_and_our_loop_make_the_same_episodes_and_rewards_see_the_same_columns(what, tmp_path):
    text, tokens = SCRIPTS[what]
    lm = scripted(family("llama"), text)
    ours = generate.rollouts(Condition(lm, tools=BOX), problems(), Sampling(n=2, max_new_tokens=tokens), progress=False)
    theirs, spy = by_trl(lm, tokens, tmp_path)
    scripted_part = len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    for a, b in zip(ours, theirs, strict=True):
        n = a.prompt_len + scripted_part  # beyond the script both sample with random numbers of their own
        assert a.token_ids[:n] == b.token_ids[:n] and a.results == b.results
        if len(a.token_ids) <= n or "fit" in what or "many" in what:
            assert a == b
    batch = RewardBatch.from_rollouts(theirs)
    assert (batch["calls"] > 0).any() == (what != "no call")
    for name in ("calls", "result_tokens", "written_tokens", "tokens", "answer_text", "text"):
        assert spy.batch[name].tolist() == batch[name].tolist(), name
    turns = Protocol.of(BOX).of_batch(spy.batch)
    for r, of in zip(theirs, turns, strict=True):
        results = [lm.text(r.token_ids[span.start : span.stop]) for span in r.results]
        assert [BOX.result.around(turn.result or "") for turn in of[:-1]] == results and len(of) == len(r.results) + 1
    if "so 7" in text:
        assert spy.batch["answer_text"].tolist() == ["so 7"] * 4


def test_our_trainer_leaves_results_out_of_the_loss(tmp_path):
    lm = scripted(family("llama"), CALL)
    recipe = replace(recipes.plain("correctness"), problems=2, samples=4, max_tokens=90, learning_rate=1e-3)
    spy, seen = Spy(), []
    trainer = Trainer(
        lm, recipe, problems(), run.arguments(lm, recipe, Run(tmp_path, steps=1, micro_batch=8)), Extras(reward=spy, tools=BOX)
    )
    loss_of = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or loss_of(model, inputs)
    trainer.train()
    drawn = [d.rollout for d in trainer.newest.drawn]
    assert all(len(r.results) == 2 for r in drawn)
    trained = []
    for inputs in seen:
        for row, mask, ids in zip(inputs["row"], inputs["tool_mask"], inputs["completion_ids"], strict=True):
            trained.append(r := drawn[int(row)])
            assert ids[: r.response_tokens].tolist() == list(r.token_ids[r.prompt_len :])
            assert mask[: r.response_tokens].bool().tolist() == list(r.written)
    assert len(trained) >= 4  # rows with advantage 0 are left out
    # The log compares sampled and trained log-probabilities on the tokens that the model wrote. Those of the script differ.
    plain = entropies.with_entropies(family("llama"), trained)
    gaps = [np.abs(np.subtract(r.logprobs, p.logprobs))[np.array(r.written)] for r, p in zip(trained, plain, strict=True)]
    (row,) = [row for row in trainer.state.log_history if "sampler/gap" in row]
    assert row["sampler/gap"] == pytest.approx(float(np.concatenate(gaps).mean()), rel=1e-3)
    assert spy.batch["calls"].tolist() == [2] * 8
    assert (spy.batch["written_tokens"] + spy.batch["result_tokens"] == spy.batch["tokens"]).all()


@pytest.mark.parametrize("name", ["correctness", "drpo"])
def test_the_gradient_of_the_loss_is_zero_at_tool_results_and_not_elsewhere(name, tmp_path):
    lm, spy = scripted(family("llama"), CALL), Spy()
    recipe = replace(recipes.find(name), problems=2, samples=4, max_tokens=90, updates=1, curriculum=None)
    args = run.arguments(lm, recipe, Run(tmp_path, steps=1, micro_batch=8))
    trainer = Trainer(lm, recipe, problems(), args, Extras(reward=spy, tools=BOX))
    log_probs_of, loss_of = trainer._get_per_token_logps_and_entropies, trainer._compute_loss
    added: list[torch.Tensor] = []
    gradients: list[tuple[torch.Tensor, torch.Tensor]] = []

    def shifted(*args, **kwargs):
        log_probs, *others = log_probs_of(*args, **kwargs)
        added.append(torch.zeros_like(log_probs, requires_grad=True))
        return log_probs + added[-1], *others

    def loss(model, inputs):
        before = len(added)
        if "correct" in inputs:  # DRPO needs right and wrong responses in a group; the script writes wrong ones only
            inputs["correct"] = (torch.arange(len(inputs["correct"])) % 2).to(inputs["correct"].dtype)
        value = loss_of(model, inputs)
        (gradient,) = torch.autograd.grad(value, added[before], retain_graph=True)
        gradients.append((gradient, inputs["completion_mask"] * (1 + inputs["tool_mask"])))  # 0: padding, 1: result, 2: written
        return value

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = shifted, loss
    trainer.train()
    assert gradients and all((gradient[kind == 1] == 0).all() and (kind == 1).any() for gradient, kind in gradients)
    assert any((gradient[kind == 2] != 0).any() for gradient, kind in gradients)


@dataclass
class Steps:
    """A reward with one number per turn, drawn at random."""

    name: ClassVar[str] = "steps"
    needs: ClassVar[frozenset[str]] = frozenset({"calls"})

    def steps(self, batch: RewardBatch) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        return [random.random(calls + 1) for calls in batch["calls"]]

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return RewardValues.sum(mean=np.array([steps.mean() for steps in self.steps(batch)]))


def test_each_token_is_trained_with_the_advantage_of_its_turn(tmp_path):
    lm = scripted(family("llama"), CALL)
    recipe = replace(recipes.find("ppr"), problems=2, samples=4, max_tokens=90, learning_rate=1e-3)
    args = run.arguments(lm, recipe, Run(tmp_path, steps=1, micro_batch=4))
    trainer = Trainer(lm, recipe, problems(), args, Extras(reward=Steps(), tools=BOX))
    log_probs_of, loss_of = trainer._get_per_token_logps_and_entropies, trainer._compute_loss
    added: list[torch.Tensor] = []
    pushed: list[tuple[int, torch.Tensor]] = []

    def shifted(*args, **kwargs):
        log_probs, *others = log_probs_of(*args, **kwargs)
        added.append(torch.zeros_like(log_probs, requires_grad=True))
        return log_probs + added[-1], *others

    def loss(model, inputs):
        before = len(added)
        value = loss_of(model, inputs)
        (gradient,) = torch.autograd.grad(value, added[before], retain_graph=True)
        pushed.extend(zip(inputs["row"].tolist(), gradient, strict=True))
        return value

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = shifted, loss
    trainer.train()
    drawn = [d.rollout for d in trainer.newest.drawn]
    rewards = Steps().steps(trainer.newest.batch)
    written = sum(r.written_tokens for r in drawn)
    assert len(pushed) == 8 and all(len(r.results) == 2 for r in drawn)
    for row, gradient in pushed:
        r, group = drawn[row], [rewards[i] for i in range(8) if drawn[i].problem_id == drawn[row].problem_id]
        flat = np.concatenate(group)
        expected, turn = [], 0
        for at in range(r.prompt_len, len(r.token_ids)):
            turn += any(span.start == at for span in r.results)
            inside = any(span.start <= at < span.stop for span in r.results)
            later = sum((x - flat.mean()) / (flat.std(ddof=1) + 1e-4) for x in rewards[row][turn:])
            expected.append(0.0 if inside else later)
        found = -gradient[: len(expected)].double().numpy() * written  # DAPO: the mean over all trained tokens of the generation
        assert found == pytest.approx(np.array(expected), rel=1e-3, abs=1e-5)
        assert (gradient[len(expected) :] == 0).all()


def test_the_log_probability_without_the_question_leaves_results_out_as_that_with_it_does(tiny):
    """The question explains nothing: written tokens have -1 nat with and without it. The two tokens of a result are unlikely."""
    problem = problems()[0]
    prompt = tiny.prompt_ids(problem.messages)
    n = len(prompt)
    r = Rollout(
        problem.id, 0, (*prompt, 6, 7, 8, 9, 10, 2), n, None, Span(n, n + 5), "stop", "x", True,
        logprobs=(-1.0, -1.0, 0.0, 0.0, -1.0, -1.0), results=(Span(n + 2, n + 4),),
    )  # fmt: skip
    scored = torch.tensor([[-1.0, -1, -9, -9, -1, -1]])
    view = object.__new__(PolicyView)  # with the three parts that this method needs
    vars(view).update(lm=tiny, accelerator=SimpleNamespace(device="cpu"), log_probs=lambda ids, mask, width: scored)
    (drawn,) = Sampler(view)._with_prior([Drawn(r, tuple(problem.messages))])
    batch = RewardBatch.from_rollouts([r]).with_columns(logprob_without=[drawn.logprob_without])
    assert batch["logprob"] == batch["logprob_without"] == [-1] and SAR()(batch).components["alignment"] == [0]


def test_an_advantage_per_step_needs_a_reward_per_step(tmp_path):
    lm, recipe = family("llama"), replace(recipes.find("ppr"), problems=2, samples=4, max_tokens=9)
    with pytest.raises(ValueError, match="needs a reward per step, which 'spy' has not"):
        Trainer(lm, recipe, problems(), run.arguments(lm, recipe, Run(tmp_path, steps=1)), Extras(reward=Spy()))


def test_every_evaluation_of_a_run_samples_with_its_tools(monkeypatch, tmp_path):
    offered = []
    sample = generate.rollouts
    monkeypatch.setattr(generate, "rollouts", lambda target, *args, **more: offered.append(target) or sample(target, *args, **more))
    recipe = replace(recipes.plain("correctness"), problems=2, samples=2, max_tokens=20, learning_rate=1e-2)
    held_out = tuple(replace(p, id=f"held-out-{p.id}") for p in problems())
    settings = Run(
        tmp_path / "run",
        1,
        held_out=held_out,
        evaluate_every=1,
        evaluate=Sampling(temperature=0.0, max_new_tokens=20),
        micro_batch=4,
    )
    run.train(family("llama"), recipe, problems(), settings, extras=Extras(train=parts.adapter(4), tools=BOX))
    assert len(offered) >= 4 and all(isinstance(target, Condition) and target.tools == BOX for target in offered)


def test_an_engine_without_tools_is_refused_for_evaluations_before_training(tmp_path):
    with serving("vllm", lm := family("llama")) as (url, _):
        engine = connect(url, lm, adapters=tmp_path / "adapters")
        settings = Run(tmp_path / "run", 1, held_out=tuple(problems()), evaluate_every=1, evaluation_engine=engine)
        with pytest.raises(CannotSampleError, match="cannot answer tool calls"):
            run.check_evaluation(lm, settings, Extras(train=parts.adapter(4), tools=BOX))


def test_tools_with_trl_as_engine_are_refused_before_training():
    with pytest.raises(ValueError, match="cannot answer the calls"):
        Extras(engine="trl", tools=BOX)


def test_marks_that_are_no_token_are_refused_for_trl():
    with pytest.raises(ValueError, match="'</calculate>', the end of a call of calculate, because it is not a single token"):
        for_trl(family("llama").tokenizer, Toolbox((Tool(calculate),)))
