"""Neighbours: the same weights in memory as a TransformerLens bridge or an nnsight model, the same places by their names.

Nothing is folded, centred or moved, and ``lm`` itself is left as it was: either neighbour gets a copy of the *modules* that
shares every weight and every hook. So an edited model is its own neighbour, and an intervention acts there too::

    bridge = bridges.to_transformer_lens(lm)
    with edits.steering(direction, 0.05)(lm):
        logits, cache = bridge.run_with_cache(ids)

==============  ==================  ==================================================  ===============================
kind            TransformerLens     nnsight (of the block's modules)                    add a vector there
==============  ==================  ==================================================  ===============================
``resid_pre``   hook_resid_pre      block, input                                        same
``z``           attn.hook_z [1]_    output projection, input                            same
``attn_out``    hook_attn_out [2]_  output projection, output                           same
``resid_mid``   hook_resid_mid [3]_ attention or its post-norm, output + block's input  hook_attn_out; that output
``mlp_out``     hook_mlp_out [2]_   MLP, output                                         same
``resid_post``  hook_resid_post     block, output                                       same
==============  ==================  ==================================================  ===============================

.. [1] ``[batch, seq, heads, head_dim]`` there, ``[batch, seq, heads * head_dim]`` here.
.. [2] In post-norm families these are *after* the norm; our sites are ``attn.hook_out`` and ``mlp.hook_out``.
.. [3] Reading only: a bridge hooks what the MLP's norm reads, so a write there never reaches the residual stream. Parallel
   blocks have no such hook; :func:`from_transformer_lens` forms the sum.

Limits. TransformerLens computes attention itself (eager), so numbers agree to rounding; in GPT-NeoX it splits the fused
query-key-value weights into copies of its own, and with ``use_attn_result`` the output projection is never called, so that our
interventions at ``z`` and ``attn_out`` do not act. *At* a site that we write to, a neighbour may show the value of before the
write (nnsight: at every output; TransformerLens: at ``resid_pre``, ``z`` and ``mlp_out``); all later sites show its effect.
nnsight must be read in the order of the computation; ask it for sites and not for ``output_hidden_states``, for which transformers puts
hooks on the shared layers that later list every hidden state of ``lm`` twice.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from toolkit import hooks, origins, sites
from toolkit.lm import LM, NoThinkTagsError
from toolkit.sites import KINDS, Layout, Site
from toolkit.types import HeadScores, Moments, Rollout

_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class NeighbourError(ValueError):
    """A model, place or activation that a neighbour does not have, computes differently, or means otherwise."""


@dataclass(frozen=True)
class Place:
    """Where nnsight finds a site: ``model.get(place.module).input`` or ``.output`` (of a tuple, the first entry).

    Attributes:
        module: Path below the model, ``"model.layers.3.self_attn.o_proj"``.
        plus: Path of a module whose *input* is added, or ``None``: ``resid_mid`` is a sum no module returns. Read that input
            first. A vector to be added to the sum is added to ``module``'s output.
    """

    module: str
    side: Literal["input", "output"]
    plus: str | None = None


# --- the same weights ----------------------------------------------------------------------------------------


def to_transformer_lens(lm: LM) -> Any:
    """A ``TransformerBridge`` around the weights of ``lm``. A string is tokenized as ``lm.tokenizer`` does, no BOS added.

    Raises:
        ImportError: TransformerLens is not installed.
        NeighbourError: it does not know the architecture, or does not compute what ``lm`` computes at every site.
    """
    bridges = _imported("transformer_lens.model_bridge", "TransformerLens")
    _refuse_processors(lm)
    model, tokenizer = _shell(lm), copy.deepcopy(lm.tokenizer)
    layout = sites.find(model)
    # A bridge asks for attention rows, for which transformers puts hooks on the layers, for good. The layers' hooks are those of lm, whose
    # hidden states would then be collected twice. The bridge has hooks of its own, so the model is marked as having transformers' already.
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            inner._output_capturing_hooks_installed = True  # type: ignore[assignment]
    # An architecture is looked up by the class names a saved config holds; and a tokenizer that does not say that it adds a
    # BOS would be loaded again from wherever it came from.
    model.config.architectures = [type(model).__name__]
    tokenizer.init_kwargs |= {"name_or_path": lm.name, "add_bos_token": True}
    try:
        bridge = bridges.TransformerBridge.boot_transformers(
            lm.name, hf_model=model, tokenizer=tokenizer, device=str(lm.device), dtype=model.dtype
        )
    except ValueError as error:
        reason = str(error).partition(". ")[0]
        raise NeighbourError(f"TransformerLens cannot take {type(model).__name__}: {reason}. Use to_nnsight instead.") from error
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    stands_for = {id(part.original_component): part for part in bridge.modules() if hasattr(part, "original_component")}
    for block in layout.blocks:
        for module in {block.adds_attention, block.mlp}:
            # What stands in for attention (or a fused MLP) never calls it, so the hooks have to move to the stand-in.
            if (part := stands_for.get(id(module))) is not None:
                for name in _AFTER:
                    setattr(part, name, getattr(module, name))
                    setattr(module, name, OrderedDict())
    _check(lm, bridge)
    return bridge


def _refuse_processors(lm: LM) -> None:
    """Raise for a model that reads more than text: TransformerLens would look for its processor by name, and install packages for it."""
    config = lm.model.config
    reads = [part for part in ("vision", "audio", "video") if getattr(config, f"{part}_config", None) is not None]
    if reads or config.get_text_config() is not config:
        raise NeighbourError(
            f"{lm.name} is a {type(lm.model).__name__}, which reads more than text: TransformerLens would install packages for its processor. "
            "Use to_nnsight instead."
        )


def check_transformer_lens() -> None:
    """Raise ImportError, naming the extra, unless TransformerLens can be imported: to be asked before long work."""
    _imported("transformer_lens.head_detector", "TransformerLens")


def to_nnsight(lm: LM) -> Any:
    """An nnsight ``TransformersModel`` around the weights of ``lm``; it pads on the left, whatever ``lm.tokenizer`` does.

    Raises:
        ImportError: nnsight is not installed.
    """
    nnsight = _imported("nnsight", "nnsight")
    return nnsight.TransformersModel(_shell(lm), tokenizer=copy.deepcopy(lm.tokenizer))


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{name} cannot be imported ({error}). It is optional: pip install 'reasoning-length-toolkit[lens]'."
        ) from error


def _shell(lm: LM) -> PreTrainedModel:
    """A copy of the modules, which the neighbours replace or rewire, that shares all tensors and all hooks, also later ones."""
    shared: list[Any] = [*lm.model.parameters(), *lm.model.buffers()]
    shared += [getattr(module, name) for module in lm.model.modules() for name in _AFTER + _BEFORE]
    return copy.deepcopy(lm.model, {id(item): item for item in shared})


@torch.no_grad()
def _check(lm: LM, bridge: Any, *, tokens: int = 8) -> None:
    """Our hooks on ``lm`` must see one pass of the bridge as they see one of ``lm``: each site once, the same numbers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(lm.device)
    seen: dict[Site, list[Tensor]] = {Site(kind, layer): [] for layer in range(lm.layout.n_layers) for kind in KINDS}

    def watch(site: Site) -> Callable[[Tensor], None]:
        return lambda value: seen[site].append(value.float())

    with hooks.observe(lm.layout, {site: watch(site) for site in seen}):
        lm.model(input_ids=ids)
        bridge(ids)
    allowed = 1e-3 if lm.model.dtype == torch.float32 else 5e-2
    for site, values in seen.items():
        error = ((values[0] - values[1]).abs().max() / values[0].abs().max()).item() if len(values) == 2 else float("nan")
        if not error <= allowed:
            raise NeighbourError(
                f"TransformerLens does not compute {lm.name} as it is: at {site} it ran {len(values) - 1} times (once is right), "
                f"relative deviation {error:.2g}. Use to_nnsight, which runs the model's own modules."
            )


# --- what it detects -----------------------------------------------------------------------------------------

DETECTED = {"previous token": "previous_token_head", "induction": "induction_head", "duplicate token": "duplicate_token_head"}
"""Names of ours -> names of TransformerLens's detection patterns."""


@torch.no_grad()
def detect_heads(lm: LM, sequences: Sequence[Sequence[int]], *, repeated: int = 32, seed: int = 0) -> dict[str, HeadScores]:
    """TransformerLens's head detectors through the bridge: the share of a head's attention on each pattern, a mean over sequences.

    Previous token and duplicate token are looked for in ``sequences`` (token ids of one's own text); induction in as many sequences
    of up to ``repeated`` different ones of their tokens in random order, twice over, where only the repetition tells what comes next.

    Raises:
        ImportError, NeighbourError: as :func:`to_transformer_lens`.
        ValueError: no sequence, or one of fewer than two tokens.
    """
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError(f"{len(sequences)} sequences: head patterns need at least one, each of two tokens or more.")
    bridge, detector = to_transformer_lens(lm), _imported("transformer_lens.head_detector", "TransformerLens")
    generator, special = torch.Generator().manual_seed(seed), set(lm.tokenizer.all_special_ids)
    pool = torch.tensor(sorted({i for ids in sequences for i in ids} - special))
    twice = [pool[torch.randperm(len(pool), generator=generator)[:repeated]].repeat(2).tolist() for _ in sequences]
    found = {}
    for name, pattern in DETECTED.items():
        score = torch.zeros(lm.layout.n_layers, lm.layout.n_heads, dtype=torch.float64)
        for ids in twice if name == "induction" else sequences:
            tokens = torch.tensor([list(ids)], device=lm.device)
            _, cache = bridge.run_with_cache(tokens, remove_batch_dim=True)
            wanted = getattr(detector, f"get_{pattern}_detection_pattern")(tokens.cpu())
            for layer in range(lm.layout.n_layers):
                score[layer] += torch.tensor(
                    [detector.compute_head_attention_similarity_score(
                        cache["pattern", layer, "attn"][head].cpu().float(), detection_pattern=wanted,
                        exclude_bos=False, exclude_current_token=False, error_measure="mul",
                    ) for head in range(lm.layout.n_heads)]
                )  # fmt: skip
        found[name] = HeadScores(score / len(sequences), pattern, "share of attention", lm.provenance(seed))
    return found


# --- names ---------------------------------------------------------------------------------------------------


def _hook_names(lm: LM) -> dict[str, tuple[str, ...]]:
    """Site kind -> its TransformerLens names within a block, the usual one first."""
    names: dict[str, tuple[str, ...]] = {
        "resid_pre": ("hook_resid_pre", "hook_in"),
        "z": ("attn.hook_z",),
        "attn_out": ("hook_attn_out", "attn.hook_out"),
        "resid_mid": ("hook_resid_mid",),
        "mlp_out": ("hook_mlp_out", "mlp.hook_out"),
        "resid_post": ("hook_resid_post", "hook_out"),
    }
    block = lm.layout.blocks[0]
    if block.post_attention_norm is not None:
        names |= {"attn_out": ("attn.hook_out",), "mlp_out": ("mlp.hook_out",)}
    if getattr(block.block, "use_parallel_residual", False):
        names["resid_mid"] = ()
    return names


def transformer_lens_name(lm: LM, site: Site, *, write: bool = False) -> str:
    """Name of the hook that holds a site, ``blocks.3.hook_resid_post``; with ``write``, of the one where a vector is added to it.

    Raises:
        IndexError: no such layer.
        NeighbourError: TransformerLens has no such hook (``resid_mid`` of parallel blocks).
    """
    lm.layout.check(site)
    names = ("hook_attn_out",) if write and site.kind == "resid_mid" else _hook_names(lm)[site.kind]
    if not names:
        raise NeighbourError(
            f"TransformerLens has no hook for {site}: attention and MLP of {lm.name} run in parallel. "
            "It is hook_resid_pre + hook_attn_out; from_transformer_lens(lm, cache) forms it."
        )
    return f"blocks.{site.layer}.{names[0]}"


def site_of_transformer_lens(lm: LM, name: str) -> Site:
    """The site that a TransformerLens hook of this model holds.

    Raises:
        IndexError: no such layer.
        NeighbourError: the hook holds no site of ours, or something else than its name suggests (post-norm families).
    """
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    layer, hook = (int(found[1]), found[2]) if found else (0, name)
    for kind, names in _hook_names(lm).items():
        if found and hook in names:
            site = Site(kind, layer)
            lm.layout.check(site)
            return site
    if hook in ("hook_attn_out", "hook_mlp_out"):
        part = hook.split("_")[1]
        raise NeighbourError(
            f"{name} of {lm.name} ({lm.layout.row.family}) is taken after the post-norm, our {part}_out before it. "
            f"That is blocks.{layer}.{part}.hook_out."
        )
    known = ", ".join(names[0] for names in _hook_names(lm).values() if names)
    raise NeighbourError(f"{name} is no site of {lm.name}: take one of blocks.LAYER.{{{known}}}.")


def nnsight_path(lm: LM, site: Site) -> Place:
    """Where nnsight finds a site of this model. Raises IndexError if there is no such layer."""
    lm.layout.check(site)
    path, block = {module: name for name, module in lm.model.named_modules()}, lm.layout.blocks[site.layer]
    if site.kind == "resid_mid":
        return Place(path[block.adds_attention], "output", path[block.block])
    module = {"z": block.out, "attn_out": block.out, "mlp_out": block.mlp}.get(site.kind, block.block)
    return Place(path[module], "input" if site.kind in ("resid_pre", "z") else "output")


def site_of_nnsight(lm: LM, place: Place) -> Site:
    """The site at a place, inverse of :func:`nnsight_path`.

    Raises:
        NeighbourError: no site is there; the output of attention, for one, is part of ``resid_mid`` (``plus`` the block's input).
    """
    for layer in range(lm.layout.n_layers):
        for site in (Site(kind, layer) for kind in KINDS):
            if nnsight_path(lm, site) == place:
                return site
    ours = "; ".join(str(nnsight_path(lm, Site(kind, 0))) for kind in KINDS)
    raise NeighbourError(f"{place} is no site of {lm.name}. Those of layer 0 are {ours}.")


# --- activations ---------------------------------------------------------------------------------------------


def from_transformer_lens(lm: LM, cache: Any) -> dict[Site, Float[Tensor, "*batch seq _"]]:
    """Every site in an ``ActivationCache`` (or any mapping from hook names), ``z`` with its heads side by side.

    Raises:
        NeighbourError: there is none in it.
    """
    found: dict[Site, Tensor] = {}
    for layer in range(lm.layout.n_layers):
        for kind, names in _hook_names(lm).items():
            present = [full for name in names if (full := f"blocks.{layer}.{name}") in cache]
            if present:
                found[Site(kind, layer)] = cache[present[0]].flatten(-2) if kind == "z" else cache[present[0]]
        parts = [found.get(Site(kind, layer)) for kind in ("resid_pre", "attn_out")]
        if not _hook_names(lm)["resid_mid"] and all(part is not None for part in parts):
            found[Site("resid_mid", layer)] = parts[0] + parts[1]  # type: ignore[operator]  # neither is None
    if not found:
        raise NeighbourError(f"No site of {lm.name} is in this cache: keep names such as blocks.0.hook_resid_post.")
    return found


def from_nnsight(lm: LM, model: Any, wanted: Iterable[Site]) -> dict[Site, Tensor]:
    """Save sites inside a trace: ``with model.trace(ids): values = bridges.from_nnsight(lm, model, wanted)``.

    Reads them in the order of the computation, which nnsight asks for; values are ``[batch, seq, width]``.
    """
    nnsight, chosen, values = _imported("nnsight", "nnsight"), set(wanted), {}
    for site in chosen:
        lm.layout.check(site)
    for layer in sorted({site.layer for site in chosen}):
        resid_pre = model.get(nnsight_path(lm, Site("resid_pre", layer)).module).input.clone()
        for kind in (kind for kind in KINDS if Site(kind, layer) in chosen):
            place = nnsight_path(lm, Site(kind, layer))
            value = resid_pre if kind == "resid_pre" else getattr(model.get(place.module), place.side)
            value = value[0] if isinstance(value, tuple) else value
            values[Site(kind, layer)] = resid_pre + value if place.plus else value.clone()
    return nnsight.save(values)


def moments(
    lm: LM,
    examples: Iterable[tuple[Rollout, str, Mapping[Site, Tensor]]],
    positions: Callable[[Rollout], Sequence[int]],
    *,
    name: str,
) -> Moments:
    """What ``collect.moments`` returns, from activations captured elsewhere, one example at a time, in fp64.

    Args:
        examples: ``(rollout, class, {site: [seq, width] or [1, seq, width]})``, every layer of each kind.
        positions: Positions of a rollout to average over, ``collect.THINK.of``; an example without any is left out.
        name: What these positions are called, ``"think"``.

    Raises:
        NeighbourError: missing layers, other kinds than before, or activations that do not fit the rollout or the model.
        NoThinkTagsError: no rollout has a position to look at.
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
            raise NeighbourError(f"{rollout.problem_id} has the sites {[*means]}, others {[*before]}: capture the same for all.")
        sums[label] = {kind: sums[label][kind] + mean for kind, mean in means.items()} if label in sums else means
    if not sums:
        raise NoThinkTagsError(f"No rollout of {lm.name} has positions {name!r}: choose others, or other rollouts.")
    labels = tuple(sorted(sums))
    stacked = {kind: torch.stack([sums[label][kind] for label in labels]) for kind in sums[labels[0]]}
    return Moments(labels, tuple(n[label] for label in labels), name, stacked, {}, lm.provenance(**origins.record(read)))


def _means(lm: LM, rollout: Rollout, values: Mapping[Site, Tensor], where: list[int]) -> dict[str, Float[Tensor, "layers _"]]:
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in values)]
    found = {}
    for kind in kinds:
        rows = []
        for site in (Site(kind, layer) for layer in range(lm.layout.n_layers)):
            shape = tuple(values[site].shape) if site in values else None
            wanted = (len(rollout.token_ids), lm.layout.width(kind))
            if shape not in (wanted, (1, *wanted)):
                raise NeighbourError(
                    f"{rollout.problem_id}: {site} is {shape or 'missing'}, the rollout and {lm.name} need {wanted}. "
                    "Was a BOS prepended (pass token ids, not text), or a layer left out?"
                )
            rows.append(values[site].detach().reshape(wanted)[where].double())
        found[kind] = torch.stack([row.mean(dim=0).cpu() for row in rows])
        if kind == "z":
            found[lm.layout.contribution_kind] = torch.stack(
                [_over_norm(lm.layout, at, z).mean(dim=0).cpu() for at, z in enumerate(rows)]
            )
    return found


@torch.no_grad()
def _over_norm(layout: Layout, layer: int, z: Float[Tensor, "positions _"]) -> Float[Tensor, "positions _"]:
    """``z`` over the scale of the norm that follows attention's output; as it is where none does."""
    norm, W_O, b_O = layout.norm(layer), layout.W_O(layer), layout.b_O(layer)
    if norm is None:
        return z
    attn_out = z.to(W_O.device) @ W_O.double().T + (0.0 if b_O is None else b_O.double())
    return z / norm.scale(attn_out).to(z)
