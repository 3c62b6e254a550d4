"""What characterizes effective reasoning? Failed-step fraction, length and review ratio (2025), arXiv:2509.19284.

Equations (one response, its thinking cut into steps; correctness c over rollouts i of question q):

    FSF          = (number of failed or abandoned steps) / (number of steps)
    review ratio = (characters in steps that re-check) / (characters in all steps)
    r            = corr(m_i - mean_q m, c_i - mean_q c)          for a measure m: within question, so that difficulty drops out

Deviations: the paper has language models cut, label and judge the steps (its prompts are not public); here a *reader* does, and says
how: by recomputing (the shipped models' lines: exact), or by cue words (anything else: a guess, to be checked
by eye in a transcript). A re-check is a step like another, so it counts in the denominator of FSF. Length is in characters as in the
paper, and in tokens. Correlations have intervals over problems.

Units and signs: shares 0 to 1; in a table of correlations - means that more of the measure goes with wrong answers.

Cost: none; text only.
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

MEASURES = ("fsf", "review_ratio", "characters", "think_tokens")

# Cue words: ours. They are the words that backtracking, re-checking and giving up are usually written with.
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
    """A response's thinking in steps.

    Attributes:
        texts: Text of each step; joined, they are the thinking.
        failed: Whether each step failed or was abandoned.
        review: Whether each step re-checks an earlier one.
        spans: Tokens of each step in the full sequence, or empty for a text without tokens.
    """

    texts: tuple[str, ...]
    failed: tuple[bool, ...]
    review: tuple[bool, ...]
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        counts = (len(self.texts), len(self.failed), len(self.review))
        if len({*counts}) > 1 or (self.spans and len(self.spans) != len(self.texts)):
            raise ValueError(f"{counts} texts, failed and review flags, {len(self.spans)} spans: need one of each a step.")

    @property
    def steps(self) -> list[Step]:
        """The steps with their tokens. ValueError if the chain was read from a text, so that there are none."""
        if len(self.spans) != len(self.texts):
            raise ValueError("This chain has no token spans: read the rollout with failed_steps.chain(lm, rollout, reader).")
        return [Step(span, text) for span, text in zip(self.spans, self.texts, strict=True)]


def failed_step_fraction(chain: Chain) -> float:
    """FSF: share of the steps that failed; 0 without steps."""
    return sum(chain.failed) / len(chain.failed) if chain.failed else 0.0


def review_ratio(chain: Chain) -> float:
    """Share of the characters that stand in re-checking steps; 0 without steps."""
    total = sum(map(len, chain.texts))
    return sum(len(t) for t, review in zip(chain.texts, chain.review, strict=True) if review) / total if total else 0.0


# --- readers -------------------------------------------------------------------------------------------------

Judge = Callable[[Sequence[str]], tuple[list[bool], list[bool]]]
"""Step texts -> which failed, and which re-check."""


@dataclass(frozen=True)
class Reader:
    """How thinking is read: where a step starts, and a judge of all steps of a response. Both are plain functions."""

    split: Splitter
    judge: Judge

    def read(self, text: str) -> Chain:
        """The steps of a text."""
        texts = tuple(text[a:b] for a, b in steps.step_ranges(text, self.split))
        failed, review = self.judge(texts)
        return Chain(texts, tuple(failed), tuple(review))


ReaderOf = Callable[[Problem], Reader]
"""A reader may look at the problem: what a lookup line may state is written in the prompt."""

_EQUATION = re.compile(r"(?:wait )?(-?\d+(?:[+-]\d+)+)=(-?\d+)(?: ok| fix)?")
_STATED = re.compile(r"(\(?\d+(?:\)? [-+*/] \(?\d+)+\)?) (?:=|is) (\d+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_BINDING = re.compile(r"(?:wait )?([A-Z])=([A-Z]|\d+)(?: ok| fix)?")


def arithmetic(problem: Problem | None = None) -> Reader:
    """The tiny reasoner's sums: a line is a step, failed iff the equation it states is wrong.

    Whether a line goes on from the one before does not matter, and one that states nothing to recompute (``=36``) has not failed.
    """

    def wrong(line: str) -> bool:
        found = _EQUATION.fullmatch(line)
        return found is not None and sum(map(int, re.findall(r"[+-]?\d+", found[1]))) != int(found[2])

    return Reader(steps.lines, _by_line(wrong))


def lookup(problem: Problem) -> Reader:
    """The tiny reasoner's lookups: a line ``K=52`` has failed iff the prompt's bindings do not lead from K to 52, in any number of hops."""
    content = " ".join(m["content"] for m in problem.messages)
    bound = dict(re.findall(r"\b([A-Z])=([A-Z]|\d+);", content))

    def wrong(line: str) -> bool:
        found = _BINDING.fullmatch(line)
        if found is None:
            return False
        at, seen = found[1], set[str]()
        while at in bound and at not in seen:
            seen.add(at)
            if (at := bound[at]) == found[2]:
                return False
        return True

    return Reader(steps.lines, _by_line(wrong))


def equations(problem: Problem | None = None) -> Reader:
    """Lines of prose with sums in them (``wordproblems``): a line has failed iff a sum it states is wrong, and re-checks iff it states
    again what the line before did."""

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
    """Exact value of whole numbers joined by + - * / and parentheses; ``None`` of anything else."""

    def of(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](of(left), of(right))
        raise ValueError(expression)

    try:
        return of(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def tiny(problem: Problem) -> Reader:
    """The reader of the tiny reasoner's format that fits the problem's task.

    Raises:
        ValueError: the problem is of another task.
    """
    match problem.meta.get("task"):
        case "arithmetic":
            return arithmetic(problem)
        case "lookup":
            return lookup(problem)
    raise ValueError(
        f"Problem {problem.id!r} is of task {problem.meta.get('task')!r}: lines are recomputed for arithmetic and lookup only. "
        "Read it by cue words, reader_of=failed_steps.cued."
    )


def _by_line(wrong: Callable[[str], bool]) -> Judge:
    def judge(texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        lines = [text.strip() for text in texts]
        return [wrong(line) for line in lines], [line.startswith("wait ") for line in lines]

    return judge


@dataclass(frozen=True)
class Cues:
    """Steps by cue words, for thinking in prose (ours). Each field is a regular expression, or ``None`` for none.

    Attributes:
        starts: Where a step starts, besides at every paragraph.
        failed: Says that the step before it failed; in the middle of a step: that this one did.
        review: In a step's head: the step re-checks.
        back: Goes back to a numbered step (group ``step``): the steps after that one, up to the one that says so, are abandoned, so
            they failed. Steps are numbered by their own ``Step 3:``, else counted.
        head: Characters at the start of a step that ``failed`` and ``review`` mean by it.
    """

    starts: str | None = assumed_starts
    failed: str | None = assumed_failed
    review: str | None = assumed_review
    back: str | None = assumed_back
    head: int = 40

    def reader(self) -> Reader:
        """The reader these cues make. Raises ValueError if one is no regular expression."""
        return Reader(self._split, self._judge)

    def _split(self, text: str) -> list[int]:
        own = steps.at_cues(self.starts)(text) if self.starts else []
        return sorted({*steps.paragraphs(text), *own})

    def _judge(self, texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
        failed = [False] * len(texts)
        live: list[tuple[int, int]] = []  # number and place of the steps not abandoned
        for i, text in enumerate(texts):
            said = re.search(self.failed, text) if self.failed else None
            if said:
                failed[i - 1 if i and said.start() < self.head else i] = True
            back = re.search(self.back, text) if self.back else None
            own = NUMBERED.match(text)
            live.append((int(own["step"]) if own else len(live) + 1, i))
            if back:
                kept = int(back["step"])
                for number, place in live:
                    failed[place] |= number > kept
                live = [(number, place) for number, place in live if number <= kept]
        review = [bool(self.review and re.search(self.review, text[: self.head])) for text in texts]
        return failed, review


def cued(problem: Problem | None = None) -> Reader:
    """The reader by the assumed cue words, whatever the problem is."""
    return Cues().reader()


def fitting(problem: Problem) -> Reader:
    """Lines recomputed where the problem is of a task of the shipped models (:func:`tiny`, :func:`equations`), cue words for anything
    else (:func:`cued`)."""
    match problem.meta.get("task"):
        case "arithmetic" | "lookup":
            return tiny(problem)
        case "wordproblems":
            return equations(problem)
    return cued(problem)


# --- measures ------------------------------------------------------------------------------------------------


def chain(lm: LM, rollout: Rollout, reader: Reader) -> Chain:
    """The steps of a rollout's thinking, with their tokens; no steps if it did not think."""
    found = steps.think_steps(lm, rollout, reader.split)
    texts = tuple(step.text for step in found)
    failed, review = reader.judge(texts)
    return Chain(texts, tuple(failed), tuple(review), tuple(step.span for step in found))


def chains(lm: LM, found: Sequence[Rollout], problems: Sequence[Problem], reader_of: ReaderOf = tiny) -> list[Chain]:
    """The chain of every rollout, in order.

    Args:
        reader_of: Reader of a problem's responses; for thinking in prose :func:`cued`.

    Raises:
        KeyError: a rollout's problem is not among the problems.
    """
    by_id = {p.id: p for p in problems}
    if missing := sorted({r.problem_id for r in found} - by_id.keys()):
        raise KeyError(
            f"{len(missing)} problems of the rollouts are not among the {len(by_id)} given, such as {missing[0]!r}: give the problems sampled "
            "from (task, split, number and seed)."
        )
    return [chain(lm, r, reader_of(by_id[r.problem_id])) for r in found]


def table(found: Sequence[Rollout], read: Sequence[Chain]) -> pd.DataFrame:
    """One row per rollout that thought, from the rollouts and their :func:`chains`.

    Columns: ``problem_id, sample, correct, steps, failed, reviews, fsf, review_ratio, characters, think_tokens``.

    Raises:
        NoThinkTagsError: no rollout has a step.
    """
    rows = []
    for r, c in zip(found, read, strict=True):
        if c.texts:
            counts = (len(c.texts), sum(c.failed), sum(c.review))
            measures = (failed_step_fraction(c), review_ratio(c), sum(map(len, c.texts)), r.think_tokens)
            rows.append((r.problem_id, r.sample, r.correct, *counts, *measures))
    if not rows:
        raise NoThinkTagsError(
            f"None of the {len(found)} rollouts has a step of thinking: load the model with tags=ThinkTags(...)."
        )
    return pd.DataFrame(rows, columns=["problem_id", "sample", "correct", "steps", "failed", "reviews", *MEASURES])


def against_correctness(
    rows: pd.DataFrame, measures: Sequence[str] = MEASURES, *, times: int = stats.RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Each measure of :func:`table` against correctness, pooled and within question, with 95 % intervals over problems.

    Columns: ``measure, scope, kind, r, low, high``. The last rows, ``fsf (shuffled)``, are a control: FSF dealt out anew among all
    rollouts, which must give about 0. NaN where a measure or correctness never varies. Within question needs two rollouts of a
    problem (ValueError).
    """
    rows = rows.sort_values(["problem_id", "sample"])  # what is dealt does not depend on the order of rows
    dealt = np.random.default_rng(seed).permutation(rows["fsf"].to_numpy(float))
    columns = {name: rows[name].to_numpy(float) for name in measures} | {"fsf (shuffled)": dealt}
    found = []
    for name, values in columns.items():
        for scope in ("pooled", "within"):
            for kind in ("pearson", "spearman"):
                correct, problems = rows["correct"].to_numpy(float), rows["problem_id"].to_numpy()
                e = stats.correlation(values, correct, problems, kind=kind, within=scope == "within", times=times, seed=seed)
                found.append((name, scope, kind, e.mean, e.low, e.high))
    return pd.DataFrame(found, columns=["measure", "scope", "kind", "r", "low", "high"])


def chosen_by(rows: pd.DataFrame, measure: str = "fsf", *, seed: int = 0) -> tuple[stats.Estimate, stats.Estimate]:
    """Accuracy of each problem's rollout with the lowest measure (ties averaged), and what that gains over any rollout, paired.

    The paper's test-time selection: it keeps the trace of lowest FSF among the samples of a problem.
    """
    lowest = rows[measure] == rows.groupby("problem_id")[measure].transform("min")
    best, mean = (part.groupby("problem_id")["correct"].mean().to_numpy(float)[:, None] for part in (rows[lowest], rows))
    own, any_ = stats.mean_of(best), stats.mean_of(mean)
    return stats.bootstrap(own, len(best), seed=seed), stats.bootstrap(stats.difference(own, any_), len(best), seed=seed)
