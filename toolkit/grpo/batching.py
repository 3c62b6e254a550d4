"""Cutting a generation into micro-batches with little padding."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict


def micro_batches(scored: dict[str, Any], parts: int, together: int = 1, *, by_length: bool = True) -> list[dict[str, Any]]:
    """The rows of a generation in ``parts`` equal micro-batches, each trimmed to its longest row.

    Args:
        scored: Tensors of TRL's generation batch, ``[rows, ...]``; scalars are repeated.
        together: Rows that stay side by side in their order (a group), from the first row on.
        by_length: Whether rows (or groups, by their longest) are sorted by response length.
    """
    longest = scored["completion_mask"].sum(dim=1).view(-1, together).amax(dim=1)
    blocks = longest.argsort(stable=True) if by_length else torch.arange(len(longest), device=longest.device)
    order = (blocks[:, None] * together + torch.arange(together, device=blocks.device)).flatten()
    rows = {k: v[order.to(v.device)] if torch.is_tensor(v) and v.ndim else v for k, v in scored.items()}
    return [trimmed(part) for part in split_tensor_dict(rows, parts)]


def trimmed(part: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch without the columns that are padding in every row: prompts are padded left, responses right."""
    left = part["prompt_mask"].shape[1] - int(part["prompt_mask"].sum(dim=1).max())
    width, right = part["completion_mask"].shape[1], max(1, int(part["completion_mask"].sum(dim=1).max()))

    def cut(name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim < 2:
            return value
        if name in ("prompt_ids", "prompt_mask"):
            return value[:, left:]
        return value[:, :right] if value.shape[1] == width else value

    return {name: cut(name, value) for name, value in part.items()}
