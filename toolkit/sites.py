"""Sites inside a model at which activations are read or changed, and their modules in each architecture family.

The sites of a block, in the order in which they are computed. Values are ``[batch, seq, width]``:

==============  =====================  ==============================================================
kind            width                  value
==============  =====================  ==============================================================
``resid_pre``   d_model                input of the block
``z``           n_heads * head_dim     outputs of all attention heads (after a gate, if there is one): the input of ``W_O``. Layers
                                       without attention heads do not have this site.
``attn_out``    d_model                output of ``W_O``, bias included, *before* a post-norm; in a layer without heads, the output of
                                       the module in attention's place
``resid_mid``   d_model                ``resid_pre`` plus attention's contribution
``mlp_out``     d_model                output of the MLP, *before* a post-norm
``resid_post``  d_model                output of the block, before any final norm
==============  =====================  ==============================================================

*Post-norm families* (Gemma 2/3, OLMo 2) normalise ``attn_out`` before it is added to the residual stream. The vector that a head adds to
the stream is called its *contribution*. In these families it differs from the head's part of ``attn_out``. The contribution is a linear
function of ``Z_OVER_NORM``. This is ``z / s``, where s is the number by which the norm divides at the position. It is computed from the
sites ``z`` and ``attn_out``, and is not a site itself. The norm also multiplies by a gain. ``Layout.to_attn_out`` takes
the gain into account when it maps a direction of the stream to ``attn_out``.

In parallel blocks (GPT-NeoX) the MLP reads ``resid_pre``, so ``resid_mid`` is only a partial sum that no module reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit import tensors
from toolkit.types import Z_OVER_NORM as Z_OVER_NORM
from toolkit.types import Kind

KINDS: tuple[str, ...] = get_args(Kind)
MIXERS = ("linear_attn", "mamba", "conv")
"""Names of the module that stands in attention's place in a layer without attention heads: linear attention, Mamba, convolution."""
PROBE, SMALL_PROBE = 64.0, 1e-3  # entries of a norm's test inputs: far above and far below the square root of its epsilon
LONGEST = 400  # longest error message, in characters


class UnsupportedModelError(ValueError):
    """A model cannot be used: its files are damaged, its layout is unknown, or it fails the checks of ``toolkit.qualify``.

    The error puts its message on one line and cuts it to 400 characters.
    """

    def __init__(self, message: str) -> None:
        flat = " ".join(message.split())
        super().__init__(flat if len(flat) <= LONGEST else f"{flat[: LONGEST - 3]}...")


@dataclass(frozen=True, order=True)
class Site:
    """A kind of activation in one block: ``Site("resid_mid", 3)`` is the residual stream between attention and MLP of block 3.

    >>> sorted([Site("z", 1), Site("z", 0)])
    [Site(kind='z', layer=0), Site(kind='z', layer=1)]
    >>> Site("residual", 3)
    Traceback (most recent call last):
    ValueError: Unknown site kind 'residual': choose one of resid_pre, z, attn_out, resid_mid, mlp_out, resid_post.
    """

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown site kind {self.kind!r}: choose one of {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Row:
    """The module names of one architecture family.

    A model belongs to the family if each of its blocks has all these modules, with two exceptions. A block without attention heads has one
    of the modules in ``MIXERS`` in place of the attention module. The module ``extra`` may be missing.

    Attributes:
        family: Name of the family, or of several with the same module names.
        attention: Name of the attention module in a block.
        out: Name of the output projection ``W_O`` in the attention module.
        mlp: Name of the MLP in a block.
        post_attention_norm: Name of the norm that follows ``attn_out`` in a block; ``None`` if no norm does.
        post_mlp_norm: Name of the norm that follows ``mlp_out`` in a block; ``None`` if no norm does.
        factor: Name of the config entry that holds the factor on the outputs of attention and MLP when they are added to the residual
            stream. The factor is 1 if this is ``None`` or the config has no such entry.
        extra: Name of a module in a block whose output is added to the stream after the MLP's, or ``None``.
        output_scale: Name of a tensor in a block that multiplies the block's output, or ``None``.
    """

    family: str
    attention: str
    out: str
    mlp: str
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    factor: str | None = None
    extra: str | None = None
    output_scale: str | None = None


# The first row that matches is used, so more specific rows come first.
ROWS = (
    Row(
        "Gemma 4",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        extra="post_per_layer_input_norm",
        output_scale="layer_scalar",
    ),
    Row(
        "post-norm (Gemma 2/3, OLMo 2/3, EXAONE 4)",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    ),
    Row(
        "GLM 4",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        post_attention_norm="post_self_attn_layernorm",
        post_mlp_norm="post_mlp_layernorm",
    ),
    Row(
        "Trinity (AFMoE)",
        attention="self_attn",
        out="o_proj",
        mlp="mlp",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_mlp_layernorm",
    ),
    Row(
        "pre-norm (Llama, Mistral, Qwen, Phi-3, gpt-oss, DeepSeek, Granite)",
        "self_attn",
        "o_proj",
        "mlp",
        factor="residual_multiplier",
    ),
    Row("Granite MoE", "self_attn", "o_proj", "block_sparse_moe", factor="residual_multiplier"),
    Row("Granite hybrid", "self_attn", "o_proj", "shared_mlp", factor="residual_multiplier"),
    Row("Bamba, Llama 4", "self_attn", "o_proj", "feed_forward"),
    Row("LFM2", "self_attn", "out_proj", "feed_forward"),
    Row("Phi", "self_attn", "dense", "mlp"),
    Row("GPT-2", "attn", "c_proj", "mlp"),
    Row("GPT-NeoX", "attention", "dense", "mlp"),
)


@dataclass(frozen=True)
class Block:
    """The modules of one transformer block. A ``Row`` holds their names.

    Attributes:
        block: The block itself.
        attention: The attention module; in a layer without heads, the module in its place (see ``MIXERS``).
        out: The output projection ``W_O``; ``None`` in a layer without attention heads.
        mlp: The MLP.
        post_attention_norm: The norm that follows ``attn_out``, or ``None``.
        post_mlp_norm: The norm that follows ``mlp_out``, or ``None``.
        extra: Module whose output is added to the stream after the MLP's, or ``None``.
    """

    block: nn.Module
    attention: nn.Module
    out: nn.Module | None
    mlp: nn.Module
    post_attention_norm: nn.Module | None
    post_mlp_norm: nn.Module | None
    extra: nn.Module | None = None

    @property
    def adds_attention(self) -> nn.Module:
        """The module whose output, times ``Layout.factor``, is added to the stream: the norm after ``attn_out``, else attention itself."""
        return self.post_attention_norm or self.attention


@dataclass(frozen=True)
class Norm:
    """An RMS norm or LayerNorm as a formula: ``norm(x) = gain * centre(x) / scale(x) + shift``.

    ``centre`` and ``scale`` are methods of this class. The shift (the bias of the norm) is not stored: it adds the same vector to every
    output, whatever the heads contribute.

    Attributes:
        gain: Factor on each entry of the vector.
        centred: True for a LayerNorm, which subtracts the mean over the entries of x.
        eps: Epsilon that is added to the mean square in ``scale``.
    """

    gain: Float[Tensor, " d_model"]
    centred: bool
    eps: float

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return the number by which the norm divides its input at each position, in fp32: ``sqrt(mean(centre(x)^2) + eps)``."""
        return (self.centre(x.float()).pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def back(self, v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Map a direction v from the norm's output to its input.

        Return u with ``<v, norm(x) - shift> = <u, x> / scale(x)`` for all x, where ``<a, b>`` is the inner product and the shift is the
        norm's bias.
        """
        return self.centre(self.gain.to(v) * v)

    def centre(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return x minus its mean over the last axis if the norm is a LayerNorm; return x itself if it is an RMS norm."""
        # As a matrix, this map is symmetric: so ``back`` can apply it to the direction instead of to x.
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


@torch.no_grad()
def read_norm(module: nn.Module, W_O: Float[Tensor, "d_model _"]) -> Norm:
    """Return the formula of the norm that follows an output projection.

    Gain and epsilon are measured by running the norm on test inputs. The module's attributes cannot be used: some families store the gain g
    as g - 1, and epsilon has many names.

    Args:
        module: The norm.
        W_O: The output projection. Only its size, device and dtype are used.

    Raises:
        UnsupportedModelError: the module is neither an RMS norm nor a LayerNorm.
    """
    # PyTorch's norms accept only inputs in the dtype of their weights; those of transformers accept fp32 and compute in it.
    dtype = W_O.dtype if isinstance(module, nn.LayerNorm | nn.RMSNorm) else torch.float32

    def odd(x: Tensor) -> Tensor:
        # (f(x) - f(-x)) / 2: a shift cancels. Calling forward directly runs no hooks, which may be active on the norm now.
        return (module.forward(x.to(dtype)).float() - module.forward(-x.to(dtype)).float()) / 2

    # Inputs of alternating sign have mean 0, so centring does not change them. For large inputs epsilon is negligible: outputs are +-gain.
    signs = torch.ones(len(W_O), device=W_O.device)
    signs[1::2] = -1
    large = odd(PROBE * signs)
    # The output for a constant input is 0 only if the norm subtracts the mean.
    centred = bool(odd(PROBE * torch.ones_like(signs)).abs().max() < 1e-3 * large.abs().max())
    plain = Norm(torch.ones_like(signs), centred, 0.0)
    gain = large * plain.scale(signs) / plain.centre(signs)
    # With tiny inputs epsilon dominates the scale. share is 1 / scale there, by least squares over the entries. Solve
    # scale^2 = mean square + eps for eps; rounding may make it slightly negative.
    small = gain * plain.centre(signs) * SMALL_PROBE
    share = (small @ odd(SMALL_PROBE * signs)) / (small @ small).clamp(min=1e-30)
    norm = Norm(gain, centred, max(0.0, float(share**-2 - (SMALL_PROBE * plain.scale(signs)) ** 2)))
    # The formula has to predict the output of an input that none of the above used.
    ramp = torch.linspace(-1, 2, len(W_O), device=W_O.device)
    if not torch.allclose(odd(ramp), gain * norm.centre(ramp) / norm.scale(ramp), rtol=0.02, atol=0.02 * float(gain.abs().max())):
        raise UnsupportedModelError(
            f"{type(module).__name__} follows attention's output projection and is neither an RMS norm nor a LayerNorm, so the "
            "contributions of single heads to the residual stream cannot be separated. Use a model of another family."
        )
    return norm


@dataclass(frozen=True)
class Layout:
    """Modules of one model, the number and size of its attention heads, and its output projections ``W_O``.

    Layers may differ in the number and size of their heads, and may have none (linear attention, state spaces, convolutions). Therefore a
    table with one number per head is ``[layers, n_heads]``, with NaN for heads that a layer does not have. A tensor that holds ``z`` of all
    layers has the width of the widest layer, ``width("z")``; narrower layers are padded with 0.

    Attributes:
        row: The architecture family, with its module names.
        blocks: The modules of each layer.
        heads: Number of query heads of each layer; 0 in a layer without attention heads.
        head_dims: Size of a head's output in each layer; 0 in a layer without attention heads.
        d_model: Width of the residual stream.
        factor: Factor on the outputs of attention and MLP when they are added to the residual stream; 1 in most models.
    """

    row: Row
    blocks: tuple[Block, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    d_model: int
    factor: float = 1.0

    @property
    def n_layers(self) -> int:
        """Number of layers (blocks)."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer; the largest one if layers differ."""
        return max(self.heads)

    @property
    def head_dim(self) -> int:
        """Size of a head's output; the largest one if layers differ."""
        return max(self.head_dims)

    @property
    def all_heads(self) -> list[tuple[int, int]]:
        """Every ``(layer, head)`` of the model."""
        return [(layer, head) for layer, n in enumerate(self.heads) for head in range(n)]

    @property
    def absent(self) -> tuple[tuple[int, int], ...]:
        """Entries ``(layer, head)`` of a ``[layers, n_heads]`` table for which there is no head."""
        return tuple((layer, head) for layer, n in enumerate(self.heads) for head in range(n, self.n_heads))

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that have attention heads."""
        return [layer for layer, n in enumerate(self.heads) if n]

    @property
    def attention(self) -> Any:
        """The attention module of the first layer that has heads."""
        return self.blocks[self.attention_layers[0]].attention

    def layers(self, kind: str) -> list[int]:
        """Return the layers that have sites of a kind: for ``z`` and ``Z_OVER_NORM`` those with attention heads, else all."""
        return self.attention_layers if kind in ("z", Z_OVER_NORM) else list(range(self.n_layers))

    def width(self, kind: str) -> int:
        """Return the size of the last axis of activations at a kind of site; for ``z`` and ``Z_OVER_NORM``, the largest over layers."""
        widths = [n * size for n, size in zip(self.heads, self.head_dims, strict=True)]
        return max(widths) if kind in ("z", Z_OVER_NORM) else self.d_model

    def check(self, site: Site) -> None:
        """Raise IndexError if the model does not have the site."""
        if not 0 <= site.layer < self.n_layers:
            raise IndexError(f"{site} does not exist: the model has layers 0..{self.n_layers - 1}.")
        if site.layer not in self.layers(site.kind):
            raise IndexError(f"{site} does not exist: {self._headless(site.layer)}")

    def _headless(self, layer: int) -> str:
        kind = type(self.blocks[layer].attention).__name__
        return f"layer {layer} has no attention heads (it is {kind}); layers {', '.join(map(str, self.attention_layers))} have."

    def W_O(self, layer: int) -> Float[Tensor, "d_model n_heads_head_dim"]:
        """Return the output projection as ``[d_model, heads * head_dim]``.

        It is a view, so writing to it edits the model. Exception: if the weights are quantised or offloaded, it is a copy.

        Raises:
            IndexError: the layer has no attention heads.
        """
        out = self.blocks[layer].out
        if out is None:
            raise IndexError(self._headless(layer).capitalize())
        return tensors.matrix(out, next(p for p in self.blocks[layer].block.parameters() if p.is_floating_point()))

    def b_O(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Return the bias of the output projection; ``None`` if it has none, or the layer has no attention heads."""
        out = self.blocks[layer].out
        return None if out is None else tensors.bias(out)

    def head(self, layer: int, head: int) -> slice:
        """Return the columns of ``W_O`` (and entries of ``z``) that belong to a query head. Raise IndexError if there is no such head."""
        self.check(Site("z", layer))
        if not 0 <= head < self.heads[layer]:
            raise IndexError(f"Head {layer}.{head} does not exist: layer {layer} has heads 0..{self.heads[layer] - 1}.")
        return slice(head * self.head_dims[layer], (head + 1) * self.head_dims[layer])

    def by_head(self, layer: int, z: Float[Tensor, "... z"]) -> Float[Tensor, "... heads head_dim"]:
        """Return a layer's ``z`` (the heads' outputs, the input of ``W_O``) with the last axis split into heads.

        If ``z`` is padded with 0 to the width of the widest layer, the padding is removed first.
        """
        n, size = self.heads[layer], self.head_dims[layer]
        return z[..., : n * size].unflatten(-1, (n, size))

    def table(self, rows: Mapping[int, Float[Tensor, " _"]]) -> Float[Tensor, "layers heads"]:
        """Return one value per head as a table, fp64, with NaN for heads that do not exist and for layers that are not in ``rows``.

        Args:
            rows: Layer -> one value per head of the layer.
        """
        table = torch.full((self.n_layers, self.n_heads), torch.nan, dtype=torch.float64)
        for layer, values in rows.items():
            table[layer, : self.heads[layer]] = values.double().cpu()
        return table

    @property
    def contribution_kind(self) -> str:
        """Kind of activation of which a head's contribution to the residual stream is a linear function.

        It is ``Z_OVER_NORM`` in models with a norm between ``W_O`` and the stream, else ``"z"``. A head's contribution is the vector that
        the head adds to the stream. Because the function is linear, the mean contribution can be computed from the mean activation.
        """
        return Z_OVER_NORM if any(block.post_attention_norm is not None for block in self.blocks) else "z"

    def norm(self, layer: int) -> Norm | None:
        """Return the norm between a layer's ``attn_out`` and the residual stream; ``None`` if the model has no norm there.

        Raises:
            UnsupportedModelError: the norm is neither an RMS norm nor a LayerNorm.
        """
        module = self.blocks[layer].post_attention_norm
        return None if module is None else read_norm(module, self.W_O(layer))

    def to_attn_out(self, layer: int, v: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Map a direction v of the residual stream to ``attn_out``, the output of ``W_O``.

        Return u with ``<v, contribution> = <u, attn_out> / scale``, where ``<a, b>`` is the inner product. The other symbols are:

        - ``contribution`` is ``N(attn_out) * to_end(layer)``: the vector that this layer's attention contributes to the residual stream
          after the last block. N is the norm between ``attn_out`` and the stream, without its shift; if there is no norm, it is the
          identity. ``to_end(layer)`` is the factor of ``Layout.to_end``, 1 in most families.
        - ``scale`` is the number by which N divides at the position; 1 without a norm.

        Without a norm, u is ``v * to_end(layer)``. With an RMS norm of gain g, u is ``g * v * to_end(layer)``.

        One head's contribution along v is ``u @ W_O[:, columns] @ (z[columns] / scale)``, with the head's columns from ``Layout.head``.
        """
        norm, factor = self.norm(layer), self.to_end(layer)
        u = v if norm is None else norm.back(v)
        return u if factor == 1.0 else factor * u

    def to_end(self, layer: int) -> float:
        """Return the total factor on a layer's attention output in the residual stream after the last block; 1 in most families.

        It is a product. One part is ``Layout.factor``, the factor when the output is added to the stream. The other parts are the factors
        by which this block and all later blocks multiply their outputs (see ``output_scale``).
        """
        return self.factor * math.prod(map(self.output_scale, range(layer, self.n_layers)))

    def output_scale(self, layer: int) -> float:
        """Return the factor by which a block multiplies its output (``Row.output_scale``); 1 in most families."""
        if self.row.output_scale is None:
            return 1.0
        block = self.blocks[layer].block
        with tensors.present(block):
            return float(getattr(block, self.row.output_scale))


def text_model(model: Any) -> Any:
    """Return the text part of a model without its LM head: the embedding, the blocks and the final norm.

    The encoders of images or sound in a multimodal model do not belong to it.
    """
    inner = model.get_decoder()
    if inner is model and model.get_output_embeddings() is not None:
        inner = model.model  # Llama 4's text model with an LM head calls itself its decoder
    return model if inner is model else text_model(inner)


def find(model: PreTrainedModel) -> Layout:
    """Return a model's layout. The model's family is the first row of ``ROWS`` whose module names match all of its blocks.

    Raises:
        UnsupportedModelError: no row matches (the message lists the modules of a block and says how to add a row); no layer has attention
            heads; or the number of heads is unknown or does not divide the input width of ``W_O``.
    """
    config = model.config.get_text_config()
    n_layers = config.num_hidden_layers
    lists = [m for m in text_model(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    for row in ROWS:
        for modules in lists:
            blocks = [_block(module, row) for module in modules]
            if blocks and all(blocks):
                return _layout(config, row, tuple(b for b in blocks if b))
    children = ", ".join(sorted({name for modules in lists for name, _ in modules[0].named_children()}))[:100] if n_layers else ""
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of {n_layers} blocks has the modules of a family that the toolkit knows; a block here has "
        f"{children or 'none'}. Use a model of a supported family (README), or add a Row with its module names to ROWS in toolkit/sites.py."
    )


def _block(module: nn.Module, row: Row) -> Block | None:
    # Return None if the module is not a block of this family.
    attention: Any = getattr(module, row.attention, None)
    out = getattr(attention, row.out, None)
    if attention is None:
        attention = next((m for name in MIXERS if (m := getattr(module, name, None)) is not None), None)
    elif not tensors.is_linear(out):  # attention without the output projection that the row names: another family
        return None
    mlp = getattr(module, row.mlp, None)
    names = (row.post_attention_norm, row.post_mlp_norm)
    norms = [getattr(module, name, None) if name else None for name in names]
    missing = any(name and part is None for name, part in zip(names, norms, strict=True))
    missing |= bool(row.output_scale) and not hasattr(module, str(row.output_scale))
    if attention is None or mlp is None or missing:
        return None
    return Block(module, attention, out, mlp, norms[0], norms[1], getattr(module, row.extra, None) if row.extra else None)


def _layout(config, row: Row, blocks: tuple[Block, ...]) -> Layout:
    heads, head_dims, d_model = [], [], 0
    for layer, block in enumerate(blocks):
        if block.out is None:
            heads.append(0)
            head_dims.append(0)
            continue
        d_in, d_model = tensors.sizes(block.out)
        n = _n_heads(config, block.attention, layer)
        if d_in % n:
            raise UnsupportedModelError(
                f"W_O of layer {layer} takes {d_in} inputs, which {n} heads of one size cannot fill. Check num_attention_heads in config.json."
            )
        heads.append(n)
        head_dims.append(d_in // n)
    if not any(heads):
        raise UnsupportedModelError(
            f"{type(config).__name__.removesuffix('Config')}: no layer has attention heads, which the toolkit needs at least once."
        )
    factor = float(getattr(config, row.factor, 1.0)) if row.factor else 1.0
    return Layout(row, blocks, tuple(heads), tuple(head_dims), d_model, factor)


def _n_heads(config: Any, attention: Any, layer: int) -> int:
    """Return the number of query heads of a layer, from the config (one number, or one per layer), else from the attention module."""
    try:
        n = config.num_attention_heads
        return int(n[layer] if isinstance(n, list | tuple) else n)
    except Exception as error:  # a config with values per layer may raise when it is asked for a single one
        n = getattr(attention, "num_heads", None) or getattr(attention, "num_attention_heads", None)
        if n is None:
            name = type(config).__name__
            raise UnsupportedModelError(f"{name} does not give the number of heads of layer {layer}: {error}") from error
        return int(n)
