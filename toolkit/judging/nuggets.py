"""A small verifier of nuggets: a linear model that says whether an answer supports a fact, partly supports it, or does not.

    P(label | answer, nugget) = softmax(W x + b)        x: features of the pair; W, b: weights

The features compare words: the share of the nugget's words that the answer has, the share of its pairs of neighbouring words, the longest
run of its words that stands in the answer, and whether the answer has its last word, where the generated facts state their value.

Deviations: Search-Gen-V (arXiv:2510.14660) trains a language model of 4 billion parameters with reinforcement learning. This model has 15
weights, reads no meaning, and is trained on labels. It shows how a trained verifier is used as an argument of the reward ``search_gen_v``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from sklearn.linear_model import LogisticRegression

SUPPORT, PARTIAL, NOT = "support", "partial_support", "not_support"
RELATIONS = ("river", "capital", "food", "song", "colour", "house")
PLACES = ("zor", "ao", "bei", "mip", "tal", "gor", "hin", "dun")
VALUES = ("iva", "jopa", "kel", "lumo", "nar", "osti", "pel", "raku")


class Judged(NamedTuple):
    """An answer, a nugget, and the right label."""

    answer: str
    nugget: str
    label: str


def examples(n: int, seed: int) -> list[Judged]:
    """Return generated answers of up to three facts, each with a nugget and its label, in random order.

    A nugget is stated in the answer (supported), stated without its value (partly supported), contradicted by another value, or absent
    (both not supported).

    >>> examples(1, seed=0)[0].label in (SUPPORT, PARTIAL, NOT)
    True

    Args:
        n: Number of examples.
        seed: Seed of all random choices.
    """
    rng, made = random.Random(f"nuggets-{seed}"), []
    for _ in range(n):
        facts = [(rng.choice(RELATIONS), rng.choice(PLACES), rng.choice(VALUES)) for _ in range(3)]
        relation, place, value = facts[0]
        others = [f"the {r} of {p} is {v}" for r, p, v in facts[1 : rng.randint(2, 3)] if (r, p) != (relation, place)]
        kind = rng.choice(["stated", "without value", "other value", "absent"])
        other = rng.choice([v for v in VALUES if v != value])
        own = {
            "stated": [rng.choice([f"the {relation} of {place} is {value}", f"{place} has {value} as its {relation}"])],
            "without value": [rng.choice([f"there is a {relation} of {place}", f"{place} has a {relation}"])],
            "other value": [f"the {relation} of {place} is {other}"],
            "absent": [],
        }[kind]
        parts = [*own, *others]
        rng.shuffle(parts)
        label = {"stated": SUPPORT, "without value": PARTIAL}.get(kind, NOT)
        made.append(Judged(". ".join(parts), f"{relation} of {place} is {value}", label))
    return made


def features(answer: str, nugget: str) -> Float[ndarray, " 4"]:
    """Return the features of an answer and a nugget, each from 0 to 1."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, nugget))
    if not b:
        return np.zeros(4)
    pairs, text = {*pairwise(a)}, f" {' '.join(a)} "
    runs = [j - i for i in range(len(b)) for j in range(i + 1, len(b) + 1) if f" {' '.join(b[i:j])} " in text]
    neighbours = [pair in pairs for pair in pairwise(b)]
    return np.array(
        [np.mean([w in a for w in b]), np.mean(neighbours) if neighbours else 0.0, max(runs, default=0) / len(b), float(b[-1] in a)]
    )


@dataclass(frozen=True)
class NuggetVerifier:
    """A verifier for the reward ``search_gen_v``: called with an answer and nuggets, it returns one label per nugget. ``fit`` trains it.

    Attributes:
        labels: Labels, in the order of the rows of ``weight``.
        weight: W, ``[labels, features]``.
        bias: b, ``[labels]``.
    """

    labels: tuple[str, ...]
    weight: Float[ndarray, "labels features"]
    bias: Float[ndarray, " labels"]

    def __call__(self, answer: str, nuggets: Sequence[str]) -> list[str]:
        """Return the likeliest label of each nugget."""
        return [self.labels[int(np.argmax(self.weight @ features(answer, nugget) + self.bias))] for nugget in nuggets]


def fit(judged: Sequence[Judged], *, strength: float = 10.0) -> NuggetVerifier:
    """Train a verifier on labelled examples, and return it.

    Args:
        judged: The examples; every label must occur.
        strength: Inverse of the L2 penalty (ours).

    Raises:
        ValueError: fewer than three labels occur.
    """
    labels = [j.label for j in judged]
    if missing := sorted({SUPPORT, PARTIAL, NOT} - {*labels}):
        raise ValueError(f"{len(judged)} examples without the label {missing[0]!r}: a verifier needs examples of all three labels.")
    model = LogisticRegression(C=strength, max_iter=1000).fit(np.stack([features(j.answer, j.nugget) for j in judged]), labels)
    return NuggetVerifier(tuple(model.classes_.tolist()), model.coef_, model.intercept_)
