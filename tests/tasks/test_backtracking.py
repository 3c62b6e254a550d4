"""Countdown traces: every step recomputes, exactly k different dead ends, failed steps known; the checker is exact."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from toolkit import tasks
from toolkit.methods import failed_steps
from toolkit.tasks import countdown
from toolkit.tasks.generators import backtracking
from toolkit.tasks.generators.backtracking import NoDeadEndError
from toolkit.tasks.grading import grade
from toolkit.tasks.grading.countdown import verify


@pytest.fixture(scope="module")
def problems():
    return countdown.load("train", n=300)


def test_problems_are_distinct_repeatable_and_split_by_content(problems):
    assert [p.id for p in countdown.load("train", n=300)] == [p.id for p in problems]
    assert len({p.id for p in problems}) == 300
    others = {p.id for split in ("dev", "test") for p in countdown.load(split, n=60)}
    assert not others & {p.id for p in problems}
    assert tasks.load("countdown", "dev", n=5)[0].id == countdown.load("dev", n=5)[0].id


def test_solutions_recompute_use_every_number_once_and_meet_the_target_only_at_the_end(problems):
    for p in problems:
        moves, target = countdown.solution(p), p.meta["target"]
        value = moves[0].left
        for move in moves:
            assert move.left == value and eval(f"{move.left} {move.op} {move.right}") == move.result
            value = move.result
        assert value == target and all(m.result != target for m in moves[:-1])
        assert Counter([moves[0].left, *(m.right for m in moves)]) == Counter(p.meta["numbers"])
        assert 4 <= p.meta["difficulty"] <= 6 and 100 <= target <= 999
        assert verify(p.answer, p.meta["numbers"], target, every=True) and grade(p, f"It is {p.answer} = {target}.")


def test_smaller_values_and_targets_give_problems_within_them_and_bad_ranges_are_refused():
    small = countdown.load("train", n=60, numbers=(3, 3), values=(1, 12), targets=(10, 60))
    assert all(max(p.meta["numbers"]) <= 12 and 10 <= p.meta["target"] <= 60 and len(p.meta["numbers"]) == 3 for p in small)
    assert all(verify(p.answer, p.meta["numbers"], p.meta["target"], every=True) for p in small)
    for name in ("values", "targets"):
        with pytest.raises(ValueError, match=rf"{name}=\(0, 9\)"):
            countdown.load("train", n=1, **{name: (0, 9)})


def test_mismatched_traces_are_the_same_traces_and_none_is_at_its_own_problem():
    written = [f"trace {i}" for i in range(7)]
    found = [backtracking.mismatched(written, seed=s) for s in range(20)]
    assert all(sorted(one) == sorted(written) for one in found)
    assert all(a != b for one in found for a, b in zip(one, written, strict=True))
    assert len(set(map(tuple, found))) > 10 and found[3] == backtracking.mismatched(written, seed=3)
    with pytest.raises(ValueError, match="1 traces"):
        backtracking.mismatched(written[:1])


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_a_trace_has_exactly_k_different_dead_ends_and_ends_on_the_target(problems, k):
    for p in problems[:100]:
        found = backtracking.trace(p, k)
        assert found.dead_ends == k == found.text.count("Back to step")
        ends = [tuple(step.move for step in found.steps if step.dead_end == i) for i in range(k)]
        starts = [next(step.number for step in found.steps if step.dead_end == i) for i in range(k)]
        assert len(set(zip(starts, ends, strict=True))) == k
        right = [step.move for step in found.steps if step.dead_end is None]
        assert right == countdown.solution(p) and right[-1].result == p.meta["target"]
        assert all(move.result != p.meta["target"] for end in ends for move in end)


def test_dead_ends_use_the_numbers_left_and_leave_the_solution_at_once(problems):
    for p in problems[:100]:
        found, solution = backtracking.trace(p, 3), countdown.solution(p)
        for i in range(3):
            end = [step for step in found.steps if step.dead_end == i]
            start = end[0].number - 1
            assert end[0].move != solution[start]
            used = [m.right for m in solution[:start]] + [step.move.right for step in end]
            assert Counter([solution[0].left if start else end[0].move.left, *used]) == Counter(p.meta["numbers"])


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_the_cue_reader_finds_exactly_the_failed_steps(problems, k):
    reader = failed_steps.cued()
    for p in problems:
        found = backtracking.trace(p, k, seed=1)
        read = reader.read(found.text)
        assert tuple(i for i, failed in enumerate(read.failed) if failed) == found.failed
        assert len(read.texts) == len(found.steps)


def test_every_line_of_a_trace_recomputes(problems):
    for p in problems[:50]:
        lines = re.findall(r"Step (\d+): (\d+) ([-+*/]) (\d+) = (\d+)\.", backtracking.trace(p, 2).text)
        assert all(eval(a + op + b) == int(c) for _, a, op, b, c in lines) and len(lines) == len(backtracking.trace(p, 2).steps)


def test_short_and_long_chains_of_a_problem_have_one_answer(problems):
    short, long = backtracking.trace(problems[0], 0), backtracking.trace(problems[0], 5)
    assert short.answer == long.answer == problems[0].answer and len(long.text) > 2 * len(short.text)
    assert backtracking.trace(problems[0], 5) == long != backtracking.trace(problems[0], 5, seed=1)


def test_examples_are_conversations(problems):
    (row,) = backtracking.examples(problems[:1], 1)
    question, reply = row["messages"]
    assert question == dict(problems[0].messages[0]) and reply["role"] == "assistant"
    assert reply["content"].startswith("<think>\nStep 1:") and reply["content"].endswith(f"</think>\n{problems[0].answer}")


def test_more_dead_ends_than_there_are_is_an_error():
    (p,) = countdown.load("train", n=1, numbers=(3, 3))
    with pytest.raises(NoDeadEndError, match="different dead ends"):
        backtracking.trace(p, 10_000)
    with pytest.raises(ValueError, match="at least 3 numbers"):
        countdown.load("train", n=1, numbers=(2, 4))
    with pytest.raises(ValueError, match="not countdown"):
        backtracking.trace(tasks.load("arithmetic", "train", n=1)[0], 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4 * 25 - 7 + 3", True),
        ("((4 × 25) − 7) + 3", True),
        ("So (4*25) - 7 + 3 = 96.", True),
        ("Not 4 + 25.\nIt is 3 - 7 + 25 * 4", True),
        ("96", False),
        ("", False),
        ("100 - 7 + 3", False),  # 100 is no given number
        ("4 * 25 - 4", False),  # 4 twice
        ("4 * 25 - 7", False),
        ("4 * 25 - (7 + 3", False),
        ("3 / (7 - 7)", False),
        ("4 ** 3 + 25 + 7", False),
        ("25 // 3 * 12", False),
        ("__import__('os').getcwd() + 4 * 25", False),
        ("(" * 5000 + "4 * 25 - 7 + 3" + ")" * 5000, False),
    ],
)
def test_the_checker_takes_expressions_of_the_given_numbers_only(text, right):
    assert verify(text, [3, 4, 7, 25], 96) == right


@pytest.mark.parametrize(
    "text",
    [
        "**4 * 25 - 7 + 3**",
        "**4 * 25 - 7 + 3** = 96",
        "***4 * 25 - 7 + 3***",
        "**4** * **25** - **7** + **3**",
        "`4 * 25 - 7 + 3`",
        "4 * 25 - 7 + 3 (which is 96)",
        "4 * 25 - 7 + 3(=96)",
        "4 * 25 - 7 + 3 (96)",
        "4 * 25 - 7 + 3 - that's it",
        "(so 4 * 25 - 7 + 3)",
        "(4 * 25 - 7 + 3 = 96)",
        "1) 4 * 25 - 7 + 3",
        "1. (4 * 25) - (7 - 3)",
        r"$4 \times 25 - 7 + 3$",
        r"\(4 \cdot 25 - 7 + 3\)",
        r"\left(4 \times 25\right) - 7 + 3",
        "4 x 25 – 7 + 3",
        "(4)x(25) - 7 + 3",
        "4·25 - 7 + 3",
    ],
)
def test_marks_and_words_around_an_expression_do_not_make_it_wrong(text):
    assert verify(text, [3, 4, 7, 25], 96)
    assert not verify(text.replace("7", "8"), [3, 4, 7, 25], 96) and not verify(text, [3, 4, 7, 25], 97)


@pytest.mark.parametrize("text", ["4 * (25 - 1 - 3", "3 * 7 + 4) * 25", "3(7 - 3)", "4 ** 2", "4**2 + 5", "(7 + 3 * (3 - 1"])
def test_a_part_of_a_broken_expression_does_not_count(text):
    values = (21, 25, 4, 16, 2, 10, 13, 7)
    assert not any(verify(text, [1, 1, 2, 3, 3, 4, 5, 7, 25], value) for value in values)


def test_the_checker_is_exact_and_can_demand_every_number():
    assert verify("(1 / 3) * 3 * 96", [1, 3, 3, 96], 96)  # fractions, not floating point
    assert verify("90 + 6", [6, 7, 90], 96) and not verify("90 + 6", [6, 7, 90], 96, every=True)


def test_the_checker_agrees_with_eval_on_random_expressions():
    rng = random.Random(0)
    for _ in range(500):
        numbers = [rng.randint(1, 20) for _ in range(4)]
        text = (
            f"({numbers[0]} {rng.choice('+-*/')} {numbers[1]}) {rng.choice('+-*')} ({numbers[2]} {rng.choice('+-*')} {numbers[3]})"
        )
        value = eval(text)
        assert verify(text, numbers, round(value)) == (abs(value - round(value)) < 1e-9)
