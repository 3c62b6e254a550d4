"""Training only vectors or some heads: what changes, what stays, what is saved, and that the saved policy is the one in memory."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig

from toolkit import edits, generate, sites, store, tasks, vectors
from toolkit.generate import Sampling
from toolkit.grpo import log, parts, policies, recipes, saved
from toolkit.grpo.parts import Heads, Vectors
from toolkit.grpo.plan import TrainingPlan
from toolkit.grpo.run import Run, arguments, train
from toolkit.grpo.trainer import Extras, Trainer
from toolkit.lm import LM, Condition
from toolkit.types import Direction, HeadEdit, Plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
HEADS = ((1, 0), (1, 2), (3, 1))
PARTS = {"vector": Vectors(), "two layers": Vectors((1, 2)), "heads": Heads(HEADS), "head-scales": Heads(HEADS, scale=True)}


@pytest.fixture(scope="module")
def easy():
    return tasks.arithmetic.load("train", 24, operands=(2, 4))


@pytest.fixture(scope="module")
def recipe():
    return replace(recipes.plain("length_penalty", longest=20), problems=2, samples=4, max_tokens=64, learning_rate=0.02)


@pytest.fixture(params=PARTS)
def part(request):
    return PARTS[request.param]


def copy_of(lm: LM) -> LM:
    return replace(lm, model=deepcopy(lm.model))


def logits(lm: LM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


def filled(attached: parts.Attached, seed: int = 0) -> parts.Attached:
    """Random values in place of the zeros."""
    generator = torch.Generator().manual_seed(seed)
    for value in attached.values.values():
        value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return attached


# --- the parts ---------------------------------------------------------------------------------------------------


def test_a_part_that_is_not_trained_yet_changes_no_number(any_lm, ids):
    for part in (Vectors(), Heads(((0, 0), (1, 1)))):
        other = copy_of(any_lm)
        parts.attach(part, other)
        assert torch.equal(logits(other, ids), logits(any_lm, ids))


def test_vectors_in_training_act_as_steering_along_them_bit_for_bit(any_lm, ids):
    other = copy_of(any_lm)
    attached = filled(parts.attach(Vectors(), other))
    direction = Direction(-attached.vectors(), "resid_post", "all", "test", 0, 0, any_lm.provenance())
    with Condition(any_lm, (edits.steering(direction, -1.0),)).active():
        steered = logits(any_lm, ids)
    assert torch.equal(logits(other, ids), steered) and not torch.equal(steered, logits(any_lm, ids))


@pytest.mark.parametrize("scale", [False, True])
def test_heads_in_training_act_as_the_merged_weights_and_only_their_columns_change(any_lm, ids, scale):
    heads = ((0, 0), (1, 1))
    other = copy_of(any_lm)
    attached = filled(parts.attach(Heads(heads, scale), other))
    values = {name: value.detach().clone() for name, value in attached.values.items()}
    in_training = logits(other, ids)
    attached.merge(other.model)
    assert torch.allclose(logits(other, ids), in_training, atol=1e-4) and not torch.allclose(
        in_training, logits(any_lm, ids), atol=1e-3
    )
    expected = deepcopy(any_lm.model)
    layout = sites.find(expected)
    for layer, head in heads:  # by hand
        columns, value = layout.head(layer, head), values[f"{layer}-{head}"]
        with torch.no_grad():
            W = layout.W_O(layer)
            W[:, columns] = (1 + value) * W[:, columns] if scale else W[:, columns] + value
    names = dict(other.model.named_parameters())
    assert set(names) == {name for name, _ in any_lm.model.named_parameters()}
    assert all(torch.allclose(names[name], weight, atol=1e-6) for name, weight in expected.named_parameters())
    assert all(w.requires_grad for w in names.values()) and other.model._keys_to_ignore_on_save is None


def test_a_scale_of_minus_one_removes_a_head_as_the_edit_does(tiny, ids):
    plan = Plan((HeadEdit(1, 2, "scale", 1.0),), None, "one head", tiny.provenance())
    other, ids = copy_of(tiny), ids % tiny.vocab_size
    attached = parts.attach(parts.plan_heads(plan, scale=True), other)
    attached.values["1-2"].data.fill_(-1.0)
    assert torch.allclose(logits(other, ids), logits(edits.apply(tiny, plan), ids), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vectors(assumed_site="z"), "width of the residual stream"),
        (lambda: Vectors(assumed_site="nonsense"), "nonsense"),
        (lambda: Vectors(()), "at least one layer"),
        (lambda: Heads(()), "at least one head"),
        (lambda: Heads(((0, 1), (0, 1))), "none twice"),
        (
            lambda: Extras(train=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            "virtual tokens cannot be merged.*adapter",
        ),
        (
            lambda: Extras(train=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            "virtual tokens cannot be merged.*adapter",
        ),
        (lambda: Extras(train="vector"), "give None .every weight., a peft config"),
    ],
)
def test_a_part_that_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_heads_of_another_models_plan_are_refused_before_training(tiny, easy, recipe, tmp_path):
    other = replace(tiny.provenance(), fingerprint="another-model")
    plan = Plan((HeadEdit(1, 2, "scale", 1.0),), None, "one head", other)
    for made in (plan, edits.random_heads(plan, tiny.layout, seed=0)):
        part = parts.plan_heads(made)
        with pytest.raises(store.WrongModelError, match=r"chosen for another model.*another-mode.*Make a plan from this model"):
            train(tiny, recipe, easy, Run(tmp_path / "run", steps=1, evaluate_every=0), extras=Extras(train=part))
        parts.check_model(Heads(part.heads), tiny)
    parts.check_model(parts.plan_heads(replace(plan, provenance=tiny.provenance())), tiny)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", [Vectors((99,)), Heads(((0, 99),)), Heads(((99, 0),))])
def test_a_layer_or_head_that_the_model_lacks_is_refused_before_training(part, tiny, easy, recipe, tmp_path):
    with pytest.raises(IndexError, match="99"):
        train(tiny, recipe, easy, Run(tmp_path / "run", steps=1, evaluate_every=0), extras=Extras(train=part))
    assert not list(tmp_path.rglob("checkpoint*"))


def test_vllm_is_refused_since_it_would_sample_without_the_vectors(tiny, easy, recipe, tmp_path):
    plan = Run(tmp_path / "run", steps=1, overrides={"use_vllm": True})
    with pytest.raises(ValueError, match="vLLM gets weights only"):
        train(tiny, recipe, easy, plan, extras=Extras(train=Vectors(), engine="trl"))


# --- training ----------------------------------------------------------------------------------------------------


def test_gradients_reach_only_the_part(part, tiny, easy, recipe, tmp_path):
    trainer = Trainer(copy_of(tiny), recipe, easy, arguments(tiny, recipe, Run(tmp_path, steps=1)), Extras(train=part))
    trainer.train()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained == {f"{parts.NAME}.{name}" for name in trainer.attached.values} and len(trained) == len(trainer.attached.values)
    assert all(value.abs().sum() > 0 for value in trainer.attached.values.values()), "every trained value moved"
    assert len(trainer.optimizer.state) == len(trained)
    for name, weight in trainer.model.named_parameters():
        if name not in trained:
            assert weight.grad is None and torch.equal(weight, tiny.model.get_parameter(name))


def test_with_rate_zero_nothing_changes(part, tiny, easy, recipe, tmp_path, ids):
    plan = Run(tmp_path / "run", steps=2, evaluate_every=0, overrides={"learning_rate": 0.0})
    done = train(tiny, recipe, easy, plan, extras=Extras(train=part))
    with done.policy.active() as lm:
        assert torch.equal(logits(lm, ids % tiny.vocab_size), logits(tiny, ids % tiny.vocab_size))
    assert done.log["grad_norm"].dropna().gt(0).any(), "there was something to learn"


def test_a_saved_vector_steers_as_the_model_in_memory(tiny, easy, recipe, tmp_path, ids):
    out = tmp_path / "run"
    trainer = None

    class Keep(log.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **_):
            nonlocal trainer
            with torch.no_grad():
                trainer = model(input_ids=ids % tiny.vocab_size).logits

    done = train(tiny, recipe, easy, Run(out, steps=3, evaluate_every=0), extras=Extras(train=Vectors(), callbacks=(Keep(),)))
    loaded = store.load(out / saved.VECTOR / saved.DIRECTION, Direction, fingerprint=tiny.fingerprint)
    with saved.steered(tiny, loaded).active():
        assert torch.equal(logits(tiny, ids % tiny.vocab_size), trainer)
    assert not torch.equal(logits(tiny, ids % tiny.vocab_size), trainer)
    facts = store.read_json(out / saved.VECTOR / saved.ABOUT)
    assert facts["parameters"] == loaded.vector.numel() == tiny.layout.n_layers * tiny.layout.d_model
    assert facts["train"]["part"] == "vector" and facts["parent"] == tiny.fingerprint
    assert done.lm is tiny and not (out / saved.MODEL).exists()
    assert loaded.provenance.notes["problem_ids"], "the training problems are recorded, so that it is not judged on them"
    strength = facts["strength"]
    assert strength == loaded.provenance.notes["strength"] == (-1 if parts.length_change(log.read(out / log.LOG)) < 0 else 1)
    # A trained vector goes to llama.cpp and back: all but layer 0.
    path = vectors.save_gguf(loaded, tmp_path / "v.gguf", lm=tiny, scale=strength, drop_layer_0=True)
    assert torch.allclose(vectors.load_gguf(path, tiny).vector[1:], loaded.vector[1:], atol=1e-6)


@pytest.mark.parametrize("scale", [False, True])
def test_training_heads_saves_a_model_that_differs_in_their_columns_only(scale, tiny, easy, recipe, tmp_path):
    made_from = ({"problem_ids": ["0123456789abcdef"]},)
    part = Heads(HEADS, scale, made_from)
    done = train(tiny, recipe, easy, Run(tmp_path / "run", steps=2, evaluate_every=0), extras=Extras(train=part))
    for layer in range(tiny.layout.n_layers):
        changed = (done.lm.layout.W_O(layer) != tiny.layout.W_O(layer)).any(dim=0)
        expected = torch.zeros_like(changed)
        for _, head in (pair for pair in HEADS if pair[0] == layer):
            expected[tiny.layout.head(layer, head)] = True
        assert torch.equal(changed, expected)
    others = [name for name, weight in tiny.model.named_parameters() if "o_proj" not in name]
    assert all(torch.equal(done.lm.model.get_parameter(name), tiny.model.get_parameter(name)) for name in others)
    each = 1 if scale else tiny.layout.d_model * tiny.layout.head_dims[0]
    assert store.read_json(tmp_path / "run" / "model" / "grpo.json")["parameters"] == len(HEADS) * each
    assert made_from[0] in done.lm.made_from and len(done.lm.made_from) == 2


@pytest.mark.parametrize("name", ["vector", "heads"])
def test_killed_and_resumed_a_run_ends_with_the_same_policy_and_checkpoints_hold_the_part_only(name, tiny, easy, recipe, tmp_path):
    part = PARTS[name]
    plan = Run(tmp_path / "whole", steps=3, save_every=1, evaluate_every=0)
    whole = train(tiny, recipe, easy, plan, extras=Extras(train=part))

    class Killed(RuntimeError):
        pass

    class Kill(log.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                raise Killed

    plan = replace(plan, out=tmp_path / "killed")
    with pytest.raises(Killed):
        train(tiny, recipe, easy, plan, extras=Extras(train=part, callbacks=(Kill(),)))
    weights, _ = store.read_tensors(plan.out / "checkpoint-2" / "model.safetensors")
    assert weights and all(name.startswith(parts.NAME) for name in weights)
    with pytest.raises(store.WrongModelError, match="train"):
        train(tiny, recipe, easy, plan, extras=Extras(train=Vectors((1,))), resume=True)
    resumed = train(tiny, recipe, easy, plan, extras=Extras(train=part), resume=True)
    assert resumed.lm.fingerprint == whole.lm.fingerprint
    assert list(map(str, resumed.policy.during)) == list(map(str, whole.policy.during))
    assert resumed.log["reward"].tolist()[1:] == whole.log["reward"].tolist()[1:]


def test_the_last_row_of_the_log_judges_the_saved_vector(model_of, easy, recipe, tmp_path):
    half = model_of("tiny-reasoner")
    half = replace(half, model=deepcopy(half.model).bfloat16())
    half.model.config.dtype = torch.bfloat16
    plan = Run(tmp_path / "run", steps=2, held_out=tuple(easy[:6]), evaluate_every=1, evaluate=Sampling(n=2, max_new_tokens=64))
    done = train(half, recipe, easy, plan, extras=Extras(train=Vectors()))
    policy = saved.read_policy(half, plan.out, Vectors(), "policy")
    rollouts = generate.rollouts(policy, plan.held_out, plan.evaluate, progress=False)
    assert done.log["held_out/accuracy"].iloc[-1] == pytest.approx(sum(r.correct for r in rollouts) / len(rollouts))
    assert done.log["held_out/tokens"].iloc[-1] == pytest.approx(
        sum(len(r.token_ids) - r.prompt_len for r in rollouts) / len(rollouts)
    )


def test_a_kl_penalty_is_measured_against_the_initial_model(tiny, easy, recipe, tmp_path):
    plan = Run(tmp_path / "run", steps=2, evaluate_every=0, overrides={"beta": 0.1})
    kl = train(tiny, recipe, easy, plan, extras=Extras(train=Vectors())).log["kl"].dropna().tolist()
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6


def test_a_vector_policy_is_trained_once_and_read_back_and_other_parts_have_other_folders(tiny, tmp_path):
    plan = TrainingPlan(
        steps=1,
        pool=8,
        held_out=2,
        evaluate_every=0,
        train=Vectors(),
        changes=(("problems", 2), ("samples", 4), ("max_tokens", 64)),
    )
    once, again = (policies.train_policy(tiny, recipes.plain("correctness"), 0, plan, tmp_path) for _ in range(2))
    assert str(once.policy.during[0]) == str(again.policy.during[0])
    folders = {
        policies.folder_of(tiny, recipes.plain("correctness"), 0, replace(plan, train=part), tmp_path)
        for part in (None, parts.adapter(4), parts.adapter(8), *PARTS.values())
    }
    assert len(folders) == 7


def test_a_length_reward_moves_length_through_a_vector(tiny, tmp_path):
    problems = tasks.load("arithmetic", "train", 64)
    recipe = replace(recipes.plain("length_penalty").scaled(), problems=8, learning_rate=0.1)
    out = tmp_path / "run"
    done = train(tiny, recipe, problems, Run(out, steps=8, evaluate_every=0), extras=Extras(train=Vectors()))
    tokens = done.log["tokens"].dropna().tolist()
    assert sum(tokens[-2:]) < sum(tokens[:2])
    assert parts.length_change(log.read(out / log.LOG)) < 0 and done.policy.during[0].strength == -1


def test_the_change_of_length_is_read_from_held_out_results_if_there_are_two():
    training = [{"step": i, "think_tokens": 10.0 + i, "tokens": 0.0} for i in range(5)]
    assert parts.length_change(training) == 3.0  # (13 + 14) / 2 - (10 + 11) / 2
    assert parts.length_change([{"step": 0, "held_out/think_tokens": 9.0}, *training]) == 3.0
    ends = [{"held_out/think_tokens": 9.0}, *training, {"held_out/think_tokens": 5.0, "think_tokens": None}]
    assert parts.length_change(ends) == -4.0
    assert parts.length_change([{"step": 0}, {"think_tokens": None, "tokens": 4.0}, {"tokens": 6.0}]) == 2.0
    assert parts.length_change([{"step": 0}]) is None


def test_without_thinking_the_change_of_length_is_that_of_responses():
    """No think tags, or thinking switched off: the length of thinking is 0 in every row."""
    rows = [{"held_out/think_tokens": 0.0, "held_out/tokens": n, "think_tokens": 0.0, "tokens": 50.0} for n in (200.0, 100.0)]
    assert parts.length_change(rows) == -100.0
    assert parts.length_change([{"think_tokens": 0.0, "tokens": n} for n in (200.0, 150.0)]) == -50.0
    assert parts.length_change([{"think_tokens": 0.0}] * 2) is None
