"""Rewards against the printed values of their specification (an independent implementation's), and at the edges."""

from __future__ import annotations

import math
import sys
from itertools import chain, pairwise

import numpy as np
import pytest
from batches import batch_of, every_reward, full_batch
from numpy.testing import assert_allclose

from toolkit import rewards
from toolkit.rewards import (
    Gated,
    MeanOfAdvantages,
    MissingColumnError,
    ReNorm,
    RewardBatch,
    RewardValues,
    Schedule,
    WeightedSum,
    answers,
)
from toolkit.rewards.adaptive_deep_reasoning import AdaptiveDeepReasoning
from toolkit.rewards.arora_zanette import AroraZanette
from toolkit.rewards.beyond_monolithic import BeyondMonolithic
from toolkit.rewards.combine import advantage
from toolkit.rewards.correctness import Correctness, Format, LengthPenalty
from toolkit.rewards.crf import CRF
from toolkit.rewards.dler import DLER, SCRIPT_KEPT, DifficultyAwareDLER
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.kimi import Kimi
from toolkit.rewards.l1 import L1Exact, L1Max
from toolkit.rewards.laser import Laser, LaserD, LaserDE
from toolkit.rewards.laser_targets import TargetSettings, difficulty
from toolkit.rewards.longwriter import LongWriter
from toolkit.rewards.mash import MASH, penalty
from toolkit.rewards.pear import PEAR
from toolkit.rewards.ppr import renorm
from toolkit.rewards.repetition import Distinct, Repetition, distinct_share
from toolkit.rewards.ruler import Ruler
from toolkit.rewards.sar import SAR, alignment
from toolkit.rewards.slpo import SLPO
from toolkit.rewards.surrogate import SCRIPT_FORMAT, Surrogate
from toolkit.rewards.train_long_think_short import TrainLongThinkShort, budget_at, budget_stages, length_reward, stated_budget
from toolkit.rewards.truncation import ThinkPrune, Truncation
from toolkit.stats import RULER_PRECISE
from toolkit.types import Rollout, Span

GOLDEN = dict(atol=5e-5, rtol=0)  # printed to four decimals


def paid(reward, batch: RewardBatch) -> np.ndarray:
    return reward(batch).values


# --- golden values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ddof", "expected"), [(0, [0.8637, 0.7, 0.5363, 0.0]), (1, [0.8386, 0.7, 0.5614, 0.0])])
def test_arora_zanette_discounts_by_the_right_lengths_of_the_group(ddof, expected):
    batch = batch_of([1, 1, 1, 0], [100, 200, 300, 50])
    assert_allclose(paid(AroraZanette(0.6, ddof), batch), expected, **GOLDEN)


def test_grpo_lambda_prices_length_in_the_most_accurate_group_only():
    correct = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [1, 1, 1, 0]]
    lengths = [[100, 200, 300, 400], [100, 200, 300, 400], [10, 20, 30, 40], [1, 2, 3, 4], [5, 6, 7, 8]]
    batch = batch_of([*chain(*correct)], [*chain(*lengths)], [f"q{k}" for k in range(5) for _ in range(4)])
    expected = [0.876, 0.766, 0.634, 0.524, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert_allclose(paid(GRPOLambda(0.2, 0.6), batch), expected, atol=5e-4)


def test_surrogate_pays_format_and_a_middling_length():
    tokens = [0, 768, 1536, 2304, 3072]
    assert_allclose(paid(Surrogate(), batch_of([0] * 5, tokens)), [1.0, 1.75, 2.0, 1.5, 0.0], **GOLDEN)
    assert_allclose(paid(Surrogate(), batch_of([1] * 5, tokens, answer_text="unsure")), [0, 0, 0, 0, -1], **GOLDEN)
    assert_allclose(paid(Surrogate(format=SCRIPT_FORMAT), batch_of([0], [1536])), [1.5])
    assert_allclose(paid(Surrogate(shape="polyline"), batch_of([0] * 3, [768, 1536, 3072])), [1.5, 2.0, 0.0])


@pytest.mark.parametrize(
    ("text", "answer", "read"),
    [
        ("<think>3+4=7</think> 7<|end|>", " 7", True),
        ("<think>3+4=7</think> I do not know.<|im_end|>", " I do not know.", False),
        ("<think>7</think></s>", "", False),
        ("so it is 1,204.5", "so it is 1,204.5", True),  # no tags: all of it answers
        ("<think>x</think>\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{2}}", True),
        ("<think>x</think>12 or \\boxed{x+}", "12 or \\boxed{x+}", False),  # the box is the answer, and does not parse
        ("<think>x</think>12 or \\boxed{\\frac{1}{2}", "12 or \\boxed{\\frac{1}{2}", False),  # never closed
        ("<think>x</think>\\boxed{7} eggs in <b>2</b> boxes", "\\boxed{7} eggs in <b>2</b> boxes", True),
    ],
)
def test_the_format_of_surrogate_is_an_answer_that_parses(text, answer, read):
    assert answers.answer_text(text) == answer and answers.parses(answer) == read
    rollout = Rollout("q", 0, tuple(range(1537)), 1, Span(2, 3), Span(4, 1537), "stop", text, False)
    assert paid(Surrogate(), RewardBatch.from_rollouts([rollout])) == [2.0 if read else 0.0]


@pytest.mark.parametrize("close", ["</a>", None])
def test_an_answer_begins_after_the_models_own_closing_tag(close):
    text = "<a>3+4=7</a> unsure" if close else "</think> is no tag of a model without tags: 7"
    rollout = Rollout("q", 0, tuple(range(9)), 1, Span(2, 3), Span(4, 9), "stop", text, False)
    (answer,) = RewardBatch.from_rollouts([rollout], close=close)["answer_text"]
    assert answer == (" unsure" if close else text) and answers.parses(answer) == (close is None)
    entry = rewards.as_trl(Surrogate(longest=4), generations=1, close=close)
    paid_there = entry(["?"], [text], [[1, 2]])
    assert (
        paid_there == rewards.score([rollout], Surrogate(longest=16), close=close)["reward"].tolist() == ([0.0] if close else [2.0])
    )


def test_surrogate_finds_no_answer_in_thinking_that_was_never_closed():
    rollout = Rollout("q", 0, tuple(range(1537)), 1, Span(2, 1537), None, "length", "3+4=7", False)
    assert paid(Surrogate(), RewardBatch.from_rollouts([rollout])) == [0.0]


def with_history(reward: HAPO, length: int = 1000) -> HAPO:
    reward(batch_of([1], [length]))
    return reward


def test_hapo_follows_the_shortest_right_answer_so_far():
    for right, expected in ((1, [2.0, 1.7071, 1.0, 0.6173, 0.3]), (0, [0, 0, 0, -0.3827, -1])):
        batch = batch_of([right] * 5, [0, 500, 1000, 1250, 2000], split="eval")
        assert_allclose(paid(with_history(HAPO()), batch), expected, **GOLDEN)
    for right, expected in ((1, [2.0, 1.5, 1.0, 0.8, 0.3]), (0, [0, 0, 0, -0.2, -1])):
        batch = batch_of([right] * 5, [0, 500, 1050, 1300, 3000], split="eval")
        assert_allclose(paid(with_history(HAPO(form="linear")), batch), expected, **GOLDEN)


def test_kimi_follows_the_range_of_the_group():
    scored = Kimi()(batch_of([1, 1, 0, 0], [100, 300, 150, 500]))
    assert_allclose(scored.components["length"], [0.5, 0, 0, -0.5])
    assert_allclose(scored.values, [1.5, 1, 0, -0.5])


def test_laser_d_targets_are_the_least_lengths_with_one_right_response_expected():
    targets = TargetSettings(base=2048)
    assert targets.least_right == (6, 3, 1)
    lengths = np.sort(np.round(8192 * np.sqrt(np.linspace(0, 1, 8193)))).astype(np.int64)  # P(l) = (l / 8192)^2
    assert [targets.length(bucket, lengths) for bucket in range(3)] == [4096, 5120, 8192]
    within = [(length / 8192) ** 2 for length in (4096, 5120, 8192)]
    assert all(targets.expected_right(p, bucket) >= 1 for bucket, p in enumerate(within))
    assert targets.expected_right(((4096 - 1024) / 8192) ** 2, 0) < 1


def test_slpo_pays_the_shortest_right_answer_most():
    assert_allclose(paid(SLPO(0.5), batch_of([1, 1, 1, 0], [100, 200, 300, 50])), [1.5, 1.25, 1.0, 0.0])
    assert_allclose(paid(SLPO(0.5), batch_of([1, 0], [9, 1])), [1, 0])
    assert_allclose(paid(SLPO(0.5), batch_of([0, 0], [9, 1])), [0, 0])


def test_train_long_think_short_has_a_triangle_and_a_band():
    lengths, budget = np.array([0, 50, 100, 150, 200, 300]), np.full(6, 100.0)
    assert_allclose(length_reward(lengths, budget, "triangle"), [0, 0.5, 1, 0.5, 0, 0])
    assert_allclose(length_reward(lengths, budget, "band"), [1, 1, 1, 0.5, 0, 0])
    budgets = [stated_budget(budget_at(step)) for step in (0, 149, 150, 300, 450, 599)]
    assert budgets == [256, 256, 179, 125, 87, 87], "the budgets that the paper states"
    batch = batch_of([1, 0], [100, 150], budget=100, formatted=np.array([True, False]))
    assert_allclose(paid(TrainLongThinkShort(0.6, 0.3, 0.1), batch), [0.6 + 0.3 + 0.1, 0.15 + 0.05])


@pytest.mark.parametrize(
    "combined",
    [
        lambda part: WeightedSum(((1, Correctness()), (0.5, part))),
        lambda part: Gated(part, (Correctness(),)),
        lambda part: MeanOfAdvantages(((1, Correctness()), (0.5, part))),
        lambda part: ReNorm(WeightedSum(((1, part),))),
        lambda part: BeyondMonolithic(aspects=((0.5, part),)),
    ],
)
def test_a_combination_shows_its_parts_their_monitoring_set_and_saves_their_states(combined):
    part = LaserD(targets=TargetSettings(50, 10, 100, every=1, problems=3, samples=2))
    reward, batch = combined(part), full_batch([1, 0], [20, 60], "aa")
    assert reward.monitoring() == (3, 2)
    reward.monitor(batch)
    assert part.state_dict()["monitored"] and reward.monitoring() is None
    again = LaserD(targets=TargetSettings(50, 10, 100, every=1, problems=3, samples=2))
    combined(again).load_state_dict(reward.state_dict())
    assert again.state_dict() == part.state_dict()


@pytest.mark.parametrize(("drops", "factor", "interval"), [(1, 0.340, 300), (3, 0.698, 150), (7, 0.857, 75)])
def test_a_curriculum_of_n_drops_has_the_published_factor_and_interval(drops, factor, interval):
    found = budget_stages(256, 87, drops, 600)
    assert [step for step, _ in found] == [k * interval for k in range(drops + 1)]
    assert_allclose([b / a for (_, a), (_, b) in pairwise(found)], factor, atol=5e-4)
    assert_allclose(found[-1][1], 87)
    linear = [budget for _, budget in budget_stages(256, 87, drops, 600, "linear")]
    assert_allclose(np.diff(linear), (87 - 256) / drops)


def test_sar_compares_perplexities_with_and_without_the_question():
    assert_allclose(alignment(np.array([-0.1, -0.5, -2.0]), np.array([-1.0, -0.5, -0.5])), [0.5934, 0, -1], **GOLDEN)
    batch = batch_of([1, 0], [4, 4], logprob=np.array([-0.1, -2.0]), logprob_without=np.array([-1.0, -0.5]))
    assert_allclose(paid(SAR(0.2), batch), [1 + 0.2 * 0.5934, -0.2], **GOLDEN)


def test_longwriter_pays_a_range():
    tokens = [0, 400, 800, 1200, 7600, 14000, 20000]
    assert_allclose(paid(LongWriter(800, 1200), batch_of([0] * 7, tokens)), [0, 0.5, 1, 1, 0.5, 0, 0])
    tokens = [0, 50, 100, 200, 300, 400, 500]
    assert_allclose(paid(LongWriter(100, 200, 400), batch_of([0] * 7, tokens)), [0, 0.5, 1, 1, 0.5, 0, 0])


def test_pear_charges_the_excess_entropy_of_thinking():
    batch = batch_of(
        [1, 1, 0, 1], [5, 2, 4, 4], think_entropy=np.array([0.5, 0.5, 0.5, 0.1]), answer_entropy=np.array([0.2, np.nan, 0.1, 0.5])
    )
    assert_allclose(paid(PEAR(), batch), [0.7, 0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "least", "costs", "expected"),
    [
        ("otc", 0, [0, 1, 2, 3], [1.0, 0.901, 0.766, 0.6549]),
        ("otc", 1, [1, 2, 3, 4], [1.0, 0.866, 0.7071, 0.5878]),
        ("otc_strict", 0, [0, 1, 2, 3], [1, 0, 0, 0]),
        ("linear", 0, [0, 3, 6, 9], [1, 0.5, 0, 0]),
    ],
)
def test_mash_discounts_by_cost(kind, least, costs, expected):
    assert_allclose(penalty(np.array(costs), np.full(4, least), kind), expected, **GOLDEN)


def test_mash_with_token_blocks_prices_a_right_answer_against_the_cheapest_known():
    reward = MASH("exp", decay=0.5, block=10)
    batch = batch_of([1, 1, 1, 1, 0], [5, 15, 25, 39, 5])
    assert_allclose(paid(reward, batch), [1.0, 0.5, 0.25, 0.125, 0])
    assert_allclose(paid(reward, batch_of([1, 1], [15, 25])), [0.5, 0.25])  # the cost of 0 is remembered
    assert_allclose(paid(reward, batch_of([1, 1], [15, 25], "another")), [1.0, 0.5])


def test_renorm_ties_the_process_to_the_outcome():
    assert_allclose(renorm(np.array([0.2, 0.9]), np.array([1, 1])), [0.2, 0.9])
    assert_allclose(renorm(np.array([0.2, 0.9]), np.array([0, 0])), [-0.8, -0.1])
    batch = batch_of([1, 0], [50, 50])
    assert_allclose(paid(ReNorm(LongWriter(100, 200, 400)), batch), [0.5, -0.5])


def test_a_mean_of_advantages_lets_no_scale_decide():
    batch = batch_of([0, 0, 1, 1], [10, 0, 10, 0])
    a, b = np.array([0.0, 0, 1, 1]), np.array([10.0, 0, 10, 0])
    assert_allclose(advantage(a + b, batch.groups), [0.896, -1.095, 1.095, -0.896], atol=5e-4)
    mean = MeanOfAdvantages(((1.0, Correctness()), (1.0, Tokens())))
    assert_allclose(paid(mean, batch), [0, -1, 1, 0], atol=1e-5)
    scaled = MeanOfAdvantages(((1.0, Correctness()), (1.0, Tokens(1000.0))))
    assert_allclose(paid(scaled, batch), paid(mean, batch), atol=1e-5)
    assert_allclose(paid(mean, batch_of([1, 1], [1, 3])), [-0.5, 0.5], atol=1e-5)  # a part that does not vary adds 0


class Tokens:
    """A reward of one's own: no base class, no registration."""

    name, needs = "tokens", frozenset({"tokens"})

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, batch: RewardBatch) -> RewardValues:
        return RewardValues.sum(tokens=self.scale * batch["tokens"])


def test_repetition_counts_different_n_grams():
    words = [["a", "b", "c"] * 17, [str(i) for i in range(50)], ["a", "b"], []]
    assert_allclose(distinct_share(words, 3), [3 / 49, 1, 1, 1])
    text = np.array([" ".join(w) for w in words], dtype=object)
    gated = Gated(Correctness(), (Distinct(unit="words"),))
    assert_allclose(paid(gated, batch_of([1, 1, 1, 0], [9, 9, 9, 9], text=text)), [3 / 49, 1, 1, 0])
    assert_allclose(0.8 * 51 / 100 * 3 / 49, 0.025, atol=5e-5)  # R^3's printed value: relevance x length x gate


def test_ruler_hits_its_range():
    for target, expected in ((80, [False, True, True, True, False, False, False]), (800, [False] * 6 + [True])):
        answer_text = np.array(["w " * n for n in (0, 70, 71, 100, 101, 800, 801)], dtype=object)
        assert_allclose(paid(Ruler(target=target), batch_of([0] * 7, [1] * 7, answer_text=answer_text)), expected)
    precise = Ruler(ranges=RULER_PRECISE, target=80)
    assert_allclose(paid(precise, batch_of([0, 0], [1, 1], answer_text=np.array(["w " * 70, "w " * 71], dtype=object))), [0, 1])
    assert_allclose(paid(Ruler(None, 0.1, "tokens", 100), batch_of([0] * 3, [90, 91, 110])), [0, 1, 1])


# --- values by hand ------------------------------------------------------------------------------------------


def test_dler_pays_a_right_answer_that_ends_in_time():
    finish = np.array(["stop", "stop", "length", "stop"], dtype=object)
    batch = batch_of([1, 1, 1, 0], [4000, 4001, 100, 10], finish=finish)
    assert_allclose(paid(DLER(), batch), [1, 0, 0, 0])
    assert_allclose(paid(DLER(kept=SCRIPT_KEPT), batch), [1, 0.1, 0.1, 0])


def test_da_dler_is_stricter_from_half_right_on():
    correct, tokens = [1, 1, 0, 0, 1, 0, 0, 0], [2000, 2001, 5, 5, 2001, 5, 5, 5]
    batch = batch_of(correct, tokens, ["half"] * 4 + ["hard"] * 4)
    assert_allclose(paid(DifficultyAwareDLER(), batch), [1, 0, 0, 0, 1, 0, 0, 0])


def test_laser_pays_a_bonus_within_the_target():
    batch = batch_of([1, 1, 0, 0, 1], [50, 51, 50, 51, 50], formatted=np.array([1, 1, 1, 0, 0], bool))
    assert_allclose(paid(Laser(50), batch), [1.5, 1.0, -0.5, -1.0, -1.0])


def test_laser_de_pays_wrong_answers_for_going_on_but_not_for_looping():
    loops, varied = (1, 2) * 30, tuple(range(60))
    ids = np.fromiter([varied, loops, varied, varied], dtype=object)
    formatted = np.array([1, 1, 0, 1], bool)
    batch = batch_of([0, 0, 0, 1], [60] * 4, formatted=formatted, token_ids=ids)
    assert_allclose(paid(LaserDE(targets=TargetSettings(50, 10, 100)), batch), [0.0, -0.5, -1.0, 1.0])


def test_l1_follows_the_budget_in_the_prompt():
    batch = batch_of([1, 1, 0, 1], [100, 150, 100, 0], budget=np.array([100, 100, 100, 1000]))
    assert_allclose(paid(L1Exact(0.001), batch), [1, 0.95, 0, 0])
    assert_allclose(paid(L1Max(0.01), batch), [0.5, 0.0, 0.0, 1.0])  # at the budget, beyond it, wrong, far below
    assert_allclose(paid(L1Max(0.001, budget=100), batch), [0.5, 0.45, 0, 0.6])


def test_truncation_and_its_stages():
    batch = batch_of([1, 1, 0], [50, 51, 51])
    assert_allclose(paid(Truncation(50), batch), [1, 0, 0])
    assert_allclose(paid(Truncation(50, -0.5), batch), [1, -0.5, -0.5])
    staged = ThinkPrune((60, 50), every=10)
    assert [paid(staged, batch_of([1], [55], step=step))[0] for step in (0, 9, 10, 99)] == [1, 1, 0, 0]


def test_adaptive_deep_reasoning_prefers_the_mode_of_the_problem():
    mode = np.array(["short", "short", "long", "long"] * 2, dtype=object)
    batch = batch_of([1, 0, 1, 0, 0, 0, 1, 1], [1] * 8, ["simple"] * 4 + ["hard"] * 4, mode=mode)
    assert_allclose(paid(AdaptiveDeepReasoning(), batch), [1.5, 0, 1.0, 0, 0, 0, 1.5, 1.5])
    with pytest.raises(ValueError, match="'medium'"):
        AdaptiveDeepReasoning()(batch_of([1], [1], mode="medium"))


def test_crf_multiplies_by_conciseness_which_fades_with_the_steps():
    batch = batch_of([1, 1, 0, 0], [1] * 4, conciseness=np.array([0.1, 1.0, 1.0, 0.5]))
    d = math.exp(0.5)
    assert_allclose(paid(CRF(0.2, 100), batch), [1 + 0.02 * (1 + d), 1 + 0.2 * (1 + d), 0, 0])
    later = batch_of([1, 0], [1, 1], conciseness=1.0, step=250)
    assert_allclose(paid(CRF(0.2, 100), later), [1 + 0.2 * d, 0])
    with pytest.raises(ValueError, match=r"'conciseness' holds 1\.5"):
        CRF()(batch_of([1], [1], conciseness=1.5))


def test_beyond_monolithic_charges_being_shorter_than_right_answers():
    scored = BeyondMonolithic(0.5, 0.5)(batch_of([1, 1, 0, 0], [100, 200, 75, 300]))
    expected = [-0.5 * (1 - math.exp(-x / 0.5)) for x in (50 / 150, 0, 75 / 150, 0)]
    assert_allclose(scored.components["length"], expected)
    assert_allclose(BeyondMonolithic()(batch_of([0, 0], [1, 9])).components["length"], 0)


def test_the_naive_penalty_pays_wrong_answers_for_being_short():
    assert_allclose(paid(LengthPenalty(1.0, 100), batch_of([1, 0, 0], [50, 50, 10])), [0.5, -0.5, -0.1])


# --- combinators ---------------------------------------------------------------------------------------------


def test_a_weighted_sum_with_a_schedule():
    fading = Schedule(1.0, 0.0, 10, 20)
    reward = WeightedSum(((2.0, Correctness()), (fading, Format())))
    for step, weight in ((0, 1.0), (15, 0.5), (30, 0.0)):
        scored = reward(batch_of([1, 0], [1, 1], step=step))
        assert_allclose(scored.values, [2 + weight, weight])
        assert set(scored.components) == {"correctness.correctness", "format.format"}
    assert reward.needs == {"correct", "formatted"}
    assert Schedule(0.0, 1.0, 0, 10, "step")(9) == 0 and Schedule(0.0, 1.0, 0, 10, "step")(10) == 1
    assert_allclose(Schedule(0.0, 1.0, 0, 10, "cosine")(5), 0.5)


def test_a_gate_multiplies_every_component():
    scored = Gated(SLPO(), (Format(),))(batch_of([1, 1], [10, 20], formatted=np.array([False, True])))
    assert_allclose(scored.values, [0, 1])
    assert_allclose(scored.components["correctness"], [0, 1])


def test_parts_with_one_name_are_refused():
    with pytest.raises(ValueError, match="names that differ"):
        WeightedSum(((1.0, SLPO(0.5)), (1.0, SLPO(0.2))))


# --- edges ---------------------------------------------------------------------------------------------------

ONE_GROUP_SUMS = (
    "arora_zanette",
    "grpo_lambda",
    "slpo",
    "self_rewarded_efficiency",
    "crf",
    "laser",
    "dler",
    "dot",
    "gr3",
    "hapo",
    "mash",
    "repetition",
)


@pytest.mark.parametrize("name", ONE_GROUP_SUMS)
def test_an_all_wrong_group_is_paid_all_the_same(name):
    values = paid(every_reward()[name], full_batch([0] * 4, [5, 50, 90, 20], "q", formatted=True))
    assert np.ptp(values) == 0


def test_all_wrong_groups_have_a_gradient_where_the_paper_says_so():
    wrong = batch_of([0, 0], [500, 2000], budget=1000, split="eval")
    assert np.ptp(paid(with_history(HAPO()), wrong)) > 0  # towards shorter wrong answers
    assert np.ptp(paid(TrainLongThinkShort(), wrong)) > 0  # towards the budget


@pytest.mark.parametrize(("name", "expected"), [("arora_zanette", 0.8), ("grpo_lambda", 0.7), ("slpo", 1.0)])
def test_one_right_answer_or_equal_lengths_leave_length_neutral(name, expected):
    assert_allclose(paid(every_reward()[name], batch_of([1, 0, 0], [123, 5, 9])), [expected, 0, 0])
    assert_allclose(paid(every_reward()[name], batch_of([1, 1, 0], [7, 7, 9])), [expected, expected, 0])


def test_equal_lengths_in_the_group_leave_kimi_at_correctness():
    assert_allclose(paid(Kimi(), batch_of([1, 0], [7, 7])), [1, 0])


@pytest.mark.parametrize("name", sorted(rewards.ALL))
def test_an_empty_completion_is_paid_a_number(name):
    batch = full_batch([0, 1, 0, 1], [0, 0, 9, 30], ["a", "a", "b", "b"])
    empty = {
        "logprob": np.array([np.nan, np.nan, -0.1, -0.2]),
        "think_entropy": np.full(4, np.nan),
        "answer_entropy": np.full(4, np.nan),
    }
    reward = every_reward()[name]
    for _ in range(2):  # a second time with whatever was remembered, a history of 0 tokens included
        assert np.isfinite(paid(reward, batch.with_columns(**empty))).all()


def test_an_empty_response_has_no_alignment():
    batch = batch_of([0], [0], logprob=np.nan, logprob_without=np.nan)
    assert paid(SAR(), batch) == [0]


def test_a_group_of_one():
    for name, reward in every_reward().items():
        assert np.isfinite(paid(reward, full_batch([1], [30], "q"))).all(), name


def test_an_empty_batch_is_paid_nothing():
    for name, reward in every_reward().items():
        assert paid(reward, full_batch([], [], [])).shape == (0,), name


def test_difficulty_boundaries_of_reward_and_monitor_differ_at_exact_thirds():
    batch = batch_of([1, 1, 0, 1, 0, 0, 0], [1] * 7, ["a"] * 3 + ["b"] * 3 + ["c"])
    assert difficulty(batch, "reward").tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert difficulty(batch, "monitor").tolist() == [1, 1, 1, 2, 2, 2, 2]


def test_pear_can_fall_below_a_wrong_answer_unless_clamped():
    batch = batch_of([1, 0], [5, 5], think_entropy=1.5, answer_entropy=0.1)
    assert paid(PEAR(), batch)[0] < paid(PEAR(), batch)[1]
    assert_allclose(paid(PEAR(lowest=0.0), batch), [0, 0])


# --- the batch -----------------------------------------------------------------------------------------------


def test_groups_follow_the_problem_id_never_the_text():
    same_text = batch_of([1, 1, 1, 1], [10, 20, 10, 40], ["a", "a", "b", "b"], text="the same")
    assert same_text.groups.tolist() == [0, 0, 1, 1]
    assert_allclose(paid(SLPO(0.5), same_text), [1.5, 1.0, 1.5, 1.0])
    merged = batch_of([1, 1, 1, 1], [10, 20, 10, 40], "one")
    assert not np.allclose(paid(SLPO(0.5), merged), paid(SLPO(0.5), same_text))


@pytest.mark.parametrize("name", sorted(rewards.ALL))
def test_a_missing_column_is_named_with_its_reward_and_how_to_get_it(name):
    reward = every_reward()[name]
    batch = full_batch([1, 0], [10, 20], "q")
    for column in reward.needs:
        without = RewardBatch({k: v for k, v in batch.columns.items() if k != column})
        with pytest.raises(MissingColumnError, match=rf"{name!r} needs the column {column!r}.*How to get it: \S+") as error:
            reward(without)
        assert error.value.column == column and error.value.reward == name


@pytest.mark.parametrize("name", sorted(rewards.ALL))
def test_a_reward_reads_only_what_it_says_it_needs(name):
    reward, again = every_reward()[name], every_reward()[name]
    batch = full_batch([1, 0, 1, 1], [10, 20, 30, 90], ["a", "a", "b", "b"])
    only = RewardBatch({k: v for k, v in batch.columns.items() if k in reward.needs | {"problem_id"}})
    assert_allclose(paid(reward, only), paid(again, batch))


@pytest.mark.parametrize("name", sorted(rewards.ALL))
def test_components_add_up_to_the_reward(name):
    scored = every_reward()[name](full_batch([1, 0, 1, 1], [10, 20, 30, 90], ["a", "a", "b", "b"]))
    assert scored.values.dtype == np.float64
    assert_allclose(np.sum(list(scored.components.values()), axis=0), scored.values)


def test_bad_batches_are_refused():
    with pytest.raises(MissingColumnError, match="problem_id"):
        RewardBatch({"correct": np.array([True])})
    with pytest.raises(ValueError, match=r"'tokens': \(3,\)"):
        batch_of([1, 0], [1, 2]).with_columns(tokens=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="split='test'"):
        batch_of([1], [1], split="test")
    with pytest.raises(ValueError, match="Row 1 has no problem_id"):
        _ = batch_of([1, 1], [1, 1], ["a", None]).groups


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AroraZanette(1.5), "alpha=1.5"),
        (lambda: GRPOLambda(share=0), "share=0"),
        (lambda: HAPO(weight=2), "weight=2"),
        (lambda: MASH("free"), "kind='free'"),
        (lambda: HAPO(form="line"), "form='line'"),
        (lambda: Surrogate(best=1.0), "best"),
        (lambda: Surrogate(shape="hat"), "shape='hat'"),
        (lambda: TrainLongThinkShort(shape="hat", budget=5)(batch_of([1], [1])), "shape='hat'"),
        (lambda: LongWriter(1, 2, unit="lines").needs, "unit='lines'"),
        (lambda: Ruler(unit="tokens"), "ranges are in words"),
        (lambda: TargetSettings(base=0), "base"),
        (lambda: DifficultyAwareDLER(((0.5, 10),)), "ascend"),
        (lambda: L1Max(budget=-1)(batch_of([1], [1])), "budget of -1"),
        (lambda: LongWriter(10, 5)(batch_of([1], [1])), "range of 10 to 5"),
        (lambda: SLPO(-0.1), "alpha=-0.1"),
        (lambda: Schedule(0, 1, 5, 5), "end after"),
        (lambda: renorm(np.array([1.2]), np.array([1])), "process score of 1.2"),
    ],
)
def test_bad_parameters_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", sorted(rewards.ALL))
def test_the_file_of_a_reward_names_its_paper_and_what_deviates(name):
    entry = rewards.ALL[name]
    told = sys.modules[entry.make.__module__].__doc__ or ""
    assert all(word in told for word in ("Equation", "Deviations:", "Units and signs:")) and entry.paper in told


def test_the_list_is_complete():
    for name, entry in rewards.ALL.items():
        reward = entry.make()
        assert reward.name == name and isinstance(reward, rewards.Reward)
        assert entry.line.endswith(".") and (not entry.paper or len(entry.paper) == 10)
    assert isinstance(rewards.ALL["repetition"].make(), Repetition)
