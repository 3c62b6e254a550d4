"""Steps and failed steps: exactly the generator's, whatever tokens they are cut into; measures against correctness within question."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from families import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from toolkit import figures, stats, steps
from toolkit.lm import NoThinkTagsError
from toolkit.methods import failed_steps
from toolkit.methods.failed_steps import Chain, Cues, Reader
from toolkit.tasks import arithmetic, lookup, wordproblems
from toolkit.tasks.generators import wordtraces
from toolkit.tasks.generators.traces import Habits, Trace
from toolkit.types import Problem, Rollout, Span

TASKS = {"arithmetic": arithmetic, "lookup": lookup}
CLUMSY = Habits(slip_easy=0.3, slip_hard=0.3, wait_calm=0.4, wait_hasty=0.4)  # as many slips and re-checks as may be


def traces(task: str, n: int, habits: Habits) -> list[tuple[Problem, Trace]]:
    rng = random.Random(task)
    return [(p, TASKS[task].write_trace(p, rng, habits)) for p in TASKS[task].load("train", n)]


def rollout_with(trace: Trace, problem: Problem, *, correct: bool = True, sample: int = 0) -> Rollout:
    """The trace as if the tiny reasoner had written it."""
    encode = tokenizer().encode
    head = encode(f"<|user|>{problem.messages[0]['content']}<|end|><|assistant|>")
    think, tail = encode(trace.text), encode(f"</think>{trace.conclusion}<|end|>")
    ids = [*head, *encode("<think>"), *think, *tail]
    start = len(head) + 1
    stop = start + len(think)
    return Rollout(problem.id, sample, tuple(ids), len(head), Span(start, stop), Span(stop + 1, len(ids) - 1), "stop", "", correct)


# --- steps ---------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab.\n \t"), st.sampled_from([steps.lines, steps.paragraphs, steps.at_cues("ab?")]))
def test_steps_cover_the_text_without_overlap_and_none_is_blank(text, split):
    ranges = steps.step_ranges(text, split)
    assert "".join(text[a:b] for a, b in ranges) == (text if text.strip() else "")
    assert all(text[a:b].strip() for a, b in ranges)


@pytest.mark.parametrize(
    ("split", "text", "wanted"),
    [
        (steps.lines, "a\n\n b\nc", ["a\n\n", " b\n", "c"]),
        (steps.paragraphs, "\na\nb\n \n\n c\n\nd\n", ["\na\nb\n \n\n ", "c\n\n", "d\n"]),
        (steps.at_cues(r"\bWait\b"), "So. Wait, no. Wait! Waiting", ["So. ", "Wait, no. ", "Wait! Waiting"]),
        (steps.lines, " \n", []),
    ],
)
def test_steps_start_where_the_splitter_says(split, text, wanted):
    assert [text[a:b] for a, b in steps.step_ranges(text, split)] == wanted


@pytest.mark.parametrize("pattern", ["(", "a*"])
def test_a_step_cue_that_cannot_work_is_refused(pattern):
    with pytest.raises(ValueError, match="step cue"):
        steps.at_cues(pattern)


def test_pieces_join_to_the_text_also_where_a_character_is_several_tokens(llama):
    """A byte-level tokenizer made here: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise = replace(llama, tokenizer=PreTrainedTokenizerFast(tokenizer_object=own))
    text = "é is 2 tokens, 語 3, 🙂 4.\nWait"
    found = steps.token_texts(bytewise, own.encode(text).ids)
    assert "".join(found) == text
    assert found[:2] == ["", "é"] and "🙂" in found


@pytest.mark.parametrize("task", TASKS)
def test_token_spans_of_steps_are_the_lines(task, llama):
    for problem, trace in traces(task, 30, CLUMSY):
        r = rollout_with(trace, problem)
        found = steps.think_steps(llama, r)
        assert [s.text for s in found] == trace.text.splitlines(keepends=True)
        assert [llama.text(r.token_ids[s.span.start : s.span.stop]) for s in found] == [s.text for s in found]
        assert (found[0].span.start, found[-1].span.stop) == (r.think.start, r.think.stop)


# --- failed steps, against the generator ---------------------------------------------------------------------


@pytest.mark.parametrize("habits", [Habits(), CLUMSY], ids=["usual", "clumsy"])
@pytest.mark.parametrize("task", TASKS)
def test_failed_steps_are_exactly_the_generators(task, habits):
    """400 traces each: lines, failed lines and re-checks."""
    slips = 0
    for problem, trace in traces(task, 400, habits):
        chain = failed_steps.tiny(problem).read(trace.text)
        assert list(chain.texts) == trace.text.splitlines(keepends=True)
        assert [i for i, failed in enumerate(chain.failed) if failed] == list(trace.failed_lines), trace.text
        assert sum(chain.review) == trace.waits
        assert failed_steps.failed_step_fraction(chain) == len(trace.failed_lines) / len(trace.text.splitlines())
        slips += len(trace.failed_lines)
    assert slips > 10


@pytest.mark.parametrize("task", TASKS)
def test_reading_tokens_equals_reading_text(task, llama):
    for problem, trace in traces(task, 30, CLUMSY):
        read = failed_steps.tiny(problem).read(trace.text)
        chain = failed_steps.chain(llama, rollout_with(trace, problem), failed_steps.tiny(problem))
        assert (chain.texts, chain.failed, chain.review) == (read.texts, read.failed, read.review)
        assert [(s.span, s.text) for s in chain.steps] == list(zip(chain.spans, chain.texts, strict=True))
        with pytest.raises(ValueError, match="no token spans: read the rollout with"):
            _ = read.steps


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("3+4=7", False), ("3+4=8", True), ("-5+7=2", False), ("-5-7=2", True), ("3+4-9+1=-1", False), ("wait 3+4=8 ok", True),
        ("wait 3+4=7 fix", False), ("=36", False), ("36", False), ("3+=7", False), ("3+4=7=7", False), ("", False),
    ],
)  # fmt: skip
def test_a_line_fails_iff_the_equation_it_states_is_wrong(line, failed):
    assert failed_steps.arithmetic().judge([f"{line}\n"])[0] == [failed]


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.integers(-3, 3))
def test_a_stated_sum_fails_iff_it_is_off(values, error):
    line = f"{values[0]}" + "".join(f"{v:+d}" for v in values[1:]) + f"={sum(values) + error}"
    assert failed_steps.arithmetic().judge([line])[0] == [error != 0]


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("K=52", False), ("B=K", False), ("B=52", False), ("B=51", True), ("K=B", True), ("Z=5", True), ("=52", False),
        ("L=M", False), ("L=9", True),
    ],
)  # fmt: skip
def test_a_lookup_line_fails_iff_the_bindings_do_not_lead_there(line, failed):
    """Also where bindings go round in a circle."""
    problem = Problem("p", ({"role": "user", "content": "K=52; lamp rose; B=K; L=M; M=L; B?"},), "52", {"task": "lookup"})
    assert failed_steps.lookup(problem).judge([line])[0] == [failed]


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("Then there are 26 + 15 = 41.", False),
        ("Adding 9 gives 79 + 9 = 87.", True),
        ("(12 + 5) * 2 is 34, yes.", False),
        ("2 * (3 + 4) = 14 and 14 / 3 = 5.", True),
        ("7 / 0 = 3.", True),
        ("So it comes to 38.", False),
        ("9 ** 9 = 3.", False),
    ],
)
def test_a_line_of_prose_fails_iff_a_sum_it_states_is_wrong(line, failed):
    assert failed_steps.equations().read(line).failed == (failed,)


def test_failed_and_checking_lines_of_word_problems_are_the_generators():
    rng = random.Random(0)
    habits = replace(wordtraces.HABITS, slip_hard=0.2, slip_easy=0.2, wait_calm=0.4)
    slips = checks = 0
    for p in wordproblems.load("train", 200):
        trace = wordtraces.write(p, rng, habits)
        found = failed_steps.fitting(p).read(trace.text)
        assert tuple(i for i, failed in enumerate(found.failed) if failed) == trace.failed_lines, trace.text
        assert sum(found.review) == trace.waits, trace.text
        slips, checks = slips + len(trace.failed_lines), checks + trace.waits
    assert slips > 50 and checks > 150


def test_a_problem_of_another_task_has_no_line_reader_and_is_read_by_cues():
    other, own = Problem("g", (), "1", {"task": "gsm8k"}), Problem("a", (), "1", {"task": "arithmetic"})
    with pytest.raises(ValueError, match=r"'g' is of task 'gsm8k'.*failed_steps\.cued"):
        failed_steps.tiny(other)
    text = "3+4=8\nStill 8.\n\nWait, that's wrong."
    assert failed_steps.fitting(other).read(text) == failed_steps.cued(other).read(text) == Cues().reader().read(text)
    assert failed_steps.fitting(own).read(text) == failed_steps.tiny(own).read(text) != Cues().reader().read(text)


# --- cues ----------------------------------------------------------------------------------------------------


def test_golden_five_steps_two_failed():
    assert failed_steps.failed_step_fraction(Chain(tuple("abcde"), (False, True, True, False, False), (False,) * 5)) == 0.4


def test_golden_review_ratio_counts_characters():
    assert failed_steps.review_ratio(Chain(("abc", "d"), (False, False), (False, True))) == 0.25
    assert failed_steps.review_ratio(Chain((), (), ())) == failed_steps.failed_step_fraction(Chain((), (), ())) == 0.0


def countdown(rng: random.Random) -> tuple[str, int, int]:
    """A trace with dead ends that are left by going back: text, steps, failed steps (after the oracle of the specification)."""
    n, out, total, failed, at = rng.randint(2, 5), [], 0, 0, 0
    for point in sorted(rng.randrange(n) for _ in range(rng.randint(0, 5))):
        while at < point:
            at, total = at + 1, total + 1
            out.append(f"Step {at}: {at} + 1 = {at + 1}.")
        for j in range(point, n):
            out.append(f"Step {j + 1}: {j} * 7 = {7 * j}.")
            total, failed = total + 1, failed + 1
        out.append(f"That ends at {7 * n}, not the target. Back to step {point}.")
    while at < n:
        at, total = at + 1, total + 1
        out.append(f"Step {at}: {at} + 1 = {at + 1}.")
    return "\n".join(out), total, failed


def test_cues_recover_the_abandoned_branches_of_backtracking_traces():
    rng, reader = random.Random(1), Cues().reader()
    for _ in range(300):
        text, total, failed = countdown(rng)
        chain = reader.read(text)
        assert (len(chain.texts), sum(chain.failed)) == (total, failed), text


def test_cues_read_prose():
    text = (
        "First add: 2+3=6.\n\nWait, that's wrong. It is 5.\n\nNow double it: 10. Let me check this: 5+5=10.\n\nSo the answer is 10."
    )
    chain = Cues().reader().read(text)
    assert [t.strip() for t in chain.texts] == [
        "First add: 2+3=6.", "Wait, that's wrong. It is 5.", "Now double it: 10.", "Let me check this: 5+5=10.", "So the answer is 10.",
    ]  # fmt: skip
    assert chain.failed == (True, False, False, False, False)
    assert chain.review == (False, True, False, True, False)


def test_cues_of_ones_own_replace_the_defaults():
    cues = Cues(starts=r"(?=#)", failed="nope", review=None, back=None)
    chain = cues.reader().read("# one # two # nope, three")
    assert (chain.failed, chain.review) == ((False, True, False), (False, False, False))
    with pytest.raises(ValueError, match="not a regular expression"):
        Cues(starts="(").reader().read("text")


# --- measures against correctness ----------------------------------------------------------------------------


def made_up(rng: np.random.Generator, problems: int = 40, samples: int = 8) -> pd.DataFrame:
    """Within a question failed steps make answers wrong, and length has nothing to do with it."""
    rows = []
    for i in range(problems):
        hard = rng.random()
        for s in range(samples):
            fsf = 0.4 * hard + 0.6 * rng.random()
            length = int(100 * hard + 20 * rng.random())
            correct = bool(rng.random() > 1.4 * (fsf - 0.4 * hard) + 0.1)
            rows.append((f"p{i}", s, correct, 5, 1, 1, fsf, rng.random(), length, length))
    return pd.DataFrame(rows, columns=["problem_id", "sample", "correct", "steps", "failed", "reviews", *failed_steps.MEASURES])


def test_failed_steps_predict_wrong_answers_within_question_and_shuffled_ones_do_not():
    found = failed_steps.correctness_correlations(made_up(np.random.default_rng(0)), times=300)
    within = found[(found["scope"] == "within") & (found["kind"] == "spearman")].set_index("measure")
    assert within.loc["fsf", "high"] < -0.3
    for name in ("fsf (shuffled)", "characters", "review_ratio"):
        assert abs(within.loc[name, "r"]) < 0.15


def test_a_signal_of_the_question_alone_vanishes_within_question():
    rows = made_up(np.random.default_rng(1))
    rows["fsf"] = rows.groupby("problem_id")["fsf"].transform("mean") + 1e-3 / 3
    found = failed_steps.correctness_correlations(rows, ["fsf"], times=50)
    within = found[(found["scope"] == "within") & (found["measure"] == "fsf")]
    assert all(math.isnan(r) for r in within["r"])


def test_choosing_by_failed_steps_gains_where_they_matter():
    rows = made_up(np.random.default_rng(2))
    accuracy, gain = failed_steps.accuracy_of_lowest(rows)
    assert gain.low > 0.1
    assert accuracy.mean == pytest.approx(gain.mean + rows.groupby("problem_id")["correct"].mean().mean())
    rows["fsf"] = 0.0  # all tied: choosing is no choice
    assert failed_steps.accuracy_of_lowest(rows)[1].mean == pytest.approx(0.0)


def test_the_table_counts_what_the_generator_wrote(llama):
    pairs = traces("arithmetic", 25, CLUMSY)
    problems = [p for p, _ in pairs]
    found = [rollout_with(t, p, correct=t.conclusion == p.answer, sample=s) for p, t in pairs for s in (0, 1)]
    rows = failed_steps.table(found, failed_steps.chains(llama, found, problems))
    assert rows["failed"].tolist() == [len(t.failed_lines) for _, t in pairs for _ in (0, 1)]
    assert rows["reviews"].tolist() == [t.waits for _, t in pairs for _ in (0, 1)]
    assert rows["characters"].tolist() == rows["think_tokens"].tolist()  # a character is a token there
    assert set(failed_steps.correctness_correlations(rows, times=20)["measure"]) == {*failed_steps.MEASURES, "fsf (shuffled)"}


def test_rollouts_without_thinking_or_without_their_problem_are_named(llama, rollout_of):
    silent = replace(rollout_of(3, name="a"), think=None)
    problem = Problem("a", (), "1", {"task": "arithmetic"})
    with pytest.raises(NoThinkTagsError, match="None of the 1 rollouts has a step"):
        failed_steps.table([silent], failed_steps.chains(llama, [silent], [problem]))
    with pytest.raises(KeyError, match=r"1 problems.*not among the 0 given, such as 'a'"):
        failed_steps.chains(llama, [silent], [])
    with pytest.raises(ValueError, match="one of each per step"):
        Chain(("a",), (), ())


def test_the_figure_of_coefficients_shows_each_measure_twice_with_its_interval():
    found = failed_steps.correctness_correlations(made_up(np.random.default_rng(0)), ["review_ratio", "fsf"], times=50)
    figure = figures.coefficients(found, "title", kind="pearson")
    assert list(figure.layout.yaxis.ticktext) == ["review ratio", "failed-step fraction", "failed-step fraction (shuffled)"]
    for trace, scope in zip(figure.data, ("pooled", "within"), strict=True):
        rows = found[(found["scope"] == scope) & (found["kind"] == "pearson")]
        assert list(trace.x) == rows["r"].tolist()
        assert list(trace.error_x.array) == pytest.approx((rows["high"] - rows["r"]).tolist())
        assert list(trace.error_x.arrayminus) == pytest.approx((rows["r"] - rows["low"]).tolist())


# --- correlation over rows that repeat within problems --------------------------------------------------------


def test_within_question_correlation_can_have_the_other_sign_than_the_pooled_one():
    """Simpson: harder questions raise both, within a question one lowers the other."""
    rng = np.random.default_rng(0)
    base = np.repeat(np.arange(30.0), 6)
    x = base + rng.normal(0, 1, 180)
    y = base - (x - base) + rng.normal(0, 0.3, 180)
    for kind in ("pearson", "spearman"):
        pooled = stats.correlation(x, y, base.astype(str), kind=kind, times=300)
        within = stats.correlation(x, y, base.astype(str), kind=kind, within=True, times=300)
        assert pooled.low > 0.8 and within.high < -0.8


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=3, max_size=20))
def test_correlation_is_scipys_where_rows_stand_alone(rows):
    from scipy.stats import pearsonr

    x, y, groups = (np.array(column) for column in zip(*rows, strict=True))
    pearson, spearman = (stats.correlation(x, y, groups.astype(str), kind=kind, times=5).mean for kind in ("pearson", "spearman"))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(pearson) and math.isnan(spearman)
    else:
        assert pearson == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
        assert spearman == pytest.approx(stats.spearman(x, y), abs=1e-12)


def test_a_resampled_problem_counts_as_often_as_it_is_drawn():
    """The interval equals a naive bootstrap that copies rows and ranks them anew."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(8), 4)
    x, y = rng.integers(0, 5, 32).astype(float), rng.integers(0, 5, 32).astype(float)
    index = stats.resamples(8, seed=1, times=60)
    rows = [np.concatenate([np.flatnonzero(groups == g) for g in draw]) for draw in index]
    wanted = np.quantile([stats.spearman(x[i], y[i]) for i in rows], [0.025, 0.975])
    got = stats.correlation(x, y, groups.astype(str), kind="spearman", times=60, seed=1)
    assert [got.low, got.high] == pytest.approx(wanted.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"kind": "kendall"}, "choose pearson or spearman"),
        ({"within": True}, "two rows, which within=True needs"),
        ({"y": [1.0]}, "2 x, 1 y"),
    ],
)
def test_correlations_that_cannot_be_taken_are_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        stats.correlation(**{"x": [1.0, 2.0], "y": [1.0, 3.0], "groups": ["a", "b"]} | kwargs)


def test_a_reader_is_two_plain_functions():
    loud = Reader(steps.lines, lambda texts: ([t.isupper() for t in texts], [False] * len(texts)))
    assert loud.read("one\nTWO\n").failed == (False, True)


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("I add them (3 + 4 = 7).", False), ("I add them (3 + 4 = 8).", True), ("3 + 4 + 5 = 7 + 5 = 12", False), ("12 / 5 = 2.4", False),
        ("1.5 * 4 = 6", False), ("1,200 + 300 = 1,500", False), ("08 + 1 = 9", False), ("3 - 5 = -7", True), ("3 - 5 = -2.", False),
        ("17 + 5 = 22, so 22 - 9 = 14", True), ("3 + 4 + 5 = 7 + 5 = 13", True), ("$3 + 4 = 8", True),
        # The end of a longer expression says nothing by itself.
        ("5*3 + 2 = 17", False), ("2.5 * 4 + 3 = 13", False), ("-3 + 4 = 1", False), ("3 × 4 + 5 = 17", False),
        (r"2 \times 3 + 4 = 10", False), ("x + 3 + 4 = 12", False), ("5 apples + 3 + 4 = 12", False), ("2^3 + 1 = 9", False),
        # Decimals may be rounded or cut.
        ("10 / 3 = 3.33", False), ("20 / 3 = 6.67", False), ("20 / 3 = 6.66", False), ("3 - 20 / 3 = -3.67", False),
        ("10 / 3 = 3.34", True), ("10 / 3 = 3", True), ("5 / 2 = 2.4", True), ("1 / 0 = 3.5", True),
    ],
)  # fmt: skip
def test_equations_in_prose_are_judged_by_their_values(line, failed):
    assert failed_steps.equations().read(line).failed == (failed,)


def test_problems_without_a_value_are_left_out_of_a_selection():
    rows = [("a", math.nan, False), ("a", math.nan, False), ("b", 0.0, True), ("b", 0.5, False), ("c", 0.0, True), ("c", 0.0, True)]
    accuracy, gain = failed_steps.accuracy_of_lowest(pd.DataFrame(rows, columns=["problem_id", "fsf", "correct"]))
    assert (accuracy.mean, gain.mean) == (1.0, 0.25)
