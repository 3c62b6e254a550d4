"""When more is less: understanding chain-of-thought length in LLMs (2025; ICLR 2026), arXiv:2502.07266.

The paper predicts that accuracy is highest at a certain number of steps of thinking. This module computes that prediction, measures the
length of highest accuracy in rollouts, and implements the paper's vote among samples of suitable length.

Equations (T: difficulty, the total work; M: capability, the work that one step can do; C: upper bound of T; N: number of steps; alpha:
constant factor):

    A(N)  = alpha [(1 - T/C) (1 - T/(N M))]^N                 accuracy if N > T/M; otherwise 0
    N*    = T Z / (M (Z + 1)),   Z = W_-1(-(1 - T/C) / e)     best number of steps; W_-1: lower branch of Lambert's function; e = 2.718...
    t*    = T / N* = M (1 + 1/Z)                              best size of a step (work per step)

So harder problems need more steps, and more capable models need fewer.

Length-filtered vote, for the sampled responses to one problem: sort the answers into buckets of width D by the length of their response.
The entropy of a bucket is the Shannon entropy of the distribution of its answers: 0 if all agree. Keep the K buckets of lowest entropy, and
take the most frequent answer in them.

Deviations:

* The formula of N* follows from setting the derivative of A to zero, and a grid search agrees. Some notes about the paper, by other
  authors, give another formula: in them, the e in the argument of W_-1 is misplaced.
* The measured curve of accuracy against length is ours. It is a logistic regression on log length and its square, separately for each
  difficulty. Its intervals are bootstrap intervals over problems: whole problems are resampled, each with all its rollouts.
* A bucket votes only if it has at least 2 answers (ours). A single answer has entropy 0, so its bucket would otherwise always be kept.
* Samples without an answer do not vote.

Units and signs: in the theory, lengths are numbers of steps. In ``table`` and ``peaks`` they are think tokens by default. In the vote they
have the unit that the caller passes; the published bucket width, 2, is in steps. Accuracies are shares from 0 to 1. Cost: no model is run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit, lambertw

from toolkit import stats
from toolkit.lm import LM
from toolkit.stats import Estimate, Number
from toolkit.tasks.grading import last_number
from toolkit.types import Problem, Rollout

PUBLISHED_WIDTH, PUBLISHED_KEEP = 2, 3  # D (in steps) and K (number of buckets)
assumed_smallest = 2  # smallest number of answers in a bucket that votes: ours
assumed_ridge = 0.1  # L2 penalty on b and c of ``Curve``, the coefficients of standardised log length and its square: ours


# --- theory --------------------------------------------------------------------------------------------------


def accuracy(steps: ndarray, difficulty: Number, capability: Number, bound: Number, alpha: Number = 1.0) -> Float[ndarray, " n"]:
    """Return the accuracy A(N) that the theory of arXiv:2502.07266 predicts for each number of steps N of a chain of thought.

    With the arguments named below, A(N) = alpha [(1 - T/C) (1 - T/(N M))]^N. The square bracket is the probability that one step is right.
    It contains two error rates. The first, T/C, grows with the difficulty of the problem. The second, T/(N M), is the work of one step,
    T/N, divided by M. If the second is 1 or more, A(N) is 0.

    >>> accuracy(np.array([1, 2, 4, 8]), difficulty=2, capability=2, bound=10).round(3).tolist()
    [0.0, 0.16, 0.13, 0.058]

    Args:
        steps: Numbers of steps N.
        difficulty: T, the total work of the problem.
        capability: M, the work that the model can do in one step.
        bound: C, upper bound of the work of all problems; above T.
        alpha: Constant by which all accuracies are multiplied.

    Raises:
        ValueError: The parameters do not satisfy 0 < T < C and M > 0.
    """
    check_parameters(difficulty, capability, bound)
    n = np.asarray(steps, float)
    # sub_task: error rate of a step, T / (N M); at 1 and above, or without steps, the accuracy is 0.
    sub_task = np.divide(difficulty, n * capability, out=np.ones_like(n), where=n > 0)
    return alpha * ((1 - difficulty / bound) * np.maximum(0.0, 1 - sub_task)) ** n * (sub_task < 1)


def best_steps(difficulty: Number, capability: Number, bound: Number) -> float:
    """Return N*, the number of steps at which the predicted accuracy is highest (see ``accuracy`` for the prediction). It is not rounded.

    >>> round(best_steps(difficulty=2, capability=2, bound=10), 2)
    2.21

    Args:
        difficulty: T, the total work of the problem.
        capability: M, the work that the model can do in one step.
        bound: C, upper bound of the work of all problems; above T.

    Raises:
        ValueError: The parameters do not satisfy 0 < T < C and M > 0.
    """
    check_parameters(difficulty, capability, bound)
    # k=-1: the lower branch of Lambert's function, on which z < -1, so that z / (z + 1) > 1.
    z = float(lambertw(-(1 - difficulty / bound) / math.e, k=-1).real)
    return difficulty * z / (capability * (z + 1))


def best_step_size(difficulty: Number, capability: Number, bound: Number) -> float:
    """Return the best amount of work per step: ``difficulty`` divided by ``best_steps(difficulty, capability, bound)``."""
    return difficulty / best_steps(difficulty, capability, bound)


def check_parameters(difficulty: Number, capability: Number, bound: Number) -> None:
    """Raise ValueError unless 0 < difficulty < bound and capability > 0, as ``accuracy`` requires."""
    if not (0 < difficulty < bound and capability > 0):
        raise ValueError(
            f"difficulty={difficulty}, capability={capability}, bound={bound}: need 0 < difficulty < bound, capability > 0."
        )


# --- accuracy against length, measured -----------------------------------------------------------------------


def table(rollouts: Sequence[Rollout], problems: Sequence[Problem], lengths: Sequence[Number] | None = None) -> pd.DataFrame:
    """Return a table of difficulty, length and correctness, with one row per rollout: the input of ``peaks``.

    Columns: ``problem_id``; ``difficulty`` (``meta["difficulty"]`` of the problem); ``length``; ``correct`` (True or False).

    Args:
        rollouts: Graded rollouts.
        problems: Problems, each with a ``meta["difficulty"]``. The problem of every rollout must be among them.
        lengths: Length of each rollout in any unit, such as steps; ``None`` takes the number of think tokens.

    Raises:
        ValueError: The problem of a rollout is missing or has no difficulty.
    """
    difficulty = {p.id: p.meta.get("difficulty") for p in problems}
    if without := [r.problem_id for r in rollouts if difficulty.get(r.problem_id) is None]:
        raise ValueError(
            f"Problem {without[0]!r} has no meta['difficulty']: pass problems that have one, or build the table yourself."
        )
    return pd.DataFrame(
        {
            "problem_id": [r.problem_id for r in rollouts],
            "difficulty": [difficulty[r.problem_id] for r in rollouts],
            "length": [r.think_tokens for r in rollouts] if lengths is None else list(lengths),
            "correct": [r.correct for r in rollouts],
        }
    )


@dataclass(frozen=True)
class Curve:
    """Fitted accuracy as a function of length: ``sigma(a + b x + c x^2)`` with x = (log length - centre) / scale.

    sigma is the logistic function. Lengths below 1 count as 1, since the logarithm of 0 is not finite.

    Attributes:
        coefficients: The fitted ``(a, b, c)``.
        centre: Mean of the log lengths in the data.
        scale: Standard deviation of the log lengths in the data.
        shortest: Shortest length in the data, but at least 1.
        longest: Longest length in the data.
    """

    coefficients: tuple[float, float, float]
    centre: float
    scale: float
    shortest: float
    longest: float

    def at(self, lengths: Sequence[Number] | ndarray) -> Float[ndarray, " n"]:
        """Return the fitted accuracy, 0 to 1, at each of the given lengths."""
        x = (np.log(np.maximum(lengths, 1)) - self.centre) / self.scale
        a, b, c = self.coefficients
        return expit(a + b * x + c * x * x)

    @property
    def peak(self) -> float:
        """Length at which the fitted accuracy is highest; NaN if the curve has no maximum between ``shortest`` and ``longest``."""
        _, b, c = self.coefficients
        # A maximum needs c < 0; it lies at x = -b / (2 c). The bound on b / c keeps exp from overflowing if c is almost 0.
        top = math.exp(self.centre - b / (2 * c) * self.scale) if c < 0 and abs(b / c) < 1e3 else math.nan
        return top if self.shortest < top < self.longest else math.nan


def peaks(rows: pd.DataFrame, *, times: int = 500, seed: int = 0) -> tuple[pd.DataFrame, dict[Number, Curve]]:
    """Fit accuracy against length, separately for each difficulty. Return a table of the peaks, and a dict from difficulty to ``Curve``.

    A *peak* is the length at which a fitted curve is highest. It exists only if that length lies strictly between the shortest and the
    longest length of the rollouts at that difficulty.

    The table has one row per difficulty. Columns: ``difficulty``; ``problems, rollouts`` (how many); ``accuracy`` (mean over rollouts, 0 to
    1); ``peak`` (in the unit of ``length``; NaN if there is none); ``low, high`` (95 % interval of the peak over problems); ``inverted``
    (share of bootstrap resamples, 0 to 1, whose curve has a peak, that is, the shape of an inverted U).

    ``low`` and ``high`` are computed only from resamples with a peak. So the interval is meaningful only if ``inverted`` is near 1. If
    length or correctness never varies at a difficulty, no curve is fitted. Then ``peak, low, high, inverted`` are NaN, and the dict has no
    entry for the difficulty.

    Args:
        rows: One row per rollout, from the function ``optimal_length.table``, or a table with the same columns.
        times: Number of bootstrap resamples of problems.
        seed: Seed of the bootstrap.
    """
    fits, curves = [], {}
    for difficulty, part in rows.groupby("difficulty"):
        problems, which = np.unique(part["problem_id"].to_numpy(str), return_inverse=True)
        correct, length = part["correct"].to_numpy(float), part["length"].to_numpy(float)
        row = {"difficulty": difficulty, "problems": len(problems), "rollouts": len(part), "accuracy": correct.mean()}
        if np.ptp(np.log(np.maximum(length, 1))) == 0 or np.ptp(correct) == 0:  # ptp: maximum minus minimum
            fits.append(row | {"peak": math.nan, "low": math.nan, "high": math.nan, "inverted": math.nan})
            continue
        draws = stats.resamples(len(problems), seed=seed, times=times)
        counts = np.stack([np.bincount(draw, minlength=len(problems)) for draw in draws])
        # Row 0 weights every rollout equally; each further row is a resample: how often it drew the rollout's problem.
        weights = np.concatenate([np.ones((1, len(part))), counts[:, which]])
        curve, *resampled = _curves(length, correct, weights)
        tops = np.array([c.peak for c in resampled])
        inside = tops[~np.isnan(tops)]
        low, high = np.quantile(inside, [0.025, 0.975]) if len(inside) else (math.nan, math.nan)
        fits.append(row | {"peak": curve.peak, "low": low, "high": high, "inverted": len(inside) / times})
        curves[difficulty] = curve
    return pd.DataFrame(fits), curves


def _curves(length: Float[ndarray, " rows"], correct: Float[ndarray, " rows"], weights: Float[ndarray, "fits rows"]) -> list[Curve]:
    """Return fitted curves of accuracy against length, one per row of ``weights``.

    Each curve is a weighted logistic regression with an L2 penalty. A row of ``weights`` gives one weight per rollout, such as how often a
    bootstrap resample contains the rollout. All regressions are fitted at once, with Newton's method.
    """
    x = np.log(np.maximum(length, 1))
    centre, scale = float(x.mean()), float(x.std())
    features = np.stack([np.ones(len(x)), (x - centre) / scale, ((x - centre) / scale) ** 2], axis=1)  # [rows, 3]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(x), 9)  # outer product of each row's features
    # The intercept is not penalised; the small term only keeps the systems solvable.
    penalty = assumed_ridge * np.diag([0.0, 1.0, 1.0]) + 1e-6 * np.eye(3)
    beta = np.zeros((len(weights), 3))
    for _ in range(30):
        p = expit(beta @ features.T)
        slope = (weights * (correct - p)) @ features - beta @ penalty  # gradient, [fits, 3]
        curvature = ((weights * p * (1 - p)) @ products).reshape(-1, 3, 3) + penalty  # negative Hessian, [fits, 3, 3]
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        beta += np.clip(step, -2.0, 2.0)  # a full step may overshoot if the classes are nearly separable
        if np.abs(step).max() < 1e-8:
            break
    ends = float(max(1.0, length.min())), float(length.max())
    return [Curve((float(a), float(b), float(c)), centre, scale, *ends) for a, b, c in beta]


# --- length-filtered vote ------------------------------------------------------------------------------------


def final_answers(lm: LM, rollouts: Sequence[Rollout]) -> list[str | None]:
    """Return the answer of each rollout in a form that can be compared: the last number in the answer span, as text.

    If the answer span has no number, the result is its whole text. If it is missing or blank, the result is ``None``. ``lm`` decodes the
    token ids.
    """
    texts = [lm.text(r.token_ids[r.answer.start : r.answer.stop]).strip() if r.answer else "" for r in rollouts]
    return [(last_number(text) or text) if text else None for text in texts]


@dataclass(frozen=True)
class Buckets:
    """Settings of the length-filtered vote, ``length_filtered_vote``.

    The answers to a problem are sorted into buckets by the length of their response. Only the buckets whose answers agree most (lowest
    entropy) vote.

    Attributes:
        width: Width of a bucket, in the unit of the lengths. Bucket b holds lengths from ``b * width`` to below ``(b + 1) * width``.
        keep: Largest number of buckets that vote.
        smallest: Smallest number of answers in a bucket that votes. If all buckets have fewer, then all vote, whatever ``keep`` is.
    """

    width: Number = PUBLISHED_WIDTH
    keep: int = PUBLISHED_KEEP
    smallest: int = assumed_smallest

    def __post_init__(self) -> None:
        if self.width <= 0 or self.keep < 1 or self.smallest < 1:
            raise ValueError(f"{self}: need width > 0, keep >= 1 and smallest >= 1.")


PUBLISHED_BUCKETS = Buckets()


def filter_by_length(answers: Sequence[str | None], lengths: Sequence[Number], buckets: Buckets = PUBLISHED_BUCKETS) -> list[int]:
    """Return the indices of the answers that vote: those in the ``buckets.keep`` buckets of lowest entropy.

    The answers are sorted into buckets by length. The entropy of a bucket is that of the distribution of its answers. Buckets with fewer
    than ``buckets.smallest`` answers do not vote. If all buckets have fewer, all answers vote. Among buckets of equal entropy, those with
    more answers are kept first, then those with shorter lengths. An answer ``None`` never votes.

    Args:
        answers: Answers to one problem, from ``final_answers``.
        lengths: Length of the response of each answer, in the unit of ``buckets.width``.
        buckets: Width of the buckets, how many of them vote, and how many answers a voting bucket needs.
    """
    members: dict[int, list[int]] = {}  # bucket -> indices of its answers
    for i, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        if answer is not None:
            members.setdefault(int(length // buckets.width), []).append(i)
    # Sort keys: entropy; more answers first (hence the minus); shorter lengths first.
    large = [(entropy([answers[i] for i in rows]), -len(rows), b) for b, rows in members.items() if len(rows) >= buckets.smallest]
    chosen = [b for _, _, b in sorted(large)[: buckets.keep]] or list(members)
    return sorted(i for b in chosen for i in members[b])


def length_filtered_vote(
    answers: Sequence[str | None], lengths: Sequence[Number], buckets: Buckets = PUBLISHED_BUCKETS
) -> str | None:
    """Return the most frequent of the answers that ``filter_by_length`` selects; ``None`` if all answers are ``None``.

    Of equally frequent answers, the one that comes first wins. The arguments are those of ``filter_by_length``.

    >>> answers, lengths = ["7", "7", "8", "9", "8", "8"], [4, 5, 10, 10, 11, 11]
    >>> majority(answers), length_filtered_vote(answers, lengths, Buckets(width=2, keep=1))
    ('8', '7')
    """
    return majority([answers[i] for i in filter_by_length(answers, lengths, buckets)])


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, not counting ``None``. Of equally frequent answers, the one that comes first wins.

    If all answers are ``None``, or there are none at all, the result is ``None``.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def entropy(answers: Sequence[str | None]) -> float:
    """Return the Shannon entropy (nats) of the distribution of answers in a non-empty list. ``None`` counts like any other answer.

    The value is rounded to 12 decimals, so that ties between buckets are exact.

    >>> round(entropy(["7", "7", "8", "8"]), 3)
    0.693
    """
    share = np.array(list(Counter(answers).values())) / len(answers)
    # + 0.0 turns -0.0 into 0.0.
    return round(float(-(share * np.log(share)).sum()), 12) + 0.0


def votes(
    rollouts: Sequence[Rollout],
    answers: Sequence[str | None],
    lengths: Sequence[Number],
    buckets: Buckets = PUBLISHED_BUCKETS,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a table with one row per problem: the accuracy of a single sample, and whether each of three votes is right.

    Columns: ``problem_id``; ``samples`` (number of samples); ``one`` (expected accuracy of a single sample, that is, the mean over the
    samples, 0 to 1); and ``majority, filtered, random``, one per vote: True if the answer with most votes is graded correct. A vote is
    False if that answer is wrong, or if all answers are ``None``.

    Answers that are ``None`` never vote. All others take part in the vote ``majority``. Only the answers that ``filter_by_length`` selects
    take part in ``filtered``. The vote ``random`` is a control: as many answers as in ``filtered`` take part, chosen at random.

    Args:
        rollouts: Graded rollouts, several per problem. Their grades say which answers are right.
        answers: Answer of each rollout, from ``final_answers``.
        lengths: Length of each rollout, in the unit of ``buckets.width``.
        buckets: Settings of the length-filtered vote.
        seed: Seed of the random control.

    Raises:
        ValueError: Two equal answers to a problem have different grades.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, dict] = {}
    indices: dict[str, list[int]] = {}  # problem -> indices of its rollouts
    for i, r in enumerate(rollouts):
        indices.setdefault(r.problem_id, []).append(i)
    for problem, unordered in sorted(
        indices.items()
    ):  # sorted, so that the control's draws do not depend on the order of the rollouts
        group = sorted(unordered, key=lambda i: rollouts[i].sample)
        cast, group_lengths = [answers[i] for i in group], [lengths[i] for i in group]
        right = _right_answers(problem, cast, [rollouts[i].correct for i in group])
        # cast: all votes of the problem. answering: indices of those that are not None.
        filtered = filter_by_length(cast, group_lengths, buckets)
        answering = [i for i, answer in enumerate(cast) if answer is not None]
        drawn = sorted(random.choice(answering, len(filtered), replace=False)) if filtered else []
        voters = {"majority": cast, "filtered": [cast[i] for i in filtered], "random": [cast[i] for i in drawn]}
        verdicts = {name: majority(some) in right for name, some in voters.items()}
        one = np.mean([rollouts[i].correct for i in group])
        rows[problem] = {"problem_id": problem, "samples": len(group), "one": one, **verdicts}
    return pd.DataFrame([rows[problem] for problem in indices])


def _right_answers(problem: str, answers: Sequence[str | None], grades: Sequence[bool]) -> set[str]:
    """Return the answers to a problem that are graded correct. ``None`` is not an answer, so it is never among them.

    Raises:
        ValueError: Two equal answers have different grades.
    """
    graded: dict[bool, set[str]] = {
        grade: {a for a, g in zip(answers, grades, strict=True) if a is not None and bool(g) == grade} for grade in (True, False)
    }
    if both := sorted(graded[True] & graded[False]):
        raise ValueError(
            f"Problem {problem!r}: the answer {both[0]!r} is graded correct in one sample and wrong in another, so its vote has no grade: "
            "expected equal grades for equal answers. Pass answers that tell such samples apart, such as the whole text after thinking."
        )
    return graded[True]


def vote_accuracy(rows: pd.DataFrame, *, seed: int = 0) -> Mapping[str, Estimate]:
    """Return a dict of estimates: the accuracy of a single sample, the accuracy of each vote, and two differences between votes.

    Keys: ``one, majority, filtered, random`` (accuracies, 0 to 1; ``votes`` defines them), and ``filtered - majority`` and ``filtered -
    random`` (differences of accuracies, -1 to 1, paired by problem). All have 95 % intervals over problems.

    Args:
        rows: From ``votes``.
        seed: Seed of the bootstrap.
    """
    rows = rows.sort_values("problem_id")
    ways = {name: stats.mean_of(rows[name].to_numpy(float)[:, None]) for name in ("one", "majority", "filtered", "random")}
    ways |= {f"filtered - {name}": stats.difference(ways["filtered"], ways[name]) for name in ("majority", "random")}
    return {name: stats.bootstrap(way, len(rows), seed=seed) for name, way in ways.items()}
