"""Split a generation (all responses sampled at once, for one or more optimizer steps) into micro-batches with little padding."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict

BY_ROWS = frozenset({"grpo", "sapo", "dr_grpo", "luspo"})  # TRL's losses that divide by the number of rows of a micro-batch
BY_TOKENS = frozenset({"dapo", "cispo", "vespo"})  # ... and by the number of tokens of the whole generation


def micro_batches(scored: dict[str, Any], parts: int, together: int = 1, *, by_length: bool = True) -> list[dict[str, Any]]:
    """Split the rows of a generation into ``parts`` equal micro-batches, each trimmed to its longest row.

    Args:
        scored: Tensors of TRL's generation batch by name, ``[rows, ...]``; values without rows are copied into every part.
        parts: Number of micro-batches.
        together: Number of consecutive rows that must stay in one micro-batch: the size of a group, or 1 for no such constraint.
        by_length: True to sort rows (or groups, by their longest row) by response length.
    """
    # A block is ``together`` consecutive rows: ``longest`` is [blocks], ``order`` the new order of rows, [rows].
    longest = scored["completion_mask"].sum(dim=1).view(-1, together).amax(dim=1)
    blocks = longest.argsort(stable=True) if by_length else torch.arange(len(longest), device=longest.device)
    order = (blocks[:, None] * together + torch.arange(together, device=blocks.device)).flatten()
    return [trim(part) for part in split_tensor_dict(_rows(scored, order), parts)]


def nonzero_micro_batches(scored: dict[str, Any], parts: int, loss_type: str, least: int = 0) -> list[dict[str, Any]]:
    """Split only the rows with a nonzero advantage into micro-batches; the other rows add nothing to the gradient.

    Each micro-batch gets an entry ``share``, a factor by which the caller multiplies the loss of the micro-batch. With it, the total loss
    is still divided by the number of all rows, dropped ones included. Each micro-batch keeps at least one row, so that it has a loss.

    Args:
        scored: Tensors of TRL's generation batch by name, ``[rows, ...]``.
        parts: Number of micro-batches.
        loss_type: TRL's name of the loss, one of ``BY_ROWS`` or ``BY_TOKENS``.
        least: Minimum number of rows to keep; rows with advantage 0 fill up to it. Give every process the same number, since TRL gathers
            measurements of equally many rows from each process.
    """
    lengths, rows = scored["completion_mask"].sum(dim=1), len(scored["advantages"])
    chosen = (scored["advantages"] != 0).nonzero().flatten()
    if len(chosen) < (needed := max(parts, least)):  # fill up with rows of advantage 0
        chosen = torch.cat([chosen, (scored["advantages"] == 0).nonzero().flatten()[: needed - len(chosen)]])
    order = chosen[lengths[chosen].argsort(stable=True)]
    batches = [trim(_rows(scored, part)) for part in order.tensor_split(parts)]
    for part in batches:
        part["share"] = len(part["advantages"]) * parts / rows if loss_type in BY_ROWS else 1.0
    return batches


def _rows(scored: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """Return the rows with the given indices, in that order; values without rows are kept."""
    return {k: v[order.to(v.device)] if torch.is_tensor(v) and v.ndim else v for k, v in scored.items()}


def trim(part: dict[str, Any]) -> dict[str, Any]:
    """Remove the columns that are padding in every row of a micro-batch (prompts are padded left, responses right)."""
    left = part["prompt_mask"].shape[1] - int(part["prompt_mask"].sum(dim=1).max())
    width, right = part["completion_mask"].shape[1], max(1, int(part["completion_mask"].sum(dim=1).max()))

    def cut(name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim < 2:
            return value
        if name in ("prompt_ids", "prompt_mask"):
            return value[:, left:]
        if name in ("plain_ids", "plain_mask"):  # prompts too, padded left, which may be as wide as the responses
            return value
        return value[:, :right] if value.shape[1] == width else value  # cut every tensor with one column per response token

    return {name: cut(name, value) for name, value in part.items()}
