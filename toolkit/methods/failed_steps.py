"""What characterizes effective reasoning? Failed-step fraction, length and review ratio (2025), arXiv:2509.19284.

This module splits thinking into steps, marks the steps that failed, and tests whether responses with many failed steps are more often
wrong.

Equations. The thinking of each response is split into steps. m_i is a measure of rollout i, such as FSF; c_i is its correctness (0 or 1).
mean_q m and mean_q c are their means over all rollouts of the same problem q:

    FSF          = (number of failed or abandoned steps) / (number of steps)             failed-step fraction
    review ratio = (characters in steps that re-check) / (characters in all steps)
    r            = corr(m_i - mean_q m, c_i - mean_q c)          over all rollouts i; within problems, so that difficulty cancels

Deviations: in the paper, language models split the thinking and label the steps (the prompts are not public). Here a *reader* does this: a
set of rules that splits the text into steps and marks those that failed or that re-check an earlier one.

* For the tasks ``arithmetic`` and ``lookup`` (shipped model ``tiny-reasoner``) and ``wordproblems``, the reader recomputes each line, which
  is exact.
* For other text the reader uses cue words. They are a guess: check the marks on some of your responses.
* Steps that re-check stay in the denominator of FSF, like all other steps.
* Length is given in characters, as in the paper, and in tokens.
* Correlations and accuracies have 95 % bootstrap intervals. *Over problems* means that whole problems are resampled, each with all its
  rollouts.

Units and signs: shares are from 0 to 1. A negative correlation means that a larger measure goes with wrong answers.

Cost: none; only text is read.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd

from toolkit import stats, steps
from toolkit.lm import LM, NoThinkTagsError
from toolkit.steps import Splitter, Step
from toolkit.types import Problem, Rollout, Span, problems_by_id

MEASURES = ("fsf", "review_ratio", "characters", "think_tokens")  # fsf: failed-step fraction

# Cue words, ours: typical of backtracking, re-checking and giving up.
assumed_starts = (
    r"(?<=\n)(?=Step \d+\b)|(?<![^\s])(?=(?:But |But wait|Wait|Hmm|Alternatively|Actually|Let me|Hold on|Next|So,|Therefore)\b)"
)
assumed_failed = (
    r"\b(?:that(?:'s| is| was) (?:wrong|not right|incorrect|a mistake|not possible|impossible)|th(?:is|at) (?:doesn't|does not|won't|"
    r"didn't) work|(?:I|we) made (?:a mistake|an error)|scratch that|contradiction|dead end)"
)
assumed_review = (
    r"\b(?:[Ww]ait|[Dd]ouble[- ]check|[Ll]et me (?:re-?)?check|[Vv]erify|[Rr]e-?check|[Cc]heck (?:that|this|again|whether))\b"
)
assumed_back = r"\b[Bb]ack to step (?P<step>\d+)\b"
NUMBERED = re.compile(r"\s*Step (?P<step>\d+)\b")


@dataclass(frozen=True)
class Chain:
    """The thinking of a response, split into steps.

    Attributes:
        texts: Text of each step; joined, the texts are the whole thinking.
        failed: For each step, True if it failed or was abandoned.
        review: For each step, True if it re-checks an earlier one.
        spans: Token span of each step in the full sequence (prompt and response). Empty if the chain was made from a text alone, by
            ``Reader.read``.
    """

    texts: tuple[str, ...]
    failed: tuple[bool, ...]
    review: tuple[bool, ...]
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        counts = (len(self.texts), len(self.failed), len(self.review))
        if len({*counts}) > 1 or (self.spans and len(self.spans) != len(self.texts)):
            raise ValueError(
                f"{counts} texts, failed and review flags, {len(self.spans)} spans: need one of each per step (spans may be empty)."
            )

    @property
    def steps(self) -> list[Step]:
        """The steps as ``Step`` objects, each with its text and its token span.

        Raises:
            ValueError: The chain was made from a text, so it has no token spans.
        """
        if len(self.spans) != len(self.texts):
            raise ValueError("This chain has no token spans: read the rollout with failed_steps.chain(lm, rollout, reader).")
        return [Step(span, text) for span, text in zip(self.spans, self.texts, strict=True)]


def failed_step_fraction(chain: Chain) -> float:
    """Return the failed-step fraction (FSF): the share of steps that failed or were abandoned; 0 if there are no steps.

    >>> failed_step_fraction(Chain(("a", "b", "c", "d"), (False, True, False, False), (False,) * 4))
    0.25
    """
    return sum(chain.failed) / len(chain.failed) if chain.failed else 0.0


def review_ratio(chain: Chain) -> float:
    """Return the share of the thinking's characters that belong to re-checking steps; 0 if there are no steps."""
    total = sum(map(len, chain.texts))
    return sum(len(t) for t, review in zip(chain.texts, chain.review, strict=True) if review) / total if total else 0.0


# --- readers -------------------------------------------------------------------------------------------------

Judge = Callable[[Sequence[str]], tuple[list[bool], list[bool]]]
"""Function from the texts of all steps to ``(failed, review)``, two lists with one entry per step.

``failed`` has True for each step that failed or was abandoned, ``review`` for each step that re-checks an earlier one.
"""


@dataclass(frozen=True)
class Reader:
    """Rules that split thinking into steps and mark the steps that failed or that re-check an earlier step.

    Attributes:
        split: Function from the whole text to the character positions at which steps start.
        judge: Function from the texts of all steps to two lists of flags, one flag per step. The first list marks the failed steps, the
            second those that re-check an earlier step.
    """

    split: Splitter
    judge: Judge

    def read(self, text: str) -> Chain:
        """Split a text of thinking into steps, mark them, and return them as a ``Chain`` without token spans."""
        texts = tuple(text[a:b] for a, b in steps.step_ranges(text, self.split))
        failed, review = self.judge(texts)
        return Chain(texts, tuple(failed), tuple(review))


ReaderOf = Callable[[Problem], Reader]
"""Function from a problem to a ``Reader``, the rules that split and mark the thinking of the problem's responses.

The rules may depend on the prompt: those of ``lookup`` use the values that the prompt gives to variables.
"""

# tiny-reasoner's sums, such as "wait 12+30-2=40 fix". A re-checking line starts with "wait" and may end with its verdict, "ok" or "fix".
_EQUATION = re.compile(r"(?:wait )?(-?\d+(?:[+-]\d+)+)=(-?\d+)(?: ok| fix)?")
# An equation in prose, such as "(3 + 4) * 2 = 14" or "3 + 4 is 7".
# It is not a part of a longer number, and not followed by an operator, as in "3 + 4 = 5 + 2". ``_UNFINISHED`` says what may not stand before it.
_STATED = re.compile(r"(?<![\d.,])(\(?\d+(?:\)? [-+*/] \(?\d+)+\)?) (?:=|is) (-?\d+(?:\.\d+)?)(?!\d|[.,]\d| [-+*/] )")
# An operator at the end of a text: the expression that follows is only the end of a longer one, as in "2.5 * 4 + 3" and "5 apples + 3 + 4".
_UNFINISHED = re.compile(r"(?:[-+*/^×·÷−]|\\\w+)\s*$")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# tiny-reasoner's lookups: a variable and its value, which is a number or another variable.
_BINDING = re.compile(r"(?:wait )?([A-Z])=([A-Z]|\d+)(?: ok| fix)?")


def arithmetic(problem: Problem | None = None) -> Reader:
    r"""Return a reader (rules that split and mark thinking) for the arithmetic of the shipped model ``tiny-reasoner``.

    Each line is a step. A line failed if its equation, a sum of whole numbers such as ``12+30=42``, is wrong. Each line is checked alone,
    whatever the line before it says. A line without a complete equation, such as ``=36``, counts as not failed. A line that starts with
    the word ``wait`` and a space counts as re-checking an earlier step.

    Args:
        problem: Not used. It is there so that ``arithmetic`` can be passed as ``reader_of`` to ``chains``.

    >>> arithmetic().read("12+30=42\n42+5=48\n").failed
    (False, True)
    """

    def wrong(line: str) -> bool:
        equation = _EQUATION.fullmatch(line)
        return equation is not None and sum(map(int, re.findall(r"[+-]?\d+", equation[1]))) != int(equation[2])

    return Reader(steps.lines, _by_line(wrong))


def lookup(problem: Problem) -> Reader:
    """Return a reader (rules that split and mark thinking) for the variable lookups of the shipped model ``tiny-reasoner``.

    Each line is a step. The prompt sets variables to numbers or to other variables, such as ``K=M; M=5;``. So ``K=M`` and ``K=5`` are
    correct lines. A line such as ``K=7`` failed: K has this value neither directly nor through other variables. A line that is no such
    equation counts as not failed. A line that starts with the word ``wait`` and a space counts as re-checking an earlier step.

    Args:
        problem: Problem whose prompt sets the variables.
    """
    content = " ".join(m["content"] for m in problem.messages)
    bound = dict(re.findall(r"\b([A-Z])=([A-Z]|\d+);", content))

    def wrong(line: str) -> bool:
        binding = _BINDING.fullmatch(line)
        if binding is None:
            return False
        at, seen = binding[1], set[str]()  # seen: stops at a cycle of variables, such as K=M; M=K;
        while at in bound and at not in seen:
            seen.add(at)
            if (at := bound[at]) == binding[2]:
                return False
        return True

    return Reader(steps.lines, _by_line(wrong))


def equations(problem: Problem | None = None) -> Reader:
    """Return a reader (rules that split and mark thinking) for lines of prose that contain equations (task ``wordproblems``).

    Each line is a step. A line failed if one of its equations is wrong. A line re-checks an earlier step if it repeats a computation: the
    left side of its first equation equals, character by character, the left side of the last equation in the line directly before it.

    Args:
        problem: Not used. It is there so that ``equations`` can be passed as ``reader_of`` to ``chains``.
    """

    def judge(texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        failed, review, before = [], [], None  # before: left side of the last equation in the line before
        for text in texts:
            stated = [m for m in _STATED.finditer(text) if not _UNFINISHED.search(text[: m.start()])]
            # An expression that cannot be read says nothing.
            failed.append(any((value := _value(m[1])) is not None and not _rounds_to(value, m[2]) for m in stated))
            review.append(bool(stated) and stated[0][1] == before)
            before = stated[-1][1] if stated else None
        return failed, review

    return Reader(steps.lines, judge)


def _rounds_to(value: Fraction | float, stated: str) -> bool:
    """Return True if a value is the stated number, or is rounded or cut to its decimals, as 10 / 3 to 3.33."""
    if math.isnan(value) or "." not in stated:  # a whole number states the value itself
        return value == Fraction(stated)
    unit = Fraction(1, 10 ** len(stated.partition(".")[2]))
    left_out = (value - Fraction(stated)) * (-1 if stated.startswith("-") else 1)
    return -unit / 2 <= left_out < unit


def _value(expression: str) -> Fraction | float | None:
    """Return the exact value of an expression of whole numbers, + - * / and parentheses: NaN after a division by 0, ``None`` for other text."""

    def evaluate(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](evaluate(left), evaluate(right))
        raise ValueError(expression)

    if expression.count("(") != expression.count(")"):  # the equation itself stands in parentheses
        expression = expression.strip("()")
    try:
        return evaluate(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        return math.nan
    except (SyntaxError, ValueError):
        return None


def tiny(problem: Problem) -> Reader:
    """Return the reader (rules that split and mark thinking) for responses of the shipped model ``tiny-reasoner``.

    It is ``arithmetic(problem)`` or ``lookup(problem)``, by the problem's task.

    Raises:
        ValueError: The task is neither ``arithmetic`` nor ``lookup``.
    """
    match problem.meta.get("task"):
        case "arithmetic":
            return arithmetic(problem)
        case "lookup":
            return lookup(problem)
    raise ValueError(
        f"Problem {problem.id!r} is of task {problem.meta.get('task')!r}: only lines of arithmetic and lookup can be "
        "recomputed. Use cue words instead: reader_of=failed_steps.cued."
    )


def _by_line(wrong: Callable[[str], bool]) -> Judge:
    """Return a ``Judge`` that looks at each line alone.

    A line failed if ``wrong`` returns True for it. It re-checks an earlier step if it starts with the word ``wait`` and a space.
    """

    def judge(texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        lines = [text.strip() for text in texts]
        return [wrong(line) for line in lines], [line.startswith("wait ") for line in lines]

    return judge


@dataclass(frozen=True)
class Cues:
    """Regular expressions that split thinking in prose into steps, and mark failed and re-checking steps, by cue words (ours).

    The first ``head`` characters of a step are called its *head*. An expression that is ``None`` is not used.

    For ``back``, every step has a number. A step that begins with "Step 3" has number 3. The number of any other step is 1 plus the number
    of steps before it that are not abandoned.

    Attributes:
        starts: Words that begin a step. (Each paragraph begins a step, too.)
        failed: Words that report a failure, such as "that's wrong". Only the first match in a step counts. If it begins in the head, the
            step before failed (in the first step: the step itself). If it begins after the head, the step itself failed.
        review: Words in the head of a step that say that the step re-checks an earlier one.
        back: Words that return to an earlier step, such as "back to step 2". The expression must have a group ``step`` for the number, here
            2. All steps up to these words with a number above 2 are then abandoned, and count as failed. This includes the step that
            contains the words, if its number is above 2.
        head: Length of the head of a step, in characters.
    """

    starts: str | None = assumed_starts
    failed: str | None = assumed_failed
    review: str | None = assumed_review
    back: str | None = assumed_back
    head: int = 40

    def reader(self) -> Reader:
        """Return a ``Reader``, which splits thinking into steps and marks failed and re-checking steps by the expressions of this object.

        The expressions are not checked here. An invalid one raises an error when the reader reads a text: ValueError for ``starts``,
        re.error for ``failed``, ``review`` and ``back``.
        """
        return Reader(self._split, self._judge)

    def _split(self, text: str) -> list[int]:
        starts = steps.at_cues(self.starts)(text) if self.starts else []
        return sorted({*steps.paragraphs(text), *starts})

    def _judge(self, texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        failed = [False] * len(texts)
        live: list[tuple[int, int]] = []  # (number as in ``back``, index in texts) of each step that is not abandoned
        for i, text in enumerate(texts):
            failure = re.search(self.failed, text) if self.failed else None
            if failure:
                # "That's wrong" at the start of a step speaks of the step before it.
                failed[i - 1 if i and failure.start() < self.head else i] = True
            back = re.search(self.back, text) if self.back else None
            label = NUMBERED.match(text)
            live.append((int(label["step"]) if label else len(live) + 1, i))
            if back:
                target = int(back["step"])
                for number, index in live:
                    failed[index] |= number > target
                live = [(number, index) for number, index in live if number <= target]
        review = [bool(self.review and re.search(self.review, text[: self.head])) for text in texts]
        return failed, review


def cued(problem: Problem | None = None) -> Reader:
    """Return the reader (rules that split and mark thinking) that uses the default cue words, ``Cues().reader()``.

    It is the same for all problems: ``problem`` is not used.
    """
    return Cues().reader()


def fitting(problem: Problem) -> Reader:
    """Return the reader (rules that split and mark thinking) that fits the task of a problem, ``problem.meta["task"]``.

    * ``arithmetic`` and ``lookup``: ``tiny(problem)``, which recomputes each line.
    * ``wordproblems``: ``equations(problem)``, which recomputes each equation.
    * any other task: ``cued(problem)``, which guesses by cue words.
    """
    match problem.meta.get("task"):
        case "arithmetic" | "lookup":
            return tiny(problem)
        case "wordproblems":
            return equations(problem)
    return cued(problem)


# --- measures ------------------------------------------------------------------------------------------------


def chain(lm: LM, rollout: Rollout, reader: Reader) -> Chain:
    """Return the steps of a rollout's thinking as a ``Chain``, with their token spans. The chain is empty if there is no thinking.

    A last step that was cut off at the token limit counts as not failed: its number may lack digits.

    Args:
        lm: The model whose tokenizer decodes the rollout.
        rollout: The rollout.
        reader: Rules that split the thinking into steps and mark the steps that failed or that re-check an earlier one.
    """
    parts = steps.think_steps(lm, rollout, reader.split)
    texts = tuple(step.text for step in parts)
    failed, review = reader.judge(texts)
    if failed and rollout.finish == "length" and not rollout.closed:
        failed = [*failed[:-1], False]
    return Chain(texts, tuple(failed), tuple(review), tuple(step.span for step in parts))


def chains(lm: LM, rollouts: Sequence[Rollout], problems: Sequence[Problem], reader_of: ReaderOf = tiny) -> list[Chain]:
    """Return one ``Chain`` per rollout, in order: the steps of its thinking, with marks on steps that failed or re-check an earlier one.

    Args:
        lm: The model whose tokenizer decodes the rollouts.
        rollouts: The rollouts.
        problems: Problems, which must include that of every rollout.
        reader_of: Function from a problem to the reader (rules that split and mark thinking) of its responses. Default: ``tiny``, for
            ``tiny-reasoner``. Use ``cued`` for thinking in prose; ``fitting`` chooses by task.

    Raises:
        KeyError: A rollout's problem is not among the problems.
    """
    by_id = problems_by_id(problems, rollouts)
    return [chain(lm, r, reader_of(by_id[r.problem_id])) for r in rollouts]


def table(rollouts: Sequence[Rollout], chains: Sequence[Chain]) -> pd.DataFrame:
    """Return a table of the steps and lengths of thinking, with one row per rollout that has at least one step of thinking.

    Columns: ``problem_id, sample, correct``; ``steps`` (number of steps); ``failed`` (number of steps that failed or were abandoned);
    ``reviews`` (number of steps that re-check an earlier one); ``fsf`` (failed-step fraction, ``failed / steps``, 0 to 1); ``review_ratio``
    (share of characters in steps that re-check, 0 to 1); ``characters, think_tokens`` (length of the thinking).

    Args:
        rollouts: The rollouts.
        chains: One chain per rollout, from the function ``chains``.

    Raises:
        NoThinkTagsError: No rollout has a step.
    """
    rows = []
    for r, c in zip(rollouts, chains, strict=True):
        if c.texts:
            counts = (len(c.texts), sum(c.failed), sum(c.review))
            measures = (failed_step_fraction(c), review_ratio(c), sum(map(len, c.texts)), r.think_tokens)
            rows.append((r.problem_id, r.sample, r.correct, *counts, *measures))
    if not rows:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts has a step of thinking: load the model with tags=ThinkTags(...)."
        )
    return pd.DataFrame(rows, columns=["problem_id", "sample", "correct", "steps", "failed", "reviews", *MEASURES])


def correctness_correlations(
    rows: pd.DataFrame, measures: Sequence[str] = MEASURES, *, times: int = stats.RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Return a table of how measures of thinking, such as the failed-step fraction, correlate with correctness.

    Each measure has four rows: two scopes, each with the correlations ``pearson`` and ``spearman``. The scope ``pooled`` uses all rollouts.
    In the scope ``within``, the means of the rollout's problem are subtracted from measure and correctness first, so that difficulty
    cancels. Problems with a single rollout are left out there.

    Columns: ``measure, scope, kind`` (``pearson`` or ``spearman``); ``r`` (the correlation; negative if a larger measure goes with wrong
    answers; NaN if the measure or correctness never varies in this scope); ``low, high`` (95 % interval over problems).

    The last four rows are a control, with the measure ``fsf (shuffled)``. There, the failed-step fractions are shuffled among all rollouts,
    so ``r`` should be about 0.

    Args:
        rows: One row per rollout, from the function ``failed_steps.table``.
        measures: Columns of ``rows`` to correlate with the column ``correct``. Default: failed-step fraction, review ratio, and length in
            characters and in tokens.
        times: Number of bootstrap resamples.
        seed: Seed of the bootstrap and of the shuffled control.

    Raises:
        ValueError: No problem has two rollouts, which the scope ``within`` needs.
    """
    rows = rows.sort_values(["problem_id", "sample"])  # so that the shuffle does not depend on the order of rows
    shuffled = np.random.default_rng(seed).permutation(rows["fsf"].to_numpy(float))
    columns = {name: rows[name].to_numpy(float) for name in measures} | {"fsf (shuffled)": shuffled}
    estimates = []
    for name, values in columns.items():
        for scope in ("pooled", "within"):
            for kind in ("pearson", "spearman"):
                correct, problems = rows["correct"].to_numpy(float), rows["problem_id"].to_numpy()
                e = stats.correlation(values, correct, problems, kind=kind, within=scope == "within", times=times, seed=seed)
                estimates.append((name, scope, kind, e.mean, e.low, e.high))
    return pd.DataFrame(estimates, columns=["measure", "scope", "kind", "r", "low", "high"])


def accuracy_of_lowest(rows: pd.DataFrame, measure: str = "fsf", *, seed: int = 0) -> tuple[stats.Estimate, stats.Estimate]:
    """Select, for each problem, the rollout with the lowest value of a measure. Return the accuracy of the selected rollouts, and its gain.

    With the failed-step fraction as the measure, this is the test-time selection of arXiv:2509.19284. If several rollouts of a problem
    share the lowest value, their correctness is averaged.

    Args:
        rows: One row per rollout, from the function ``failed_steps.table``. Rows without a value of the measure are left out.
        measure: Column of ``rows`` by which rollouts are selected; default: the failed-step fraction.
        seed: Seed of the bootstrap.

    Returns:
        Two estimates, ``(accuracy, gain)``, with 95 % intervals over problems. Accuracy (0 to 1) is the mean over problems. Gain (-1 to 1)
        is the accuracy minus the mean accuracy of all rollouts of the same problems, so it is positive if selection helps.
    """
    rows = rows.dropna(subset=[measure])
    # best, mean: one value per problem, as a column [problems, 1], which is the form that stats.mean_of takes.
    lowest = rows[measure] == rows.groupby("problem_id")[measure].transform("min")
    best, mean = (part.groupby("problem_id")["correct"].mean().to_numpy(float)[:, None] for part in (rows[lowest], rows))
    selected, average = stats.mean_of(best), stats.mean_of(mean)
    gain = stats.difference(selected, average)
    return stats.bootstrap(selected, len(best), seed=seed), stats.bootstrap(gain, len(best), seed=seed)
