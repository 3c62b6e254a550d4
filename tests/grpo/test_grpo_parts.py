"""The parts of GRPO that are plain functions: advantages, losses, the order of problems, measures and alarms, recipes."""

from __future__ import annotations

import ast
import graphlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch_of
from hypothesis import given
from hypothesis import strategies as st

from toolkit import lm as lms
from toolkit import rewards, tasks
from toolkit.grpo import advantages, draws, log, losses, measures, recipes, run, saved
from toolkit.grpo.batching import nonzero_micro_batches, trim
from toolkit.grpo.draws import Drawn
from toolkit.rewards import RewardBatch, RewardValues
from toolkit.types import Problem, Rollout, Span

GROUPS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
TOKENS = np.array([10, 20, 30, 40, 50, 60, 70, 80])


def column(values) -> np.ndarray:
    return np.array(values, float)[:, None]


# --- advantages ----------------------------------------------------------------------------------------------


def test_dler_advantage_is_the_papers_golden_value():
    """Groups [1,0,0,0] and [1,1,1,0]: centred by group, then whitened over the batch with the sample deviation."""
    found = advantages.dler(column([1, 0, 0, 0, 1, 1, 1, 0]), GROUPS, TOKENS)
    assert found == pytest.approx([1.6202, -0.5401, -0.5401, -0.5401, 0.5401, 0.5401, 0.5401, -1.6202], abs=5e-5)


def test_dler_by_tokens_equals_whitening_of_the_values_tiled_over_tokens():
    values = column([1, 0, 0, 0, 1, 1, 1, 0])
    centred = np.repeat(advantages.dr_grpo(values, GROUPS, TOKENS), TOKENS)
    naive = (centred - centred.mean()) / (centred.std(ddof=1) + 1e-8)
    ends = np.cumsum(TOKENS) - 1
    assert advantages.dler_tokens(values, GROUPS, TOKENS) == pytest.approx(naive[ends])
    equal = np.full(8, 7)
    assert (
        np.sign(advantages.dler_tokens(values, GROUPS, equal)).tolist() == np.sign(advantages.dler(values, GROUPS, equal)).tolist()
    )


def test_grpo_and_leave_one_out_equal_loops_over_groups():
    rng = np.random.default_rng(0)
    r = rng.normal(size=8)
    for g in (0, 1):
        mine = g == GROUPS
        grpo = (r[mine] - r[mine].mean()) / (r[mine].std(ddof=1) + 1e-4)
        assert advantages.grpo(column(r), GROUPS, TOKENS)[mine] == pytest.approx(grpo)
        others = [r[i] - np.mean([r[j] for j in np.flatnonzero(mine) if j != i]) for i in np.flatnonzero(mine)]
        assert advantages.leave_one_out(column(r), GROUPS, TOKENS)[mine] == pytest.approx(others)


def test_decoupled_keeps_a_small_component_that_the_sum_would_drown():
    big, small = [100, 0, 100, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 0, 1]
    parts = np.array([big, small], float).T
    found = advantages.decoupled(parts, GROUPS, TOKENS)
    naive = (advantages.grpo(column(big), GROUPS, TOKENS) + advantages.grpo(column(small), GROUPS, TOKENS)) / 2
    assert found == pytest.approx(naive)
    assert found[2] > found[0]  # equal in the big component, better in the small one


def test_advantages_per_step_are_sums_over_later_steps_and_do_not_depend_on_shift_scale_or_order():
    random = np.random.default_rng(0)
    groups, steps = np.array([0, 1, 0, 1, 0]), [random.random(n) for n in (1, 3, 2, 2, 4)]
    found = advantages.grpo_steps(steps, groups)
    for row, of in zip(found, range(5), strict=True):
        flat = [r for i in range(5) if groups[i] == groups[of] for r in steps[i]]
        z = (steps[of] - np.mean(flat)) / (np.std(flat, ddof=1) + 1e-4)
        assert row == pytest.approx([sum(z[t:]) for t in range(len(z))])
    moved = advantages.grpo_steps([5 + 100 * r for r in steps], groups)
    assert [a.tolist() for a in moved] == [pytest.approx(a, abs=5e-3) for a in found]
    order = [3, 0, 4, 1, 2]
    shuffled = advantages.grpo_steps([steps[i] for i in order], groups[order])
    assert [a.tolist() for a in shuffled] == [pytest.approx(found[i]) for i in order]
    single = [np.array([r.mean()]) for r in steps]
    whole = advantages.grpo(column([r.mean() for r in steps]), groups, np.ones(5, int))
    assert np.concatenate(advantages.grpo_steps(single, groups)) == pytest.approx(whole)


def test_a_row_with_another_number_of_steps_than_turns_is_refused():
    r = Rollout("p", 0, (1, 2, 3, 4, 5), 1, None, None, "stop", "", True, results=(Span(2, 3),))
    assert advantages.per_token([np.array([1.0, 2.0])], [r]).tolist() == [[1, 0, 2, 2]]
    with pytest.raises(ValueError, match="3 steps of a response with 1 tool results: expected 2"):
        advantages.per_token([np.ones(3)], [r])


@pytest.mark.parametrize("name", advantages.ALL)
@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=8, max_size=8), st.permutations(range(8)))
def test_advantages_follow_the_group_not_the_order_of_rows_and_are_finite(name, values, order):
    order = np.array(order)
    f = advantages.ALL[name]
    found = f(column(values), GROUPS, TOKENS)
    assert np.isfinite(found).all()
    assert f(column(values)[order], GROUPS[order], TOKENS[order]) == pytest.approx(found[order], abs=1e-6)


@pytest.mark.parametrize("name", advantages.ALL)
def test_equal_rewards_push_nothing_and_a_group_of_one_is_no_error(name):
    assert advantages.ALL[name](column([0.1] * 8), GROUPS, TOKENS) == pytest.approx(np.zeros(8), abs=1e-9)
    assert np.isfinite(advantages.ALL[name](column([1.0, 0.0]), np.array([0, 1]), TOKENS[:2])).all()


# --- losses --------------------------------------------------------------------------------------------------


def test_drpo_weights_are_the_published_golden_values():
    for lam, wanted in ((0.1, [0.7572, 0.2234, 0.0194]), (1.0, [0.3878, 0.3433, 0.2689])):
        score = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
        tokens, correct = torch.tensor([1000, 2000, 4000, 500]), torch.tensor([True, True, True, False])
        losses.drpo_objective(score, correct, tokens, torch.zeros(4, dtype=torch.long), losses.DRPO(lam, capacity=8192)).backward()
        assert score.grad[:3].tolist() == pytest.approx(wanted, abs=5e-5)


def test_drpo_gradient_is_the_published_golden_value_and_the_finite_difference():
    form = losses.DRPO(capacity=8192)
    correct, groups = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long)
    tokens = torch.tensor([1000, 2000, 1000, 1000])
    at = torch.tensor([-0.3, -0.4, -0.5, -1.5], dtype=torch.float64)
    score = at.clone().requires_grad_()
    (-losses.drpo_objective(score, correct, tokens, groups, form)).backward()
    assert score.grad.tolist() == pytest.approx([-0.7722, -0.2278, 0.5250, 0.4750], abs=5e-5)
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        up, down = (losses.drpo_objective(x, correct, tokens, groups, form) for x in (at + step, at - step))
        assert -(up - down).item() / 2e-6 == pytest.approx(score.grad[i].item(), abs=1e-7)


def test_drpo_counts_groups_without_wrong_rollouts_and_never_pushes_a_correct_one_down():
    form = losses.DRPO(capacity=100)
    score = torch.randn(12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    correct = torch.tensor([True, False, True, False] + [True] * 4 + [False] * 4)
    groups = torch.arange(3).repeat_interleave(4)
    losses.drpo_objective(score, correct, torch.full((12,), 20), groups, form).backward()
    assert (score.grad[correct] >= 0).all() and (score.grad[4:] == 0).all()
    assert score.grad[:4][correct[:4]].sum().item() == pytest.approx(1 / 3)  # Q counts all three groups


def test_kl_hinge_has_the_gradient_of_half_the_squared_excess():
    form = losses.DRPO(beta=3.0, delta=0.01)
    old = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    new = torch.full((2, 3), -0.1, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(losses.kl_hinge(new, old, mask, form), new)
    excess = (((old - new) * mask).sum() / 5 - form.delta).clamp(min=0)
    (wanted,) = torch.autograd.grad(form.beta / 2 * excess**2, new)
    torch.testing.assert_close(found, wanted)
    assert losses.kl_hinge(old.clone(), old, mask, form) == 0


def test_switch_hinge_is_zero_beyond_the_margin_and_pushes_the_preferred_token_up():
    form = losses.ModeSwitch("long", "short", assumed_margin=1.0, assumed_weight=1.0)
    logits = torch.tensor([[3.0, 0.0], [0.2, 0.0], [0.0, 9.0]], requires_grad=True)
    hinge = losses.switch_hinge(logits, torch.tensor([1, -1, 0]), (0, 1), form)
    assert hinge.tolist() == pytest.approx([0, 1.2, 0])
    hinge.sum().backward()
    assert logits.grad[0].tolist() == logits.grad[2].tolist() == [0, 0] and logits.grad[1, 0] > 0 > logits.grad[1, 1]


def test_a_group_prefers_short_where_its_short_half_is_right_often_enough():
    correct = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    long, groups = np.array([True, True, False, False] * 3), np.repeat([0, 1, 2], 4)
    assert losses.preference(correct, long, groups, losses.ModeSwitch("a", "b")).tolist() == [-1] * 4 + [1] * 4 + [0] * 4


# --- what is asked -------------------------------------------------------------------------------------------


def test_schedule_has_no_problem_twice_in_a_step_and_every_problem_once_an_epoch():
    problems = tasks.load("arithmetic", "train", 10)
    order = draws.schedule(problems, per_step=5, steps=6, seed=3)
    steps = [order[i : i + 5] for i in range(0, 30, 5)]
    assert all(len(set(step)) == 5 for step in steps)
    assert all(set(a + b) == {p.id for p in problems} for a, b in zip(steps[::2], steps[1::2], strict=True))
    assert order == draws.schedule(problems, 5, 6, 3) != draws.schedule(problems, 5, 6, 4)
    assert order[:20] == draws.schedule(problems, 5, 4, 3)  # a longer run begins as a shorter one
    with pytest.raises(ValueError, match="10 training problems, but one step uses 11"):
        draws.schedule(problems, 11, 1, 0)


def test_curriculum_follows_the_published_budgets():
    curriculum = recipes.train_long_think_short().curriculum
    assert [curriculum.at(step) for step in (0, 149, 150, 300, 450)] == [256, 256, 179, 125, 87]
    asked = curriculum.ask(300)(({"role": "system", "content": "s"}, {"role": "user", "content": "1+1=?"}))
    assert [m["content"] for m in asked] == ["s", "1+1=? Use exactly 125 tokens."]


def test_dynamic_sampling_asks_for_as_many_as_are_likely_to_be_missing_within_its_bound():
    rule = draws.Dynamic(most=4)
    assert rule.next_round(kept=8, sampled=16, wanted=16) == 16
    assert rule.next_round(kept=0, sampled=16, wanted=16) == 48
    assert rule.next_round(kept=3, sampled=64, wanted=16) == 0


@pytest.mark.parametrize(
    ("correct", "tokens", "kept"),
    [
        ([1] * 8, [1500] * 4 + [3000] * 4, True),  # all right, half cut by the tighter limit
        ([1] * 6 + [0] * 2, [3000] * 8, False),  # mostly right, all cut: all are paid 0
        ([1] * 3 + [0] * 5, [3000] * 8, True),  # mostly wrong: the wider limit
        ([1] * 8, [1500] * 8, False),
        ([0] * 8, [1500] * 4 + [5000] * 4, False),
    ],
)
def test_dynamic_sampling_keeps_a_group_iff_its_truncated_rewards_differ(correct, tokens, kept):
    recipe = recipes.da_dler()
    paid = rewards.ALL[recipe.reward].make(**recipe.options)(batch_of(correct, tokens)).values
    limit = 2000 if np.mean(correct) >= 0.5 else 4000
    assert paid.tolist() == [float(c and n <= limit) for c, n in zip(correct, tokens, strict=True)]
    assert recipe.dynamic.keeps(paid) == kept


def test_dynamic_sampling_leaves_a_reward_that_is_nan_for_the_trainer_to_name():
    assert draws.Dynamic.keeps(np.array([math.nan] * 4))


def test_micro_batches_of_pushed_rows_hold_as_many_as_another_process_asks_for():
    """Processes gather what they measure of each micro-batch, so all of them need equally many rows."""
    mask = torch.ones(6, 3, dtype=torch.long)
    scored = {
        "advantages": torch.tensor([0, 1.0, 0, -1.0, 0, 0]),
        "row": torch.arange(6),
        "prompt_mask": mask,
        "completion_mask": mask,
    }
    for least, kept in ((0, {1, 3}), (4, {0, 1, 2, 3}), (6, set(range(6)))):
        parts = nonzero_micro_batches(scored, 2, "grpo", least)
        rows = [part["row"].tolist() for part in parts]
        assert {r for part in rows for r in part} == kept and len(rows[0]) == len(rows[1])
        # Each part's loss is the mean of its rows, times its share: the sum of all parts stays that over all rows.
        assert sum(part["share"] * part["advantages"].mean().item() for part in parts) == pytest.approx(0)
        assert all(part["share"] == len(part["row"]) * 2 / 6 for part in parts)


def test_no_file_of_grpo_imports_one_that_imports_it():
    folder = Path(draws.__file__).parent
    graph = {}
    for file in folder.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        whole = [alias.name for node in nodes if node.module == "toolkit.grpo" for alias in node.names]
        parts = [node.module.split(".")[2] for node in nodes if (node.module or "").startswith("toolkit.grpo.")]
        graph[file.stem] = {*whole, *parts}
    assert graph["run"] > {"trainer", "log", "saved"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# --- measures and alarms -------------------------------------------------------------------------------------


def test_measures_of_a_batch_with_every_kind_of_response(rollout_of):
    right, wrong = replace(rollout_of(6), correct=True), rollout_of(3, seed=1)
    cut = rollout_of(30, closed=False)
    loop = replace(cut, token_ids=cut.token_ids[: cut.prompt_len + 1] + (7,) * 30)
    found = [replace(r, problem_id=p, sample=s) for s, (r, p) in enumerate([(right, "a"), (wrong, "a"), (loop, "b"), (cut, "b")])]
    batch, values = RewardBatch.from_rollouts(found), np.array([1.0, 0.0, 0.0, 0.0])
    row = measures.batch_measures([Drawn(r, ()) for r in found], batch, RewardValues(values, {"correct": values}))
    assert row["accuracy"] == 0.25 and row["truncated"] == 0.5 and row["zero_std"] == 0.5 and row["closed"] == 0.5
    assert row["tokens/correct"] == right.response_tokens and row["tokens/truncated"] == cut.response_tokens
    assert row["tokens/stopped"] == (right.response_tokens + wrong.response_tokens) / 2
    assert row["loops"] == 0.25 and row["answers/most_common"] == 0.5
    assert math.isnan(row["entropy/think"])  # none kept
    assert row["component/correct"] == 0.25


def test_alarms_name_each_kind_of_collapse_and_are_silent_otherwise():
    start = {"held_out/accuracy": 0.7, "held_out/think_tokens": 30.0}
    fine = {"held_out/accuracy": 0.69, "held_out/think_tokens": 15.0, "answers/most_common": 0.1, "loops": 0.0}
    assert log.alarms([start, fine]) == []
    assert log.alarms([]) == []
    bad = {"held_out/accuracy": 0.5, "held_out/think_tokens": 15.0, "answers/most_common": 0.9, "loops": 0.4}
    said = log.alarms([start, bad])
    assert [text.partition(":")[0] for text in said] == ["accuracy falls with length", "one answer", "loops"]
    longer = {**bad, "held_out/think_tokens": 40.0, "answers/most_common": 0.1, "loops": 0.0}
    assert log.alarms([start, longer]) == []


def test_a_policy_that_always_gives_one_class_raises_an_alarm_however_it_words_it(rollout_of):
    problems = [Problem(f"p{i}", ({"role": "user", "content": ""},), "reject" if i % 2 else "select") for i in range(12)]

    def row(right):
        """A log row with 12 different responses, of which those with ``right(gold)`` are correct."""
        rollouts = [replace(rollout_of(6 + i, seed=i), problem_id=p.id, correct=right(i, p.answer)) for i, p in enumerate(problems)]
        return measures.held_out_measures(rollouts, problems)

    fine, collapsed = row(lambda i, gold: i > 3), row(lambda i, gold: gold == "reject")
    assert collapsed["held_out/recall_high"] == 1 and collapsed["held_out/recall_low"] == 0
    assert log.alarms([fine]) == []
    assert log.alarms([collapsed]) == [
        "one class: held-out accuracy is 100% on problems with one gold answer and 0% on those with another"
    ]
    # Accuracies of many answers, or of answers with few problems, say nothing about a collapse.
    assert measures.class_recalls([True] * 24, [str(i % 6) for i in range(24)]) == {}
    assert measures.class_recalls([True] * 12, ["yes"] * 8 + ["no"] * 4) == {}


def test_without_held_out_problems_accuracy_that_falls_with_length_in_training_is_an_alarm():
    fine, bad = {"accuracy": 0.7, "think_tokens": 30.0}, {"accuracy": 0.5, "think_tokens": 15.0}
    assert log.alarms([fine] * 10 + [bad] * 9) == []  # too early to tell: means over ten steps
    (said,) = log.alarms([{"step": 0}, *[fine] * 10, *[bad] * 10])
    assert said == "accuracy falls with length: 20 points lost in training since the start, think tokens 30 to 15"
    assert log.alarms([fine] * 10 + [{**bad, "think_tokens": 30.0}] * 10) == [], "no shorter: not this kind of collapse"


# --- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.ALL)
def test_every_recipe_names_its_source_and_its_reward_can_be_made(name):
    for recipe in (recipes.find(name), recipes.find(name).scaled()):
        made = rewards.ALL[recipe.reward].make(**recipe.options)
        assert made.needs and recipe.sources and recipe.name == name
    assert recipe.problems * recipe.samples == 128 and recipe.updates == 1


@pytest.mark.parametrize("name", rewards.ALL)
def test_every_reward_has_a_recipe(name):
    assert recipes.find(name).reward in rewards.ALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "nonsense"}, "Unknown reward 'nonsense': choose one of"),
        ({"advantage": "nonsense"}, "Unknown advantage 'nonsense'"),
        ({"samples": 1}, "samples=1: an advantage compares"),
        ({"samples": 3, "modes": draws.Modes()}, "half of a group"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"switch": losses.ModeSwitch("a", "b")}, "needs modes"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(recipes.plain("correctness"), **change)


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"Unknown reward or recipe 'nonsense': choose one of .*dler"):
        recipes.find("nonsense")


def test_a_saved_model_with_code_of_its_own_is_read_back_with_it(llama, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(lms, "load", lambda folder, **how: given.update(how) or llama)
    for module in ("transformers.models.llama", "transformers_modules.theirs"):
        monkeypatch.setattr(type(llama.model), "__module__", module)
        saved.read_back(llama, tmp_path)
        assert given["trust_remote_code"] == (module == "transformers_modules.theirs") and given["tags"] == llama.tags


def test_padding_is_cut_where_it_is_and_prompts_as_wide_as_the_responses_keep_their_ends():
    part = {
        "prompt_ids": torch.tensor([[0, 1, 2], [0, 0, 3]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[4, 5, 0, 0], [6, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        "plain_ids": torch.tensor([[7, 8, 9, 10], [0, 0, 11, 12]]),
        "plain_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "share": 0.5,
    }
    cut = trim(part)
    assert cut["prompt_ids"].tolist() == [[1, 2], [0, 3]] and cut["completion_ids"].tolist() == [[4, 5], [6, 0]]
    assert (
        torch.equal(cut["plain_ids"], part["plain_ids"])
        and torch.equal(cut["plain_mask"], part["plain_mask"])
        and cut["share"] == 0.5
    )


# --- prompts and the context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "asks"),
    [
        (recipes.plain("correctness"), [None]),
        (
            replace(recipes.train_long_think_short(), curriculum=draws.Curriculum(start=1200, decay=0.05, every=1)),
            [draws.AppendedText(f" Use exactly {budget} tokens.") for budget in (1200, 60, 3)],
        ),
        (
            recipes.adaptive_deep_reasoning(),
            [draws.AppendedText(f"[Please answer with {mode} CoT]") for mode in ("Long", "Short")],
        ),
    ],
    ids=["plain", "curriculum", "modes"],
)
@pytest.mark.parametrize("at_a_time", [1, 2, 1024])
def test_the_prompts_that_must_fit_the_context_are_those_that_are_sampled_from(recipe, asks, at_a_time, monkeypatch):
    """With all that the recipe adds; the prompt with the most characters is not the one with the most tokens."""
    monkeypatch.setattr(run, "TOKENIZED", at_a_time)
    lm = lms.load("tiny-reasoner")
    contents = {"most characters": "<think>" * 20, "short": "1+2=?", "most tokens": "+".join("123") * 10}
    problems = [Problem(name, ({"role": "user", "content": text},), "6", {}) for name, text in contents.items()]
    widths = {p.id: max(len(lm.prompt_ids(draws.prompted_messages(p, ask))) for ask in asks) for p in problems}
    context = lm.model.config.max_position_embeddings
    room = context - widths["most tokens"]
    assert len(contents["most characters"]) > len(contents["most tokens"]) and max(widths, key=widths.get) == "most tokens"
    run.check_context(lm, problems, room, recipe, steps=3)
    with pytest.raises(ValueError, match=rf"The longest prompt \('most tokens'\) has {widths['most tokens']} tokens"):
        run.check_context(lm, problems, room + 1, recipe, steps=3)
    with pytest.raises(ValueError, match="the list is empty"):
        run.check_context(lm, [], 1, recipe)
