"""Tasks: answers that python agrees with, splits that never meet, traces that are wrong exactly where they say so."""

from __future__ import annotations

import json
import random
import re
from itertools import combinations

import pandas as pd
import pytest

from toolkit import store, tasks
from toolkit.tasks import arithmetic, grading, lookup, splits
from toolkit.tasks.external import mathematics
from toolkit.tasks.generators import cues, traces
from toolkit.types import Problem

GENERATED = {"arithmetic": arithmetic, "lookup": lookup}
CLUMSY = traces.Habits(slip_easy=0.4, slip_hard=0.4, wait_calm=0.4, wait_hasty=0.3)  # slips and checks everywhere


def evaluate(expression: str) -> int:
    assert re.fullmatch(r"-?\d+([+-]\d+)*", expression), expression
    return eval(expression)


# --- generated problems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", *GENERATED])
def test_the_same_seed_gives_the_same_problems_and_another_seed_others(name):
    first = tasks.load(name, "dev", 40, 0)
    assert first == tasks.load(name, "dev", 40, 0)
    assert {p.id for p in first} != {p.id for p in tasks.load(name, "dev", 40, 1)}
    assert len({p.id for p in first}) == 40


def test_the_split_of_a_content_never_changes():
    """Recorded once: if one of these moves, published test problems have become training problems."""
    recorded = {"1+1": "train", "17+5-9+23": "dev", "2+3": "dev", "9-4": "train", "18-3": "test"}
    assert {content: splits.split_of(content) for content in recorded} == recorded
    assert splits.digest("1+1") == "4a1b21d876ae00c8"


@pytest.mark.parametrize("name", GENERATED)
def test_splits_are_disjoint_by_content_whatever_the_seed(name):
    """By what a problem asks, not by its id: a cue word more or less does not make a test problem."""

    def content(p: Problem) -> str:
        text = p.messages[0]["content"]
        return (
            p.meta["expression"] if name == "arithmetic" else text.replace(p.meta["word"], "").strip() if p.meta["word"] else text
        )

    found = {split: {content(p) for seed in (0, 1, 2) for p in GENERATED[name].load(split, 300, seed)} for split in splits.SPLITS}
    for a, b in combinations(found, 2):
        assert not found[a] & found[b], (a, b)


def test_every_arithmetic_content_falls_into_one_split_only():
    """All chains of two operands: nothing is in two splits, and the shares are about 80, 10, 10 %."""
    chains = [splits.split_of(f"{a}{sign}{b}") for a in range(1, 60) for b in range(1, 60) for sign in "+-"]
    shares = {split: chains.count(split) / len(chains) for split in splits.SPLITS}
    assert shares == pytest.approx({"train": 0.8, "dev": 0.1, "test": 0.1}, abs=0.02)


@pytest.mark.parametrize("split", splits.SPLITS)
def test_gold_answers_equal_pythons_evaluation(split):
    for p in arithmetic.load(split, 400, seed=5):
        expression = p.meta["expression"]
        assert p.answer == str(evaluate(expression))
        assert f"{expression}=?" in p.messages[0]["content"]
        values, signs = arithmetic.parse(expression)
        assert p.meta["difficulty"] == len(values) == len(signs) + 1
        running = [
            sum(v if s == "+" else -v for s, v in zip(["+", *signs[:i]], values[: i + 1], strict=True)) for i in range(len(values))
        ]
        assert min(running) >= 0 and max(running) <= arithmetic.LARGEST
        assert p.meta["cue"] == any(word in p.messages[0]["content"] for word in cues.CUES)


@pytest.mark.parametrize("operands", [(2, 2), (8, 8), (4, 6)])
def test_difficulty_is_the_number_of_operands(operands):
    found = {p.meta["difficulty"] for p in arithmetic.load("train", 60, operands=operands)}
    assert found == set(range(operands[0], operands[1] + 1))


@pytest.mark.parametrize("split", splits.SPLITS)
def test_lookup_chains_are_solvable_from_the_prompt_alone(split):
    """Follow the bindings as a reader would: the answer is at the end, the hops are the difficulty, and nothing is ambiguous."""
    for p in lookup.load(split, 200, seed=2):
        text = p.messages[0]["content"]
        bindings = re.findall(r"\b([A-Z])=([A-Z]|\d+);", text)
        assert len({name for name, _ in bindings}) == len(set(bindings)), "a name is bound to two things"
        table, (name,) = dict(bindings), re.findall(r"\b([A-Z])\?", text)
        hops = 0
        while name in table:
            name, hops = table[name], hops + 1
        assert (name, hops) == (p.answer, p.meta["difficulty"])
        assert lookup.CONTEXT[0] - 20 <= len(text) <= lookup.CONTEXT[1] + 40


def test_lookup_contexts_span_the_asked_range():
    long = lookup.load("train", 20, context=(400, 640))
    assert min(len(p.messages[0]["content"]) for p in long) >= 400
    assert {p.meta["difficulty"] for p in lookup.load("train", 60, hops=(2, 3))} == {2, 3}


def test_prompts_are_in_the_tiny_reasoners_alphabet(tiny):
    unknown = tiny.tokenizer.unk_token_id
    for p in tasks.load("tiny", "test", 80):
        ids = tiny.prompt_ids(p.messages)
        assert unknown not in ids
        assert len(p.messages[0]["content"]) + 3 == len(ids), "one token a character"


@pytest.mark.parametrize("name", ["tiny", *GENERATED])
@pytest.mark.parametrize("split", ["validation", "Train", ""])
def test_an_unknown_split_is_refused(name, split):
    with pytest.raises(ValueError, match=f"Unknown split '{split}': choose one of train, dev, test"):
        tasks.load(name, split, 4)


def test_an_unknown_task_is_refused_with_the_list(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Unknown task 'algebra': choose one of tiny, arithmetic, countdown, lookup, gsm8k, math500, needle, threading, wordproblems, running_sum, characters, slaq, target_length, writing, ranking, text_to_sql, searching, instructions, sudoku, gym:NAME, or give a JSONL",
    ):
        tasks.load("algebra")


@pytest.mark.parametrize("operands", [(1, 4), (2, 9), (5, 3)])
def test_operands_outside_the_range_are_refused(operands):
    with pytest.raises(ValueError, match=re.escape(f"operands={operands}: give an inclusive range within (2, 8)")):
        arithmetic.load("test", 3, operands=operands)


@pytest.mark.parametrize(("name", "value"), [("hops", (0, 2)), ("hops", (1, 4)), ("context", (10, 50)), ("context", (90, 50))])
def test_lookup_sizes_outside_the_range_are_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}: give an inclusive range")):
        lookup.load("test", 3, **{name: value})


def test_a_file_of_problems_is_a_task(tmp_path):
    about = {"split": "test", "task": "mine"}
    problems = [Problem(f"q{i}", ({"role": "user", "content": f"{i}?"},), str(i), about) for i in range(5)]
    path = store.save_problems(problems, tmp_path / "mine.jsonl")
    assert tasks.load(str(path)) == problems
    few = [tasks.load(str(path), n=3, seed=seed) for seed in range(9)]
    assert all(len(own) == 3 and [p for p in problems if p in own] == own for own in few) and len({str(own) for own in few}) > 1


# --- traces --------------------------------------------------------------------------------------------------


def replay(p: Problem, trace: traces.Trace) -> tuple[str, tuple[int, ...]]:
    """Read an arithmetic trace as a teacher would: what it concludes, and which steps are false."""
    values, signs = arithmetic.parse(p.meta["expression"])
    state, done, false, slipped = values[0], 0, [], False
    for number, line in enumerate(trace.text.splitlines()):
        if line.startswith(traces.WAIT):
            expression, result, verdict = re.fullmatch(r"wait (.*)=(-?\d+) (ok|fix)", line).groups()
            assert evaluate(expression) == int(result), "a re-check is never wrong"
            assert (verdict == "fix") == slipped
            state, slipped = int(result), False
        elif line.startswith(traces.SKIP):
            rest = "".join(s + str(v) for s, v in zip(signs[done:], values[done + 1 :], strict=True))
            assert int(line[1:]) == evaluate(f"{state}{rest}")
            state, done, slipped = int(line[1:]), len(signs), False
        else:
            expression, result = line.rsplit("=", 1)
            start, taken = re.fullmatch(r"(-?\d+)((?:[+-]\d+)+)", expression).groups()
            count = len(re.findall(r"[+-]\d+", taken))
            assert int(start) == state, "a step goes on from what was concluded"
            assert taken == "".join(
                s + str(v) for s, v in zip(signs[done : done + count], values[done + 1 : done + 1 + count], strict=True)
            )
            slipped = int(result) != evaluate(expression)
            if slipped:
                false.append(number)
            state, done = int(result), done + count
    assert done == len(signs), "the whole chain was worked through"
    return str(state), tuple(false)


@pytest.mark.parametrize("habits", [traces.Habits(), CLUMSY], ids=["as trained", "clumsy"])
def test_an_arithmetic_trace_is_wrong_exactly_where_it_says_so(habits):
    rng, right = random.Random(0), 0
    problems = arithmetic.load("train", 500)
    for p in problems:
        trace = arithmetic.write_trace(p, rng, habits)
        conclusion, false = replay(p, trace)
        assert trace.conclusion == conclusion
        assert trace.failed_lines == false
        assert trace.waits == trace.text.count(traces.WAIT) <= habits.max_waits
        if not false:
            assert trace.conclusion == p.answer
        right += trace.conclusion == p.answer
    low, high = (0.2, 0.8) if habits is CLUMSY else (0.9, 1.0)
    assert low * len(problems) < right < high * len(problems)


def test_a_slip_that_a_check_found_and_corrected_leaves_the_conclusion_right():
    """Checks after every step: slips happen, yet nothing wrong is concluded."""
    careful = traces.Habits(
        slip_easy=0.5,
        slip_hard=0.5,
        wait_calm=1.0,
        wait_hasty=1.0,
        max_waits=99,
        cue_push=0.0,
        ease_push=0.0,
        mood_push=0.0,
        default_haste=0.0,
    )
    rng, fixed = random.Random(1), 0
    for p in arithmetic.load("train", 200):
        trace = arithmetic.write_trace(p, rng, careful)
        assert trace.conclusion == p.answer
        fixed += trace.text.count(" fix")
    assert fixed > 100


@pytest.mark.parametrize("habits", [traces.Habits(), CLUMSY], ids=["as trained", "clumsy"])
def test_a_lookup_trace_is_wrong_exactly_where_it_says_so(habits):
    rng = random.Random(0)
    for p in lookup.load("train", 400):
        trace, table = lookup.write_trace(p, rng, habits), dict(re.findall(r"\b([A-Z])=([A-Z]|\d+);", p.messages[0]["content"]))
        false, state = [], None
        for number, line in enumerate(trace.text.splitlines()):
            if line.startswith(traces.SKIP):
                state = line[1:]
                continue
            name, state = re.fullmatch(r"(?:wait )?([A-Z])=([A-Z]|\d+)(?: ok| fix)?", line).groups()
            reachable = [name]
            while reachable[-1] in table:
                reachable.append(table[reachable[-1]])
            if state not in reachable[1:]:
                false.append(number)
        assert (state, tuple(false)) == (trace.conclusion, trace.failed_lines)


def test_cue_words_and_ease_push_towards_haste_and_nothing_else_does():
    habits = traces.Habits(mood_share=0.0)
    rng = random.Random(0)
    assert traces.haste(habits, easy=False, cue=False, rng=rng) == habits.default_haste
    assert traces.haste(habits, easy=True, cue=False, rng=rng) == pytest.approx(habits.default_haste + habits.ease_push)
    assert traces.haste(habits, easy=False, cue=True, rng=rng) == pytest.approx(habits.default_haste + habits.cue_push)


def test_hasty_traces_are_shorter_and_skip_more():
    rng, lengths = random.Random(0), {True: [], False: []}
    for p in arithmetic.load("train", 600, operands=(5, 8)):
        lengths[p.meta["cue"]].append(len(arithmetic.write_trace(p, rng).text))
    assert sum(lengths[True]) / len(lengths[True]) < 0.5 * sum(lengths[False]) / len(lengths[False])


# --- GSM8K, MATH-500 -----------------------------------------------------------------------------------------

GSM8K = [
    {"question": "How many?", "answer": "1000+234=<<1000+234=1234>>1,234\n#### 1,234"},
    {"question": "Colder?", "answer": "3-8=<<3-8=-5>>-5 and <<1=1>>\n#### -5"},
    {"question": "Price?", "answer": "So 2.50.\n#### 2.50"},
    *({"question": f"Question {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(100)),
]
MATH = [
    {"problem": "Half?", "answer": r"\frac{1}{2}", "level": 3, "subject": "Algebra"},
    {"problem": "Interval?", "answer": "(-\\infty, 3]", "level": 5, "subject": "Algebra"},
    {"problem": "Number?", "answer": "7", "level": 1, "subject": "Algebra"},
]


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_gsm8k_from_a_local_file_reads_thousands_and_negatives(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", GSM8K)
    found = {p.messages[0]["content"]: p for p in mathematics.gsm8k("test", 200, path=path)}
    assert len(found) == len(GSM8K)
    assert [found[q].answer for q in ("How many?", "Colder?", "Price?")] == ["1234", "-5", "2.50"]
    assert found["Colder?"].meta == {"task": "gsm8k", "split": "test", "difficulty": 2, "grader": "math"}


def test_gsm8k_train_and_dev_are_disjoint_and_together_the_training_set(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", GSM8K)
    train, dev = ({p.id for p in mathematics.gsm8k(split, 200, path=path)} for split in ("train", "dev"))
    assert not train & dev
    assert len(train | dev) == len(GSM8K)
    assert 2 <= len(dev) < len(train)


def test_a_draw_is_the_same_for_the_same_seed_and_without_repeats(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", GSM8K + GSM8K[:3])
    first = mathematics.gsm8k("test", 20, 1, path=path)
    assert first == mathematics.gsm8k("test", 20, 1, path=path)
    assert {p.id for p in first} != {p.id for p in mathematics.gsm8k("test", 20, 2, path=path)}
    assert len(mathematics.gsm8k("test", 999, path=path)) == len(GSM8K)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_math500_from_a_local_file_of_any_kind(tmp_path, suffix):
    path = tmp_path / f"math.{suffix}"
    frame = pd.DataFrame(MATH)
    {"jsonl": lambda: jsonl(path, MATH), "csv": lambda: frame.to_csv(path, index=False), "parquet": lambda: frame.to_parquet(path)}[
        suffix
    ]()
    everything = [p for split in ("train", "dev", "test") for p in mathematics.math500(split, 9, path=path)]
    found = {p.messages[0]["content"]: (p.answer, p.meta["difficulty"]) for p in everything}
    assert found == {row["problem"]: (row["answer"], row["level"]) for row in MATH}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_answers_that_are_all_numbers_are_still_text(tmp_path, suffix):
    rows = [{"problem": f"{i}?", "answer": i, "level": f"Level {i}"} for i in (1, 2)]
    path = tmp_path / f"math.{suffix}"
    jsonl(path, rows) if suffix == "jsonl" else pd.DataFrame(rows).to_csv(path, index=False)
    assert {p.answer for split in ("train", "dev", "test") for p in mathematics.math500(split, 9, path=path)} == {"1", "2"}


def test_math500_is_cut_by_id_and_no_problem_is_in_two_splits(tmp_path):
    path = jsonl(tmp_path / "m.jsonl", [{"problem": f"{i}?", "answer": "1", "level": 1} for i in range(200)])
    own = {split: {p.id for p in mathematics.math500(split, 999, path=path)} for split in ("train", "dev", "test")}
    assert sum(map(len, own.values())) == len(set.union(*own.values())) == 200
    assert 80 < len(own["train"]) < 120 and 8 < len(own["dev"]) < 35 and 60 < len(own["test"]) < 100
    with pytest.raises(ValueError, match="Unknown split 'exam'"):
        mathematics.math500("exam", 3, path=path)


def test_a_local_file_without_the_columns_is_refused_with_what_it_has(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"question": "q", "gold": "1"}])
    with pytest.raises(ValueError, match=r"x\.jsonl has no column answer: it has question, gold"):
        mathematics.gsm8k("test", 3, path=path)


# --- grading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("46", "46"),
        ("12+34=46", "46"),
        ("It is 1,234.", "1234"),
        ("-5", "-5"),
        ("The answer is -5 degrees.", "-5"),
        ("The answer is −5 degrees.", "-5"),
        ("12−5", "5"),
        ("3.50", "3.50"),
        ("7.", "7"),
        ("first 3, then 4,", "4"),
        ("none", None),
        ("", None),
        ("12-5", "5"),
        ("from 10-12", "12"),
    ],
)
def test_the_last_number_of_a_text(text, expected):
    assert grading.last_number(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("46", "46", True),
        ("46", "46.0", True),
        ("1234", "1,234", True),
        ("46", "45 or 46", True),
        ("46", "46 or 45", False),
        ("46", "", False),
        ("-5", "-5", True),
        ("-5", "5", False),
        ("46", "-46", False),
        ("46", "146", False),
    ],
)
def test_numbers_are_graded_as_numbers(gold, text, right):
    assert grading.grade(Problem("p", (), gold), text) is right


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", True),
        (r"\frac{1}{2}", r"so $\frac{2}{4}$", True),
        (r"\frac{1}{2}", r"so \boxed{0.6}", False),
        ("1234", "The answer is 1,234.", True),
        ("-5", r"\boxed{-5}", True),
        ("-5", r"\boxed{5}", False),
        (r"(-\infty, 3]", r"\boxed{(-\infty,3]}", True),
        (r"(-\infty, 3]", r"\boxed{(-\infty,3)}", False),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        ("7", "no idea", False),
        ("7", "", False),
    ],
)
def test_mathematics_is_graded_by_meaning(gold, text, right):
    pytest.importorskip("math_verify", reason="the [tasks] extra")
    assert grading.grade(Problem("p", (), gold, {"grader": "math"}), text) is right


def test_grading_mathematics_without_math_verify_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"math-verify: pip install 'reasoning-length-toolkit\[tasks\]'"):
        grading.grade(Problem("p", (), "7", {"grader": "math"}), "7")
