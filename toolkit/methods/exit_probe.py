"""Reasoning models know when they are right: probing hidden states for self-verification, arXiv:2504.05419. A check for ``exits.EarlyExit``.

A probe reads, at the end of each chunk of thinking, the last hidden state h *after* the final norm, and predicts whether the answer that the
model would give now is right. Thinking ends at the first chunk with::

    sigmoid( w . h + b ) > threshold            published threshold .5

Sources: the released code. There, a linear probe or an MLP is trained with Adam (1e-5, weight decay 1e-3, 200 epochs), and positive
examples weigh twice as much; chunks are paragraphs that begin with a transition word, and another model labels their intermediate answers.

Deviations: the linear probe only, fitted as a logistic regression on standardised features (``directions.logistic_model``), where both
classes weigh the same. The label of a chunk is our own: the answer that is forced there, greedily, is graded. Every end of a step can be a
chunk. A threshold is not portable between models: choose it on a dev split, and look at ``calibration``.

Units and signs: probabilities, 0 to 1; a higher one stops earlier. Problems, not chunks, are split for the scores. Cost: a pass over the
response so far at each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import exits, identity, origins, probes, stats
from toolkit.baselines import closing
from toolkit.directions import assumed_penalty, logistic_model
from toolkit.exits import EarlyExit
from toolkit.generate import Sampling, continuations
from toolkit.lm import LM
from toolkit.probes import Protocol
from toolkit.spans import Reader
from toolkit.store import WrongModelError
from toolkit.types import Problem, Provenance, Rollout, problems_by_id

THRESHOLD = 0.5  # published
ANSWER_TOKENS = 21  # longest forced answer: ours, as in CoDE-Stop


class OneOutcomeError(ValueError):
    """All forced answers are right, or all are wrong, so a probe has nothing to tell apart."""


@torch.inference_mode()
def last_state(lm: LM, ids: Sequence[int]) -> Float[Tensor, " d_model"]:
    """Return the last hidden state, after the final norm, at the last position of a sequence of token ids, fp32."""
    batch = torch.tensor([list(ids)], device=lm.device)
    return lm.body(input_ids=batch, use_cache=False).last_hidden_state[0, -1].float()


@dataclass(frozen=True)
class Chunks:
    """Candidates of responses with the outcome of the answer that is forced there.

    Attributes:
        states: Last hidden states after the final norm, ``[chunks, d_model]``.
        right: True where the forced answer is right, one per chunk.
        problems: Problem id of each chunk.
    """

    states: np.ndarray
    right: np.ndarray
    problems: np.ndarray


def chunks(
    lm: LM, rule: EarlyExit, rollouts: Sequence[Rollout], problems: Sequence[Problem], *, at_most: int | None = None
) -> Chunks:
    """Return the candidates of some responses, with an answer forced and graded at each.

    Args:
        lm: The model.
        rule: Rule whose candidates are taken; its check is not called.
        rollouts: Responses of the model.
        problems: The problems of the responses.
        at_most: Largest number of candidates, evenly spread over the list of all; ``None`` for all.

    Raises:
        KeyError: a response belongs to none of the problems.
        ValueError: no response has a candidate.
    """
    known = problems_by_id(problems, rollouts)
    found = []
    for r in rollouts:
        for _, reader in exits.candidates(lm, rule, r):
            tag = closing(lm, reader, rule.before)
            found.append((known[r.problem_id], list(reader.ids), tag))
    if not found:
        raise ValueError(
            f"None of {len(rollouts)} responses has a candidate of {rule}: sample more, or choose another end of steps."
        )
    if at_most is not None and len(found) > at_most:
        found = [found[i] for i in np.linspace(0, len(found) - 1, at_most).astype(int)]
    answers = continuations(
        lm, [(p, [*ids, *tag]) for p, ids, tag in found], Sampling(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
    )
    states = torch.stack([last_state(lm, ids) for _, ids, _ in found]).cpu().numpy()
    return Chunks(states, np.array([a.correct for a in answers]), np.array([p.id for p, _, _ in found]))


@dataclass(frozen=True)
class ExitProbe:
    """Check that stops where a linear probe on the last hidden state expects a right answer.

    Attributes:
        weight: Weight of each entry of the state, ``d_model`` numbers.
        bias: Constant of the probe.
        provenance: The model whose states the probe was fitted to, and the problems.
        threshold: Probability above which thinking stops.
    """

    weight: tuple[float, ...]
    bias: float
    provenance: Provenance = field(hash=False)  # its notes are a dict
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or not all(map(math.isfinite, (*self.weight, self.bias))):
            raise ValueError(f"threshold={self.threshold}, bias={self.bias}: need a threshold from 0 to 1, and finite weights.")

    def __str__(self) -> str:
        return f"probe {identity.hash_of(torch.tensor([*self.weight, self.bias]))} over {identity.format_exact(self.threshold)}"

    def probability(self, lm: LM, ids: Sequence[int]) -> float:
        """Return the probability that the answer is right if thinking ends after these tokens.

        Raises:
            WrongModelError: the probe was fitted to another model's states.
        """
        if lm.fingerprint != self.provenance.fingerprint:
            raise WrongModelError(f"The probe was fitted to the states of another model than {lm.name}: fit one to this model.")
        score = last_state(lm, ids).cpu() @ torch.tensor(self.weight) + self.bias
        return float(torch.sigmoid(score))

    def __call__(self, lm: LM, reader: Reader, earlier: list[Any]) -> bool:
        """Return True to stop. ``earlier`` gets the probability of each candidate."""
        earlier.append(self.probability(lm, reader.ids))
        return earlier[-1] > self.threshold


def fit(lm: LM, found: Chunks, *, threshold: float = THRESHOLD, penalty: float = assumed_penalty) -> ExitProbe:
    """Return a probe that is fitted to all chunks.

    Args:
        lm: The model whose states the chunks hold.
        found: Chunks from ``chunks``.
        threshold: Probability above which thinking stops.
        penalty: L2 penalty, see ``directions.logistic_model``.

    Raises:
        OneOutcomeError: all forced answers are right, or all are wrong.
    """
    if len(np.unique(found.right)) < 2:
        raise OneOutcomeError(
            f"All {len(found.right)} forced answers are {'right' if found.right.all() else 'wrong'}: use problems of other difficulty."
        )
    scaler, model = logistic_model(len(found.right), penalty).fit(found.states, found.right).named_steps.values()
    weight = model.coef_.reshape(-1) / scaler.scale_
    bias = float(model.intercept_[0] - weight @ scaler.mean_)
    return ExitProbe(tuple(map(float, weight)), bias, lm.provenance(**origins.record(found.problems)), threshold)


def calibration(found: Chunks, protocol: Protocol = Protocol()) -> Mapping[str, float]:
    """Return the area under the ROC curve and the calibration of probes, on problems that they were not fitted on.

    Returns:
        ``auc``; ``predicted`` and ``right``: mean probability and share of right answers, which are equal for a calibrated probe.
    """
    margins = probes.out_of_fold(found.states, found.right, found.problems, logistic_model, protocol)
    return {
        "auc": stats.auc(found.right, margins),
        "predicted": float((1 / (1 + np.exp(-margins))).mean()),
        "right": float(found.right.mean()),
    }
