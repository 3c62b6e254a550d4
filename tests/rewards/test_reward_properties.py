"""Properties of rewards over random batches: what must never matter, and what the papers promise."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from batches import batch_of, every_reward, full_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit import rewards
from toolkit.rewards import RewardBatch
from toolkit.rewards.arora_zanette import AroraZanette
from toolkit.rewards.columns import object_array
from toolkit.rewards.grpo_lambda import GRPOLambda
from toolkit.rewards.hapo import HAPO
from toolkit.rewards.laser import LaserD
from toolkit.rewards.laser_targets import TargetSettings, TargetState
from toolkit.rewards.mash import MASH
from toolkit.rewards.ppr import renorm

STATEFUL = ("hapo", "laser_d", "laser_de", "mash")
FAST = settings(max_examples=30, deadline=None)


@st.composite
def batches(draw, smallest: int = 0):
    """Up to 4 problems with up to 6 rows each, rows in any order, and every column."""
    rows = [
        (f"q{g}", draw(st.booleans()), draw(st.integers(smallest, 200)))
        for g in range(draw(st.integers(1, 4)))
        for _ in range(draw(st.integers(1, 6)))
    ]
    rows = draw(st.permutations(rows))
    return full_batch([r[1] for r in rows], [r[2] for r in rows], [r[0] for r in rows], seed=draw(st.integers(0, 99)))


def taught(name: str, batch: RewardBatch):
    """A reward that has seen the batch in training once, where it has a state."""
    reward = every_reward()[name]
    if name in STATEFUL:
        reward(batch)
    return reward


# --- what must never matter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(rewards.ALL))
@FAST
@given(data=st.data())
def test_the_order_of_rows_never_changes_what_a_row_is_paid(name, data):
    batch = data.draw(batches())
    order = np.array(data.draw(st.permutations(range(len(batch)))))
    values = taught(name, batch)(batch).values
    shuffled = taught(name, batch.take(order))(batch.take(order)).values
    assert_allclose(shuffled, values[order], rtol=1e-12, atol=1e-12)


WHOLE_BATCH = {"grpo_lambda", "hybrid"}  # rank the groups, or standardise scores, over the batch, so that other groups matter


@pytest.mark.parametrize("name", sorted(set(rewards.ALL) - WHOLE_BATCH))
@FAST
@given(batch=batches())
def test_other_groups_never_change_what_a_row_is_paid(name, batch):
    alone = np.empty(len(batch))
    reward = taught(name, batch)
    values = reward(RewardBatch(batch.columns, batch.step, "eval")).values
    for g in range(batch.groups.max() + 1):
        rows = batch.groups == g
        part = RewardBatch({k: v[rows] for k, v in batch.columns.items()}, batch.step, "eval")
        alone[rows] = reward(part).values
    assert_allclose(alone, values, rtol=1e-12, atol=1e-12)


def test_ties_of_grpo_lambda_move_between_problems_with_the_steps():
    ids = [f"q{k}" for k in range(20) for _ in range(2)]
    chosen = {tuple(np.flatnonzero(GRPOLambda(0.1).priced(batch_of([1] * 40, [5] * 40, ids, step=step)))) for step in range(5)}
    assert len(chosen) > 1 and all(len(rows) == 4 for rows in chosen)


# --- what the papers promise ---------------------------------------------------------------------------------

SHORTER_IS_NEVER_PAID_LESS = [
    "alp",
    "arora_zanette",
    "cosine",
    "dler",
    "da_dler",
    "dot",
    "gr3",
    "grpo_lambda",
    "hapo",
    "kimi",
    "laser",
    "laser_d",
    "length_penalty",
    "mash",
    "overlong",
    "self_rewarded_efficiency",
    "slpo",
    "truncation",
]  # for right answers to one problem


@pytest.mark.parametrize("name", SHORTER_IS_NEVER_PAID_LESS)
@FAST
@given(batch=batches())
def test_a_shorter_right_answer_is_never_paid_less(name, batch):
    same = batch.with_columns(formatted=True, finish="stop")
    values = taught(name, same)(same).values
    for g in range(same.groups.max() + 1):
        rows = np.flatnonzero((same.groups == g) & same["correct"])
        by_length = rows[np.argsort(same["tokens"][rows], kind="stable")]
        assert (np.diff(values[by_length]) <= 1e-12).all()


RIGHT_BEATS_WRONG = [
    "adaptive_deep_reasoning",
    "arora_zanette",
    "correctness",
    "cosine",
    "crf",
    "ppr",
    "dler",
    "dot",
    "gr3",
    "grpo_lambda",
    "hapo",
    "laser",
    "laser_d",
    "laser_de",
    "mash",
    "self_rewarded_efficiency",
    "slpo",
]


@pytest.mark.parametrize("name", RIGHT_BEATS_WRONG)
@FAST
@given(batch=batches(smallest=1))
def test_a_wrong_answer_never_beats_a_right_one_to_the_same_problem(name, batch):
    same = batch.with_columns(formatted=True, finish="stop")
    values = taught(name, same)(same).values
    for g in range(same.groups.max() + 1):
        rows = same.groups == g
        right, wrong = values[rows & same["correct"]], values[rows & ~same["correct"]]
        assert not len(right) or not len(wrong) or right.min() >= wrong.max() - 1e-12


BOUNDS = {
    "correctness": (0, 1), "format": (0, 1), "cosine": (-1, 1), "overlong": (-1, 1), "arora_zanette": (0, 1), "grpo_lambda": (0, 1),
    "kimi": (-0.5, 1.5), "truncation": (0, 1), "dler": (0, 1), "da_dler": (0, 1), "laser": (-1, 1.5), "laser_d": (-1, 1.5),
    "laser_de": (-1, 1.5), "hapo": (-1, 2), "slpo": (0, 1.5), "sar": (-0.2, 1.2), "surrogate": (-1, 2), "longwriter": (0, 1), "longwriter_zero": (0, 3),
    "mash": (0, 1), "ruler": (0, 1), "repetition": (0, 1), "repetition_penalty": (-1, 0), "train_long_think_short": (0, 1),
    "adaptive_deep_reasoning": (0, 1.5), "l1_max": (0, 1), "alp": (-0.2, 1), "dot": (0, 1), "gr3": (0, 1),
    "reseek": (-1.8, 1.9), "re_searcher": (0, 1.2), "ppr": (-1, 1),
    "toolrl": (-3, 4), "search_gen_v": (0, 1), "contrastive_sql": (0, 1.2), "r3": (0, 0.04), "ace_rl": (0, 1), "hybrid": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BOUNDS))
@FAST
@given(batch=batches())
def test_rewards_stay_within_their_bounds(name, batch):
    values = taught(name, batch)(batch).values
    low, high = BOUNDS[name]
    assert (values >= low - 1e-12).all() and (values <= high + 1e-12).all()


@FAST
@given(st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.booleans()), min_size=1, max_size=20))
def test_renorm_never_pays_a_wrong_outcome_nor_charges_a_right_one(steps):
    process, outcome = np.array([p for p, _ in steps]), np.array([o for _, o in steps])
    found = renorm(process, outcome)
    assert (found[outcome] >= 0).all() and (found[~outcome] <= 0).all()


def test_hapo_only_ever_lowers_its_history():
    reward, random, seen = HAPO(), np.random.default_rng(0), []
    for _ in range(20):
        reward(batch_of(random.random(8) < 0.5, random.integers(1, 100, 8)))
        seen.append(reward.history.get("q", (np.inf, 0))[0])
    assert (np.diff([s for s in seen if np.isfinite(s)]) <= 0).all() and seen[-1] < 20


def test_hapo_with_a_mean_history_averages_all_right_answers():
    reward = HAPO(memory="mean")
    reward(batch_of([1, 1, 0], [10, 20, 99]))
    reward(batch_of([1], [60]))
    assert reward.history == {"q": (30.0, 3)}


# --- states --------------------------------------------------------------------------------------------------


def learned(reward) -> str:
    return json.dumps(reward.state_dict(), sort_keys=True)


def drawn(step: int, split: str = "train") -> RewardBatch:
    """Different every step, the same every time."""
    random = np.random.default_rng(step)
    ids = [f"q{k}" for k in range(4) for _ in range(8)]
    return full_batch(random.random(32) < 0.5, random.integers(1, 120, 32), ids, seed=step, step=step, split=split)


@pytest.mark.parametrize("name", STATEFUL)
def test_evaluation_never_changes_a_state_and_training_does(name):
    reward = every_reward()[name]
    fresh = learned(reward)
    reward(drawn(0, "eval"))
    assert learned(reward) == fresh
    reward(drawn(0))
    assert learned(reward) != fresh


@pytest.mark.parametrize("name", sorted({*STATEFUL} - {"mash"}))  # its least cost includes the group's own, as published
def test_a_reward_is_scored_before_it_learns_from_the_batch(name):
    reward = every_reward()[name]
    for step in range(3):
        asked = reward(drawn(step, "eval")).values
        assert_allclose(reward(drawn(step)).values, asked)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(name):
    whole, before = every_reward()[name], every_reward()[name]
    for step in range(5):
        whole(drawn(step))
        before(drawn(step))
    after = every_reward()[name]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step in range(5, 9):
        assert_allclose(after(drawn(step)).values, whole(drawn(step)).values)
    assert learned(after) == learned(whole)


def test_states_of_parts_are_saved_by_name():
    one, two = (rewards.WeightedSum(((1.0, HAPO()), (0.5, MASH(block=16)), (0.1, rewards.ALL["format"].make()))) for _ in range(2))
    one(drawn(0))
    assert set(one.state_dict()) == {"hapo", "mash"}
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == json.loads(json.dumps(one.state_dict()))
    with pytest.raises(KeyError, match="slpo"):
        two.load_state_dict({"slpo": {}})
    assert rewards.WeightedSum(((1.0, AroraZanette()),)).state_dict() == {}


def test_laser_targets_follow_training_every_n_generations_however_many_updates_share_one():
    for updates in (1, 2, 8):
        state, seen = TargetState(TargetSettings(20, 10, 100, every=2)), []
        for generation, tokens in enumerate([55, 75, 55, 35]):
            state.observe(batch_of([1] * 8, [tokens] * 8, step=updates * generation))
            seen.append(state.lengths_for(1000)[0])
        assert seen == [20, 60, 60, 40], "a sixth of the responses has to be within, and no others are looked at than the last two"


def test_laser_targets_are_those_of_the_released_function_for_both_roundings():
    random = np.random.default_rng(0)
    for rounding in ("ceil", "floor"):
        targets = TargetSettings(20, 10, 100, rounding=rounding)
        for bucket, level in enumerate(("high", "medium", "low")):
            for _ in range(50):
                lengths, longest = random.integers(1, 150, random.integers(1, 12)), int(random.integers(1, 150))
                wanted = released_target(lengths, longest, level, rounding)
                assert targets.length(bucket, lengths, longest) == wanted


def released_target(lengths, longest: int, level: str, rounding: str) -> int:
    """The released rule in a loop: the longest response of the training batch, unless a shorter length of the grid is enough."""
    found = longest
    for length in range(20, 101, 10):
        share = sum(n <= length for n in lengths) / len(lengths)
        whole = int if rounding == "floor" else lambda x: -int(-x // 1)
        least = {"high": whole(16 / 3), "medium": whole(8 / 3), "low": 1}[level]
        expected = share * least if rounding == "ceil" else int(share * least + 1e-9)
        if expected >= 1 - 1e-9 and length < found:
            found = length
    return found


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
def test_where_no_length_of_the_grid_is_enough_laser_d_pays_every_right_answer_of_the_batch(rounding):
    reward = LaserD(targets=TargetSettings(20, 10, 100, every=2, rounding=rounding))
    hard = dict(correct=[1] + [0] * 7, tokens=[200] * 8)
    assert reward(batch_of(**hard)).components["length"][0] == 0  # the first target of every bucket
    reward(batch_of(**hard))
    assert reward.state.lengths == [20, 20, 200]
    longer = reward(batch_of([1] + [0] * 7, [300] + [90] * 7))
    assert longer.components["length"][0] == reward.alpha and reward.state.lengths[2] == 300


def test_laser_targets_from_a_monitoring_set_replace_what_training_showed():
    state = TargetState(TargetSettings(20, 10, 100, every=2))
    state.observe(batch_of([1] * 8, [90] * 8))
    assert state.due
    state.monitor(batch_of([1] * 8, [35] * 8, split="eval"))
    assert state.lengths == [40, 20, 20] and state.state_dict()["seen"] == [[], [], []]
    due = []
    for tokens in (90, 95, 99):
        state.observe(batch_of([1] * 8, [tokens] * 8))
        due.append(state.due)
    assert state.lengths == [40, 20, 20], "from then on training rollouts set no length"
    assert due == [False, True, True]


# --- speed ---------------------------------------------------------------------------------------------------

BY_TEXT = (
    "ace_rl",
    "contrastive_sql",
    "fine_grained",
    "page_llm",
    "longwriter_zero",
    "ppr",
    "r3",
    "re_searcher",
    "reseek",
    "search_gen_v",
    "toolrl",
)
CLOSED_FORMS = sorted(
    set(rewards.ALL) - {"repetition", "repetition_penalty", "laser_de", "surrogate", *BY_TEXT, *STATEFUL}
)  # those look at every token or text, or keep a number per problem


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_score_a_million_rows_a_second(name):
    n, random = 400_000, np.random.default_rng(0)
    columns = {
        "correct": random.random(n) < 0.5,
        "tokens": random.integers(1, 200, n),
        "closed": np.ones(n, bool),
        "think_closed": np.ones(n, bool),
        "formatted": random.random(n) < 0.9,
        "finish": object_array(["stop", "length"] * (n // 2)),
        "mode": object_array(["short", "long"] * (n // 2)),
        "target_tokens": np.full(n, 30),
        "low_tokens": np.full(n, 20),
        "high_tokens": np.full(n, 40),
        "budget": np.full(n, 50),
        "conciseness": random.uniform(0.1, 1, n),
        "rule_confidence": random.random(n),
        "model_score": random.random(n),
        **{k: -random.random(n) for k in ("logprob", "logprob_without")},
        **{k: random.random(n) for k in ("think_entropy", "answer_entropy")},
    }
    ids = object_array(f"q{k}" for k in random.permutation(np.repeat(np.arange(n // 8), 8)))
    reward = every_reward()[name]
    best = min(_seconds(reward, {"problem_id": ids, **columns}) for _ in range(3))
    assert n / best > 1e6, f"{n / best:.3g} rows a second"


def _seconds(reward, columns: dict[str, np.ndarray]) -> float:
    """Processor time to find the groups and score, whatever else the machine does."""
    start = time.process_time()
    reward(RewardBatch(columns))
    return time.process_time() - start
