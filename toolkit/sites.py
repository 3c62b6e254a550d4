"""Where things are inside a model: one layout row per architecture family, sites, head geometry.

Sites of a block, in the order they are computed (``[batch, seq, width]``):

==============  =====================  ==============================================================
kind            width                  what it is
==============  =====================  ==============================================================
``resid_pre``   d_model                input of the block
``z``           n_heads * head_dim     per-head attention output, the input of ``W_O``
``attn_out``    d_model                output of ``W_O``, bias included, *before* a post-norm
``resid_mid``   d_model                ``resid_pre`` + what attention adds
``mlp_out``     d_model                output of the MLP, *before* a post-norm
``resid_post``  d_model                output of the block, before any final norm
==============  =====================  ==============================================================

Post-norm families (Gemma 2/3, OLMo 2) normalise ``attn_out`` before it is added; :meth:`Layout.to_attn_out`
carries a residual direction back through that norm's gain. In parallel blocks (GPT-NeoX) the MLP reads
``resid_pre``, so ``resid_mid`` is read by nothing but the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

Kind = Literal["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
KINDS: tuple[str, ...] = get_args(Kind)
LONGEST = 400  # characters of an error message


class UnsupportedModelError(ValueError):
    """A model cannot be used: its files are damaged, its layout could not be found, or it does not behave as its row says.

    The message is one line of at most :data:`LONGEST` characters, whatever foreign text it quotes.
    """

    def __init__(self, message: str) -> None:
        flat = " ".join(message.split())
        super().__init__(flat if len(flat) <= LONGEST else f"{flat[: LONGEST - 3]}...")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network: ``Site("resid_mid", 3)`` is the residual stream inside block 3."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown site kind {self.kind!r}: choose one of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Row:
    """Names of a family's modules inside a block. A row fits if every named module exists."""

    family: str
    attention: str
    out: str
    mlp: str
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None


# The first row that fits wins, so the more specific ones come first.
ROWS = (
    Row(
        "post-norm (Gemma 2/3, OLMo 2)",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    ),
    Row("pre-norm (Llama, Mistral, Qwen 2/3, Phi-3)", attention="self_attn", out="o_proj", mlp="mlp"),
    Row("GPT-2", attention="attn", out="c_proj", mlp="mlp"),
    Row("GPT-NeoX", attention="attention", out="dense", mlp="mlp"),
)


@dataclass(frozen=True)
class Block:
    """The modules of one block."""

    block: nn.Module
    attention: nn.Module
    out: nn.Module
    mlp: nn.Module
    post_attention_norm: nn.Module | None
    post_mlp_norm: nn.Module | None

    @property
    def adds_attention(self) -> nn.Module:
        """The module whose output is what attention adds to the residual stream."""
        return self.post_attention_norm or self.attention


@dataclass(frozen=True)
class Layout:
    """Sites, head geometry and output projections of one model."""

    row: Row
    blocks: tuple[Block, ...]
    n_heads: int
    head_dim: int
    d_model: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def width(self, kind: str) -> int:
        """Size of the last axis at a site."""
        return self.n_heads * self.head_dim if kind == "z" else self.d_model

    def check(self, site: Site) -> None:
        """Raise IndexError if the model has no such layer."""
        if not 0 <= site.layer < self.n_layers:
            raise IndexError(f"{site} does not exist: the model has layers 0..{self.n_layers - 1}.")

    def W_O(self, layer: int) -> Float[Tensor, "d_model n_heads_head_dim"]:
        """Output projection as ``[d_model, n_heads * head_dim]``: a view, writing to it edits the model."""
        out: Any = self.blocks[layer].out
        return out.weight.T if _is_conv1d(out) else out.weight

    def b_O(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Bias of the output projection, or ``None``."""
        return getattr(self.blocks[layer].out, "bias", None)

    def head(self, head: int) -> slice:
        """Columns of ``W_O`` (and entries of ``z``) that belong to a query head."""
        if not 0 <= head < self.n_heads:
            raise IndexError(f"Head {head} does not exist: the model has heads 0..{self.n_heads - 1}.")
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def to_attn_out(self, layer: int, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """The functional of ``attn_out`` that equals (up to a positive scale) v's component of what attention adds.

        Pre-norm: v itself. Post-norm (RMS norm with gain g): ``g * v``, since ``<v, g * a / rms(a)> = <g * v, a> / rms(a)``.
        """
        norm: Any = self.blocks[layer].post_attention_norm
        if norm is None:
            return v
        # The gain is read off behaviour: some families store g, others 1 + g.
        probe = torch.ones(self.d_model, dtype=norm.weight.dtype, device=norm.weight.device)
        return norm(probe).detach().to(v) * v


def find(model: PreTrainedModel) -> Layout:
    """Find a model's layout by structure.

    Raises:
        UnsupportedModelError: no row fits; says what was looked for and how to add one.
    """
    config = model.config.get_text_config()
    wanted = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    for row in ROWS:
        for modules in lists:
            blocks = [_block(module, row) for module in modules]
            if blocks and all(blocks):
                return _layout(config, row, tuple(b for b in blocks if b))
    seen = ", ".join(sorted({name for modules in lists for name, _ in modules[0].named_children()}))[:100] if wanted else ""
    looked = ", ".join(sorted({f"{row.attention}.{row.out} + {row.mlp}" for row in ROWS}))
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of {wanted} blocks has the modules of a known family ({looked}); a block here has {seen or 'none'}. "
        "To support it, add a Row with its module names to ROWS in toolkit/sites.py."
    )


def _block(module: nn.Module, row: Row) -> Block | None:
    attention: Any = getattr(module, row.attention, None)
    out, mlp = getattr(attention, row.out, None), getattr(module, row.mlp, None)
    names = (row.post_attention_norm, row.post_mlp_norm)
    norms = [getattr(module, name, None) if name else None for name in names]
    if out is None or mlp is None or any(name and norm is None for name, norm in zip(names, norms, strict=True)):
        return None
    return Block(module, attention, out, mlp, norms[0], norms[1])


def _layout(config, row: Row, blocks: tuple[Block, ...]) -> Layout:
    shapes = [_sizes(b.out) for b in blocks]
    if len({*shapes}) > 1:
        raise UnsupportedModelError(
            f"The layers of {type(config).__name__.removesuffix('Config')} differ in their heads: W_O takes {min(shapes)[0]} inputs in one and "
            f"{max(shapes)[0]} in another. Only families whose layers are alike are supported."
        )
    d_in, d_out = shapes[0]
    try:
        n_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or d_in // n_heads
    except Exception as error:  # a config that keeps one value per layer refuses to give one for all
        raise UnsupportedModelError(f"{type(config).__name__} does not give one number and size of heads: {error}") from error
    if n_heads * head_dim != d_in:
        raise UnsupportedModelError(
            f"W_O takes {d_in} inputs, but the config says {n_heads} heads of {head_dim}: "
            "heads cannot be told apart. Check num_attention_heads and head_dim in config.json."
        )
    return Layout(row, blocks, n_heads, head_dim, d_out)


def _sizes(out: Any) -> tuple[int, int]:
    """Inputs and outputs of an output projection."""
    d_in, d_out = out.weight.shape if _is_conv1d(out) else out.weight.shape[::-1]
    return d_in, d_out


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's Conv1D stores [in, out] and carries its output size as nf.
    return hasattr(module, "nf")
