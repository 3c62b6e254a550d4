"""Whether a model behaves as its layout says: identities on random tokens, checked whenever a model is loaded.

What is sampled, edited, masked and read rests on these, so that a family that passes is supported, and one that does not is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from toolkit import hooks, sites
from toolkit.sites import Layout, Site, UnsupportedModelError

SHORTER = 3  # tokens by which the second row of a padded batch is shorter
FULL = (torch.float32, torch.float64)  # types in which every token is compared
EXACT, ROUNDED = 1e-4, 0.1  # deviations allowed: in fp32; of logits computed in another order in half precision
STEPS = 2  # tokens decoded one by one after the rest filled the cache


@dataclass(frozen=True)
class Check:
    """One line of :func:`checks`: what was checked, the largest deviation seen, and whether it passed."""

    name: str
    value: float
    passed: bool


@torch.inference_mode()
def checks(model: PreTrainedModel, layout: Layout, *, seed: int = 0, tokens: int = 12) -> list[Check]:
    """Check every site and the attention of a model on one random sequence.

    A recorded value written back is a no-op (bitwise); a perturbed value moves the logits (each site is causal); head contributions plus
    bias sum to ``attn_out``; cached steps of a padded batch equal one pass; every layer attends once, through transformers' interface,
    and its rows are those the model used.

    Raises:
        UnsupportedModelError: activations are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(model.device)
    base = model(input_ids=ids).logits
    if not torch.isfinite(base).all():
        raise UnsupportedModelError(not_finite("the output", "activations", model.dtype))
    found = _sites(model, layout, ids, base, seed)
    found += _attention(model, layout, ids, base)
    found.append(_steps(model, ids, base))
    return found


def not_finite(what: str, which: str, dtype: torch.dtype) -> str:
    """Say of NaN or infinity what it means: fp16 ends at 65,504, beyond which other types go."""
    if dtype == torch.float16:
        return f"{what} holds NaN or infinity: its {which} overflow float16, use bfloat16 or float32 (if those fail too, it is damaged)."
    return f"{what} holds NaN or infinity; the checkpoint is damaged."


def _deviation(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation, in parts of the largest value wanted; infinite where shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30)).item()


def _logit_deviation(
    got: Float[Tensor, "tokens vocab"], wanted: Float[Tensor, "tokens vocab"], parts: Sequence[int] | None = None
) -> float:
    """Largest deviation of logits, in parts of the largest. In half precision that of the median token, since rounding may send a token to
    another expert, which is one token's error and not the family's; of each part by itself, so that a part that is wrong is seen.

    Args:
        parts: How many tokens each part holds, in order; ``None``: all are one part.
    """
    per_token = (got.float() - wanted.float()).abs().amax(dim=-1) / wanted.float().abs().max().clamp(min=1e-30)
    if wanted.dtype in FULL:
        return per_token.max().item()
    return max(part.median().item() for part in per_token.split(list(parts or [len(per_token)])))


def _allowed(dtype: torch.dtype, *, half: float = 3e-2) -> float:
    return EXACT if dtype in FULL else half


# --- sites ---------------------------------------------------------------------------------------------------


def _sites(model: PreTrainedModel, layout: Layout, ids: Tensor, base: Tensor, seed: int) -> list[Check]:
    found = []
    everything = [Site(kind, layer) for kind in sites.KINDS for layer in range(layout.n_layers)]
    with hooks.record(layout, everything) as values:
        model(input_ids=ids)
    for kind in sites.KINDS:
        written = {site: _constant(values[site]) for site in everything if site.kind == kind}
        with hooks.rewrite(layout, written):
            change = (model(input_ids=ids).logits - base).abs().max().item()
        found.append(Check(f"{kind}: written back is a no-op", change, change == 0.0))
        for layer in (0, layout.n_layers - 1):
            with hooks.rewrite(layout, {Site(kind, layer): _perturbed(seed)}):
                change = (model(input_ids=ids).logits - base).abs().max().item()
            found.append(Check(f"{kind} {layer}: is causal", change, change > 1e-6))
    for layer in range(layout.n_layers):
        found += _sums(layout, layer, {site.kind: value.float() for site, value in values.items() if site.layer == layer})
    return found


def _sums(layout: Layout, layer: int, seen: Mapping[str, Tensor]) -> list[Check]:
    """What must add up in a block: heads to ``attn_out``, attention's share to ``resid_mid``, the MLP's to ``resid_post``."""
    block, W_O, b_O = layout.blocks[layer], layout.W_O(layer).float(), layout.b_O(layer)
    parts = [seen["z"][..., layout.head(h)] @ W_O[:, layout.head(h)].T for h in range(layout.n_heads)]
    heads = torch.stack(parts).sum(dim=0) + (b_O.float() if b_O is not None else 0.0)

    def added(kind: str, norm: nn.Module | None) -> Tensor:
        return seen[kind] if norm is None else norm(seen[kind].to(layout.W_O(layer).dtype)).float()

    expected = {
        "attn_out: heads + bias sum to it": (heads, seen["attn_out"]),
        "resid_mid: resid_pre + attention": (seen["resid_pre"] + added("attn_out", block.post_attention_norm), seen["resid_mid"]),
        "resid_post: resid_mid + MLP": (seen["resid_mid"] + added("mlp_out", block.post_mlp_norm), seen["resid_post"]),
    }
    errors = {name: _deviation(got, wanted) for name, (got, wanted) in expected.items()}
    return [Check(f"{layer} {name}", error, error < _allowed(layout.W_O(layer).dtype)) for name, error in errors.items()]


def _constant(recorded: Tensor) -> hooks.Rewrite:
    # Equal to the value, yet another tensor, so that the write really happens.
    return lambda value, inputs: recorded.clone()


def _perturbed(seed: int) -> hooks.Rewrite:
    def fn(value: Tensor, inputs: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        return value + 0.5 * value.float().std().to(value) * noise.to(value)

    return fn


# --- attention and the cache ---------------------------------------------------------------------------------


def _attention(model: PreTrainedModel, layout: Layout, ids: Tensor, base: Tensor) -> list[Check]:
    """Masks, attention rows and retrieval heads stand where ``hooks.wrap_attention`` puts them: each layer must attend there, once, with rows
    that read the values, and its heads must be made of nothing else."""
    calls, errors = [0] * layout.n_layers, [0.0] * layout.n_layers

    def look(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(query, key, value)
        calls[layer] += 1
        if weights is None:
            errors[layer] = float("inf")
            return output, None
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        errors[layer] = _deviation((weights.float() @ values.float()).transpose(1, 2), output)
        return output, weights

    def nothing(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(query, key, value)
        return torch.zeros_like(output), weights

    allowed, same = _allowed(model.dtype), _allowed(model.dtype, half=ROUNDED)
    with hooks.wrap_attention(layout, look, eager=True):
        logits = model(input_ids=ids).logits
    with hooks.wrap_attention(layout, nothing), hooks.record(layout, [Site("z", layer) for layer in range(layout.n_layers)]) as z:
        model(input_ids=ids)
    left = max(value.abs().max().item() for value in z.values())
    wrong = float(max(abs(n - 1) for n in calls))
    rows = max(errors)
    found = [
        Check("each layer attends once, through transformers' interface", wrong, wrong == 0),
        Check("attention rows are those the model used: rows x values", rows, rows < allowed),
        Check("attention rows are those the model used: heads are made of nothing else", left, left == 0),
        Check("attention rows are those the model used: same logits", error := _logit_deviation(logits[0], base[0]), error < same),
    ]
    if hooks.attention_name(layout) == "sdpa" and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    ):
        with hooks.replace_attention(layout, _softmax):
            logits = model(input_ids=ids).logits
        found.append(
            Check("attention is a softmax over scaled products", error := _logit_deviation(logits[0], base[0]), error < same)
        )
    return found


def _softmax(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, None]:
    """Attention as ``decode`` computes it on a CPU: nothing but scale and mask."""
    size, group, scaling = query.shape[-1], query.shape[1] // key.shape[1], kwargs.get("scaling")
    key, value = (part.repeat_interleave(group, dim=1).float() for part in (key, value))
    scores = query.float() @ key.mT * (size**-0.5 if scaling is None else scaling)
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).to(query.dtype), None


def _steps(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"], base: Float[Tensor, "1 tokens vocab"]) -> Check:
    """Sampling rests on this: two rows of different lengths, left padded, decoded step by step from a cache, equal one pass of each."""
    width = ids.shape[1]
    alone = model(input_ids=ids[:, SHORTER:]).logits
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :SHORTER]), ids[:, SHORTER:]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :SHORTER] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, found = DynamicCache(config=model.config), []
    for start, stop in ((0, width - STEPS), *((at, at + 1) for at in range(width - STEPS, width))):
        found.append(
            model(
                input_ids=batch[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            ).logits
        )  # fmt: skip
    got = torch.cat(found, dim=1)
    # Each row's first pass and its cached steps: a row that reads its padding, or steps that forget the cache, are few of all tokens.
    parts = (width - STEPS, STEPS, width - SHORTER - STEPS, STEPS)
    error = _logit_deviation(torch.cat([got[0], got[1, SHORTER:]]), torch.cat([base[0], alone[0]]), parts)
    return Check("cached, padded, batched steps equal one pass", error, error < _allowed(base.dtype, half=ROUNDED))
