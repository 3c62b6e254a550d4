"""Convert activations that TransformerLens or nnsight recorded into a dict from ``Site`` to tensor, and such dicts into ``Moments``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import origins
from toolkit.bridges.models import import_optional
from toolkit.bridges.names import NeighbourError, hook_names, nnsight_path
from toolkit.lm import LM, NoThinkTagsError
from toolkit.sites import KINDS, Layout, Site
from toolkit.types import Moments, Rollout


def from_transformer_lens(lm: LM, cache: Any) -> dict[Site, Float[Tensor, "*batch seq _"]]:
    """Return the activations that TransformerLens recorded, as a dict from site to tensor ``[batch, seq, width]``.

    The width is ``heads * head_dim`` for ``z``, which holds the outputs of all heads, and d_model for other kinds of sites. Recorded hooks
    that do not correspond to a site are ignored. If attention and MLP run in parallel, ``resid_mid`` is computed as ``resid_pre +
    attn_out``, if both were recorded.

    Args:
        lm: The model that TransformerLens ran.
        cache: An ``ActivationCache``, or another mapping from hook names to tensors. If it has no batch axis, the result has none either.

    Raises:
        NeighbourError: no hook in the cache corresponds to a site.
    """
    values: dict[Site, Tensor] = {}
    for layer in range(lm.layout.n_layers):
        for kind, names in hook_names(lm).items():
            present = [full for name in names if (full := f"blocks.{layer}.{name}") in cache]
            if present and layer in lm.layout.layers(kind):
                values[Site(kind, layer)] = cache[present[0]].flatten(-2) if kind == "z" else cache[present[0]]
        # Where attention and MLP run in parallel there is no hook for resid_mid; it is the sum of resid_pre and attn_out.
        parts = [values.get(Site(kind, layer)) for kind in ("resid_pre", "attn_out")]
        if not hook_names(lm)["resid_mid"] and all(part is not None for part in parts):
            values[Site("resid_mid", layer)] = parts[0] + parts[1]  # type: ignore[operator]  # neither is None
    if not values:
        raise NeighbourError(f"No site of {lm.name} is in this cache: record names such as blocks.0.hook_resid_post.")
    return values


def from_nnsight(lm: LM, model: Any, wanted: Iterable[Site]) -> dict[Site, Tensor]:
    """Return the activations at some sites, as a dict from site to tensor ``[batch, seq, width]``. Call it inside an nnsight trace::

        with model.trace(ids):
            values = from_nnsight(lm, model, wanted)

    The width is ``heads * head_dim`` for ``z`` and d_model for other kinds of sites. The tensors remain usable after the trace.

    Args:
        lm: The model from which ``model`` was made.
        model: The nnsight model, from ``to_nnsight``.
        wanted: Sites to read, in any order. They are read in the order in which the model computes them, as nnsight requires.

    Raises:
        ImportError: nnsight is not installed.
        IndexError: the model does not have one of the sites.
    """
    nnsight, chosen, values = import_optional("nnsight", "nnsight"), set(wanted), {}
    for site in chosen:
        lm.layout.check(site)
    for layer in sorted({site.layer for site in chosen}):
        resid_pre = model.get(nnsight_path(lm, Site("resid_pre", layer)).module).input.clone()
        for kind in (kind for kind in KINDS if Site(kind, layer) in chosen):
            place = nnsight_path(lm, Site(kind, layer))
            value = resid_pre if kind == "resid_pre" else getattr(model.get(place.module), place.side)
            value = value[0] if isinstance(value, tuple) else value
            # A clone does not change if a later module writes to the tensor in place. (The sum is a new tensor anyway.)
            values[Site(kind, layer)] = resid_pre + lm.layout.factor * value if place.plus else value.clone()
    return nnsight.save(values)


def moments(
    lm: LM,
    examples: Iterable[tuple[Rollout, str, Mapping[Site, Tensor]]],
    positions: Callable[[Rollout], Sequence[int]],
    *,
    name: str,
) -> Moments:
    """Return ``Moments`` (sums of activations per class of rollouts) of activations that another library recorded.

    First, each rollout's activations are averaged over the chosen positions. Then these means are summed over the rollouts of each class,
    in fp64. ``Moments.outer`` stays empty, so class means can be computed from the result, but no covariances. ``collect.moments`` does the
    same with activations that the toolkit records itself.

    Args:
        lm: The model that computed the activations.
        examples: One tuple per rollout: the rollout, the name of its class (such as "long"), and a dict from site to activations,
            ``[seq, width]`` or ``[1, seq, width]``. If a kind of site occurs, it must occur at all layers. Examples are read one at a time,
            so a generator saves memory.
        positions: Function from a rollout to the positions to average over, such as ``collect.THINK.of``. A rollout without positions is
            left out.
        name: Name of these positions, such as ``"think"``, to be stored in the result.

    Raises:
        NeighbourError: layers are missing, examples differ in their kinds of sites, or a tensor does not have the shape that the rollout
            and the model require.
        NoThinkTagsError: no rollout has a position to average over.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    n: Counter[str] = Counter()
    read: list[str] = []
    for rollout, label, values in examples:
        read.append(rollout.problem_id)
        if not (where := list(positions(rollout))):
            continue
        means, n[label] = _means(lm, rollout, values, where), n[label] + 1
        before = next(iter(sums.values()), means)
        if before.keys() != means.keys():
            raise NeighbourError(f"{rollout.problem_id} has the sites {[*means]}, others {[*before]}: record the same for all.")
        sums[label] = {kind: sums[label][kind] + mean for kind, mean in means.items()} if label in sums else means
    if not sums:
        raise NoThinkTagsError(f"No rollout of {lm.name} has positions {name!r}: choose others, or other rollouts.")
    labels = tuple(sorted(sums))
    stacked = {kind: torch.stack([sums[label][kind] for label in labels]) for kind in sums[labels[0]]}
    return Moments(labels, tuple(n[label] for label in labels), name, stacked, {}, lm.provenance(**origins.record(read)))


def _means(lm: LM, rollout: Rollout, values: Mapping[Site, Tensor], where: list[int]) -> dict[str, Float[Tensor, "layers _"]]:
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in values)]
    means = {}
    for kind in kinds:
        # Layers can differ in width, and some have no heads; the rest of their rows stays zero.
        means[kind] = torch.zeros(lm.layout.n_layers, lm.layout.width(kind), dtype=torch.float64)
        if kind == "z":
            means[lm.layout.contribution_kind] = means[kind].clone()
        for site in (Site(kind, layer) for layer in lm.layout.layers(kind)):
            size = lm.layout.W_O(site.layer).shape[1] if kind == "z" else lm.layout.d_model
            shape, expected = tuple(values[site].shape) if site in values else None, (len(rollout.token_ids), size)
            if shape not in (expected, (1, *expected)):
                raise NeighbourError(
                    f"{rollout.problem_id}: {site} is {shape or 'missing'}, the rollout and {lm.name} need {expected}. "
                    "Pass token ids, not text (a BOS may have been prepended), and record all layers."
                )
            row = values[site].detach().reshape(expected)[where].double()
            means[kind][site.layer, :size] = row.mean(dim=0).cpu()
            if kind == "z":
                scaled = _over_norm(lm.layout, site.layer, row)
                means[lm.layout.contribution_kind][site.layer, :size] = scaled.mean(dim=0).cpu()
    return means


@torch.no_grad()
def _over_norm(layout: Layout, layer: int, z: Float[Tensor, "positions _"]) -> Float[Tensor, "positions _"]:
    """Return ``z / r``, where r is the number by which the norm after attention divides; ``z`` itself if there is no such norm.

    In post-norm families this norm stands between ``attn_out`` and the residual stream. At each position it divides ``attn_out`` by r, the
    root mean square of ``attn_out``, which depends on all heads. So a head's contribution to the stream is linear in ``z / r``, but not in
    ``z``.
    """
    # The divisor depends on attn_out, which is computed from z.
    norm, W_O, b_O = layout.norm(layer), layout.W_O(layer), layout.b_O(layer)
    if norm is None:
        return z
    attn_out = z.to(W_O.device) @ W_O.double().T + (0.0 if b_O is None else b_O.double())
    return z / norm.scale(attn_out).to(z)
