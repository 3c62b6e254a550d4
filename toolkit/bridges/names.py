"""Translate the toolkit's sites to their names in TransformerLens and nnsight, and such names back to sites."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from toolkit.lm import LM
from toolkit.sites import KINDS, Site


class NeighbourError(ValueError):
    """TransformerLens or nnsight does not support a model or site, or its activations are incomplete or differ from the toolkit's."""


@dataclass(frozen=True)
class Place:
    """The place of a site in an nnsight model: the input or output of a module.

    With ``model`` from ``to_nnsight``, read the site as ``model.get(place.module).input`` or ``.output``. If the output is a tuple, the
    site is its first entry.

    Attributes:
        module: Path of the module below the model, such as ``"model.layers.3.self_attn.o_proj"``.
        side: ``"input"`` or ``"output"`` of the module.
        plus: Path of the block if the site is ``resid_mid``, otherwise ``None``. No module returns ``resid_mid``. Compute it as ``input of
            the block + factor * output of module``, and read the two in this order. The factor, ``lm.layout.factor``, is the number by
            which the model multiplies the output of attention before it adds it to the residual stream; it is 1 in most families. To add a
            vector to ``resid_mid``, add the vector divided by the factor to the output of ``module``.
    """

    module: str
    side: Literal["input", "output"]
    plus: str | None = None


def hook_names(lm: LM) -> dict[str, tuple[str, ...]]:
    """Return a dict from kind of site to the names of its TransformerLens hooks within a block, such as ``attn.hook_z``.

    If a kind has several names, all give the same activation, and the usual name comes first. If attention and MLP run in parallel,
    ``resid_mid`` has no hook and so no name.
    """
    names: dict[str, tuple[str, ...]] = {
        "resid_pre": ("hook_resid_pre", "hook_in"),
        "z": ("attn.hook_z",),
        "attn_out": ("hook_attn_out", "attn.hook_out"),
        "resid_mid": ("hook_resid_mid",),
        "mlp_out": ("hook_mlp_out", "mlp.hook_out"),
        "resid_post": ("hook_resid_post", "hook_out"),
    }
    # In post-norm families hook_attn_out and hook_mlp_out come after the norm, the toolkit's sites before it.
    block = lm.layout.blocks[0]
    if block.post_attention_norm is not None:
        names |= {"attn_out": ("attn.hook_out",), "mlp_out": ("mlp.hook_out",)}
    if getattr(block.block, "use_parallel_residual", False):
        names["resid_mid"] = ()
    return names


def transformer_lens_name(lm: LM, site: Site, *, write: bool = False) -> str:
    """Return the name of the TransformerLens hook for a site, such as ``blocks.3.hook_resid_post``.

    Args:
        lm: The model.
        site: The site.
        write: True for the hook at which to add a vector to the site, False for the hook at which to read it. The two differ only for
            ``resid_mid``.

    Raises:
        IndexError: the model does not have the site's layer.
        NeighbourError: TransformerLens has no hook to read the site. This holds for ``resid_mid`` if attention and MLP run in parallel.
    """
    lm.layout.check(site)
    names = ("hook_attn_out",) if write and site.kind == "resid_mid" else hook_names(lm)[site.kind]
    if not names:
        raise NeighbourError(
            f"TransformerLens has no hook for {site}, since attention and MLP of {lm.name} run in parallel. It is the sum of hook_resid_pre "
            "and hook_attn_out, which from_transformer_lens(lm, cache) computes."
        )
    return f"blocks.{site.layer}.{names[0]}"


def site_of_transformer_lens(lm: LM, name: str) -> Site:
    """Return the site that a TransformerLens hook of this model reads: the inverse of ``transformer_lens_name``.

    Args:
        lm: The model.
        name: Name of the hook, such as ``blocks.3.hook_resid_post``.

    Raises:
        IndexError: the model does not have the hook's layer.
        NeighbourError: no site of the toolkit corresponds to the hook. In post-norm families this holds for ``hook_attn_out`` and
            ``hook_mlp_out``, which come after the norm.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    layer, hook = (int(match[1]), match[2]) if match else (0, name)
    for kind, names in hook_names(lm).items():
        if match and hook in names:
            site = Site(kind, layer)
            lm.layout.check(site)
            return site
    if hook in ("hook_attn_out", "hook_mlp_out"):
        part = hook.split("_")[1]
        raise NeighbourError(
            f"{name} of {lm.name} ({lm.layout.row.family}) is after the post-norm, our {part}_out before it. "
            f"Use blocks.{layer}.{part}.hook_out."
        )
    known = ", ".join(names[0] for names in hook_names(lm).values() if names)
    raise NeighbourError(f"{name} is not a site of {lm.name}: choose one of blocks.LAYER.{{{known}}}.")


def nnsight_path(lm: LM, site: Site) -> Place:
    """Return the place of a site in the nnsight model. Raise IndexError if the model does not have the site's layer."""
    lm.layout.check(site)
    path, block = {module: name for name, module in lm.model.named_modules()}, lm.layout.blocks[site.layer]
    if site.kind == "resid_mid":
        return Place(path[block.adds_attention], "output", path[block.block])
    module = {"z": block.out, "attn_out": block.out or block.attention, "mlp_out": block.mlp}.get(site.kind, block.block)
    return Place(path[module], "input" if site.kind in ("resid_pre", "z") else "output")


def site_of_nnsight(lm: LM, place: Place) -> Site:
    """Return the site that is at a given place in the nnsight model. This is the inverse of ``nnsight_path``.

    Args:
        lm: The model.
        place: Module, and its input or output. For ``resid_mid``, ``place.plus`` must be the path of the block.

    Raises:
        NeighbourError: no site of the toolkit is at this place.
    """
    for layer in range(lm.layout.n_layers):
        for site in (Site(kind, layer) for kind in KINDS if layer in lm.layout.layers(kind)):
            if nnsight_path(lm, site) == place:
                return site
    known = "; ".join(str(nnsight_path(lm, Site(kind, 0))) for kind in KINDS if 0 in lm.layout.layers(kind))
    raise NeighbourError(f"{place} is not a site of {lm.name}. Those of layer 0 are {known}.")
