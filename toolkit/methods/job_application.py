"""Custom reward functions for job-application evaluation (Jain et al., 2025), arXiv:2511.16073.

A small model reads a job and an application and writes an assessment that ends with SELECTED or REJECTED. After supervised training it is
*polished*: GRPO on a weighted sum of four criteria, with a KL penalty to the supervised model. Aggressive penalties made the model reject
everybody; milder ones gave the published result (accuracy 0.91, precision of SELECTED 1.0, recall 0.85).

Equations (c_k: criteria, w_k: weights; z, z_0: log-odds of SELECTED under the policy and the supervised model, p = sigma(z), sigma: the
logistic function; beta: weight of the KL penalty)::

    r            = sum_k w_k c_k                                                          ``reward``
    KL           = p (z - z_0) + log(1 - p) - log(1 - p_0),   dKL/dz = p (1 - p) (z - z_0)      of one decision
    z            = w x + b                                 x: features of the application       ``polish``

Deviations: only the abstract is known to us. The four criteria, their weights, the penalties and the form of the assessment are ours. The
paper trains Qwen2-0.5B with LoRA; ``polish`` trains the smallest policy that can collapse: one decision per application, from features with
noise, and claims that are unsupported at a fixed rate when it selects, as a model that invents evidence. The advantage is an argument, since
methods do not import ``grpo``. ``grpo.log.alarms`` raises an alarm on the collapse.

Units and signs: criteria and rewards have no unit, higher is better; KL in nats per decision.

Cost: seconds. ``data/judging`` has the measurement.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import special

from toolkit.tasks import splits

SKILLS = (
    "python", "sql", "java", "excel", "statistics", "writing", "design", "testing", "networks", "security", "sales", "french",
)  # fmt: skip
SELECTED, REJECTED = "SELECTED", "REJECTED"
assumed_weights: Mapping[str, float] = {"decision": 1.0, "evidence": 1.0, "score": 0.5, "format": 0.5}
assumed_threshold = 0.6  # fit from which an applicant is right for the job


@dataclass(frozen=True)
class Application:
    """A job and an applicant.

    Attributes:
        asked: Skills that the job asks for.
        has: Skills of the applicant.
        years_asked: Years of experience that the job asks for.
        years: Years of experience of the applicant.
    """

    asked: tuple[str, ...]
    has: tuple[str, ...]
    years_asked: int
    years: int

    @property
    def parts(self) -> tuple[float, float]:
        """Share of the skills asked for, and years in proportion to those asked for, at most 1."""
        return len(set(self.asked) & set(self.has)) / len(self.asked), min(1.0, self.years / self.years_asked)

    @property
    def fit(self) -> float:
        """Mean of the two parts, 0 to 1."""
        return sum(self.parts) / 2

    @property
    def label(self) -> str:
        """The right decision."""
        return SELECTED if self.fit >= assumed_threshold else REJECTED


@dataclass(frozen=True)
class Assessment:
    """An assessment as read from text.

    Attributes:
        claims: Skills that the assessment claims for the applicant.
        score: Fit from 0 to 10.
        decision: ``SELECTED`` or ``REJECTED``.
    """

    claims: tuple[str, ...]
    score: float
    decision: str


@dataclass(frozen=True)
class Penalties:
    """Penalties of the criteria, all 0 or more; ours.

    Attributes:
        wrong_select: Taken from ``decision`` if an applicant is selected wrongly.
        wrong_reject: Taken from ``decision`` if an applicant is rejected wrongly.
        unsupported: Taken from ``evidence`` if a claim is not supported by the application.
    """

    wrong_select: float = 1.0
    wrong_reject: float = 1.0
    unsupported: float = 1.0


GENTLE, AGGRESSIVE = Penalties(), Penalties(wrong_select=5.0, wrong_reject=1.0, unsupported=10.0)


# --- applications --------------------------------------------------------------------------------------------


def applications(split: str, n: int, seed: int = 0) -> list[Application]:
    """Return ``n`` random applications. A hash of job and applicant decides the split, so splits are disjoint.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.
        n: Number of applications.
        seed: Seed of the draw.

    Raises:
        ValueError: unknown split.
    """
    splits.check_split(split)
    rng = random.Random(f"job-application-{split}-{seed}")
    drawn: dict[Application, None] = {}
    while len(drawn) < n:
        asked, has = tuple(sorted(rng.sample(SKILLS, 4))), tuple(sorted(rng.sample(SKILLS, rng.randint(3, 9))))
        application = Application(asked, has, rng.randint(2, 8), rng.randint(0, 9))
        if splits.split_of(repr(application)) == split:
            drawn[application] = None
    return list(drawn)


def message(application: Application) -> str:
    """Return the prompt: job, applicant, and the form of the assessment."""
    return (
        f"Job: needs {', '.join(application.asked)}; {application.years_asked} years of experience.\n"
        f"Applicant: knows {', '.join(application.has)}; {application.years} years of experience.\n"
        f"Write three lines. SKILLS: the needed skills that the applicant has, separated by commas, or none. SCORE: the fit from 0 to 10. "
        f"DECISION: {SELECTED} or {REJECTED}."
    )


def read(text: str) -> Assessment | None:
    """Return the assessment in a response, or ``None`` if it does not have the three lines once each, and in order.

    >>> read("SKILLS: sql, java\\nSCORE: 7\\nDECISION: SELECTED")
    Assessment(claims=('sql', 'java'), score=7.0, decision='SELECTED')
    """
    found = re.fullmatch(rf"\s*SKILLS: *([^\n]*)\nSCORE: *(\d+(?:\.\d+)?)\s*\nDECISION: *({SELECTED}|{REJECTED})\.?\s*", text)
    if found is None or float(found[2]) > 10:
        return None
    claims = tuple(c.strip().lower() for c in found[1].strip(" .").split(",") if c.strip().lower() not in ("", "none"))
    return Assessment(claims, float(found[2]), found[3])


# --- reward --------------------------------------------------------------------------------------------------


def criteria(assessment: Assessment | None, application: Application, penalties: Penalties = GENTLE) -> dict[str, float]:
    """Return the four criteria of an assessment: ``decision``, ``evidence``, ``score``, ``format``.

    ``decision`` is 1 if right, else minus a penalty. ``evidence`` is the share of the claims that the application supports (1 without
    claims), or minus a penalty if any is not supported. ``score`` is 1 minus its distance from the true fit. ``format`` is 1. If the text is
    no assessment, all four are 0.

    Args:
        assessment: The assessment, from ``read``.
        application: What it assesses.
        penalties: Size of the penalties.
    """
    if assessment is None:
        return dict.fromkeys(assumed_weights, 0.0)
    right = assessment.decision == application.label
    cost = penalties.wrong_select if assessment.decision == SELECTED else penalties.wrong_reject
    supported = set(assessment.claims) <= set(application.has)
    return {
        "decision": 1.0 if right else -cost,
        "evidence": 1.0 if supported else -penalties.unsupported,
        "score": 1 - abs(assessment.score / 10 - application.fit),
        "format": 1.0,
    }


def reward(
    assessment: Assessment | None,
    application: Application,
    penalties: Penalties = GENTLE,
    weights: Mapping[str, float] = assumed_weights,
) -> float:
    """Return the weighted sum of the criteria.

    >>> applicant = Application(("java", "sql"), ("sql",), 2, 4)
    >>> applicant.fit, applicant.label, reward(Assessment(("sql",), 7.5, "SELECTED"), applicant)
    (0.75, 'SELECTED', 3.0)
    """
    values = criteria(assessment, application, penalties)
    return sum(weights[name] * value for name, value in values.items())


# --- polishing -----------------------------------------------------------------------------------------------

AdvantageOf = Callable[[Float[ndarray, "n 1"], ndarray, ndarray], Float[ndarray, " n"]]
"""Function ``(rewards, groups, tokens) -> advantages``, such as ``grpo.advantages.grpo``."""


@dataclass(frozen=True)
class Polish:
    """Settings of ``polish``; all are ours.

    Attributes:
        steps: Updates.
        batch: Applications per step.
        samples: Assessments per application and step.
        rate: Learning rate.
        beta: Weight of the KL penalty.
        noise: Standard deviation of the noise in the policy's features; it bounds the accuracy that the policy can reach.
        invented: Probability that an assessment that selects claims a skill that the applicant does not have.
    """

    steps: int = 150
    batch: int = 32
    samples: int = 8
    rate: float = 0.2
    beta: float = 0.02
    noise: float = 0.15
    invented: float = 0.3


def polish(
    train: Sequence[Application],
    test: Sequence[Application],
    advantage: AdvantageOf,
    penalties: Penalties,
    *,
    seed: int,
    settings: Polish = Polish(),
) -> Float[ndarray, "steps test"]:
    """Train a small policy with group advantages of ``reward``, and return its probability of SELECTED per test application.

    Row 0 is the supervised policy, a logistic regression of the labels on the features; each later row is after one more update.

    Args:
        train: Training applications, more than a batch.
        test: Test applications.
        advantage: Function from rewards and groups to advantages.
        penalties: Penalties of the reward.
        seed: Seed of features, batches and samples.
        settings: Sizes of the training.

    Raises:
        ValueError: fewer training applications than a batch.
    """
    from sklearn.linear_model import LogisticRegression

    if len(train) < settings.batch:
        raise ValueError(f"{len(train)} training applications for batches of {settings.batch}: give more.")
    rng = np.random.default_rng(seed)
    x, held = (_features(part, settings.noise, rng) for part in (train, test))
    fitted = LogisticRegression(C=10.0).fit(x[:, :-1], [a.label == SELECTED for a in train])
    start = np.append(fitted.coef_[0], fitted.intercept_[0])
    # Reward of each training application's three assessments: rejects, selects, selects with an invented claim.
    cases = ((False, False), (True, False), (True, True))
    table = np.array([[reward(_assessment(a, *case), a, penalties) for case in cases] for a in train])
    w, rows = start.copy(), [special.expit(held @ start)]
    for _ in range(settings.steps):
        chosen = rng.choice(len(train), settings.batch, replace=False)
        at = np.repeat(chosen, settings.samples)
        p = special.expit(x[at] @ w)
        selects, invents = rng.random(len(at)) < p, rng.random(len(at)) < settings.invented
        rewards = table[at, np.where(selects, 1 + invents, 0)]
        groups = np.repeat(np.arange(settings.batch), settings.samples)
        a = advantage(rewards[:, None], groups, np.ones(len(at), int))
        pull = p * (1 - p) * (x[at] @ (w - start))
        w = w + settings.rate * ((a * (selects - p) - settings.beta * pull) @ x[at]) / len(at)
        rows.append(special.expit(held @ w))
    return np.stack(rows)


def _assessment(application: Application, selects: bool, invents: bool) -> Assessment:
    claims = tuple(s for s in application.asked if s in application.has)
    missing = next((s for s in SKILLS if s not in application.has), "")
    return Assessment((*claims, missing) if invents else claims, 10 * application.fit, SELECTED if selects else REJECTED)


def _features(applications: Sequence[Application], noise: float, rng: np.random.Generator) -> Float[ndarray, "n 3"]:
    parts = np.array([a.parts for a in applications])
    return np.hstack([parts + noise * rng.normal(size=parts.shape), np.ones((len(parts), 1))])
