"""GFPO's and Art's filters, GDPO's and DECS's advantages: against naive loops, TRL, and text; and one step of training with each recipe."""

from __future__ import annotations

import statistics
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from trl import GRPOConfig

from toolkit import generate, rewards, tasks
from toolkit.generate import Sampling
from toolkit.grpo import advantages, checks, decs, recipes
from toolkit.grpo.decs import DECS
from toolkit.grpo.extras import Extras
from toolkit.grpo.filters import CELLS, GFPO, CellMask, filtered
from toolkit.grpo.redundant import redundant_span
from toolkit.grpo.run import Run, arguments, train
from toolkit.grpo.trainer import Trainer
from toolkit.rewards import Gated, MeanOfAdvantages, RewardBatch, WeightedSum
from toolkit.rewards.dler import DLER
from toolkit.types import Problem, Rollout, Span

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")


@st.composite
def batches(draw):
    rows = [
        (f"q{g}", draw(st.booleans()), draw(st.integers(0, 9)))
        for g in range(draw(st.integers(1, 3)))
        for _ in range(draw(st.integers(2, 8)))
    ]
    ids, correct, tokens = zip(*draw(st.permutations(rows)), strict=True)
    return RewardBatch.from_columns(problem_id=list(ids), correct=list(correct), tokens=list(tokens), written_tokens=list(tokens))


def rows_of(batch: RewardBatch) -> list[list[int]]:
    return [[i for i in range(len(batch)) if batch.groups[i] == g] for g in range(batch.groups.max() + 1)]


def column(batch: RewardBatch) -> np.ndarray:
    return batch["correct"].astype(float)[:, None]


# --- GFPO --------------------------------------------------------------------------------------------------------


@given(batch=batches(), keep=st.integers(2, 6), metric=st.sampled_from(["shortest", "efficiency"]))
def test_gfpo_keeps_the_best_k_of_each_group(batch, keep, metric):
    kept = GFPO(keep, metric).keeps(batch, batch["correct"].astype(float))
    for rows in rows_of(batch):

        def worse(i: int) -> tuple:
            tokens = int(batch["tokens"][i])
            return (tokens if metric == "shortest" else -float(batch["correct"][i]) / max(tokens, 1), tokens, i)

        assert [i for i in rows if kept[i]] == sorted(sorted(rows, key=worse)[:keep])


@given(batch=batches(), keep=st.integers(2, 6))
def test_gfpo_compares_the_kept_among_themselves_or_with_all(batch, keep):
    form = GFPO(keep)
    kept = form.keeps(batch, batch["correct"].astype(float))
    for stats in ("kept", "all"):
        values = filtered(advantages.grpo, replace(form, assumed_stats=stats), column(batch), batch)
        for rows in rows_of(batch):
            among = [float(batch["correct"][i]) for i in rows if stats == "all" or kept[i]]
            spread = statistics.stdev(among) if len(among) > 1 else 0.0
            naive = [(float(batch["correct"][i]) - statistics.fmean(among)) / (spread + 1e-4) if kept[i] else 0.0 for i in rows]
            assert_allclose(values[rows], naive, atol=1e-6)


@given(batch=batches())
def test_gfpo_that_keeps_all_is_grpo(batch):
    plain = advantages.grpo(column(batch), batch.groups, batch["tokens"])
    for stats in ("kept", "all"):
        assert_allclose(filtered(advantages.grpo, GFPO(8, assumed_stats=stats), column(batch), batch), plain)


# --- the masking study -------------------------------------------------------------------------------------------


@given(batch=batches(), cells=st.sets(st.sampled_from(CELLS), min_size=1, max_size=3))
def test_masked_cells_get_no_advantage_and_the_others_keep_theirs(batch, cells):
    values = filtered(advantages.grpo, CellMask(tuple(cells), target=5), column(batch), batch)
    plain = advantages.grpo(column(batch), batch.groups, batch["tokens"])
    for i in range(len(batch)):
        cell = ("S" if batch["tokens"][i] <= 5 else "L") + ("C" if batch["correct"][i] else "W")
        assert values[i] == (0.0 if cell in cells else pytest.approx(plain[i]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GFPO(1), "keep at least 2"),
        (lambda: GFPO(4, "longest"), "choose one of shortest, efficiency"),
        (lambda: GFPO(4, assumed_stats="none"), "choose one of kept, all"),
        (lambda: CellMask(("XX",), 5), "choose one of SC, LC, SW, LW"),
        (lambda: CellMask((), 5), "one to three cells"),
        (lambda: CellMask(CELLS, 5), "one to three cells"),
        (lambda: CellMask(("LC",), 0), "a limit above 0"),
        (lambda: replace(recipes.gfpo(), samples=8), "leaves none out"),
        (
            lambda: replace(recipes.art(("LC", "SW")), max_tokens=4000),
            "masks LC, .* more than 4000 tokens.* max_tokens=4000: raise",
        ),
        (lambda: replace(recipes.art(("SW", "LW")).scaled(), max_tokens=40), "masks LW, .* more than 40 tokens"),
        (lambda: DECS(bonus=0.0), "above 0"),
        (lambda: replace(recipes.decs(), advantage="grpo"), "set none of them"),
        (lambda: replace(recipes.drpo(), advantage="grpo"), "loss replaces advantage and filter"),
        (lambda: replace(recipes.drpo(), filter=CellMask(("LC",), 5)), "loss replaces advantage and filter"),
    ],
)
def test_settings_without_effect_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("masked", [("SW", "LW"), ("LC",), ("LC", "SW"), ("LC", "LW")])
def test_arts_masking_study_samples_responses_that_are_long_enough_to_be_masked(masked):
    for recipe in (recipes.art(masked), recipes.art(masked).scaled()):
        assert recipe.filter.target == recipe.options["target"] < recipe.max_tokens
    assert recipes.art(masked).max_tokens == 16_000
    assert [r.max_tokens for r in (recipes.art(), recipes.art().scaled())] == [4000, 40], "without a mask both limits are the same"


def test_a_mask_of_short_cells_alone_needs_no_long_responses():
    assert replace(recipes.art(("SW",)), max_tokens=4000).filter.target == 4000


def check(lm, recipe, out, extras=Extras(), **overrides) -> None:
    """Check the settings of a run as the trainer does before it is made."""
    reward = extras.reward or rewards.ALL[recipe.reward].make(**recipe.options)
    checks.check_args(arguments(lm, recipe, Run(out, steps=1, overrides=overrides)), recipe, extras, reward)


@pytest.mark.parametrize("name", ["dler", "truncation", "dot"])
def test_truncated_responses_may_not_be_masked_if_the_reward_punishes_them(name, tiny, tmp_path):
    recipe = replace(recipes.find(name).scaled(), config={"mask_truncated_completions": True})
    with pytest.raises(ValueError, match="leaves out the rollouts that the reward"):
        Trainer(
            replace(tiny, model=deepcopy(tiny.model)),
            recipe,
            tasks.load("arithmetic", "train", 16),
            arguments(tiny, recipe, Run(tmp_path, steps=1)),
        )


@pytest.mark.parametrize(
    "reward",
    [
        DLER(),
        WeightedSum(((1.0, rewards.Correctness()), (0.5, DLER()))),
        MeanOfAdvantages(((1.0, rewards.Correctness()), (0.5, DLER()))),
        Gated(DLER(), (rewards.Correctness(),)),
        WeightedSum(((1.0, Gated(DLER(), (rewards.Correctness(),))),)),
    ],
    ids=lambda reward: reward.name,
)
def test_truncated_responses_may_not_be_masked_if_a_reward_of_ones_own_or_its_part_punishes_them(reward, tiny, tmp_path):
    recipe = recipes.plain("correctness")
    with pytest.raises(ValueError, match="that the reward dler punishes"):
        check(tiny, recipe, tmp_path, Extras(reward=reward), mask_truncated_completions=True)
    check(tiny, recipe, tmp_path, Extras(reward=reward))
    check(tiny, recipe, tmp_path, mask_truncated_completions=True)


@pytest.mark.parametrize(("name", "value"), [("min_p", 0.5), ("repetition_penalty", 1.5), ("generation_kwargs", {"num_beams": 3})])
def test_settings_of_sampling_that_the_toolkits_loop_does_not_read_are_refused(name, value, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* has no effect"):
        check(tiny, recipes.plain("correctness"), tmp_path, **{name: value})
    check(tiny, recipes.plain("correctness"), tmp_path, Extras(engine="trl"), **{name: value})
    check(tiny, recipes.plain("correctness"), tmp_path, min_p=0.0, repetition_penalty=1.0)


@pytest.mark.parametrize(
    ("name", "own"), [("dler", "advantage"), ("gfpo", "filter"), ("decs", "token_advantage"), ("drpo", "loss")]
)
def test_trls_scale_of_rewards_is_refused_if_the_recipe_does_not_use_trls_advantage(name, own, tiny, tmp_path):
    recipe = recipes.find(name).scaled()
    with pytest.raises(ValueError, match=f"has no effect, since .* has its own {own}"):
        check(tiny, recipe, tmp_path, scale_rewards="none")
    check(tiny, recipe, tmp_path)
    check(tiny, recipes.plain("correctness"), tmp_path, scale_rewards="none")


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}])
def test_log_probabilities_before_and_after_a_cut_are_not_compared(cut, tiny, tmp_path):
    with pytest.raises(ValueError, match="set top_p=1 and top_k=0"):
        check(tiny, recipes.sar().scaled(), tmp_path, **cut)
    check(tiny, recipes.sar().scaled(), tmp_path)
    check(tiny, recipes.plain("correctness"), tmp_path, **cut)


OTHER_LOSS = {
    "loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "importance_sampling_level": "sequence",
    "sapo_temperature_pos": 2.0, "vespo_k_pos": 3.0, "top_entropy_quantile": 0.1, "off_policy_mask_threshold": 0.5, "entropy_coef": 5.0,
    "use_adaptive_entropy": True, "use_bias_correction_kl": False, "reward_weights": [2.0],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_LOSS)
def test_settings_of_trls_loss_are_refused_if_the_recipe_has_its_own(name, tiny, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}=.* has no effect, since drpo has its own loss"):
        check(tiny, recipes.find("drpo").scaled(), tmp_path, **{name: OTHER_LOSS[name]})
    check(tiny, recipes.find("correctness").scaled(), tmp_path, **{name: OTHER_LOSS[name]})
    check(tiny, recipes.find("drpo").scaled(), tmp_path, temperature=0.9)


def test_every_setting_of_trls_loss_that_is_refused_is_a_field_of_trls_config():
    assert set(OTHER_LOSS) <= set(checks.OF_TRLS_LOSS) <= {f.name for f in fields(GRPOConfig)}


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_an_engine_of_trl_is_refused_if_the_toolkit_samples(name, tiny, tmp_path):
    recipe = recipes.find("correctness").scaled()
    with pytest.raises(ValueError, match=rf"{name}=True has no effect, since the toolkit samples .*--training-engine trl"):
        check(tiny, recipe, tmp_path, **{name: True})
    check(tiny, recipe, tmp_path, Extras(engine="trl"), **{name: True})


def test_a_reference_model_that_changes_is_refused_since_checkpoints_do_not_hold_it(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"sync_ref_model=True would change the reference model.*a resumed run would differ"):
        check(tiny, recipes.find("correctness").scaled(), tmp_path, sync_ref_model=True, beta=0.01)


@pytest.mark.parametrize("name", [name for name in recipes.ALL if recipes.find(name).config])
def test_the_settings_of_no_recipe_are_refused(name, tiny, tmp_path):
    check(tiny, recipes.find(name), tmp_path)


def test_the_recipe_of_the_entropy_bonus_keeps_the_bonus_for_the_tiny_reasoner():
    assert recipes.entropy_bonus().scaled().config == {"use_adaptive_entropy": True}


# --- GDPO --------------------------------------------------------------------------------------------------------


def test_gdpo_is_trls_normalize_then_sum():
    """The lines of TRL's grpo_trainer.py (``multi_objective_aggregation``), on the same numbers."""
    rewards = torch.rand(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[4:8, 1] = 0.25  # no spread in one group
    grouped = rewards.view(-1, 4, 3)
    each = (grouped - grouped.mean(dim=1, keepdim=True)) / (grouped.std(dim=1, keepdim=True) + 1e-4)
    total = each.view(-1, 3).sum(dim=1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    groups, tokens = np.repeat([0, 1, 2], 4), np.full(12, 5)
    assert_allclose(advantages.gdpo(rewards.numpy(), groups, tokens), expected.numpy(), atol=1e-9)


def test_in_gdpo_the_size_of_a_component_sets_nothing():
    components = np.random.default_rng(0).random((8, 2))
    groups, tokens = np.repeat([0, 1], 4), np.full(8, 5)
    scaled = components * [1.0, 50.0]
    assert_allclose(advantages.gdpo(scaled, groups, tokens), advantages.gdpo(components, groups, tokens), atol=2e-3)
    assert not np.allclose(advantages.grpo(scaled, groups, tokens), advantages.grpo(components, groups, tokens), atol=0.05)


def test_trls_own_aggregation_is_refused_since_it_gets_one_reward(tiny, tmp_path):
    recipe = replace(recipes.plain("laser").scaled(), config={"multi_objective_aggregation": "normalize_then_sum"})
    with pytest.raises(ValueError, match="use the advantage gdpo"):
        Trainer(
            replace(tiny, model=deepcopy(tiny.model)),
            recipe,
            tasks.load("arithmetic", "train", 16),
            arguments(tiny, recipe, Run(tmp_path, steps=1)),
        )


# --- DECS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_decs_advantages_are_those_of_a_loop_over_positions(seed):
    random = np.random.default_rng(seed)
    n, width = 9, 7
    groups, correct, tokens = random.integers(0, 3, n), random.random(n) < 0.6, random.integers(1, width + 1, n)
    spans = [Span(a, int(random.integers(a + 1, t + 1))) if (a := int(random.integers(0, t))) + 1 <= t else None for t in tokens]
    spans[0] = None
    rewards = decs.token_rewards(correct, tokens, spans, width, 0.1, 20)
    values = decs.token_advantages(rewards, groups)
    for i in range(n):
        for j in range(width):
            span = spans[i]
            charged = correct[i] and span is not None and span.start <= j < span.stop
            score = float(correct[i])
            assert rewards[i, j] == pytest.approx(score + 0.1 * (1 - tokens[i] / 20) if charged else score * 1.1)
            others = [rewards[k, j] for k in range(n) if groups[k] == groups[i]]
            mean, spread = (statistics.fmean(others), statistics.stdev(others)) if len(others) > 1 else (0.0, 1.0)
            assert values[i, j] == pytest.approx((rewards[i, j] - mean) / (spread + 1e-6), rel=1e-5, abs=1e-5)


def test_a_longer_right_response_is_charged_more_and_a_wrong_one_never():
    spans = [Span(1, 3)] * 3
    rewards = decs.token_rewards(np.array([True, True, False]), np.array([4, 8, 8]), spans, 4, 0.1, 10)
    assert rewards[0, 1] > rewards[1, 1] and (rewards[2] == 0).all() and (rewards[:2, 0] == 1.1).all()


def thought(lm, problem: Problem, text: str) -> Rollout:
    """A rollout whose thinking is ``text``."""
    prompt = lm.prompt_ids(problem.messages)
    think = lm.tokenizer.encode(text, add_special_tokens=False)
    answer = lm.tokenizer.encode(f"</think>{problem.answer}", add_special_tokens=False)
    start, stop = len(prompt), len(prompt) + len(think)
    ids = (*prompt, *think, *answer)
    return Rollout(problem.id, 0, ids, start, Span(start, stop), Span(stop + 1, len(ids)), "stop", text, True)


@pytest.mark.parametrize(
    ("expression", "needed", "rest"),
    [
        ("5+10+6", "5+10=15\n15+6=21\n", "wait 15+6=21 ok\n"),
        ("5+10+6", "5+10=15\nwait 5+10=15 ok\n15+6=21\n", ""),
        ("5+10+6-6", "5+10=15\n15+6=21\n21-6=15\n", "=15\n"),  # the first 15 is an intermediate result
        ("5+10+6-6", "5+10=15\nwait 5+10=15 ok\n15+6=21\n21-6=15\n", "wait 21-6=15 ok\n"),
        ("5+10+6", "5+10=15\n15+6=22\n", None),  # never right
    ],
)
def test_the_redundant_part_begins_after_the_line_that_reaches_the_answer(tiny, expression, needed, rest):
    problem = Problem("p", ({"role": "user", "content": f"{expression}=?"},), str(eval(expression)), {"expression": expression})
    rollout = thought(tiny, problem, needed + (rest or ""))
    span = redundant_span(tiny, rollout, problem)
    if not rest:
        assert span is None
        return
    response = rollout.token_ids[rollout.prompt_len :]
    assert tiny.text(response[span.start : span.stop]) == rest and tiny.text(response[: span.start]) == needed


def test_on_our_generator_what_is_left_out_was_never_needed(tiny):
    """In rollouts of the tiny reasoner the part before the redundant span holds every result, and the rest repeats the last one."""
    problems = tasks.arithmetic.load("train", 48, operands=(2, 3))
    by_id, seen = {p.id: p for p in problems}, 0
    for rollout in generate.rollouts(tiny, problems, Sampling(n=2, max_new_tokens=120), progress=False):
        problem = by_id[rollout.problem_id]
        span = redundant_span(tiny, rollout, problem)
        if not rollout.correct or span is None:
            continue
        seen += 1
        response = rollout.token_ids[rollout.prompt_len :]
        before, after = tiny.text(response[: span.start]), tiny.text(response[span.start : span.stop])
        results = [line.rpartition("=")[2] for line in before.splitlines() if not line.startswith("wait")]
        assert results[-1] == problem.answer
        assert problem.answer in after, after
    assert seen >= 3


# --- training ----------------------------------------------------------------------------------------------------

NEWER = ("gfpo", "gfpo_efficiency", "art", "decs", "luspo", "gdpo", "entropy_bonus", "alp", "gr3", "dot")


@pytest.mark.parametrize("name", NEWER)
def test_a_step_of_training_with_each_recipe_changes_the_model(name, tiny, tmp_path):
    recipe = replace(recipes.find(name).scaled(), problems=4, max_tokens=60)
    done = train(tiny, recipe, tasks.load("arithmetic", "train", 16), Run(tmp_path / "run", steps=1, evaluate_every=0))
    assert done.lm.fingerprint != tiny.fingerprint and done.log["grad_norm"].iloc[-1] > 0


def test_advantages_per_token_are_padded_as_wide_as_trl_pads_responses(tiny, tmp_path):
    recipe = replace(recipes.decs().scaled(), problems=1, max_tokens=40)
    problems = tasks.load("arithmetic", "train", 4)
    outputs = []
    for overrides in ({}, {"pad_to_multiple_of": 64}):
        args = arguments(tiny, recipe, Run(tmp_path, steps=1, overrides=overrides))
        trainer = Trainer(replace(tiny, model=deepcopy(tiny.model)), recipe, problems, args)
        outputs.append(trainer._generate_and_score_completions([trainer.train_dataset[0] for _ in range(recipe.samples)]))
    plain, padded = (output["advantages"] for output in outputs)
    assert padded.shape == outputs[1]["completion_ids"].shape == (recipe.samples, 64) and plain.shape[1] < 64
    assert torch.equal(padded[:, : plain.shape[1]], plain) and not padded[:, plain.shape[1] :].any()


def test_a_trainer_learns_from_the_kept_rollouts_and_from_the_charged_tokens_only(tiny, tmp_path):
    problems = tasks.load("arithmetic", "train", 16)
    for recipe in (replace(recipes.gfpo().scaled(), problems=4), replace(recipes.decs().scaled(), problems=4)):
        trainer = Trainer(
            replace(tiny, model=deepcopy(tiny.model)), recipe, problems, arguments(tiny, recipe, Run(tmp_path, steps=1))
        )
        rows = [row for row in trainer.train_dataset.select(range(4)) for _ in range(recipe.samples)]
        output = trainer._generate_and_score_completions(rows)
        batch, values = trainer.newest.batch, output["advantages"].numpy()
        if recipe.filter:
            kept = recipe.filter.keeps(batch, trainer.newest.scored.values)
            assert kept.sum() == 4 * recipe.filter.keep and (values[~kept] == 0).all() and np.abs(values[kept]).sum() > 0
        else:
            assert values.shape == output["completion_ids"].shape
            uniform = (values == values[:, :1]).all(axis=1)
            spans = [redundant_span(tiny, d.rollout, trainer.problems[d.rollout.problem_id]) for d in trainer.newest.drawn]
            charged = np.array([d.rollout.correct and s is not None for d, s in zip(trainer.newest.drawn, spans, strict=True)])
            assert charged.any() and not uniform[charged].all()
