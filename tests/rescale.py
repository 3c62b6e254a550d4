"""Rescalings of a model that leave its logits alone, on a copy: what tests of invariance change. Each returns the changed copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

from families import tokenizer
from torch import Tensor, nn

from toolkit import lm as lms
from toolkit.lm import LM
from toolkit.sites import Block

POST_NORM = ("gemma2", "gemma3", "olmo2")
NO_PRE_NORM = ("olmo2",)
ONE_PLUS = ("gemma2", "gemma3")  # families whose norms multiply by 1 + weight


def output_projection(lm: LM, c: float) -> LM:
    """Post-norm families: the norm behind ``W_O`` undoes its scale. One layer by c, another by its square root."""
    changed = copied(lm)
    for layer, factor in ((0, c), (2, c**0.5)):
        scale(changed.layout.blocks[layer].out, factor)
    return changed


def values(lm: LM, c: float) -> LM:
    """The values of one KV head by c, the ``W_O`` columns of the query heads that read it by 1/c."""
    changed, layout = copied(lm), lm.layout
    for layer, (head, factor) in enumerate([(0, c), (1, 1 / c), (1, c)]):
        rows = value_rows(changed.layout.blocks[layer].attention, layout.n_heads, layout.head_dim)
        own = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
        for part in rows:
            part[own] *= factor
        group = layout.n_heads * layout.head_dim // len(rows[0])
        readers = slice(head * group * layout.head_dim, (head + 1) * group * layout.head_dim)
        changed.layout.W_O(layer)[:, readers] /= factor
    return changed


def folded_gains(lm: LM, family: str) -> LM:
    """The gain (and shift) of each norm before attention or the MLP into the projections that read it."""
    changed = copied(lm)
    for block in changed.layout.blocks:
        for norm, readers in read_through(block):
            gain = norm.weight + 1 if family in ONE_PLUS else norm.weight.clone()
            shift = getattr(norm, "bias", None)
            for reader in readers:
                conv = hasattr(reader, "nf")
                if shift is not None:
                    reader.bias += shift @ (reader.weight if conv else reader.weight.T)
                reader.weight *= gain[:, None] if conv else gain
            norm.weight.fill_(0.0 if family in ONE_PLUS else 1.0)
            if shift is not None:
                shift.zero_()
    return changed


def whole_stream(lm: LM, c: float, family: str) -> LM:
    """Everything that is added to the stream by c, so that the final norm undoes it; what reads it without a norm by 1/c."""
    changed = copied(lm)
    head = changed.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # some are tied to the embeddings
    for module in changed.model.modules():
        if isinstance(module, nn.Embedding):
            module.weight *= c
    for block in changed.layout.blocks:
        if family in POST_NORM:
            for norm in (block.post_attention_norm, block.post_mlp_norm):
                one = 1.0 if family in ONE_PLUS else 0.0
                norm.weight.copy_(c * (norm.weight + one) - one)
        else:
            scale(block.out, c)
            scale(first(block.mlp, "down_proj", "c_proj", "dense_4h_to_h"), c)
        if family in NO_PRE_NORM:
            attention, mlp = block.attention, block.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                scale(reader, 1 / c)
    return changed


# --- parts -------------------------------------------------------------------------------------------------------


def copied(lm: LM) -> LM:
    model = copy.deepcopy(lm.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return lms.wrap(model, tokenizer(), name=lm.name)


def scale(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter *= factor


def first(module: nn.Module, *names: str) -> nn.Module:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def value_rows(attention: nn.Module, heads: int, head_dim: int) -> list[Tensor]:
    """Weight (and bias) of the value projection, views with one row per entry of a value."""
    if hasattr(attention, "v_proj"):
        return [p for p in (attention.v_proj.weight, attention.v_proj.bias) if p is not None]
    if hasattr(attention, "qkv_proj"):  # Phi-3: queries, keys, values
        rest = len(attention.qkv_proj.weight) - heads * head_dim
        return [attention.qkv_proj.weight[-rest // 2 :]]
    if hasattr(attention, "c_attn"):  # GPT-2: the same, transposed
        return [attention.c_attn.weight.T[-heads * head_dim :], attention.c_attn.bias[-heads * head_dim :]]
    fused = attention.query_key_value  # GPT-NeoX: query, key and value of one head after the other
    return [PerHead(part.view(heads, 3, head_dim, *part.shape[1:])[:, 2]) for part in (fused.weight, fused.bias)]


class PerHead:
    """Rows that lie apart in memory, head by head, written through as if they were one matrix."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return self.parts.shape[0] * self.parts.shape[1]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.parts[rows.start // self.parts.shape[1]]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        self.parts[rows.start // self.parts.shape[1]] = value


def read_through(block: Block) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The norms before attention and the MLP of a block, each with the projections that read it."""
    reads = [getattr(block.attention, n) for n in ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
             if hasattr(block.attention, n)]  # fmt: skip
    feeds = [
        getattr(block.mlp, n) for n in ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h") if hasattr(block.mlp, n)
    ]
    found = []
    for names, readers in (
        (("input_layernorm", "ln_1"), reads),
        (("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"), feeds),
    ):
        norms = [getattr(block.block, name) for name in names if hasattr(block.block, name)]
        norms = [norm for norm in norms if norm is not block.post_attention_norm]
        found += [(norms[0], readers)] if norms else []
    return found


Rescaling = Callable[[LM], LM]


def rescalings(family: str) -> dict[str, tuple[Rescaling, float]]:
    """Name -> (what changes the model, what lengths in the residual stream are multiplied by)."""
    found: dict[str, tuple[Rescaling, float]] = {
        "values": (lambda lm: values(lm, 8.0), 1.0),
        "whole stream": (lambda lm: whole_stream(lm, 4.0, family), 4.0),
    }
    if family in POST_NORM:
        found["output projection"] = (lambda lm: output_projection(lm, 100.0), 1.0)
    if family not in NO_PRE_NORM:
        found["folded gains"] = (lambda lm: folded_gains(lm, family), 1.0)
    return found
