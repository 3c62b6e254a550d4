"""What characterizes effective reasoning? Failed-step fraction, length and review ratio (2025), arXiv:2509.19284.

Equations (a response has its thinking split into steps; c_i: correctness of rollout i of question q):

    FSF          = (number of failed or abandoned steps) / (number of steps)             failed-step fraction
    review ratio = (characters in steps that re-check) / (characters in all steps)
    r            = corr(m_i - mean_q m, c_i - mean_q c)          for a measure m; within a problem, so that difficulty cancels

Deviations: in the paper, language models split, label and judge the steps (the prompts are not public). Here a *reader* does this: rules
that split the text into steps and mark the steps that failed or that re-check an earlier one. For the shipped models the reader recomputes
each line, which is exact. For any other text it uses cue words, which are a guess: check them in a transcript. A re-check counts as a step,
so it is part of the denominator of FSF. Length is given in characters, as in the paper, and in tokens. Correlations have intervals over
problems.

Units and signs: shares are from 0 to 1. A negative correlation means that a larger measure goes with wrong answers.

Cost: none; only text is read.
"""

from __future__ import annotations

import ast
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
from toolkit.types import Problem, Rollout, Span

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
        failed: Whether each step failed or was abandoned.
        review: Whether each step re-checks an earlier one.
        spans: Token span of each step in the sequence of prompt and response; empty if the chain was made from a text without tokens.
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
        """The steps with their token spans.

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
"""Function from the texts of all steps to two lists of flags: which steps failed, and which re-check."""


@dataclass(frozen=True)
class Reader:
    """Rules that split thinking into steps and judge which steps failed and which re-check an earlier step.

    Attributes:
        split: Function from a text to the character positions at which steps start.
        judge: Function from the texts of all steps to two lists of flags: which steps failed, and which re-check.
    """

    split: Splitter
    judge: Judge

    def read(self, text: str) -> Chain:
        """Return the steps of a text of thinking, and whether each step failed or re-checks an earlier one."""
        texts = tuple(text[a:b] for a, b in steps.step_ranges(text, self.split))
        failed, review = self.judge(texts)
        return Chain(texts, tuple(failed), tuple(review))


ReaderOf = Callable[[Problem], Reader]
"""Function from a problem to the reader of its responses. Some readers need the prompt, such as the bindings of a lookup problem."""

_EQUATION = re.compile(r"(?:wait )?(-?\d+(?:[+-]\d+)+)=(-?\d+)(?: ok| fix)?")
_STATED = re.compile(r"(\(?\d+(?:\)? [-+*/] \(?\d+)+\)?) (?:=|is) (\d+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_BINDING = re.compile(r"(?:wait )?([A-Z])=([A-Z]|\d+)(?: ok| fix)?")


def arithmetic(problem: Problem | None = None) -> Reader:
    r"""Return a reader for arithmetic by ``tiny-reasoner``: each line is a step, which failed if its equation is wrong.

    A line is judged alone, whether or not it follows from the line before. A line without an equation to recompute (``=36``) counts as
    not failed. The argument ``problem`` is not used; it makes ``arithmetic`` a ``ReaderOf``.

    >>> arithmetic().read("12+30=42\n42+5=48\n").failed
    (False, True)
    """

    def wrong(line: str) -> bool:
        equation = _EQUATION.fullmatch(line)
        return equation is not None and sum(map(int, re.findall(r"[+-]?\d+", equation[1]))) != int(equation[2])

    return Reader(steps.lines, _by_line(wrong))


def lookup(problem: Problem) -> Reader:
    """Return a reader for variable lookups by ``tiny-reasoner``: each line is a step.

    A line ``K=5`` failed if the bindings in the prompt do not lead from K to 5 in any number of hops. A line that is not a binding counts
    as not failed.
    """
    content = " ".join(m["content"] for m in problem.messages)
    bound = dict(re.findall(r"\b([A-Z])=([A-Z]|\d+);", content))

    def wrong(line: str) -> bool:
        binding = _BINDING.fullmatch(line)
        if binding is None:
            return False
        at, seen = binding[1], set[str]()
        while at in bound and at not in seen:
            seen.add(at)
            if (at := bound[at]) == binding[2]:
                return False
        return True

    return Reader(steps.lines, _by_line(wrong))


def equations(problem: Problem | None = None) -> Reader:
    """Return a reader for lines of prose that contain equations (task ``wordproblems``): each line is a step.

    A line failed if one of its equations is wrong. A line re-checks if the left side of its first equation repeats the left side of the
    last equation in the line before. The argument ``problem`` is not used; it makes ``equations`` a ``ReaderOf``.
    """

    def judge(texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        failed, review, before = [], [], None
        for text in texts:
            stated = _STATED.findall(text)
            failed.append(any(_value(left) != int(right) for left, right in stated))
            review.append(bool(stated) and stated[0][0] == before)
            before = stated[-1][0] if stated else None
        return failed, review

    return Reader(steps.lines, judge)


def _value(expression: str) -> Fraction | None:
    """Return the exact value of an expression of whole numbers, + - * / and parentheses; ``None`` if it is anything else."""

    def evaluate(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](evaluate(left), evaluate(right))
        raise ValueError(expression)

    try:
        return evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def tiny(problem: Problem) -> Reader:
    """Return the reader for responses of ``tiny-reasoner`` to a problem, by the problem's task.

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
    """Return a judge for single lines: ``wrong`` tells whether a line failed, and a line that starts with ``wait`` re-checks."""

    def judge(texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        lines = [text.strip() for text in texts]
        return [wrong(line) for line in lines], [line.startswith("wait ") for line in lines]

    return judge


@dataclass(frozen=True)
class Cues:
    """Rules (ours) that find and judge steps by cue words, for thinking in prose.

    Each field except ``head`` is a regular expression, or ``None`` to disable that rule. The *head* of a step is its first ``head``
    characters.

    Attributes:
        starts: A step starts at each match, and at each paragraph.
        failed: A match in the head of a step means that the step before it failed. A match later in a step means that this step failed.
        review: A match in the head of a step means that the step re-checks an earlier one.
        back: A match means a return to an earlier step, whose number is the group ``step``. All steps after the earlier step, up to and
            including the step with the match, are abandoned and count as failed. A step that begins with "Step 3" has number 3; a step
            without such a label is numbered by its position among the steps that are not abandoned.
        head: Length of the head of a step, in characters.
    """

    starts: str | None = assumed_starts
    failed: str | None = assumed_failed
    review: str | None = assumed_review
    back: str | None = assumed_back
    head: int = 40

    def reader(self) -> Reader:
        """Return the reader that uses these cues.

        The reader raises ValueError on any text if ``starts`` is not a valid regular expression, and re.error if another cue is not.
        """
        return Reader(self._split, self._judge)

    def _split(self, text: str) -> list[int]:
        starts = steps.at_cues(self.starts)(text) if self.starts else []
        return sorted({*steps.paragraphs(text), *starts})

    def _judge(self, texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        failed = [False] * len(texts)
        live: list[tuple[int, int]] = []  # number and index of the steps that are not abandoned
        for i, text in enumerate(texts):
            failure = re.search(self.failed, text) if self.failed else None
            if failure:
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
    """Return the reader that uses the default cue words (``Cues()``). It is the same for all problems."""
    return Cues().reader()


def fitting(problem: Problem) -> Reader:
    """Return the best reader for a problem: one that recomputes lines for tasks of the shipped models, else one that uses cue words.

    Tasks ``arithmetic`` and ``lookup``: ``tiny``. Task ``wordproblems``: ``equations``. Any other task: ``cued``.
    """
    match problem.meta.get("task"):
        case "arithmetic" | "lookup":
            return tiny(problem)
        case "wordproblems":
            return equations(problem)
    return cued(problem)


# --- measures ------------------------------------------------------------------------------------------------


def chain(lm: LM, rollout: Rollout, reader: Reader) -> Chain:
    """Return the steps of a rollout's thinking with their token spans, and whether each step failed or re-checks an earlier one.

    There are no steps if the rollout has no thinking.
    """
    parts = steps.think_steps(lm, rollout, reader.split)
    texts = tuple(step.text for step in parts)
    failed, review = reader.judge(texts)
    return Chain(texts, tuple(failed), tuple(review), tuple(step.span for step in parts))


def chains(lm: LM, rollouts: Sequence[Rollout], problems: Sequence[Problem], reader_of: ReaderOf = tiny) -> list[Chain]:
    """Return one chain per rollout, in order: the steps of its thinking, and whether each step failed or re-checks an earlier one.

    Args:
        problems: The problems of the rollouts.
        reader_of: Function from a problem to the reader of its responses; for thinking in prose use ``cued``.

    Raises:
        KeyError: A rollout's problem is not among the problems.
    """
    by_id = {p.id: p for p in problems}
    if missing := sorted({r.problem_id for r in rollouts} - by_id.keys()):
        raise KeyError(
            f"{len(missing)} problems of the rollouts are not among the {len(by_id)} given, such as {missing[0]!r}: pass the problems that "
            "were sampled from (same task, split, number and seed)."
        )
    return [chain(lm, r, reader_of(by_id[r.problem_id])) for r in rollouts]


def table(rollouts: Sequence[Rollout], chains: Sequence[Chain]) -> pd.DataFrame:
    """Return one row per rollout that has at least one step of thinking.

    Columns: ``problem_id, sample, correct``; the numbers of steps ``steps`` (all), ``failed`` and ``reviews`` (re-checks); ``fsf``
    (failed-step fraction, 0 to 1) and ``review_ratio`` (share of characters in re-checks, 0 to 1); and the length of the thinking in
    ``characters`` and in ``think_tokens``.

    Args:
        chains: Steps of each rollout's thinking, from the function ``chains``.

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
    """Return the correlation of each measure with correctness; a negative one means that a larger measure goes with wrong answers.

    Columns: ``measure``; ``scope`` (``pooled`` over all rollouts, or ``within``: each problem's means are subtracted first, so that
    difficulty cancels); ``kind`` (``pearson`` or ``spearman``); ``r``; ``low, high`` (95 % interval over problems). ``r`` is NaN if the
    measure or correctness never varies. The last rows, ``fsf (shuffled)``, are a control: the failed-step fractions are shuffled among all
    rollouts, so ``r`` should be about 0.

    Args:
        rows: From ``table``.
        measures: Columns of ``rows``.
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
    """Return the accuracy of selecting the rollout with the lowest measure for each problem, and the gain over not selecting.

    This is the paper's test-time selection, which takes the response with the lowest failed-step fraction among the samples of a problem.
    If several rollouts of a problem have the lowest measure, their correctness is averaged. The gain is the accuracy of the selection minus
    the mean accuracy of all rollouts, paired by problem. Both are shares (0 to 1) with 95 % intervals over problems.

    Args:
        rows: From ``table``.
        measure: Column of ``rows``; the lowest value is selected.
    """
    lowest = rows[measure] == rows.groupby("problem_id")[measure].transform("min")
    best, mean = (part.groupby("problem_id")["correct"].mean().to_numpy(float)[:, None] for part in (rows[lowest], rows))
    selected, average = stats.mean_of(best), stats.mean_of(mean)
    gain = stats.difference(selected, average)
    return stats.bootstrap(selected, len(best), seed=seed), stats.bootstrap(gain, len(best), seed=seed)
