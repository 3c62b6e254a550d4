"""Split a generation into micro-batches with little padding.

A generation is a batch of responses that are sampled at once and used for one or more optimizer steps. A row is one response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict

BY_ROWS = frozenset({"grpo", "sapo", "dr_grpo", "luspo"})  # TRL's losses that divide by the number of rows of a micro-batch
BY_TOKENS = frozenset({"dapo", "cispo", "vespo"})  # TRL's losses that divide by the number of tokens of the whole generation


def has_router_loss(settings: Mapping[str, Any], config: Any) -> bool:
    """Return True if TRL adds a mixture of experts' loss for balance between experts, which is not linear in the rows of a micro-batch.

    Args:
        settings: Fields of TRL's ``GRPOConfig`` by name. Without ``router_aux_loss_coef`` the weight is that of the model's config.
        config: Config of the model.
    """
    text, weight = config.get_text_config(), settings.get("router_aux_loss_coef")
    weight = getattr(text, "router_aux_loss_coef", 0.0) if weight is None else weight
    return hasattr(text, "output_router_logits") and weight != 0


def depends_on_parts(settings: Mapping[str, Any], config: Any = None) -> bool:
    """Return True if TRL computes a mean or a quantile over the tokens of each micro-batch, so that the split changes the update.

    This holds for the loss ``bnpo``, for an entropy bonus, for ``top_entropy_quantile`` below 1, and for a mixture of experts (see
    ``has_router_loss``). Rows of similar length must then not be
    put together: a token would count the more, the shorter the responses in its micro-batch are.

    Args:
        settings: Fields of TRL's ``GRPOConfig`` by name. A missing field has TRL's default.
        config: Config of the model; ``None`` for a model without experts.
    """
    if config is not None and has_router_loss(settings, config):
        return True
    bonus = settings.get("entropy_coef", 0.0) or settings.get("use_adaptive_entropy", False)
    return settings.get("loss_type") == "bnpo" or bool(bonus) or settings.get("top_entropy_quantile", 1.0) < 1


def micro_batches(scored: dict[str, Any], parts: int, together: int = 1, *, by_length: bool = True) -> list[dict[str, Any]]:
    """Split a generation (a batch of responses sampled at once) into ``parts`` micro-batches of equal size.

    A row is one response, and a column is one token position. Each micro-batch is a dict like ``scored`` with part of the rows. Columns
    that are padding in all of its rows are removed.

    Args:
        scored: The generation with its rewards, as TRL's dict of tensors ``[rows, ...]``. Numbers and 0-d tensors are copied into every
            micro-batch.
        parts: Number of micro-batches. The number of rows must be a multiple of it.
        together: Number of consecutive rows that must stay in one micro-batch. Pass the number of responses per problem to keep the
            responses to one problem together, or 1 for no such constraint.
        by_length: True to sort rows by response length before the split, shortest first. With ``together`` above 1, blocks of rows are
            sorted by their longest response instead. False keeps the order.
    """
    # A block is ``together`` consecutive rows: ``longest`` is [blocks], ``order`` the new order of rows, [rows].
    longest = scored["completion_mask"].sum(dim=1).view(-1, together).amax(dim=1)
    blocks = longest.argsort(stable=True) if by_length else torch.arange(len(longest), device=longest.device)
    order = (blocks[:, None] * together + torch.arange(together, device=blocks.device)).flatten()
    return [trim(part) for part in split_tensor_dict(_rows(scored, order), parts)]


def nonzero_micro_batches(scored: dict[str, Any], parts: int, loss_type: str, least: int = 0) -> list[dict[str, Any]]:
    """Split a batch into micro-batches, without the rows whose advantage is 0. A row is one response.

    In a loss without KL term, entropy bonus or other added term, a row with advantage 0 adds nothing to the gradient. Use this function
    only with such losses. The rows that stay are sorted by response length, then split, so each micro-batch has rows of similar length.

    The caller must multiply the loss of each micro-batch by its entry ``share``, a factor that corrects for the dropped rows. The total
    loss then has the same gradient as with all rows.

    If fewer than ``parts`` rows have a nonzero advantage, some rows with advantage 0 are kept, so that no micro-batch is empty.

    Args:
        scored: A batch of responses with their rewards, as TRL's dict of tensors ``[rows, ...]``. Numbers and 0-d tensors are copied into
            every micro-batch.
        parts: Number of micro-batches.
        loss_type: TRL's name of the loss. It must be in ``BY_ROWS`` (TRL divides the loss by the number of rows of the micro-batch) or
            ``BY_TOKENS`` (TRL divides it by the number of tokens of the whole batch).
        least: Smallest number of rows to keep. If fewer rows have a nonzero advantage, some rows with advantage 0 are kept too. If several
            processes train together, all must keep equally many rows, since TRL gathers one number per row from every process. To ensure
            this, count the rows with a nonzero advantage on each process, and pass the largest count on every process.
    """
    lengths, rows = scored["completion_mask"].sum(dim=1), len(scored["advantages"])
    chosen = (scored["advantages"] != 0).nonzero().flatten()
    if len(chosen) < (needed := max(parts, least)):  # fill up with rows of advantage 0
        chosen = torch.cat([chosen, (scored["advantages"] == 0).nonzero().flatten()[: needed - len(chosen)]])
    order = chosen[lengths[chosen].argsort(stable=True)]
    batches = [trim(_rows(scored, part)) for part in order.tensor_split(parts)]
    for part in batches:
        # TRL takes the mean over the rows of each part, then over parts. The factor turns this into a mean over all rows of the generation.
        part["share"] = len(part["advantages"]) * parts / rows if loss_type in BY_ROWS else 1.0
    return batches


def _rows(scored: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """Return the rows with the indices ``order``, in that order. Values without rows (numbers, 0-d tensors) stay as they are."""
    return {k: v[order.to(v.device)] if torch.is_tensor(v) and v.ndim else v for k, v in scored.items()}


def trim(part: dict[str, Any]) -> dict[str, Any]:
    """Return a micro-batch without the columns (token positions) that are padding in every row.

    Prompts are padded on the left, responses on the right.
    """
    # ``left``: columns of padding before the longest prompt. ``right``: length of the longest response, but at least one column stays.
    left = part["prompt_mask"].shape[1] - int(part["prompt_mask"].sum(dim=1).max())
    width, right = part["completion_mask"].shape[1], max(1, int(part["completion_mask"].sum(dim=1).max()))

    def cut(name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim < 2:
            return value
        if name in ("prompt_ids", "prompt_mask"):
            return value[:, left:]
        # Prompts of the mode-switching loss, padded left. They may be as wide as the responses, so the last line could cut them.
        if name in ("plain_ids", "plain_mask"):
            return value
        return value[:, :right] if value.shape[1] == width else value  # cut every tensor with one column per response token

    return {name: cut(name, value) for name, value in part.items()}


def written_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the mask of the response tokens that are trained on, ``[rows, tokens]``: 1 if the model wrote the token, else 0."""
    return inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
