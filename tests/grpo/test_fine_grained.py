"""Fine-Grained RLHF: rewards stand at the tokens where segments end, detectors find what generators planted, token advantages are a loop's."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit import rewards, tasks
from toolkit.generate import rollout_from_tokens
from toolkit.grpo import advantages, dense, recipes
from toolkit.grpo.run import Run, arguments, train
from toolkit.grpo.trainer import Trainer
from toolkit.rewards import RewardBatch
from toolkit.rewards.fine_grained import (
    FineGrained,
    Response,
    Segment,
    equations_hold,
    incomplete,
    irrelevant,
    sub_sentences,
    wrong_facts,
)
from toolkit.tags import ENDS_MESSAGE, FORMATS
from toolkit.tasks import arithmetic
from toolkit.tasks.generators import traces

CLUMSY = traces.Habits(slip_easy=0.4, slip_hard=0.4, wait_calm=0.4, wait_hasty=0.3)


def written(n: int = 60):
    """Problems with traces full of slips and re-checks."""
    rng = random.Random(0)
    for problem in arithmetic.load("train", n):
        trace = arithmetic.write_trace(problem, rng, CLUMSY)
        text = f"<think>{trace.text}</think>{trace.conclusion}"
        yield problem, trace, Response(text, problem.messages[0]["content"], trace.conclusion, trace.conclusion == problem.answer)


# --- detectors ---------------------------------------------------------------------------------------------------


def test_the_detector_of_facts_finds_the_planted_slips_and_no_others():
    found, planted = 0, 0
    for _, trace, response in written():
        lines = trace.text.splitlines()
        ends = np.cumsum([len("<think>"), *(len(line) + 1 for line in lines)])[1:] - 1
        expected = {end: -1.0 if i in trace.failed_lines else 1.0 for i, end in enumerate(ends) if not lines[i].startswith("=")}
        assert dict(wrong_facts(response)) == expected
        found, planted = found + list(expected.values()).count(-1.0), planted + len(trace.failed_lines)
    assert found == planted > 50


def test_the_detector_of_relevance_finds_repeated_lines_and_foreign_numbers():
    flagged = 0
    for problem, trace, response in written():
        seen, expected = set(), []
        for line in trace.text.splitlines():
            bare = line.replace("wait ", "").replace(" ok", "").replace(" fix", "")
            expected.append(-1.0 if bare in seen else 1.0)
            seen.add(bare)
        # The trace calculates with numbers of the problem and its own results alone, so that nothing is foreign.
        assert [s for _, s in irrelevant(response)] == expected
        flagged += expected.count(-1.0)
        foreign = response._replace(text=response.text.replace("<think>", "<think>111+222=333\n"))
        assert irrelevant(foreign)[0].score == -1 and wrong_facts(foreign)[0].score == 1
        assert problem.answer
    assert flagged > 10


def test_a_missing_answer_is_worse_than_a_wrong_one():
    base = Response("<think>3+4=7\n</think>7", "3+4=?", "7", True)
    assert incomplete(base) == [(len(base.text), 1.0)]
    assert incomplete(base._replace(correct=False))[0].score == 0
    assert incomplete(base._replace(correct=False, answer="unsure"))[0].score == -1


@pytest.mark.parametrize("answer", ["The answer is 3+4=8, no 7", "7", ""])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_with_other_think_tags_is_paid_the_same(name, answer):
    """The equation in the answer is wrong, and the answer is no line of thinking."""
    thinking, paid = "3+4=7\nwait 3+4=7 ok\n7-9=2\n", []
    for tags in (FORMATS["<think>"].tags, FORMATS[name].tags):
        text = f"{tags.open}{thinking}{ENDS_MESSAGE.get(tags.close, '')}{tags.close}{answer}<|end|>"
        batch = RewardBatch.from_columns(text=text, question="3+4-9=?", answer_text=answer, correct=bool(answer))
        paid.append({kind: values.tolist() for kind, values in FineGrained()(batch).components.items()})
        scored = wrong_facts(Response(text, "", answer, True))
        assert [text[: s.stop].removeprefix(tags.open).splitlines()[-1] for s in scored] == thinking.splitlines()
    assert paid[0] == paid[1] == {
        "relevance": [pytest.approx(0.3)], "facts": [pytest.approx(0.5)], "complete": [0.3 if answer else -0.3],
    }  # fmt: skip


@given(st.text(alphabet="ab ,;.!\n", max_size=60))
def test_sub_sentences_hold_every_word_once_and_those_cut_inside_a_line_have_five_words(text):
    ranges = sub_sentences(text)
    assert " ".join(text[a:b] for a, b in ranges).split() == text.split()
    for (_, b), (c, _) in pairwise(ranges):
        assert b <= c
    for a, b in ranges:
        rest = text[b:].partition("\n")[0]
        assert not rest.strip() or len(text[a:b].split()) >= 5


@pytest.mark.parametrize(("line", "holds"), [("17 + 5 = 22", True), ("3-4=-1 and 2+2=5", False), ("=36", None), ("1*2=3", None)])
def test_equations_of_plus_and_minus_are_checked(line, holds):
    assert equations_hold(line) is holds


# --- placing -----------------------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet="ab", max_size=3), min_size=1, max_size=8), st.data())
def test_a_reward_stands_at_the_token_of_its_segments_last_character(texts, data):
    owner = [t for t, text in enumerate(texts) for _ in text]  # token of each character
    if not owner:
        return
    stops = data.draw(st.lists(st.integers(1, len(owner)), max_size=5))
    segments = [Segment(stop, "k", 0.5 + i) for i, stop in enumerate(stops)]
    expected = np.zeros(len(texts))
    for s in segments:
        expected[owner[s.stop - 1]] += s.value
    assert_allclose(dense.token_rewards(texts, segments), expected)
    ratio = np.linspace(-1, 1, len(texts)).tolist()
    assert_allclose(dense.token_rewards(texts, segments, log_ratio=ratio, beta=0.3), expected - 0.3 * np.array(ratio))


def test_the_printed_example_of_the_specification():
    """Six tokens, sentences that end at tokens 2 and 5: relevance 0.3 each, facts wrong then right."""
    segments = [Segment(3, "relevance", 0.3), Segment(3, "facts", -0.5), Segment(6, "relevance", 0.3), Segment(6, "facts", 0.5)]
    assert_allclose(dense.token_rewards(list("abcdef"), segments), [0, 0, 0.3 - 0.5, 0, 0, 0.3 + 0.5])


def test_the_rewards_of_tokens_add_up_to_that_of_the_response_and_wrong_steps_are_charged_where_they_end(tiny):
    rollouts, problems = [], []
    for problem, trace, _ in written(12):
        ids = tiny.tokenizer(f"<think>{trace.text}</think>{trace.conclusion}<|end|>", add_special_tokens=False)["input_ids"]
        rollouts.append(rollout_from_tokens(tiny, problem, tiny.prompt_ids(problem.messages), ids))
        problems.append(problem)
    reward, batch = FineGrained(), RewardBatch.from_rollouts(rollouts, problems)
    tokens = dense.batch_rewards(tiny, rollouts, reward.segments(batch))
    assert_allclose(tokens.sum(axis=1), reward(batch).values)
    facts = dense.batch_rewards(tiny, rollouts, FineGrained({"facts": 1.0}).segments(batch))
    for row, rollout in zip(facts, rollouts, strict=True):
        wrong = [tiny.text(rollout.token_ids[rollout.prompt_len :][: t + 1]).splitlines()[-1] for t in np.flatnonzero(row < 0)]
        assert all(equations_hold(line) is False for line in wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense.token_rewards(["ab"], [Segment(3, "k", 1.0)]), "ends at character 3 of a response of 2"),
        (lambda: dense.token_rewards(["ab"], [], log_ratio=[0.1, 0.2]), "2 log-ratios of 1 tokens"),
        (lambda: FineGrained({"style": 1.0}), "No detector of the error type 'style'"),
        (lambda: FineGrained({"facts": -1.0}), "numbers of 0 or more"),
        (lambda: replace(recipes.fine_grained(), filter=recipes.gfpo().filter, samples=16), "one per token"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_pay_for_right_steps_more_of_them_change_nothing():
    short, long = "<think>3+4=7\n</think>", "<think>3+4=7\n7+1=8\n8-1=7\n</think>"
    batch = RewardBatch.from_columns(text=[short + "7", long + "7"], question="3+4+1-1=?", answer_text="7", correct=True)
    paid, unpaid = FineGrained()(batch).values, FineGrained(assumed_right_step=0.0)(batch).values
    assert paid[1] > paid[0] and unpaid[0] == unpaid[1]


# --- advantages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rewards_to_go_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    groups, lengths, width = rng.integers(0, 3, 9), rng.integers(1, 8, 9), 8
    r = rng.normal(size=(9, width)) * (np.arange(width) < lengths[:, None])
    values = advantages.reward_to_go(r, groups)
    for g in set(groups.tolist()):
        rows = [i for i in range(9) if groups[i] == g]
        longest = max(lengths[i] for i in rows)
        to_go = {(i, t): sum(r[i, t:]) for i in rows for t in range(width)}
        centred = {(i, t): to_go[i, t] - np.mean([to_go[j, t] for j in rows]) for i in rows for t in range(width)}
        scale = np.sqrt(np.mean([centred[i, t] ** 2 for i in rows for t in range(longest)])) + 1e-4
        for (i, t), value in centred.items():
            assert values[i, t] == pytest.approx(value / scale, abs=1e-9)


def test_paid_at_the_end_alone_all_tokens_have_the_advantage_of_dr_grpo_up_to_scale():
    r, groups = np.zeros((4, 6)), np.array([0, 0, 0, 0])
    r[:, 5] = [1.0, 0.0, 1.0, 0.5]
    values = advantages.reward_to_go(r, groups)
    assert_allclose(values, np.repeat(values[:, :1], 6, axis=1))
    plain = advantages.dr_grpo(r[:, [5]], groups, np.full(4, 6))
    assert_allclose(values[:, 0] / values[0, 0], plain / plain[0])


def test_another_group_or_a_wider_batch_changes_no_advantage():
    rng = np.random.default_rng(0)
    r, groups = rng.normal(size=(6, 5)), np.array([0, 0, 0, 1, 1, 1])
    alone = advantages.reward_to_go(r[:3], groups[:3])
    wide = advantages.reward_to_go(np.pad(r, ((0, 0), (0, 4))), groups)
    assert_allclose(wide[:3, :5], alone)
    assert (wide[:, 5:] == 0).all()
    assert (advantages.reward_to_go(np.ones((1, 3)), np.array([0])) == 0).all()


# --- training ----------------------------------------------------------------------------------------------------


def test_a_step_of_training_charges_tokens_and_changes_the_model(tiny, tmp_path):
    recipe = replace(recipes.fine_grained().scaled(), problems=4, max_tokens=60)
    problems = tasks.load("arithmetic", "train", 16)
    done = train(tiny, recipe, problems, Run(tmp_path / "run", steps=1, evaluate_every=0))
    assert done.lm.fingerprint != tiny.fingerprint and done.log["grad_norm"].iloc[-1] > 0
    trainer = Trainer(replace(tiny, model=deepcopy(tiny.model)), recipe, problems, arguments(tiny, recipe, Run(tmp_path, steps=1)))
    rows = [row for row in trainer.train_dataset.select(range(4)) for _ in range(recipe.samples)]
    output = trainer._generate_and_score_completions(rows)
    values = output["advantages"].numpy()
    assert values.shape == output["completion_ids"].shape and not (values == values[:, :1]).all()
    with pytest.raises(ValueError, match="needs a reward per segment, which 'correctness' has not"):
        Trainer(tiny, replace(recipe, reward="correctness"), problems, arguments(tiny, recipe, Run(tmp_path, steps=1)))


def test_the_reward_is_in_the_table():
    assert rewards.ALL["fine_grained"].make().name == "fine_grained" and recipes.find("fine_grained").advantage == "reward_to_go"
