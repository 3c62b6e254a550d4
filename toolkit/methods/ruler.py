"""Ruler: a model-agnostic method to control generated length for large language models (Li et al., 2024), arXiv:2409.18943.

A *meta length token* (MLT) such as ``[MLT:50]`` stands at the head of a response and names the level of its length. The model is fine-tuned
on responses with their MLTs. Afterwards the user places an MLT to request a length; without one, the model writes an MLT of its own first.

Equations (x: prompt; y: response; |y|: its length; T: a target, with the range ``low(T) < |y| <= high(T)``)::

    data:        (x, y) -> (x, MLT_T y)        for the T whose range contains |y|; responses that no range contains are left out
    loss:        -(1/N) sum of log p(token | x, earlier tokens)     over the N tokens of MLT and response
    requested:   y ~ p(. | x, MLT_T)
    automatic:   MLT, y ~ p(. | x)

Scores: PM and FM, percentages of lengths in a narrow and in a wide range of the target, per target and level (``stats.length_match``).

Deviations: the paper fine-tunes models of 7B and more on 121,229 instructions; here problems, responses and model are yours. Its range for
150 words is (135, 155] in the released code; all others are T +- 5, so ``TRAINING`` has (145, 155]. The code leaves stray ``[MLT:>800]``
in responses; ``written`` reads every MLT. The first values of the new embeddings are not stated: they are those of transformers, the mean of
the old ones or draws with their mean and covariance (ours; rows that the model has beyond its tokenizer are taken as they are).
``length`` may be any function of the text; the default counts words as the paper does.

Units and signs: lengths in the unit of ``length``. Cost: fine-tuning; no cost at run time beyond one token. ``data/ruler`` measures it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType

import torch

from toolkit import finetune, stats
from toolkit import lm as lms
from toolkit.finetune import Example
from toolkit.lm import LM
from toolkit.stats import Number, Ranges
from toolkit.types import Problem

TRAINING: Ranges = MappingProxyType(
    {t: (t, math.inf) if math.isinf(high) else (t - 5, t + 5) for t, (_, high) in stats.RULER_PRECISE.items()}
)
"""Ranges of the paper's training data, in words: T +- 5, and above 800 for the open target."""
MOST = 20_000  # examples per MLT: from the paper


def token(target: Number, ranges: Ranges = TRAINING) -> str:
    """Return the text of the meta length token of a target.

    >>> token(50), token(800)
    ('[MLT:50]', '[MLT:>800]')

    Args:
        target: Target length.
        ranges: Target -> ``(low, high)``. A target whose range has no upper end is written with ``>``.

    Raises:
        ValueError: the target is not among the ranges.
    """
    if target not in ranges:
        raise ValueError(f"No meta length token for the target {target}: choose one of {', '.join(map(str, ranges))}.")
    return f"[MLT:{'>' * math.isinf(ranges[target][1])}{target:g}]"


def target_of(length: Number, ranges: Ranges = TRAINING) -> Number | None:
    """Return the target whose range contains a length, or ``None`` if none does.

    >>> target_of(52), target_of(60), target_of(2000)
    (50, None, 800)

    Raises:
        ValueError: several ranges contain it.
    """
    targets = [t for t, (low, high) in ranges.items() if low < length <= high]
    if len(targets) > 1:
        raise ValueError(f"The length {length:g} lies in the ranges of {targets}: give ranges for training that do not overlap.")
    return targets[0] if targets else None


def with_tokens(lm: LM, ranges: Ranges = TRAINING) -> LM:
    """Return a copy of a model whose tokenizer and embeddings have one more token per target. Tied embeddings stay tied.

    Args:
        lm: The model; it is unchanged.
        ranges: Target -> ``(low, high)``.

    Raises:
        ValueError: the tokenizer has one of the tokens already, or no target is given.
        UnsupportedModelError: the weights are quantised or offloaded.
    """
    lms.check_plain(lm, "adding tokens", "Load the model without quantisation and offloading.")
    texts = [token(t, ranges) for t in ranges]
    if known := [text for text in texts if lm.token_id(text) is not None]:
        raise ValueError(f"{lm.name} has the token {known[0]} already: use the model as it is.")
    if not texts:
        raise ValueError("No targets: give at least one, with its range.")
    tokenizer, model = deepcopy(lm.tokenizer), deepcopy(lm.model)
    tokenizer.add_tokens(texts, special_tokens=True)
    if len(tokenizer) > lm.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    grown = lms.child(replace(lm, tokenizer=tokenizer), model.eval(), f"{lm.name} + {len(texts)} length tokens")
    lms.qualify(grown)
    return grown


def examples(
    lm: LM,
    responses: Sequence[tuple[Problem, str]],
    ranges: Ranges = TRAINING,
    *,
    length: Callable[[str], Number] = stats.words,
    most: int = MOST,
) -> list[Example]:
    """Return training examples: each response after the meta length token of its length.

    Args:
        lm: Model of ``with_tokens``.
        responses: Pairs of a problem and the text of a response, think tags included.
        ranges: Target -> ``(low, high)``; the ranges do not overlap. Responses that no range contains are left out.
        length: Function from the response's text to its length.
        most: Largest number of examples per target; the first ones are taken.

    Raises:
        ValueError: the model lacks a token, or a target has no response.
    """
    _check(lm, ranges)
    taken: dict[Number, list[Example]] = {t: [] for t in ranges}
    for problem, text in responses:
        target = target_of(length(text), ranges)
        if target is not None and len(taken[target]) < most:
            taken[target].append(finetune.example(lm, problem, token(target, ranges) + text))
    if empty := [t for t, rows in taken.items() if not rows]:
        raise ValueError(
            f"{len(responses)} responses, but none with a length in {ranges[empty[0]]}, the range of the target {empty[0]}: "
            "give responses of that length, or leave the target out."
        )
    return [e for rows in taken.values() for e in rows]


def shuffled(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """Return examples with their meta length tokens dealt out at random, as a control: the tokens then say nothing about length.

    Args:
        examples: Examples of ``examples``, whose responses begin with the token.
        seed: Seed of the order.
    """
    heads = [e.response[0] for e in examples]
    random.Random(seed).shuffle(heads)
    return [replace(e, response=[head, *e.response[1:]]) for e, head in zip(examples, heads, strict=True)]


def requested(problem: Problem, target: Number, ranges: Ranges = TRAINING) -> Problem:
    """Return a problem whose prompt ends with the meta length token of a target, so that the response has about that length.

    The id stays the same. Without this, the model writes a meta length token of its own (see ``written``).
    """
    head = {"role": "assistant", "content": token(target, ranges)}
    return replace(problem, messages=(*problem.messages, head))


def written(text: str, ranges: Ranges = TRAINING) -> tuple[Number | None, str]:
    """Return ``(target, rest)``: the target of the meta length token at the head of a response, and the text without any such token.

    The target is ``None`` if the response does not begin with one of the tokens.

    >>> written("[MLT:30]A short story.")
    (30, 'A short story.')
    """
    names: Mapping[str, Number] = {token(t, ranges): t for t in ranges}
    target = next((t for name, t in names.items() if text.startswith(name)), None)
    for name in names:
        text = text.replace(name, "")
    return target, text


def _check(lm: LM, ranges: Ranges) -> None:
    if missing := [token(t, ranges) for t in ranges if lm.token_id(token(t, ranges)) is None]:
        raise ValueError(f"{lm.name} lacks the token {missing[0]}: add the tokens with with_tokens(lm, ranges).")
