"""Stability-filtered steering vectors, arXiv:2604.02113. Only steps that the model would begin in the same way again shape the vector.

At each boundary where a behaviour begins, such as a re-check, M continuations are drawn from the text before it. Equations::

    stability = share of the M continuations whose first step shows the same behaviour        keep if >= tau
    d_q = mean h (kept behaviour) - mean h (other steps)        per question q that has both
    v   = sum over q of (d_q - P d_q),                          scaled to norm 1

P projects onto the top K right singular vectors of the hidden states at the ends of the questions alone, one row per question. Published:
M = 10 at temperature .7 and top-p .95, tau = .8 (93.3 % of 541 boundaries were dropped), K = 4, layer 20 of 28, coefficient -100.

Sources: the released code, which is built on SEAL (2504.07986).

Deviations: a step is a line or paragraph of ``steps``, a behaviour one class of a ``Label``; other steps are not filtered, as in the code.
The hidden states are those that predict a step's first token. The singular vectors are of rows that are not centred. A coefficient of 100 on
a unit vector means nothing for another model: rescale with ``directions.in_typical_units``, so that a strength is a share of the typical
norm. All layers get a vector. The caller chooses where to steer (the code acts at layer 20).

Units and signs: adding v makes the behaviour likelier, so + is longer if the behaviour is re-checking; the paper's negative coefficient is a
negative strength here. Cost: M short continuations per boundary, and one pass over the responses and the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, steps
from toolkit.collect import States
from toolkit.directions import differences
from toolkit.generate import Sampling, continuations
from toolkit.lm import LM
from toolkit.positions import Positions
from toolkit.step_states import OTHER, RECHECK, Label, begun
from toolkit.steps import Splitter
from toolkit.types import Direction, Problem, Rollout, problems_by_id

DRAWS, TEMPERATURE, TOP_P, TAU, DIRECTIONS = 10, 0.7, 0.95, 0.8, 4  # published
assumed_tokens = 64  # longest continuation: one step is enough


@dataclass(frozen=True)
class Boundary:
    """The beginning of a step that shows the behaviour.

    Attributes:
        problem_id: Problem of the response.
        sample: Sample index of the response.
        step: Index of the step in the response, from 0.
        stability: Share of the continuations whose first step shows the behaviour, 0 to 1.
    """

    problem_id: str
    sample: int
    step: int
    stability: float


def stabilities(
    lm: LM,
    rollouts: Sequence[Rollout],
    problems: Sequence[Problem],
    label: Label,
    *,
    behaviour: str = RECHECK,
    split: Splitter = steps.lines,
    draws: int = DRAWS,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    tokens: int = assumed_tokens,
    seed: int = 0,
) -> list[Boundary]:
    """Return every boundary at which the behaviour begins, with its stability.

    Args:
        lm: The model.
        rollouts: Responses of the model.
        problems: The problems of the responses.
        label: Class of a step, from its text.
        behaviour: Class of the steps whose boundaries are measured.
        split: Splitter of thinking into steps.
        draws: Number of continuations per boundary, M.
        temperature: Sampling temperature of the continuations.
        top_p: Nucleus of the continuations.
        tokens: Longest continuation. The first step should fit.
        seed: Random seed of the continuations.

    Raises:
        KeyError: a response belongs to none of the problems.
        ValueError: no step shows the behaviour.
    """
    known = problems_by_id(problems, rollouts)
    found = [(r, n, s.span.start) for r in rollouts for n, s in enumerate(begun(lm, r, split)) if label(s.text) == behaviour]
    if not found:
        raise ValueError(f"No step of {len(rollouts)} responses is of class {behaviour!r}: sample more, or change the label.")
    prompts = [(known[r.problem_id], r.token_ids[:at]) for r, _, at in found]
    sampling = Sampling(draws, temperature, top_p, max_new_tokens=tokens, seed=seed)
    drawn = continuations(lm, prompts, sampling)
    shares = []
    for i in range(len(found)):
        first = [begun(lm, c, split)[:1] for c in drawn[i * draws : (i + 1) * draws]]
        shares.append(sum(bool(s) and label(s[0].text) == behaviour for s in first) / draws)
    return [Boundary(r.problem_id, r.sample, n, share) for (r, n, _), share in zip(found, shares, strict=True)]


def keep_stable(states: States, boundaries: Sequence[Boundary], tau: float = TAU, *, behaviour: str = RECHECK) -> States:
    """Return the states without the steps of the behaviour whose boundary is less stable than ``tau``. Other steps all stay.

    Args:
        states: Activations where steps begin, from ``step_states``.
        boundaries: From ``stabilities``, of the same responses and splitter.
        tau: Smallest stability to keep, 0 to 1.
        behaviour: Class of the steps that are filtered.

    Raises:
        ValueError: ``tau`` is not from 0 to 1, or no boundary is as stable.
        KeyError: a step of the behaviour has no boundary.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: expected a share, 0 to 1.")
    stability: Mapping[tuple[str, int, int], float] = {(b.problem_id, b.sample, b.step): b.stability for b in boundaries}
    rows = zip(*(states.rows[name] for name in ("problem_id", "sample", "step", "label")), strict=True)
    kept = [name != behaviour or stability[problem, sample, step] >= tau for problem, sample, step, name in rows]
    if not any(ok and name == behaviour for ok, name in zip(kept, states.rows["label"], strict=True)):
        largest = max(stability.values(), default=float("nan"))
        raise ValueError(
            f"None of {len(stability)} boundaries is as stable as tau={tau:g}: the largest stability is {largest:g}. Choose a smaller tau, "
            "or sample more responses."
        )
    return states.take(np.array(kept))


def question_states(lm: LM, rollouts: Sequence[Rollout], kind: str) -> States:
    """Return the activations at the last token of each question's prompt, one row per problem."""
    first = list({r.problem_id: r for r in reversed(rollouts)}.values())
    return collect.states(lm, first, kind, positions=Positions("question", lambda r: [r.prompt_len - 1]))


def direction(states: States, questions: States, k: int = DIRECTIONS, *, behaviour: str = RECHECK, other: str = OTHER) -> Direction:
    """Return the unit vector of the behaviour per layer: summed differences per question, without the directions of the questions.

    Questions without both classes have no difference and are left out; ``n_pos`` of the result is the number of the others.

    Args:
        states: Activations where steps begin, filtered by ``keep_stable``.
        questions: Activations of the questions, from ``question_states``.
        k: Number of singular directions that are projected out; 0 for none.
        behaviour: Class of the steps that show the behaviour.
        other: Class of the other steps.

    Raises:
        NoPairsError: no question has both classes.
        ValueError: there are fewer than k questions, or the difference lies within their directions.
    """
    delta = differences(states, pos=behaviour, neg=other)
    removed = without(delta, singular(questions.values.double(), k)).sum(dim=0)
    norms = removed.norm(dim=-1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError(f"In layer {int(norms.argmin())} nothing is left of the difference: choose a smaller k than {k}.")
    return Direction(
        removed / norms, states.kind, states.positions, f"stability-filtered (K={k})", len(delta), len(delta), states.provenance
    )


def singular(values: Float[Tensor, "questions layers width"], k: int) -> Float[Tensor, "layers k width"]:
    """Return the top k right singular vectors of each layer's matrix, one row per question. Raise ValueError if there are fewer rows than k."""
    questions, _, width = values.shape
    if not 0 <= k <= min(questions, width):
        raise ValueError(f"k={k}: {questions} questions of width {width} have at most {min(questions, width)} singular directions.")
    return torch.linalg.svd(values.transpose(0, 1), full_matrices=False).Vh[:, :k]


def without(delta: Float[Tensor, "questions layers width"], basis: Float[Tensor, "layers k width"]) -> Tensor:
    """Return each difference without its part in the span of the rows of ``basis``, which are orthonormal, per layer."""
    return delta - torch.einsum("qlk,lkd->qld", torch.einsum("qld,lkd->qlk", delta, basis), basis)


def table(boundaries: Sequence[Boundary], taus: Sequence[float] = (0.2, 0.4, 0.6, TAU)) -> pd.DataFrame:
    """Return one row per ``tau``. Columns: ``tau``; ``kept`` (share of the boundaries that it keeps, 0 to 1); ``boundaries`` (number of all)."""
    shares = np.array([b.stability for b in boundaries])
    return pd.DataFrame({"tau": taus, "kept": [float((shares >= tau).mean()) for tau in taus], "boundaries": len(shares)})
