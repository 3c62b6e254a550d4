"""Improving length-generalization in transformers via task hinting (Awasthi and Gupta, 2023), arXiv:2310.00726.

While a model is trained on a task, it is also trained on a simpler task that is related to it, the *hint*. The paper's example is sorting:
the hint that helps is *successor* (given the sequence and one of its elements, write the next larger element). Other hints, which seem as
natural, help far less.

A hint reaches the model in one of two ways. *Mixed*: a share r of the examples of each batch are examples of the hint. *Noted*: a second
head on the same hidden states predicts the hint's answer at every token of the prompt. With C the mean cross-entropy over all tokens that
count, and w the weight of the hint::

    mixed    loss = C(next tokens of the answers, of both kinds of examples)
    noted    loss = C(next tokens of the answers) + w C(notes)

Controls: ``any_element`` has the form of *successor* without its content, ``relabelled`` that of noted hints.

Deviations: the paper's mixing ratio, model size and length-dependent temperatures were not found, so the first two are arguments, and
the last is left out. Noted hints are ours: a causal model has not seen the whole sequence while it reads it, so *successor* becomes the
smallest larger element so far. The control ``any_element`` and the hints for parity are ours too.

Units and signs: losses in nats per token; smaller is better. Cost: that of the examples, and a second output layer for notes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from toolkit.tasks.generators.sequences import ASK, END, NUMBERS, SILENT, Draw, Example

assumed_share = 0.5  # r: share of hint examples in a batch
assumed_weight = 1.0  # w: weight of the notes

Hint = Callable[[random.Random, Example], Example]
"""A function that makes an example of a hint from an example of the task."""


# --- mixed: hints that are examples of their own -------------------------------------------------------------


def successor(rng: random.Random, example: Example) -> Example:
    """Return the published hint for sorting: the sequence and one element of it; the answer is the next larger element.

    The answer for the largest element is empty, so ``END`` follows, as in sorting.

    >>> successor(random.Random(0), Example((5, 2, 9), (2, 5, 9)))
    Example(prompt=(5, 2, 9, 68, 2), answer=(5,), notes=())
    """
    element = rng.choice(example.prompt)
    return Example((*example.prompt, ASK, element), tuple(sorted(x for x in example.prompt if x > element)[:1]))


def rank(rng: random.Random, example: Example) -> Example:
    """Return a hint of counting, which the paper found to help far less: how many elements of the sequence are smaller than this one."""
    element = rng.choice(example.prompt)
    return Example((*example.prompt, ASK, element), (sum(x < element for x in example.prompt),))


def any_element(rng: random.Random, example: Example) -> Example:
    """Return the random control of ``successor``: the same prompt, but the answer is a random element of the sequence."""
    return Example((*example.prompt, ASK, rng.choice(example.prompt)), (rng.choice(example.prompt),))


def mixed(rng: random.Random, draw: Draw, hint: Hint, lengths: Sequence[int], share: float = assumed_share) -> list[Example]:
    """Return a batch of examples of a task and of a hint, hints last. Their number is exact: ``share`` of the batch, rounded.

    Args:
        rng: Source of every random choice.
        draw: Function that draws an example of the task of a given length.
        hint: Function that makes an example of the hint from one of the task.
        lengths: Length of each example of the batch.
        share: Share of hints, from 0 to 1.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected the share of hints in a batch, from 0 to 1.")
    plain = len(lengths) - round(share * len(lengths))
    examples = [draw(rng, n) for n in lengths]
    return examples[:plain] + [hint(rng, e) for e in examples[plain:]]


# --- noted: hints that a second head predicts ----------------------------------------------------------------


def successor_so_far(example: Example) -> Example:
    """Return the example with notes: for each element, the smallest larger element up to there, or ``END`` if it is the largest.

    >>> successor_so_far(Example((5, 2, 9), (2, 5, 9))).notes
    (66, 5, 66)
    """
    seen = example.prompt
    return replace(example, notes=tuple(min((x for x in seen[: i + 1] if x > seen[i]), default=END) for i in range(len(seen))))


def parity_so_far(example: Example) -> Example:
    """Return an example of bits with notes: at each bit, the sum modulo 2 of the bits up to it.

    >>> parity_so_far(Example((1, 0, 1), (0,))).notes
    (1, 1, 0)
    """
    return replace(example, notes=tuple(sum(example.prompt[: i + 1]) % 2 for i in range(len(example.prompt))))


def relabelled(example: Example) -> Example:
    """Return the random control of notes: each number's note is another number, by one random permutation; nothing need be computed.

    The permutation is always the same.
    """
    order = random.Random(0).sample(range(NUMBERS), NUMBERS)
    return replace(example, notes=tuple(order[x] if x < NUMBERS else SILENT for x in example.prompt))


NOTES: Mapping[str, Callable[[Example], Example]] = {
    "successor so far": successor_so_far, "parity so far": parity_so_far, "relabelled": relabelled,
}  # fmt: skip
HINTS: Mapping[str, Hint] = {"successor": successor, "rank": rank, "any element": any_element}


def multi_task_loss(
    logits: Float[Tensor, "batch T vocabulary"], targets: Int[Tensor, "batch T"], note_logits: Float[Tensor, "batch T vocabulary"],
    notes: Int[Tensor, "batch T"], weight: float = assumed_weight,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the loss of both heads in nats, ``C(targets) + weight * C(notes)``. Entries ``SILENT`` (-100) do not count.

    If no note counts, the loss is that of the targets alone.

    Args:
        logits: Logits of the next token.
        targets: Next tokens.
        note_logits: Logits of the second head.
        notes: Labels that the second head is to predict.
        weight: Weight w of the notes.
    """
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=SILENT)
    if not bool(torch.any(notes != SILENT)):
        return loss
    return loss + weight * cross_entropy(note_logits.flatten(0, 1), notes.flatten(), ignore_index=SILENT)
