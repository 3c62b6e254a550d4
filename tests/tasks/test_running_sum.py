"""Running sums: totals that python agrees with, lines read as a reader would, horizons that the formula and a simulation share."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import accumulate, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import generate, store, tasks
from toolkit.tasks import arithmetic, grading, running_sum, splits
from toolkit.tasks.generators import episodes, traces
from toolkit.tasks.generators.episodes import (
    answer,
    inject_history_errors,
    play,
    read_answer,
    running_sum_episodes,
    with_history_errors,
)
from toolkit.tasks.grading import execution
from toolkit.tasks.grading.execution import horizon_length, judge
from toolkit.types import Problem

SLOPPY = traces.Habits(slip_easy=0.3, slip_hard=0.3, wait_calm=0.3, wait_hasty=0.3, default_haste=0.1)

# --- the horizon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "first_below"), [(0.9, 7), (0.95, 14), (0.99, 69), (0.995, 139), (0.999, 693)])
def test_horizons_are_the_published_ones(p, first_below):
    assert horizon_length(p) == first_below == math.ceil(math.log(0.5) / math.log(p))
    assert horizon_length(p, convention="last_above") == first_below - 1


@given(st.floats(0.01, 0.9999), st.floats(0.01, 0.99))
def test_a_horizon_is_where_the_power_passes_the_threshold(p, s):
    below, above = horizon_length(p, s), horizon_length(p, s, "last_above")
    assert below == above + 1
    assert p**below < s * (1 + 1e-6) and p**above >= s * (1 - 1e-6)


def test_horizons_at_the_edges():
    assert horizon_length(1.0) == horizon_length(1.0, convention="last_above") == math.inf
    assert (horizon_length(0.0), horizon_length(0.0, convention="last_above")) == (1, 0)
    assert (horizon_length(0.5), horizon_length(0.5, convention="last_above")) == (2, 1), "p^1 = s is reached, not passed"
    assert horizon_length(0.5 ** (1 / 3), convention="last_above") == 3


@pytest.mark.parametrize(
    ("p", "s", "convention"), [(1.1, 0.5, "first_below"), (-0.1, 0.5, "last_above"), (0.9, 0, "first_below"), (0.9, 0.5, "ceil")]
)
def test_a_horizon_of_nonsense_is_refused(p, s, convention):
    with pytest.raises(ValueError, match=re.escape(f"p={p}, s={s}, convention={convention!r}: need 0 <= p <= 1")):
        horizon_length(p, s, convention)


def test_a_simulated_executor_falls_through_the_threshold_where_the_formula_says():
    """Of 3000 executors with p = 0.95 that never mend anything, fewer than half are right for the first time after 14 steps."""
    rng = np.random.default_rng(0)
    slips = rng.random((3000, 40)) > 0.95
    found = [judge(list(np.cumsum(1 + row).tolist()), [1] * 40) for row in slips]
    table = execution.execution_metrics(found)
    assert int(table.turn[table.prefix < 0.5].min()) in (13, 14, 15)
    assert execution.step_accuracy(found).mean == pytest.approx(0.95, abs=0.005)
    assert table.prefix.to_numpy() == pytest.approx(0.95 ** table.turn.to_numpy(), abs=0.03)
    assert (table.prefix_low <= table.prefix).all() and (table.prefix <= table.prefix_high).all()


# --- judging -------------------------------------------------------------------------------------------------


def naive(outputs, deltas, start):
    """Step by step, as one would by hand."""
    truth, steps_, turns = list(accumulate(deltas, initial=start))[1:], [], []
    for t, y in enumerate(outputs):
        if y is None:
            steps_.append(None)
            turns.append(None if any(z is not None for z in outputs[t:]) else False)
            continue
        at, base = next(((s, outputs[s]) for s in range(t - 1, -1, -1) if outputs[s] is not None), (-1, start))
        steps_.append(y == base + sum(deltas[at + 1 : t + 1]))
        turns.append(y == truth[t])
    return tuple(steps_), tuple(turns), tuple(all(v is not False for v in turns[: t + 1]) for t in range(len(turns)))


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.one_of(st.none(), st.integers(-6, 6))), min_size=1, max_size=8), st.integers(-3, 3)
)
def test_judging_is_what_one_would_do_by_hand(turns, start):
    deltas, outputs = [d for d, _ in turns], [y for _, y in turns]
    e = judge(outputs, deltas, start=start)
    assert (e.step, e.turn, e.prefix) == naive(outputs, deltas, start)


def test_one_slip_is_one_wrong_step_and_wrong_turns_ever_after():
    e = judge([5, 9, 10, 12], [5, 3, 1, 2])
    assert e.step == (True, False, True, True)
    assert e.turn == (True, False, False, False) == e.prefix
    assert e.step_accuracy == 0.75 and not e.final and e.stated == 1


def test_two_slips_that_cancel_leave_the_end_right_and_the_prefix_wrong():
    e = judge([6, 8, 9], [5, 3, 1])
    assert e.step == (False, False, True) and e.turn == (False, True, True) and e.prefix == (False,) * 3 and e.final


def test_an_unreadable_answer_keeps_the_value_before_it():
    assert execution.carry_forward([3, None, None, 4]) == [3, 3, 3, 4]
    assert execution.carry_forward([None, 2], start=7) == [7, 2]


def test_nothing_to_judge_is_refused():
    with pytest.raises(ValueError, match="2 outputs for 1 turns: give one per turn"):
        judge([1, 2], [1])
    with pytest.raises(ValueError, match="0 outputs for 0 turns"):
        judge([], [])
    with pytest.raises(ValueError, match="No executions to measure"):
        execution.execution_metrics([])
    with pytest.raises(ValueError, match="None of the 1 executions states a total"):
        execution.step_accuracy([judge([None], [1])])
    with pytest.raises(ValueError, match="1 answers for 2 executions"):
        execution.by_horizon([judge([1], [1])] * 2, [True])
    with pytest.raises(ValueError, match=r"1 answers for 1 executions, p=1\.2: .* p from 0 to 1"):
        execution.by_horizon([judge([1], [1])], p=1.2)


def test_accuracy_by_horizon_stands_beside_the_power():
    right, wrong = judge([1, 2], [1, 1]), judge([1, 3], [1, 1])
    table = execution.by_horizon([right, wrong, judge([1], [1])])
    assert table.horizon.tolist() == [1, 2] and table.n.tolist() == [1, 2]
    assert table.final.tolist() == [1, 0.5] and table.step.tolist() == [1, 0.75]
    assert table.expected.tolist() == pytest.approx([1, 0.75**2]) and table.stated.tolist() == [1, 1]
    assert execution.by_horizon([right, wrong], p=0.9).expected.tolist() == pytest.approx([0.81])
    assert math.isnan(execution.by_horizon([judge([None], [1])]).expected[0])
    assert execution.by_horizon([right, wrong], [False, False]).final.tolist() == [0]


def test_metrics_leave_out_what_was_jumped_over():
    table = execution.execution_metrics([judge([None, 2], [1, 1]), judge([1, 2, 9], [1, 1, 1])])
    assert table.n.tolist() == [2, 2, 1] and table.stated.tolist() == [0.5, 1, 1]
    assert table.step.tolist() == [1, 1, 0] and table.prefix.tolist() == [1, 1, 0]
    assert math.isnan(execution.execution_metrics([judge([None, 2], [1, 1])]).step[0])


# --- chains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", splits.SPLITS)
def test_chains_are_right_and_stay_in_range(split):
    for p in running_sum.load(split, 60, seed=1):
        assert p.messages[0]["content"] == f"{p.meta['expression']}=?"
        assert int(p.answer) == eval(p.meta["expression"]) == running_sum.totals(p)[-1]
        assert min(running_sum.totals(p)) >= 0 and max(running_sum.totals(p)) <= arithmetic.LARGEST
        assert p.meta["difficulty"] == len(p.meta["deltas"]) and p.meta["longer"] == (len(p.meta["deltas"]) > 7)
        assert p.meta["split"] == split == splits.split_of(p.meta["expression"])
        assert grading.grade(p, p.answer) and not grading.grade(p, str(int(p.answer) + 1))


def test_chains_have_the_horizon_asked_for_and_one_seed_gives_the_same_ones():
    assert {p.meta["difficulty"] for p in running_sum.load("test", 20, horizons=(40, 40))} == {40}
    assert tasks.load("running_sum", "dev", 20, 3) == running_sum.load("dev", 20, 3) != running_sum.load("dev", 20, 4)


def test_no_chain_is_in_two_splits_or_was_trained_on():
    found = {split: {p.meta["expression"] for p in running_sum.load(split, 150, horizons=(1, 4))} for split in splits.SPLITS}
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))
    trained = {p.meta["expression"] for p in arithmetic.load("train", 500, operands=(2, 4))}
    assert not trained & (found["test"] | found["dev"])


def test_chains_are_in_the_tiny_reasoners_alphabet(tiny):
    for p in running_sum.load("test", 20):
        assert tiny.tokenizer.unk_token_id not in tiny.prompt_ids(p.messages)


@pytest.mark.parametrize("horizons", [(0, 4), (5, 3)])
def test_bad_horizons_are_refused(horizons):
    with pytest.raises(ValueError, match=re.escape(f"horizons={horizons}: give an inclusive range of additions from 1 up")):
        running_sum.load("test", 2, horizons=horizons)
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        running_sum.load("validation", 2)


def chain(expression: str) -> Problem:
    start, *deltas = (int(v) for v in re.findall(r"[+-]?\d+", expression))
    return Problem("p", (), str(start + sum(deltas)), {"start": start, "deltas": tuple(deltas)})


@pytest.mark.parametrize(
    ("text", "outputs", "step"),
    [
        ("17+5=22\n22-9=13\n13+4=17\n", (22, 13, 17), (True, True, True)),
        ("17+5-9=13\n13+4=17\n", (None, 13, 17), (None, True, True)),  # two at once
        ("17+5=22\n=17\n", (22, None, 17), (True, None, True)),  # the rest in the head
        ("=18\n", (None, None, 18), (None, None, False)),
        ("17+5=23\nwait 17+5=22 fix\n22-9=13\n13+4=17", (22, 13, 17), (True, True, True)),  # mended in time
        ("17+5=23\n23-9=14\n14+4=18", (23, 14, 18), (False, True, True)),  # carried along
        ("17+5=22\n32-9=23\n23+4=27", (22, 23, 27), (True, False, True)),  # copied wrongly
        ("17+5=22\n22+4=26", (22, None, 26), (True, None, False)),  # one left out
        ("17+5=22\n22-9=13\n13-9=4\n4+4=8", (22, 4, 8), (True, False, True)),  # one done twice
        ("17+5=22\n22-8=14\n14+4=18", (22, 14, 18), (True, False, True)),  # misread
        ("17+5=22\n22-9", (22, None, None), (True, None, None)),  # cut off
        ("", (None, None, None), (None, None, None)),
        ("let me see\n17+5=22", (22, None, None), (True, None, None)),
    ],
)
def test_thinking_is_read_as_a_reader_would(text, outputs, step):
    e = running_sum.execution_of(chain("17+5-9+4"), text)
    assert (e.outputs, e.step) == (outputs, step)


def test_an_early_slip_of_alignment_does_not_spoil_the_steps_after_it():
    e = running_sum.execution_of(chain("1+2+3+4+5+6"), "1+3=4\n4+4=8\n8+5=13\n13+6=19")
    assert e.step == (None, False, True, True, True) and not e.final


@pytest.mark.parametrize("habits", [traces.Habits(), SLOPPY], ids=["as trained", "sloppy"])
def test_written_traces_are_wrong_exactly_where_the_writer_slipped(habits):
    """The writer of the training traces is the oracle: every slip that was not mended is one wrong step."""
    rng, slips, problems = random.Random(0), 0, arithmetic.load("train", 200, operands=(4, 8))
    for p in problems:
        trace = arithmetic.write_trace(p, rng, habits)
        e = running_sum.execution_of(chain(p.meta["expression"]), trace.text)
        lines = trace.text.splitlines()
        left = [i for i in trace.failed_lines if not (i + 1 < len(lines) and lines[i + 1].endswith(" fix"))]
        assert sum(s is False for s in e.step) == len(left)
        assert e.outputs[-1] == int(trace.conclusion) and e.final == (trace.conclusion == p.answer)
        assert e.stated == len([i for i in lines if not i.startswith("wait")]) / (p.meta["difficulty"] - 1)
        slips += len(left)
    assert slips > (30 if habits is SLOPPY else 0)


@given(st.lists(st.integers(-9, 9), max_size=12), st.lists(st.integers(-9, 9), max_size=12))
def test_alignment_goes_forward_and_finds_what_is_there(written, asked):
    found = running_sum.align(written, asked)
    assert len(found) == len(written) and found == sorted(found) and all(0 <= j <= len(asked) for j in found)
    assert running_sum.align(asked, asked) == list(range(1, len(asked) + 1))
    assert running_sum.align(asked[:3], asked) == list(range(1, len(asked[:3]) + 1))


def test_rollouts_of_the_tiny_reasoner_are_read_from_their_tokens(tiny):
    problems = running_sum.load("test", 4, horizons=(2, 3))
    found = generate.rollouts(tiny, problems, generate.Sampling(n=1, temperature=0.0, max_new_tokens=120))
    for r, p in zip(found, problems, strict=True):
        think = tiny.text(r.token_ids[r.think.start : r.think.stop])
        assert running_sum.read_rollout(tiny, r, p) == running_sum.execution_of(p, think)
    assert execution.step_accuracy([running_sum.read_rollout(tiny, r, p) for r, p in zip(found, problems, strict=True)]).mean > 0.5


def test_a_problem_of_another_task_is_not_read():
    with pytest.raises(ValueError, match=r"is of task 'arithmetic' and has no deltas: give a problem of running_sum\.load"):
        running_sum.execution_of(arithmetic.load("test", 1)[0], "1+1=2")


# --- episodes ------------------------------------------------------------------------------------------------


def oracle(problems: list[Problem]) -> list[str]:
    """Reads nothing but the conversation: the dictionary, its last total, the keys."""
    texts = []
    for p in problems:
        known = {w: int(v) for w, v in re.findall(r"(\w+): (-?\d+)", p.messages[0]["content"])}
        before = [read_answer(m["content"]) for m in p.messages if m["role"] == "assistant"]
        keys = p.messages[-1]["content"].rpartition("Keys: ")[2].split(", ")
        texts.append(answer(execution.carry_forward(before or [0])[-1] + sum(known[key] for key in keys)))
    return texts


@pytest.mark.parametrize("keys", [1, 3])
def test_an_oracle_plays_every_episode_without_a_mistake(keys):
    found = running_sum_episodes(3, 6, keys, seed=2, size=20)
    assert all(e.final and e.step_accuracy == 1 and all(e.prefix) for e in play(found, oracle))
    for episode in found:
        assert all(len(turn) == keys for turn in episode.turns) and len(episode.turns) == 6 and len(episode.values) == 20
        p = episodes.problem(episode)
        assert int(p.answer) == episode.totals[-1] == p.meta["truth"] and p.meta["difficulty"] == 6
        assert grading.grade(p, oracle([p])[0]) and len(p.messages) == 11


def test_words_and_values_are_the_papers():
    assert len(set(episodes.WORDS)) == len(episodes.WORDS) >= 100 and {len(w) for w in episodes.WORDS} == {5}
    values = {v for e in running_sum_episodes(20, 1) for _, v in e.values}
    assert min(values) >= -99 and max(values) <= 99 and len(values) > 150


def test_episodes_are_seeded_and_their_splits_disjoint():
    assert running_sum_episodes(3, 4, seed=1) == running_sum_episodes(3, 4, seed=1) != running_sum_episodes(3, 4, seed=2)
    found = {s: {e.id for seed in (0, 1) for e in running_sum_episodes(20, 2, seed=seed, split=s, size=3)} for s in splits.SPLITS}
    assert not any(found[a] & found[b] for a, b in combinations(found, 2))


def test_a_player_who_slips_once_is_wrong_for_one_step():
    (episode,) = running_sum_episodes(1, 5, size=10)

    def ask(problems):
        return [answer(read_answer(text) + (p.meta["difficulty"] == 2)) for p, text in zip(problems, oracle(problems), strict=True)]

    (e,) = play([episode], ask)
    assert e.step == (True, False, True, True, True) and e.turn == (True, False, False, False, False)


def test_an_unreadable_turn_counts_as_the_value_before():
    (episode,) = running_sum_episodes(1, 3, size=10)
    (e,) = play(
        [episode],
        lambda problems: ["hm" if p.meta["difficulty"] == 2 else t for p, t in zip(problems, oracle(problems), strict=True)],
    )
    assert e.outputs[1] == e.outputs[0] and e.step[1] is (episode.deltas[1] == 0)


def test_a_player_has_to_answer_everything_and_nothing_comes_after_the_last_turn():
    (episode,) = running_sum_episodes(1, 2, size=5)
    with pytest.raises(ValueError, match="ask gave 0 answers to 1 problems"):
        play([episode], lambda problems: [])
    with pytest.raises(ValueError, match=r"2 answers were given, and .* has 2 turns: give fewer answers"):
        episodes.problem(episode, ["<answer>1</answer>"] * 2)


@pytest.mark.parametrize("bad", [{"n": 0}, {"horizon": 0}, {"keys_per_turn": 0}, {"size": 0}, {"size": 500}])
def test_bad_episodes_are_refused(bad):
    with pytest.raises(ValueError, match=re.escape(next(f"{k}={v}" for k, v in bad.items()))):
        running_sum_episodes(**{"n": 1, "horizon": 2, **bad})
    with pytest.raises(ValueError, match="Unknown split"):
        running_sum_episodes(1, 2, split="Test")


def test_answers_are_read_from_the_last_tags():
    assert read_answer("<answer>1</answer> no, <answer> -20 </answer>") == -20
    assert read_answer("20") is None and read_answer("<answer>x</answer>") is None


# --- self-conditioning ---------------------------------------------------------------------------------------


def history(n: int) -> tuple[dict[str, str], ...]:
    return tuple(m for i in range(n) for m in ({"role": "user", "content": "Keys"}, {"role": "assistant", "content": answer(i)}))


def test_injected_errors_are_never_none_and_as_many_as_asked_for():
    said = history(4000)
    changed = [int(read_answer(b["content"])) - i for i, b in enumerate(inject_history_errors(said, 0.3, 1)[1::2])]
    assert sum(c != 0 for c in changed) / 4000 == pytest.approx(0.3, abs=0.025), "the nominal rate, not 20/21 of it"
    everything = [read_answer(m["content"]) - i for i, m in enumerate(inject_history_errors(said, 1.0)[1::2])]
    assert set(everything) == set(range(-10, 11)) - {0}
    assert inject_history_errors(said, 0.0) == said and inject_history_errors(said, 0.3, 1)[::2] == said[::2]


def test_errors_at_a_low_rate_are_among_those_at_a_higher_one():
    low, high = (inject_history_errors(history(200), rate, 5) for rate in (0.1, 0.5))
    assert all(a == b for a, b, old in zip(low, high, history(200), strict=True) if a != old) and low != high


def test_after_wrong_answers_the_gold_answer_follows_from_the_last_one():
    for episode in running_sum_episodes(10, 5, size=10):
        p = with_history_errors(episodes.problem(episode), 1.0, 3)
        assert int(p.answer) == read_answer(p.messages[-2]["content"]) + episode.deltas[-1] != episode.totals[-1]
        assert p.meta["truth"] == episode.totals[-1] and grading.grade(p, oracle([p])[0])
        assert p.id != episodes.problem(episode).id


def test_nothing_to_make_wrong_is_refused():
    (episode,) = running_sum_episodes(1, 3, size=5)
    with pytest.raises(ValueError, match="None of the 1 messages is an answer"):
        with_history_errors(episodes.problem(episode, []))
    with pytest.raises(ValueError, match=r"rate=1\.5, noise=10: need a rate from 0 to 1"):
        inject_history_errors(history(1), 1.5)
    with pytest.raises(ValueError, match=r"rate=0\.1, noise=0"):
        inject_history_errors(history(1), noise=0)
    with pytest.raises(ValueError, match="is of task 'running_sum' and has no turns"):
        with_history_errors(running_sum.load("test", 1)[0])


def test_problems_go_through_a_file(tmp_path):
    own = [*running_sum.load("test", 2), episodes.problem(running_sum_episodes(1, 3, size=5)[0])]
    back = store.load_problems(store.save_problems(own, tmp_path / "p.jsonl"))
    assert [json.dumps(p.meta) for p in back] == [json.dumps(p.meta, sort_keys=True) for p in own]
    text = own[0].meta["expression"] + f"={own[0].answer}"
    assert running_sum.execution_of(back[0], text) == running_sum.execution_of(own[0], text)
