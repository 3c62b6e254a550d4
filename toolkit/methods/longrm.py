"""LongRM: revealing and unlocking the context boundary of reward modelling (Tang et al., 2025), arXiv:2510.06915.

Reward models that are trained on short contexts judge long ones badly. The paper makes long training data from short: a judgement that
needs a few *critical chunks* of a text stays right if other chunks are added, up to a target length.

Equations, with log-probabilities log p of whole responses, |y| their lengths in tokens, w the preferred response, l_1 .. l_V the others,
r scalar rewards and sigma the logistic function::

    LOGO:           L = -log sigma( beta log p(w) / |w|  -  beta / V sum_j log p(l_j) / |l_j|  -  gamma )
    Bradley-Terry:  L = -log sigma( r(w) - r(l) )

Pairs are kept if several reward models agree on their order (score-consistency voting).

Deviations: the paper trains 8B models in two stages (SFT on padded judgements, then LOGO); here are its construction, its losses and its
evaluation, for a model or head of yours. ``beta`` and ``gamma`` are those of the paper; its code has 2 and 0.5 as defaults. The paper's
critical chunks are found by a model; here the caller knows them. How many models have to agree is not stated: ``assumed_agreement``.

Units and signs: lengths in tokens as counted by the caller's function; losses in nats; higher rewards are better.

Cost: padding tokenizes the text about log2(number of chunks) times. ``data/longrm`` has a measurement on a frozen SmolLM2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from toolkit import stats
from toolkit.judging import best_of
from toolkit.stats import PairRows

BETA, GAMMA = 0.5, 2.5  # from the paper
assumed_agreement = 1.0  # share of the reward models that have to agree on a pair: ours
Placement = Literal["random", "start", "middle", "end"]


@dataclass(frozen=True)
class Padded:
    """A text made of critical chunks and distractors.

    Attributes:
        text: The chunks, joined.
        needed: Character range ``(start, stop)`` of each critical chunk in ``text``, in the order in which they were given.
    """

    text: str
    needed: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LongPair:
    """A preferred and another response to the same padded context.

    Attributes:
        context: The context, with the ranges of its critical chunks.
        chosen: The preferred response.
        rejected: The other response.
        length: Target length of the context in tokens.
    """

    context: Padded
    chosen: str
    rejected: str
    length: int


# --- from short to long --------------------------------------------------------------------------------------


def pad_to_length(
    critical: Sequence[str],
    distractors: Sequence[str],
    n_tokens: int,
    count: Callable[[str], int],
    *,
    placement: Placement = "random",
    seed: int = 0,
    joint: str = " ",
) -> Padded:
    """Return the critical chunks among as many distractors as fit into ``n_tokens`` tokens.

    The critical chunks keep their order. Equal seeds give the same order of distractors and the same relative places at every length, so
    lengths can be compared.

    >>> pad_to_length(["A b."], ["c d.", "e f."], 4, lambda text: len(text.split()), placement="end").text
    'c d. A b.'

    Args:
        critical: Chunks that the judgement depends on.
        distractors: Other chunks. Each is used at most once.
        n_tokens: Largest length of the text in tokens.
        count: Function from a text to its number of tokens.
        placement: Where the critical chunks go: each at a random place, or together at the start, in the middle or at the end.
        seed: Seed of the order of the distractors and of random places.
        joint: Text between two chunks.

    Raises:
        ValueError: no critical chunk, the critical chunks alone are too long, or the distractors are too few for the length.
    """
    rng = random.Random(f"pad-{seed}")
    order = rng.sample(list(distractors), len(distractors))
    shares = sorted(rng.random() for _ in critical)

    def text(n: int) -> Padded:  # with the first n distractors
        fixed = {"start": 0, "middle": n // 2, "end": n}
        places = [int(s * (n + 1)) if placement == "random" else fixed[placement] for s in shares]
        return _joined(critical, order[:n], places, joint)

    if not critical or (least := count(text(0).text)) > n_tokens:
        size = f"{least} tokens" if critical else "none given"
        raise ValueError(
            f"Critical chunks: {size}, n_tokens={n_tokens}: need at least one chunk, and a length that holds them all."
        )
    low, high = 0, len(order)  # the text with low distractors fits; one with more than high does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(text(middle).text) <= n_tokens else (low, middle - 1)
    made = text(low)
    shortest = min(map(count, order), default=0)
    if low == len(order) and count(made.text) + shortest + count(joint) < n_tokens:
        raise ValueError(
            f"All {len(order)} distractors make a text of {count(made.text)} tokens, n_tokens={n_tokens}: give more of them, or ask for less."
        )
    return made


def _joined(critical: Sequence[str], others: Sequence[str], places: Sequence[int], joint: str) -> Padded:
    """Return the chunks joined: critical chunk i before the ``places[i]``-th of the others."""
    chunks: list[tuple[str, bool]] = []
    for n in range(len(others) + 1):
        chunks += [(chunk, True) for chunk, place in zip(critical, places, strict=True) if place == n]
        chunks += [(chunk, False) for chunk in others[n : n + 1]]
    needed, start = [], 0
    for chunk, is_critical in chunks:
        if is_critical:
            needed.append((start, start + len(chunk)))
        start += len(chunk) + len(joint)
    return Padded(joint.join(chunk for chunk, _ in chunks), tuple(needed))


def long_pairs(
    critical: Sequence[str],
    responses: tuple[str, str],
    distractors: Sequence[str],
    lengths: Sequence[int],
    count: Callable[[str], int],
    *,
    placement: Placement = "random",
    seed: int = 0,
) -> list[LongPair]:
    """Return one preference pair per length: the same two responses, to a context that is padded to this length.

    Args:
        critical: Chunks from which alone the preference was judged.
        responses: ``(preferred response, other response)``.
        distractors: Other chunks of the context.
        lengths: Target lengths of the context in tokens.
        count: Function from a text to its number of tokens.
        placement: Where the critical chunks go; see ``pad_to_length``, which also has the errors.
        seed: Seed of the padding.
    """
    made = [(n, pad_to_length(critical, distractors, n, count, placement=placement, seed=seed)) for n in lengths]
    return [LongPair(context, *responses, n) for n, context in made]


def consistent_pairs(scores: Float[ndarray, "models responses"], *, agreement: float = assumed_agreement) -> PairRows:
    """Return all pairs of responses to one prompt of which enough reward models score the first higher: ``(preferred, other)``.

    >>> consistent_pairs(np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0]])).tolist()
    [[0, 2], [1, 2]]

    Args:
        scores: Score of each response by each reward model. Equal scores agree with neither order.
        agreement: Share of the models that have to agree, above 0.5, up to 1.
    """
    if not 0.5 < agreement <= 1 or not len(scores):
        raise ValueError(f"{len(scores)} models, agreement={agreement}: need one model, and a share above 0.5, up to 1.")
    share = (scores[:, :, None] > scores[:, None, :]).mean(axis=0)
    return np.argwhere(share >= agreement - 1e-9)  # 1e-9: rounding of the mean


# --- losses --------------------------------------------------------------------------------------------------


def length_normalised_preference_loss(
    chosen: Float[Tensor, " batch"],
    chosen_tokens: Float[Tensor, " batch"],
    rejected: Float[Tensor, "batch others"],
    rejected_tokens: Float[Tensor, "batch others"],
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Float[Tensor, ""]:
    """Return the LOGO loss in nats, averaged over the batch. It falls if the preferred responses become more likely than the others::

        -log sigmoid( beta chosen / chosen_tokens  -  beta mean_j( rejected_j / rejected_tokens_j )  -  gamma )

    >>> ten = torch.tensor([10.0])
    >>> loss = length_normalised_preference_loss(-ten, ten, torch.tensor([[-20.0, -30.0]]), torch.tensor([[10.0, 10.0]]))
    >>> round(loss.item(), 5)
    1.91022

    Args:
        chosen: Log-probability of each preferred response in nats, summed over its tokens.
        chosen_tokens: Number of tokens of each preferred response.
        rejected: Log-probabilities of the other responses j to each prompt; every prompt has equally many.
        rejected_tokens: Number of tokens of each of these responses.
        beta: Scale of the rewards.
        gamma: Margin by which the reward of the preferred response is to exceed the mean of the others.
    """
    reward = beta * (chosen / chosen_tokens - (rejected / rejected_tokens).mean(dim=1))
    return -torch.nn.functional.logsigmoid(reward - gamma).mean()


def preference_loss(chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the Bradley-Terry loss of scalar rewards, the mean over the batch.

    >>> round(preference_loss(torch.tensor([1.0]), torch.tensor([0.0])).item(), 4)
    0.3133
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


# --- evaluation ----------------------------------------------------------------------------------------------


def accuracy_by_length(
    scores: Float[ndarray, "rows n"], lengths: Sequence[int], problems: Sequence[str], *, seed: int = 0
) -> pd.DataFrame:
    """Return how often scores are right at each context length, with 95 % bootstrap intervals over problems.

    Args:
        scores: Scores of n responses to one context per row. The first response is right, the others are wrong.
        lengths: Context length of each row.
        problems: Problem id of each row.
        seed: Seed of the bootstrap.

    Returns:
        Table with one row per length and metric, and the columns ``length, metric, mean, low, high, chance``. The metrics are ``pairwise``
        (share of the wrong responses that score below the right one) and ``best_of_n`` (share of the contexts whose best score is that of
        the right response).
    """
    n, rows = scores.shape[1], []
    right = np.zeros(scores.shape, bool)
    right[:, 0] = True
    pairs = np.array([[0, j] for j in range(1, n)])
    per_row = {
        "pairwise": (np.array([stats.pair_agreement(row, pairs).mean() for row in scores]), 0.5),
        "best_of_n": (best_of(scores, right), 1 / n),
    }
    for length in sorted(set(lengths)):
        here = np.asarray(lengths) == length
        for metric, (values, chance) in per_row.items():
            e = stats.over_problems(values[here], np.asarray(problems, str)[here], seed=seed)
            rows.append((length, metric, e.mean, e.low, e.high, chance))
    return pd.DataFrame(rows, columns=["length", "metric", "mean", "low", "high", "chance"])
