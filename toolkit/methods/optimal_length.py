"""When more is less: understanding chain-of-thought length in LLMs (2025; ICLR 2026), arXiv:2502.07266.

Equations (T: difficulty, the work to be done; M: capability, work a step can do; C: bound of T; N: number of steps):

    A(N)  = alpha [(1 - T/C) (1 - T/(N M))]^N                 accuracy, for N > T/M; 0 below
    N*    = T Z / (M (Z + 1)),   Z = W_-1(-(1 - T/C) / e)     the best number of steps, W_-1 the lower branch of Lambert's function
    t*    = T / N* = M (1 + 1/Z)                              the best size of a step

so that harder problems call for more steps and more capable models for fewer. Length-filtered vote: bucket the sampled answers by
length (equal width D), keep the K buckets whose answers have the least Shannon entropy, take the majority answer among them.

Deviations: notes on the paper print the argument of W with a misplaced e; the one here follows from setting the derivative to
zero, and a grid search agrees. The curve of accuracy against measured length is ours: logistic regression on log length and its
square within one difficulty, intervals over problems. Least size of a bucket in the vote: 2 (ours; one answer alone has entropy 0
and would always be kept). Samples without an answer do not vote.

Units and signs: steps, or tokens where a table says so; accuracies are shares. Cost: none, no model is run.
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

PUBLISHED_WIDTH, PUBLISHED_KEEP = 2, 3  # D steps, K buckets
assumed_smallest = 2  # answers of a bucket that is looked at: ours
assumed_ridge = 0.1  # penalty on both slopes of the curve, in squared standard deviations of log length: ours


# --- theory --------------------------------------------------------------------------------------------------


def accuracy(steps: ndarray, difficulty: Number, capability: Number, bound: Number, alpha: Number = 1.0) -> Float[ndarray, " n"]:
    """A(N) of the paper's linear case. Raises ValueError unless 0 < T < C and M > 0."""
    check_parameters(difficulty, capability, bound)
    n = np.asarray(steps, float)
    sub_task = np.divide(difficulty, n * capability, out=np.ones_like(n), where=n > 0)
    return alpha * ((1 - difficulty / bound) * np.maximum(0.0, 1 - sub_task)) ** n * (sub_task < 1)


def best_steps(difficulty: Number, capability: Number, bound: Number) -> float:
    """N*, not rounded. Raises ValueError unless 0 < T < C and M > 0."""
    check_parameters(difficulty, capability, bound)
    z = float(lambertw(-(1 - difficulty / bound) / math.e, k=-1).real)
    return difficulty * z / (capability * (z + 1))


def best_step_size(difficulty: Number, capability: Number, bound: Number) -> float:
    """t* = T / N*."""
    return difficulty / best_steps(difficulty, capability, bound)


def check_parameters(difficulty: Number, capability: Number, bound: Number) -> None:
    """Raise ValueError outside the theory's domain."""
    if not (0 < difficulty < bound and capability > 0):
        raise ValueError(
            f"difficulty={difficulty}, capability={capability}, bound={bound}: need 0 < difficulty < bound, capability > 0."
        )


# --- accuracy against length, measured -----------------------------------------------------------------------


def table(found: Sequence[Rollout], problems: Sequence[Problem], lengths: Sequence[Number] | None = None) -> pd.DataFrame:
    """One row a rollout: ``problem_id, difficulty`` (of ``meta``), ``length, correct``.

    Args:
        lengths: Length of each rollout in whatever unit, steps for one; ``None`` is think tokens.

    Raises:
        ValueError: a problem without a difficulty.
    """
    difficulty = {p.id: p.meta.get("difficulty") for p in problems}
    if without := [r.problem_id for r in found if difficulty.get(r.problem_id) is None]:
        raise ValueError(f"Problem {without[0]!r} has no meta['difficulty']: give problems that do, or add the column yourself.")
    return pd.DataFrame(
        {
            "problem_id": [r.problem_id for r in found],
            "difficulty": [difficulty[r.problem_id] for r in found],
            "length": [r.think_tokens for r in found] if lengths is None else list(lengths),
            "correct": [r.correct for r in found],
        }
    )


@dataclass(frozen=True)
class Curve:
    """Accuracy against length: ``sigma(a + b x + c x^2)``, x = (log length - centre) / scale.

    Attributes:
        coefficients: a, b, c.
        shortest: Least length it was fitted to.
        longest: Greatest length it was fitted to.
    """

    coefficients: tuple[float, float, float]
    centre: float
    scale: float
    shortest: float
    longest: float

    def at(self, lengths: Sequence[Number] | ndarray) -> Float[ndarray, " n"]:
        """Accuracy at some lengths."""
        x = (np.log(np.maximum(lengths, 1)) - self.centre) / self.scale
        a, b, c = self.coefficients
        return expit(a + b * x + c * x * x)

    @property
    def peak(self) -> float:
        """The length of highest accuracy if the curve is an inverted U with its top among the lengths seen, else NaN."""
        _, b, c = self.coefficients
        top = math.exp(self.centre - b / (2 * c) * self.scale) if c < 0 and abs(b / c) < 1e3 else math.nan
        return top if self.shortest < top < self.longest else math.nan


def peaks(rows: pd.DataFrame, *, times: int = 500, seed: int = 0) -> tuple[pd.DataFrame, dict[Number, Curve]]:
    """The inverted U of each difficulty in :func:`table`: the length of highest accuracy with a 95 % interval over problems.

    Columns: ``difficulty, problems, rollouts, accuracy, peak, low, high, inverted``. ``inverted`` is the share of resamples that
    are an inverted U with its top among the lengths seen; the interval is over those alone, so read it only where ``inverted`` is
    near 1. A difficulty where length or correctness never varies has no curve and NaN throughout.
    """
    found, curves = [], {}
    for difficulty, part in rows.groupby("difficulty"):
        problems, which = np.unique(part["problem_id"].to_numpy(str), return_inverse=True)
        correct, length = part["correct"].to_numpy(float), part["length"].to_numpy(float)
        row = {"difficulty": difficulty, "problems": len(problems), "rollouts": len(part), "accuracy": correct.mean()}
        if np.ptp(np.log(np.maximum(length, 1))) == 0 or np.ptp(correct) == 0:
            found.append(row | {"peak": math.nan, "low": math.nan, "high": math.nan, "inverted": math.nan})
            continue
        draws = stats.resamples(len(problems), seed=seed, times=times)
        counts = np.stack([np.bincount(draw, minlength=len(problems)) for draw in draws])
        weights = np.concatenate([np.ones((1, len(part))), counts[:, which]])
        curve, *resampled = _curves(length, correct, weights)
        tops = np.array([c.peak for c in resampled])
        seen = tops[~np.isnan(tops)]
        low, high = np.quantile(seen, [0.025, 0.975]) if len(seen) else (math.nan, math.nan)
        found.append(row | {"peak": curve.peak, "low": low, "high": high, "inverted": len(seen) / times})
        curves[difficulty] = curve
    return pd.DataFrame(found), curves


def _curves(length: Float[ndarray, " rows"], correct: Float[ndarray, " rows"], weights: Float[ndarray, "fits rows"]) -> list[Curve]:
    """One penalised logistic fit a row of weights, all by Newton's method at once."""
    x = np.log(np.maximum(length, 1))
    centre, scale = float(x.mean()), float(x.std())
    features = np.stack([np.ones(len(x)), (x - centre) / scale, ((x - centre) / scale) ** 2], axis=1)
    products = (features[:, :, None] * features[:, None, :]).reshape(len(x), 9)
    penalty = assumed_ridge * np.diag([0.0, 1.0, 1.0]) + 1e-6 * np.eye(3)
    beta = np.zeros((len(weights), 3))
    for _ in range(30):
        p = expit(beta @ features.T)
        slope = (weights * (correct - p)) @ features - beta @ penalty
        curvature = ((weights * p * (1 - p)) @ products).reshape(-1, 3, 3) + penalty
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        beta += np.clip(step, -2.0, 2.0)  # a full step may overshoot where classes are nearly separable
        if np.abs(step).max() < 1e-8:
            break
    ends = float(max(1.0, length.min())), float(length.max())
    return [Curve((float(a), float(b), float(c)), centre, scale, *ends) for a, b, c in beta]


# --- length-filtered vote ------------------------------------------------------------------------------------


def final_answers(lm: LM, found: Sequence[Rollout]) -> list[str | None]:
    """What each rollout answers, to be compared: the last number of its answer, else its text; ``None`` without one."""
    texts = [lm.text(r.token_ids[r.answer.start : r.answer.stop]).strip() if r.answer else "" for r in found]
    return [(last_number(text) or text) if text else None for text in texts]


@dataclass(frozen=True)
class Buckets:
    """How a vote is filtered by length.

    Attributes:
        width: D, in the unit of the lengths; bucket b holds lengths from ``b * width`` up to the next.
        keep: K, buckets that vote.
        smallest: Answers that a bucket needs.
    """

    width: Number = PUBLISHED_WIDTH
    keep: int = PUBLISHED_KEEP
    smallest: int = assumed_smallest

    def __post_init__(self) -> None:
        if self.width <= 0 or self.keep < 1 or self.smallest < 1:
            raise ValueError(f"{self}: need a positive width, and at least 1 of the others.")


PUBLISHED_BUCKETS = Buckets()


def filter_by_length(said: Sequence[str | None], lengths: Sequence[Number], buckets: Buckets = PUBLISHED_BUCKETS) -> list[int]:
    """Indices of the answers in the buckets of least entropy; of all answers if no bucket has ``smallest`` of them.

    Between buckets of equal entropy the one with more answers is kept, then the shorter.
    """
    rows: dict[int, list[int]] = {}
    for i, (answer, length) in enumerate(zip(said, lengths, strict=True)):
        if answer is not None:
            rows.setdefault(int(length // buckets.width), []).append(i)
    large = [(entropy([said[i] for i in own]), -len(own), place) for place, own in rows.items() if len(own) >= buckets.smallest]
    chosen = [place for _, _, place in sorted(large)[: buckets.keep]] or list(rows)
    return sorted(i for place in chosen for i in rows[place])


def length_filtered_vote(said: Sequence[str | None], lengths: Sequence[Number], buckets: Buckets = PUBLISHED_BUCKETS) -> str | None:
    """The majority answer within the buckets of :func:`filter_by_length`; the first said among equals, ``None`` if nobody answers."""
    return majority([said[i] for i in filter_by_length(said, lengths, buckets)])


def majority(said: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first said among equals; ``None`` if nobody answers."""
    votes = Counter(answer for answer in said if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def entropy(said: Sequence[str | None]) -> float:
    """Shannon entropy of answers, nats, rounded so that equal distributions are equal."""
    share = np.array(list(Counter(said).values())) / len(said)
    return round(float(-(share * np.log(share)).sum()), 12) + 0.0


def votes(
    found: Sequence[Rollout],
    said: Sequence[str | None],
    lengths: Sequence[Number],
    buckets: Buckets = PUBLISHED_BUCKETS,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """One row a problem, whether each way of answering is right: ``problem_id, samples, one, majority, filtered, random``.

    ``one`` is the mean over samples. ``random`` is the control of ``filtered``: a vote of as many answers, drawn at random.

    Args:
        said: What each rollout answers, from :func:`final_answers`.
        lengths: Length of each rollout, in the unit of the buckets.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, dict] = {}
    places: dict[str, list[int]] = {}
    for i, r in enumerate(found):
        places.setdefault(r.problem_id, []).append(i)
    for problem, unordered in sorted(places.items()):  # by id and sample: the control's draws do not depend on the order of rows
        mine = sorted(unordered, key=lambda i: found[i].sample)
        own, long = [said[i] for i in mine], [lengths[i] for i in mine]
        right = {said[i]: found[i].correct for i in mine}
        kept = filter_by_length(own, long, buckets)
        speaking = [i for i, answer in enumerate(own) if answer is not None]
        drawn = sorted(random.choice(speaking, len(kept), replace=False)) if kept else []
        ways = {"majority": own, "filtered": [own[i] for i in kept], "random": [own[i] for i in drawn]}
        told = {name: right.get(majority(answers), False) for name, answers in ways.items()}
        rows[problem] = {"problem_id": problem, "samples": len(mine), "one": np.mean([found[i].correct for i in mine]), **told}
    return pd.DataFrame([rows[problem] for problem in places])


def vote_accuracy(rows: pd.DataFrame, *, seed: int = 0) -> Mapping[str, Estimate]:
    """Accuracy of each way of :func:`votes`, and ``filtered - majority`` and ``filtered - random``, with 95 % intervals."""
    rows = rows.sort_values("problem_id")
    ways = {name: stats.mean_of(rows[name].to_numpy(float)[:, None]) for name in ("one", "majority", "filtered", "random")}
    ways |= {f"filtered - {name}": stats.difference(ways["filtered"], ways[name]) for name in ("majority", "random")}
    return {name: stats.bootstrap(way, len(rows), seed=seed) for name, way in ways.items()}
