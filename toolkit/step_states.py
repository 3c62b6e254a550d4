"""Activations where steps of thinking begin, with a class for each step, such as re-check or not.

``step_states`` returns them as ``collect.States``, for probes, directions and rotations that compare kinds of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import collect, steps
from toolkit.collect import States
from toolkit.lm import LM
from toolkit.positions import Positions
from toolkit.steps import Splitter, Step
from toolkit.types import Rollout

Label = Callable[[str], str | None]
"""Function from the text of a step to its class; ``None`` leaves the step out."""
Mark = tuple[int, int, str]
"""A position in the full sequence, the index of the step that it begins, and the class of the step."""
RECHECK, OTHER = "recheck", "other"


def starts_with(*words: str) -> Label:
    """Return a ``Label``: ``"recheck"`` for a step that begins with one of the words, in any case, else ``"other"``.

    >>> label = starts_with("wait", "hmm")
    >>> label("Wait, 17+5=22"), label("22-9=13")
    ('recheck', 'other')

    Raises:
        ValueError: no word is given, or one is empty.
    """
    chosen = tuple(word.strip().lower() for word in words)
    if not all(chosen) or not chosen:
        raise ValueError(f"words={words}: give at least one word with which a re-check begins, none of them empty.")
    pattern = steps.whole_words(chosen)
    return lambda text: RECHECK if pattern.match(text.strip().lower()) else OTHER


def begun(lm: LM, rollout: Rollout, split: Splitter) -> list[Step]:
    """Return the steps of thinking of a response, in order, without those that have no token."""
    return [step for step in steps.think_steps(lm, rollout, split) if len(step.span)]


def step_states(lm: LM, rollouts: Sequence[Rollout], kind: str, label: Label, *, split: Splitter = steps.lines) -> States:
    """Return the activations at the position that predicts each step's first token, one row per step.

    ``values`` are ``[steps, layers, width]``. The table ``rows`` has the columns ``step`` (index of the step in its response, from 0) and
    ``label`` (its class) besides the usual ones.

    Args:
        lm: The model.
        rollouts: Responses. Steps whose class is ``None`` are left out.
        kind: Kind of site, such as ``"resid_post"`` or ``"z"``.
        label: Class of a step, from its text.
        split: Splitter of thinking into steps.

    Raises:
        NoThinkTagsError: no response has a step with a class.
    """
    return states_at(lm, rollouts, kind, [_classes(lm, r, label, split) for r in rollouts])


def _classes(lm: LM, rollout: Rollout, label: Label, split: Splitter) -> list[Mark]:
    found = ((step.span.start - 1, n, label(step.text)) for n, step in enumerate(begun(lm, rollout, split)))
    return [(at, n, name) for at, n, name in found if name is not None]


def states_at(lm: LM, rollouts: Sequence[Rollout], kind: str, marks: Sequence[Sequence[Mark]]) -> States:
    """Return the activations at given positions, one row per position, with the columns ``step`` and ``label`` as given.

    Args:
        lm: The model.
        rollouts: Responses; a response without a mark is left out.
        kind: Kind of site, such as ``"resid_post"``.
        marks: For each response, triples (position, index of the step, class), in order of position.

    Raises:
        NoThinkTagsError: no response has a mark.
    """
    chosen = {id(r): each for r, each in zip(rollouts, marks, strict=True)}
    where = Positions("step starts", lambda r: [at for at, _, _ in chosen[id(r)]])
    found = collect.states(lm, rollouts, kind, positions=where, each=True)
    table = [(n, name) for each in marks for _, n, name in each]
    return replace(found, rows=found.rows.assign(step=[n for n, _ in table], label=[name for _, name in table]))


def ends_step(lm: LM, ends: str) -> Float[Tensor, " vocab"]:
    """Return a table over token ids: 1 for a token whose text ends with ``ends``, else 0. If ``ends`` is empty, it is 1 everywhere.

    Raises:
        ValueError: no token of the model ends with the text.
    """
    table = torch.zeros(lm.vocab_size)
    for token in range(min(lm.vocab_size, len(lm.tokenizer))):
        table[token] = float(lm.token_text(token).endswith(ends))
    if not table.any():
        raise ValueError(f"No token of {lm.name} ends with {ends!r}: give the text with which its steps end, such as a line break.")
    return table
