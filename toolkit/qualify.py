"""Checks, on random tokens, that a model's activations, heads, attention and KV cache behave as the toolkit assumes.

Sampling, edits, head masks and the reading of activations rely on this behaviour. The checks run whenever a model is loaded. A model that
fails one of them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from toolkit import hooks, sites, tensors
from toolkit.sites import Layout, Site, UnsupportedModelError

SHORTER = 3  # the second row of the padded batch is this many tokens shorter than the first
FULL = (torch.float32, torch.float64)  # dtypes in which every token is compared
EXACT, ROUNDED = (
    1e-4,
    0.1,
)  # allowed relative deviations: in fp32; in half precision, of logits computed in another order of operations
CHUNK, STEPS = 2, 2  # after the prefill, this many tokens are run in one pass, and then this many tokens one by one


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check, such as ``"resid_mid 3: is causal"`` (for the site ``resid_mid`` of layer 3).
        value: The measured number that decides whether the check passes. In most checks it is the largest deviation from the expected
            values, divided by the largest expected value, and has to be small. Checks whose names contain these words are the exceptions:

            - "is causal": largest change of a logit when a site is perturbed; must not be 0.
            - "written back is a no-op": largest change of a logit when the activations of a site are written back to it; must be 0.
            - "each layer attends once": largest difference from 1 of the number of attention calls per layer; must be 0.
            - "heads depend on nothing else": largest entry of ``z`` when attention outputs are set to 0; must be 0.
        passed: True if the check passed.
    """

    name: str
    value: float
    passed: bool


@torch.inference_mode()
def checks(model: PreTrainedModel, layout: Layout, *, seed: int = 0, tokens: int = 12) -> list[Check]:
    """Check every site and the attention of a model on one random sequence, and return all results, passed or failed.

    A model passes if all of this is true:

    - Writing the activations of a site back to it leaves the logits bitwise the same.
    - Adding noise at a site changes the logits, so the site is causal. This is tried in the first and last layer that have the site.
    - The sum of all heads' outputs times ``W_O``, plus the bias, equals ``attn_out``. The input of a block, plus what attention and the
      MLP add, equals the block's output.
    - Decoding a padded batch step by step with a KV cache gives the same logits as one pass over each sequence.
    - In one pass, every layer calls the attention function that is registered in transformers exactly once. This function's output equals
      the attention weights that it returns times the values. If its output is replaced by 0, ``z`` is 0 too.
    - If attention runs with SDPA and a plain KV cache, it equals a causal softmax over scaled products of queries and keys.

    Args:
        model: The model.
        layout: Its modules and sizes.
        seed: Seed of the random sequence.
        tokens: Length of the random sequence.

    Raises:
        UnsupportedModelError: the logits are not finite; or the model computes in fp32 on a GPU while TF32 is on.
    """
    if model.device.type == "cuda" and model.dtype == torch.float32 and tf32():
        raise UnsupportedModelError(
            "TF32 is on, which rounds the products of fp32 numbers to about 3 digits, but the checks expect 4: switch it off with "
            "torch.set_float32_matmul_precision('highest'), or load the model in bfloat16."
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(model.device)
    base = model(input_ids=ids).logits
    if not torch.isfinite(base).all():
        raise UnsupportedModelError(not_finite_message("the output", "activations", model.dtype))
    return [*_sites(model, layout, ids, base, seed), *_attention(model, layout, ids, base), _steps(model, ids, base)]


def tf32() -> bool:
    """Return True if PyTorch may round fp32 numbers to TF32 (10 bits of mantissa) in matrix products on a GPU."""
    backends: Any = torch.backends  # its types lack these names
    products = backends.cuda.matmul.fp32_precision
    return (backends.fp32_precision if products == "none" else products) == "tf32"  # "none": as for all operations


def not_finite_message(what: str, numbers: str, dtype: torch.dtype) -> str:
    """Return an error message about NaN or infinity in a model. It names a cause: overflow in float16, else a damaged checkpoint.

    Args:
        what: Name of the tensor that holds NaN or infinity, such as ``"the output"``.
        numbers: Name of the numbers that may have overflowed, such as ``"activations"``.
        dtype: The model's dtype.
    """
    if dtype == torch.float16:
        return (
            f"{what} holds NaN or infinity: its {numbers} overflow float16. Use bfloat16 or float32 (if those fail too, the checkpoint is "
            "damaged)."
        )
    return f"{what} holds NaN or infinity: the checkpoint is damaged. Copy it again."


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute deviation, divided by the largest absolute expected value; infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30)).item()


def _logit_deviation(
    model: PreTrainedModel,
    actual: Float[Tensor, "tokens vocab"],
    expected: Float[Tensor, "tokens vocab"],
    parts: Sequence[int] | None = None,
) -> float:
    """Return the deviation of logits, divided by the largest expected logit.

    In fp32 and fp64 it is the largest deviation over all tokens. In half precision, the tokens are divided into parts, and it is the
    largest of the parts' medians over tokens. The median is used because rounding may send single tokens to another expert in a mixture of
    experts.

    Args:
        parts: Number of tokens in each part, in order; ``None`` means that all tokens are one part.
    """
    per_token = (actual.float() - expected.float()).abs().amax(dim=-1) / expected.float().abs().max().clamp(min=1e-30)
    if _precision(model) in FULL:
        return per_token.max().item()
    return max(part.median().item() for part in per_token.split(list(parts or [len(per_token)])))


def _precision(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype that limits the precision of a model's outputs: half precision if it is quantised, else its weights' dtype."""
    return torch.float16 if tensors.storage(model) == "quantised" else model.dtype


def _allowed(model: PreTrainedModel, *, half: float = 3e-2) -> float:
    return EXACT if _precision(model) in FULL else half


# --- sites ---------------------------------------------------------------------------------------------------


def _sites(model: PreTrainedModel, layout: Layout, ids: Tensor, base: Tensor, seed: int) -> list[Check]:
    results = []
    all_sites = [Site(kind, layer) for kind in sites.KINDS for layer in layout.layers(kind)]
    extras = {layer: block.extra for layer, block in enumerate(layout.blocks) if block.extra is not None}
    with hooks.record(layout, all_sites) as values, hooks.record_outputs(extras) as extra:
        model(input_ids=ids)
    for kind in sites.KINDS:
        unchanged = {site: _constant(values[site]) for site in all_sites if site.kind == kind}
        with hooks.rewrite(layout, unchanged):
            change = (model(input_ids=ids).logits - base).abs().max().item()
        results.append(Check(f"{kind}: written back is a no-op", change, change == 0.0))
        for layer in sorted({layout.layers(kind)[0], layout.layers(kind)[-1]}):
            with hooks.rewrite(layout, {Site(kind, layer): _perturbed(seed)}):
                change = (model(input_ids=ids).logits - base).abs().max().item()
            results.append(Check(f"{kind} {layer}: is causal", change, change > 1e-6))
    for layer in range(layout.n_layers):
        of_layer = {site.kind: value.float() for site, value in values.items() if site.layer == layer}
        results += _sums(layout, layer, of_layer, extra.get(layer), model)
    return results


def _sums(layout: Layout, layer: int, values: Mapping[str, Tensor], extra: Tensor | None, model: PreTrainedModel) -> list[Check]:
    """Check the sums of a block, and return one result per sum.

    Three sums must hold: the heads plus the bias give ``attn_out``; ``resid_pre`` plus attention gives ``resid_mid``; and ``resid_mid``
    plus the MLP gives ``resid_post``.

    Args:
        values: Site kind -> activations at this site of the layer.
        extra: Output of the module ``Block.extra``, which is added to the stream too; ``None`` if the block has no such module.
    """
    block = layout.blocks[layer]

    def added(kind: str, norm: nn.Module | None) -> Tensor:
        return layout.factor * (values[kind] if norm is None else norm(values[kind].to(model.dtype)).float())

    end = values["resid_mid"] + added("mlp_out", block.post_mlp_norm)
    end = end if extra is None else end + extra.float()
    sums = {
        "resid_mid: resid_pre + attention": (
            values["resid_pre"] + added("attn_out", block.post_attention_norm),
            values["resid_mid"],
        ),
        "resid_post: resid_mid + MLP": (
            end * layout.output_scale(layer),
            values["resid_post"],
        ),
    }
    if block.out is not None:
        W_O, b_O = layout.W_O(layer).float(), layout.b_O(layer)
        columns = [layout.head(layer, head) for head in range(layout.heads[layer])]
        heads = torch.stack([values["z"][..., c] @ W_O[:, c].T for c in columns]).sum(dim=0) + (
            b_O.float() if b_O is not None else 0.0
        )
        sums["attn_out: heads + bias sum to it"] = (heads, values["attn_out"])
    errors = {name: _deviation(actual, expected) for name, (actual, expected) in sums.items()}
    return [Check(f"{layer} {name}", error, error < _allowed(model)) for name, error in errors.items()]


def _constant(recorded: Tensor) -> hooks.Rewrite:
    # Return a copy: ``hooks.rewrite`` would skip the write if the value itself were returned.
    return lambda value, inputs: recorded.clone()


def _perturbed(seed: int) -> hooks.Rewrite:
    def fn(value: Tensor, inputs: Tensor) -> Tensor:
        # Noise of half the standard deviation of the values.
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        return value + 0.5 * value.float().std().to(value) * noise.to(value)

    return fn


# --- attention and the cache ---------------------------------------------------------------------------------


def _attention(model: PreTrainedModel, layout: Layout, ids: Tensor, base: Tensor) -> list[Check]:
    """Check the attention function that ``hooks.wrap_attention`` wraps. Head masks, attention rows and retrieval scores rely on it.

    Each layer has to call the function once. The function's output has to be the attention weights times the values. If this output is
    replaced by 0, ``z`` has to be 0 too: otherwise the heads' outputs depend on something else as well.

    Args:
        ids: Token ids of one sequence.
        base: The model's logits for this sequence.
    """
    calls, errors = dict.fromkeys(layout.attention_layers, 0), dict.fromkeys(layout.attention_layers, 0.0)

    def look(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(query, key, value)
        calls[layer] += 1
        if weights is None or weights.shape[1] != layout.heads[layer]:
            errors[layer] = float("inf")
            return output, weights
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        errors[layer] = _deviation((weights.float() @ values.float()).transpose(1, 2), output)
        return output, weights

    def nothing(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(query, key, value)
        return torch.zeros_like(output), weights

    allowed, allowed_logits = _allowed(model), _allowed(model, half=ROUNDED)
    with hooks.wrap_attention(layout, look, eager=True):
        logits = model(input_ids=ids).logits
    with hooks.wrap_attention(layout, nothing), hooks.record(layout, [Site("z", layer) for layer in layout.attention_layers]) as z:
        model(input_ids=ids)
    left = max(value.abs().max().item() for value in z.values())
    wrong = float(max(abs(n - 1) for n in calls.values()))
    rows, error = max(errors.values()), _logit_deviation(model, logits[0], base[0])
    results = [
        Check("each layer attends once, through transformers' interface", wrong, wrong == 0),
        Check("attention rows are those the model used: rows x values", rows, rows < allowed),
        Check("attention rows are those the model used: heads depend on nothing else", left, left == 0),
        Check("attention rows are those the model used: same logits", error, error < allowed_logits),
    ]
    # For models with SDPA and a plain cache, ``decode`` computes attention itself. Its formula has to give the model's attention.
    layers = DynamicCache(config=model.config).layers
    if hooks.attention_name(layout) == "sdpa" and all(type(layer) is DynamicLayer for layer in layers):
        with hooks.replace_attention(layout, _softmax):
            error = _logit_deviation(model, model(input_ids=ids).logits[0], base[0])
        results.append(Check("attention is a softmax over scaled products", error, error < allowed_logits))
    return results


def _softmax(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, None]:
    """Return the attention output as ``decode.Blocks`` computes it: by a causal softmax over scaled products of queries and keys."""
    size, group, scaling = query.shape[-1], query.shape[1] // key.shape[1], kwargs.get("scaling")
    key, value = (part.repeat_interleave(group, dim=1).float() for part in (key, value))
    scores = query.float() @ key.mT * (size**-0.5 if scaling is None else scaling)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).to(query.dtype), None


def _steps(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"], base: Float[Tensor, "1 tokens vocab"]) -> Check:
    """Check decoding with a KV cache, on which sampling relies.

    Two rows of different length, left padded and decoded step by step, must give the same logits as one pass over each of them.

    Args:
        ids: Token ids of one sequence. The second row is this sequence without its first tokens.
        base: The model's logits for this sequence.
    """
    width = ids.shape[1]
    alone = model(input_ids=ids[:, SHORTER:]).logits
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :SHORTER]), ids[:, SHORTER:]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :SHORTER] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, outputs = DynamicCache(config=model.config), []
    prefill = width - CHUNK - STEPS
    for start, stop in ((0, prefill), (prefill, prefill + CHUNK), *((at, at + 1) for at in range(width - STEPS, width))):
        outputs.append(
            model(
                input_ids=batch[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            ).logits
        )  # fmt: skip
    logits = torch.cat(outputs, dim=1)
    # Compare each row's prefill and its cached steps separately: an error in one of them affects few of all tokens.
    parts = (prefill, CHUNK, STEPS, prefill - SHORTER, CHUNK, STEPS)
    error = _logit_deviation(model, torch.cat([logits[0], logits[1, SHORTER:]]), torch.cat([base[0], alone[0]]), parts)
    return Check("cached, padded, batched steps equal one pass", error, error < _allowed(model, half=ROUNDED))


@torch.inference_mode()
def gated_layers(body: PreTrainedModel, layout: Layout) -> frozenset[int]:
    """Return the layers in which ``z``, the input of ``W_O``, differs from the output of the attention function.

    In such a layer, a gate or a norm changes this output before ``W_O``.

    Args:
        body: The model without its LM head.
    """
    outputs: dict[int, Tensor] = {}

    def look(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(query, key, value)
        outputs[layer] = output.flatten(2)
        return output, weights

    sites_of_z = [Site("z", layer) for layer in layout.attention_layers]
    with hooks.wrap_attention(layout, look), hooks.record(layout, sites_of_z) as z:
        body(input_ids=torch.tensor([[0, 1, 2]], device=body.device), use_cache=False)
    both = [site for site in sites_of_z if site in z and site.layer in outputs]
    return frozenset(site.layer for site in both if not torch.equal(z[site], outputs[site.layer]))


@torch.inference_mode()
def caches_keys(body: PreTrainedModel, layout: Layout) -> bool:
    """Return True if, in every layer, the KV cache holds exactly the keys and values that attention reads in a decoding step.

    The result is False, for example, for latent attention, which caches compressed keys.

    Args:
        body: The model without its LM head.
    """
    same: dict[int, bool] = {}

    def look(layer: int, attend: hooks.Attend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        cached: Any = cache.layers[layer] if layer < len(cache.layers) else None
        pairs = ((key, getattr(cached, "keys", None)), (value, getattr(cached, "values", None)))
        same[layer] = all(held is not None and read.shape == held.shape and torch.equal(read, held) for read, held in pairs)
        return attend(query, key, value)

    cache = DynamicCache(config=body.config)
    with hooks.wrap_attention(layout, look):
        for ids in (torch.tensor([[0, 1]]), torch.tensor([[2]])):
            body(input_ids=ids.to(body.device), past_key_values=cache, use_cache=True)
    return all(same.values())
