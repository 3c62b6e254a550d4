"""Sliding windows are not the end: exploring full ranking with long-context large language models (Liu et al., 2024), arXiv:2412.14574.

A language model ranks passages by writing their identifiers: ``[3] > [1] > [2]``. Long lists are usually ranked in *sliding windows*, from
the end of the list to its beginning. The paper ranks the whole list at once (*full ranking*), and trains a model for it.

Equations, with p_i the probability of the i-th token of the response::

    L = (1 / N) sum_i w_i (-log p_i)            N: number of predicted tokens
    w_i = 1 + 1 / log2(r + 1)                   token of the identifier at rank r, from 1
    w_i = alpha                                 any other token; alpha <= 1

Labels of full lists come from a teacher that ranks windows. A pass of windows brings the best passages to the front. The first ``fixed``
of them are kept, and the next pass ranks the rest. With 100 passages, windows of 20 and 10 fixed, this takes 9 passes.

Deviations: in the paper's code, alpha is 1 and any other value is an argument here. Brackets belong to the identifier. If the step of the
windows does not divide the list, the last window still begins at the first passage. The paper also adds noise to embeddings (NEFTune, 5);
TRL has that as ``neftune_noise_alpha``. Its teacher is a large model; here the caller gives one.

Units and signs: losses in nats per predicted token; ranks from 1; indices of passages from 0.

Cost: windows of w with step s over n passages read about ``w n / s`` passages, full ranking reads n. ``data/ranking`` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from toolkit.stats.rankings import IDENTIFIER, completed

WINDOW, STEP, FIXED = 20, 10, 10  # passages per window, between two windows, and fixed per pass; from the paper's code
ALPHA = 1.0  # weight of separators and all other tokens; from the paper's code
IGNORED = -100  # label of a token that is not predicted, as in transformers

Rank = Callable[[Sequence[int]], Sequence[int]]
"""Function from passage indices to the same indices, the most relevant first. A model or a teacher behind it ranks the passages."""


# --- loss ----------------------------------------------------------------------------------------------------


def identifier_weight(rank: int) -> float:
    """Return the weight of the identifier at ``rank``, counted from 1.

    >>> [round(identifier_weight(r), 4) for r in (1, 2, 3, 10)]
    [2.0, 1.6309, 1.5, 1.2891]
    """
    return 1 + 1 / math.log2(rank + 1)


def token_weights(pieces: Sequence[str], *, alpha: float = ALPHA) -> list[float]:
    """Return the weight of each token of a response, given the tokens' texts.

    A token that holds any character of the identifier at rank r gets the weight of r, and of the higher rank if it holds characters of two.

    >>> token_weights(["[", "3", "]", " >", " [1]"], alpha=0.5)
    [2.0, 2.0, 2.0, 0.5, 1.6309297535714575]

    Args:
        pieces: Text of each token; joined, they are the response.
        alpha: Weight of all other tokens, from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the weight of separators has to be from 0 to 1.")
    weights = [alpha] * sum(map(len, pieces))  # one per character
    for rank, match in enumerate(IDENTIFIER.finditer("".join(pieces)), 1):
        weights[match.start() : match.end()] = [identifier_weight(rank)] * len(match[0])
    result, start = [], 0
    for piece in pieces:
        result.append(max(weights[start : start + len(piece)], default=alpha))
        start += len(piece)
    return result


def weighted_token_nll(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    weights: Float[Tensor, "batch seq"],
    *,
    n: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted mean of ``-log p`` over the predicted tokens, in nats. With weights of 1 it is the cross-entropy.

    Args:
        logits: Logits; those at position t predict the label at t + 1.
        labels: Token ids, and ``-100`` for tokens that are not predicted.
        weights: Weight of each label.
        n: Number by which the sum is divided. Default: the number of predicted tokens. With accumulated gradients, the number of predicted
            tokens of all accumulated batches.

    Raises:
        ValueError: no token is predicted.
    """
    targets, weights = labels[:, 1:], weights[:, 1:]
    active = targets != IGNORED
    if not bool(active.any()):
        raise ValueError(
            "No token is predicted: all labels but the first of a row are -100. Shorten the prompts, or raise max_length."
        )
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][active].float(), targets[active], reduction="none")
    return (losses * weights[active].to(losses)).sum() / (active.sum() if n is None else n)


def label_weights(labels: Int[Tensor, "batch seq"], text_of: Callable[[int], str], *, alpha: float = ALPHA) -> Tensor:
    """Return the weight of each label: as in ``token_weights`` where it is predicted, and 0 elsewhere.

    Args:
        labels: Token ids, and ``-100`` for tokens that are not predicted. The predicted tokens of a row are one response.
        text_of: Function from a token id to its text.
    """
    weights = torch.zeros(labels.shape)
    for row, ids in zip(weights, labels.tolist(), strict=True):
        where = [t for t, i in enumerate(ids) if i != IGNORED]
        row[where] = torch.tensor(token_weights([text_of(ids[t]) for t in where], alpha=alpha))
    return weights.to(labels.device)


def loss_function(tokenizer: PreTrainedTokenizerBase, *, alpha: float = ALPHA) -> Callable[..., Tensor]:
    """Return the loss as a function ``(outputs, labels, num_items_in_batch=None)``: the ``compute_loss_func`` of a Trainer.

    The weights are computed from the labels, so the data set needs no further column. Do not pack several responses into one row.

    Args:
        tokenizer: Turns the labels' ids into text.
        alpha: Weight of the tokens outside identifiers.
    """

    @cache
    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        weights = label_weights(labels, text_of, alpha=alpha)
        return weighted_token_nll(outputs.logits, labels, weights, n=num_items_in_batch)

    return loss


def trainer_class(tokenizer: PreTrainedTokenizerBase, *, alpha: float = ALPHA) -> type:
    """Return a subclass of TRL's ``SFTTrainer`` that trains with this loss. Needs the extra ``rl``.

    TRL will drop ``compute_loss_func`` in its version 2, and recommends a subclass. Use it as the SFTTrainer itself, with a data set of
    ``prompt`` and ``completion``, and without packing. The columns of the log that TRL computes itself (entropy, token accuracy) are left
    out.
    """
    from trl import SFTTrainer

    loss_of = loss_function(tokenizer, alpha=alpha)

    class RankingTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: int | Tensor | None = None
        ) -> Any:
            labels = inputs["labels"]
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
            loss = loss_of(outputs, labels, num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = (
                    loss * self.accelerator.num_processes
                )  # the number of tokens is of all processes, whose gradients are averaged
            return (loss, outputs) if return_outputs else loss

    return RankingTrainer


def listwise(passages: Sequence[str], answer: Callable[[list[str]], str]) -> Rank:
    """Return a ``Rank`` of ``passages`` from a model's answers. Passages that an answer does not name go to the end, in their given order.

    Args:
        passages: Texts of all passages, by index.
        answer: Function from the passages in a prompt to the answer, such as ``"[2] > [1]"``. Identifiers count from 1 within the prompt.
    """

    def rank(indices: Sequence[int]) -> list[int]:
        return [indices[i] for i in completed(answer([passages[i] for i in indices]), len(indices))]

    return rank


# --- windows and labels --------------------------------------------------------------------------------------


def sliding_windows(ranking: Sequence[int], rank: Rank, *, window: int = WINDOW, step: int = STEP) -> list[int]:
    """Return a ranking after one pass of windows from its end to its beginning, each of which ``rank`` puts in order.

    >>> sliding_windows([0, 1, 2, 3, 4, 5], lambda indices: sorted(indices, reverse=True), window=4, step=2)
    [5, 4, 1, 0, 3, 2]

    Args:
        ranking: Passage indices in their present order.
        rank: Puts the passages of a window in order.
        window: Passages per window, 2 or more.
        step: Passages by which a window lies before the last one, from 1 to ``window - 1``; a larger one would carry nothing forward.

    Raises:
        ValueError: an impossible window or step, or ``rank`` did not return the passages that it was given.
    """
    if window < 2 or not 1 <= step < window:
        raise ValueError(f"window={window}, step={step}: need a window of 2 or more, and a step from 1 to window - 1.")
    order = list(ranking)
    starts = range(len(order) - window, 0, -step)
    for start in [*starts, 0]:  # the last window begins at the first passage
        order[start : start + window] = _ranked(order[start : start + window], rank)
    return order


def full_list_labels(
    ranking: Sequence[int], rank: Rank, *, window: int = WINDOW, step: int = STEP, fixed: int = FIXED
) -> list[int]:
    """Return a ranking of the whole list by passes of sliding windows; each pass fixes the first ``fixed`` passages of what it ranked.

    The last pass is the first that fits into one window.

    >>> full_list_labels([0, 1, 2, 3, 4, 5], lambda indices: sorted(indices, reverse=True), window=4, step=2, fixed=2)
    [5, 4, 3, 2, 1, 0]

    Args:
        ranking: Passage indices in their first order, such as that of BM25.
        rank: The teacher. It puts the passages of a window in order.
        window: Passages per window.
        step: Passages by which a window lies before the last one.
        fixed: Passages that each pass fixes, from 1 to ``window - step``. A pass surely brings that many of the best to the front.

    Raises:
        ValueError: an impossible window, step or ``fixed``, or ``rank`` did not return the passages that it was given.
    """
    if not 1 <= fixed <= window - step:
        raise ValueError(f"fixed={fixed}: a pass of windows of {window} with step {step} finds the best {window - step} at most.")
    done: list[int] = []
    rest = list(ranking)
    while len(rest) > window:
        rest = sliding_windows(rest, rank, window=window, step=step)
        done, rest = done + rest[:fixed], rest[fixed:]
    return done + (sliding_windows(rest, rank, window=window, step=step) if len(rest) > 1 else rest)


def _ranked(indices: list[int], rank: Rank) -> list[int]:
    ranked = list(rank(indices))
    if sorted(ranked) != sorted(indices):
        raise ValueError(f"rank returned {ranked[:20]} for the passages {indices[:20]}: it has to return each of them once.")
    return ranked
