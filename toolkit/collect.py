"""One teacher-forced pass over rollouts -> :class:`~toolkit.types.Moments`. Nothing per token is kept.

Directions and head contributions need only means, and ``W mean(a) = mean(W a)``. So running sums per class are all
that leaves a forward pass: memory does not grow with the number of examples, and sums add up across shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from toolkit import hooks
from toolkit.generate import batches
from toolkit.lm import LM, Intervention, NoThinkTagsError, halving
from toolkit.sites import Site
from toolkit.types import Moments, Rollout

ATTN, MLP = "resid_mid", "resid_post"
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Positions:
    """Which positions of a rollout are averaged over: a name, and a function to positions in the full sequence."""

    name: str
    of: Callable[[Rollout], Sequence[int]]


def _think(r: Rollout) -> Sequence[int]:
    if r.think is None or not len(r.think):
        return ()
    span = r.think.predictors()
    return range(span.start, span.stop)


THINK = Positions("think", _think)
"""Every position that predicts a think token: ``[start-1, stop-1)``, as in ThinkEdit's released code."""


def step_starts(lm: LM) -> Positions:
    """Positions that predict the first token of a line of thinking (ours): where a model decides what to do next.

    These are the first predictor position and every position of the span whose token ends a line.
    """
    ends_line = {i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if lm.text([i]).endswith("\n")}

    def of(r: Rollout) -> Sequence[int]:
        where = _think(r)
        return [t for i, t in enumerate(where) if i == 0 or r.token_ids[t] in ends_line]

    return Positions("step_starts", of)


@dataclass(frozen=True)
class _Job:
    kinds: tuple[str, ...]
    positions: Positions
    second: tuple[str, ...]


def moments(
    lm: LM,
    rollouts: Sequence[Rollout],
    by: Callable[[Rollout], str | None],
    *,
    kinds: Sequence[str] = (ATTN, MLP, "z"),
    positions: Positions = THINK,
    second: Sequence[str] = (),
) -> Moments:
    """Mean activations per class, each example weighing 1 (mean over its positions, then over examples).

    Args:
        by: Class of a rollout, or ``None`` to leave it out.
        kinds: Site kinds to average, at every layer.
        positions: Which positions; an example without any is left out.
        second: Site kinds whose outer products are summed too (``layers * width^2`` numbers each).

    Raises:
        NoThinkTagsError: no rollout has a position to look at.
    """
    job = _Job(tuple(kinds), positions, tuple(second))
    examples = [(r, label, job.positions.of(r)) for r in rollouts if (label := by(r)) is not None]
    examples = [e for e in examples if len(e[2])]
    if not examples:
        raise NoThinkTagsError(
            f"None of the {len(rollouts)} rollouts of {lm.name} has positions {job.positions.name!r} in a class. "
            "Does the model think between tags? Load it with tags=ThinkTags(...) "
            "(--think 'response' takes the whole response as thinking), or choose other classes."
        )
    labels = tuple(sorted({label for _, label, _ in examples}))
    examples.sort(key=lambda e: len(e[0].token_ids))
    layout, layers = lm.layout, lm.layout.n_layers
    # fp64 sums: the difference of two long means is small beside either.
    sums = {k: torch.zeros(len(labels), layers, layout.width(k), dtype=torch.float64) for k in job.kinds}
    outer = {k: torch.zeros(len(labels), layers, layout.width(k), layout.width(k), dtype=torch.float64) for k in job.second}
    bar = tqdm(total=len(examples), desc="moments", unit="rollout", disable=len(examples) < 64, leave=False)

    def run(batch: Sequence[tuple[Rollout, str, Sequence[int]]]) -> None:
        first, squares = _batch(lm, batch, labels, job)
        for kind, value in first.items():
            sums[kind] += value
        for kind, value in squares.items():
            outer[kind] += value
        bar.update(len(batch))

    with bar:
        for batch in batches(examples, lambda e: len(e[0].token_ids), BATCH_TOKENS):
            halving(batch, run)
    n = tuple(sum(label == name for _, label, _ in examples) for name in labels)
    return Moments(labels, n, job.positions.name, sums, outer, lm.provenance())


@torch.inference_mode()
def _batch(lm: LM, batch, labels: tuple[str, ...], job: _Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ids = padded([r.token_ids for r, _, _ in batch], lm)
    flat = torch.tensor([b * ids.shape[1] + t for b, (_, _, where) in enumerate(batch) for t in where], device=lm.device)
    weights = torch.zeros(len(labels), len(flat))
    at = 0
    for _, label, where in batch:
        weights[labels.index(label), at : at + len(where)] = 1 / len(where)
        at += len(where)
    weights = weights.to(lm.device)
    first: dict[str, list] = {k: [None] * lm.layout.n_layers for k in job.kinds}
    squares: dict[str, list] = {k: [None] * lm.layout.n_layers for k in job.second}

    def watch(site: Site) -> Callable[[Tensor], None]:
        def reduce(value: Tensor) -> None:
            chosen = value.flatten(0, 1)[flat].float()
            if site.kind in first:
                first[site.kind][site.layer] = weights @ chosen
            if site.kind in squares:
                squares[site.kind][site.layer] = torch.stack([(w[:, None] * chosen).T @ chosen for w in weights])

        return reduce

    wanted = [Site(kind, layer) for kind in {*job.kinds, *job.second} for layer in range(lm.layout.n_layers)]
    with hooks.observe(lm.layout, {site: watch(site) for site in wanted}):
        # Right padding under a causal mask never reaches a real token, so no mask is needed. No logits either.
        lm.model.base_model(input_ids=ids, use_cache=False)

    def stacked(parts: dict[str, list]) -> dict[str, Tensor]:
        return {kind: torch.stack(rows, dim=1).cpu().double() for kind, rows in parts.items()}

    return stacked(first), stacked(squares)


def padded(rows: Sequence[Sequence[int]], lm: LM) -> Int[Tensor, "batch seq"]:
    """Token ids, right padded, on the model's device."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=lm.tokenizer.pad_token_id or 0).to(lm.device)


@torch.inference_mode()
def logits(lm: LM, rollout: Rollout, intervention: Intervention | None = None) -> Float[Tensor, "response vocab"]:
    """Teacher-forced logits (fp32) that predict each response token, under an intervention if given."""
    ids = padded([rollout.token_ids], lm)
    with intervention(lm) if intervention else nullcontext():
        return lm.model(input_ids=ids, use_cache=False).logits[0, rollout.prompt_len - 1 : -1].float()
