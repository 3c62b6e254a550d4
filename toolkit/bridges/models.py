"""Make a TransformerLens or nnsight model that shares weights and hooks with an LM, and run TransformerLens's head detectors."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit import hooks, sites
from toolkit import lm as lms
from toolkit.bridges.names import NeighbourError
from toolkit.lm import LM
from toolkit.sites import KINDS, Site
from toolkit.types import HeadScores

# The attributes of a torch module that hold its hooks: those that run after its forward pass, and those that run before.
_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def to_transformer_lens(lm: LM) -> Any:
    """Return a ``TransformerBridge`` (TransformerLens's model class) around the weights of ``lm``.

    The bridge tokenizes as ``lm.tokenizer`` does, and does not prepend a BOS token.

    Raises:
        ImportError: TransformerLens is not installed.
        NeighbourError: TransformerLens does not support the architecture, or its activations differ from those of ``lm`` at a site.
        UnsupportedModelError: the weights are quantised or offloaded.
    """
    bridges = import_optional("transformer_lens.model_bridge", "TransformerLens")
    _refuse_processors(lm)
    lms.check_plain(lm, "replacing its modules by those of TransformerLens", "Use to_nnsight instead.")
    model, tokenizer = _shell(lm), copy.deepcopy(lm.tokenizer)
    layout = sites.find(model)
    # When a caller requests attention weights, as the bridge does, transformers puts permanent hooks on the layers of its model, to collect
    # outputs. The layers of this copy share their hooks with lm, so lm would have the hooks too, and would collect its hidden states twice.
    # The bridge does not need them. So mark the copy as having these hooks already; transformers then adds none.
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            inner._output_capturing_hooks_installed = True  # type: ignore[assignment]
    # TransformerLens looks up the architecture by the class names in a saved config. It would load the tokenizer again from its
    # original source unless the tokenizer claims to add a BOS token.
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
            # The bridge's replacement of attention (or of a fused MLP) never calls the original, so its hooks move to the replacement.
            # Only forward hooks (_AFTER) move: the toolkit observes these modules by their outputs and puts no other hooks on them.
            if (part := stands_for.get(id(module))) is not None:
                for name in _AFTER:
                    setattr(part, name, getattr(module, name))
                    setattr(module, name, OrderedDict())
    _check(lm, bridge)
    return bridge


def _refuse_processors(lm: LM) -> None:
    """Raise NeighbourError if the model is multimodal.

    For such a model TransformerLens would load the processor of its images or sounds, and install packages for that.
    """
    config = lm.model.config
    reads = [part for part in ("vision", "audio", "video") if getattr(config, f"{part}_config", None) is not None]
    if reads or config.get_text_config() is not config:
        raise NeighbourError(
            f"{lm.name} is a {type(lm.model).__name__}, which is multimodal: TransformerLens would install packages for its processor. "
            "Use to_nnsight instead."
        )


def check_transformer_lens() -> None:
    """Raise ImportError, with the install command, if TransformerLens cannot be imported. Call this before a long computation."""
    import_optional("transformer_lens.head_detector", "TransformerLens")


def to_nnsight(lm: LM) -> Any:
    """Return an nnsight ``TransformersModel`` around the weights of ``lm``. nnsight pads batches on the left.

    Raises:
        ImportError: nnsight is not installed.
    """
    nnsight = import_optional("nnsight", "nnsight")
    return nnsight.TransformersModel(_shell(lm), tokenizer=copy.deepcopy(lm.tokenizer))


def import_optional(module: str, name: str) -> Any:
    """Import an optional module and return it. If that fails, raise ImportError with the install command.

    Args:
        module: Full name of the module, such as ``"transformer_lens.head_detector"``.
        name: Name of the package for the error message, such as ``"TransformerLens"``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{name} cannot be imported ({error}). It is optional: pip install 'reasoning-length-toolkit[lens]'."
        ) from error


def _shell(lm: LM) -> PreTrainedModel:
    """Return a copy of the model's modules, for the other library. The library can replace modules of the copy without changing ``lm``.

    The copy shares all parameters, buffers and hooks with ``lm``. A hook that is added later to either of them also acts on the other.
    """
    shared: list[Any] = [*lm.model.parameters(), *lm.model.buffers()]
    shared += [getattr(module, name) for module in lm.model.modules() for name in _AFTER + _BEFORE]
    # An object that deepcopy's memo maps to itself is shared, not copied.
    return copy.deepcopy(lm.model, {id(item): item for item in shared})


@torch.no_grad()
def _check(lm: LM, bridge: Any, *, tokens: int = 8) -> None:
    """Raise NeighbourError unless a forward pass of the bridge computes every site exactly once, with the same values as ``lm``.

    The same random tokens run through ``lm`` and through the bridge. Hooks on ``lm`` record both passes, since the bridge shares them.
    Values may differ by rounding: relative to the largest one, by 0.001 in fp32 and by 0.05 in other dtypes.

    Args:
        lm: The model.
        bridge: The ``TransformerBridge`` around its weights.
        tokens: Number of random tokens in the test sequence.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(lm.device)
    recorded: dict[Site, list[Tensor]] = {
        Site(kind, layer): [] for layer in range(lm.layout.n_layers) for kind in KINDS if layer in lm.layout.layers(kind)
    }

    def watch(site: Site) -> Callable[[Tensor], None]:
        return lambda value: recorded[site].append(value.float())

    with hooks.observe(lm.layout, {site: watch(site) for site in recorded}):
        lm.model(input_ids=ids)
        bridge(ids)
    # Largest allowed deviation, relative to the largest activation; eager attention rounds differently, most in bf16 and fp16.
    allowed = 1e-3 if lm.model.dtype == torch.float32 else 5e-2
    for site, values in recorded.items():
        # NaN, which fails the test below, if the bridge did not compute the site once (two values: one of lm, one of the bridge).
        error = ((values[0] - values[1]).abs().max() / values[0].abs().max()).item() if len(values) == 2 else float("nan")
        if not error <= allowed:
            raise NeighbourError(
                f"TransformerLens computes something else than {lm.name}: it computed {site} {len(values) - 1} times (expected once), "
                f"relative deviation {error:.2g}. Use to_nnsight, which runs the model's modules."
            )


assumed_longest = 1024
"""Number of tokens of a sequence on which attention patterns are measured: ours. Their memory grows with its square."""
DETECTED = {"previous token": "previous_token_head", "induction": "induction_head", "duplicate token": "duplicate_token_head"}
"""Name of an attention pattern in the toolkit -> its name in TransformerLens's head detectors."""


@torch.no_grad()
def detect_heads(
    lm: LM, sequences: Sequence[Sequence[int]], *, repeated: int = 32, seed: int = 0, longest: int = assumed_longest
) -> dict[str, HeadScores]:
    """Run TransformerLens's head detectors; return a dict from attention pattern (a key of ``DETECTED``) to the scores of all heads.

    A score is the share of a head's attention, 0 to 1, that lies on the pattern, averaged over sequences. The patterns are attention from a
    token to these earlier tokens:

    - "previous token": the one before it;
    - "duplicate token": those equal to it;
    - "induction": those that directly follow an earlier token equal to it.

    The first two are measured on the first ``longest`` tokens of each of ``sequences``, "induction" on as many artificial sequences. An artificial sequence consists of distinct
    tokens, drawn at random from ``sequences``, and then the same tokens again in the same order. So only the repetition predicts the next
    token.

    Args:
        lm: The model.
        sequences: Token ids of texts, one sequence per text.
        repeated: Number of distinct tokens in an artificial sequence; fewer if ``sequences`` have fewer.
        seed: Random seed for the artificial sequences.
        longest: Number of tokens after which a sequence is cut. The attention of all heads of one layer is in memory at a time:
            ``heads * longest^2`` numbers.

    Raises:
        ImportError: TransformerLens is not installed.
        NeighbourError: TransformerLens does not support the architecture, or its activations differ from those of ``lm`` at a site.
        UnsupportedModelError: the weights are quantised or offloaded.
        ValueError: there is no sequence, or one has fewer than two tokens, or ``longest`` is below 2.
    """
    if longest < 2:
        raise ValueError(f"longest={longest}: a head pattern needs at least two tokens.")
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError(f"{len(sequences)} sequences: head patterns need at least one, each with at least two tokens.")
    bridge, detector = to_transformer_lens(lm), import_optional("transformer_lens.head_detector", "TransformerLens")
    generator, special = torch.Generator().manual_seed(seed), set(lm.tokenizer.all_special_ids)
    # pool: the distinct tokens of all sequences. twice: the artificial sequences.
    pool = torch.tensor(sorted({i for ids in sequences for i in ids} - special))
    texts = [list(ids)[:longest] for ids in sequences]
    twice = [pool[torch.randperm(len(pool), generator=generator)[:repeated]].repeat(2).tolist() for _ in sequences]
    scores = {}
    for name, pattern in DETECTED.items():
        score = lm.layout.table({layer: torch.zeros(n) for layer, n in enumerate(lm.layout.heads)})
        for ids in twice if name == "induction" else texts:
            expected = getattr(detector, f"get_{pattern}_detection_pattern")(torch.tensor([ids])).to(lm.device)
            for layer, shares in _shares(lm, bridge, detector, ids, expected).items():
                score[layer, : lm.layout.heads[layer]] += torch.tensor(shares)
        scores[name] = HeadScores(score / len(sequences), pattern, "share of attention", lm.provenance(seed), lm.layout.absent)
    return scores


def _shares(lm: LM, bridge: Any, detector: Any, ids: Sequence[int], expected: Tensor) -> dict[int, list[float]]:
    """Return layer -> share of each head's attention that lies on an expected pattern, in one pass over a sequence.

    Each layer's attention is read while the pass runs and then dropped: that of all layers together may not fit into memory.

    Args:
        lm: The model.
        bridge: Its ``TransformerBridge``.
        detector: TransformerLens's module ``head_detector``.
        ids: Token ids of the sequence.
        expected: The pattern, ``[tokens, tokens]``: 1 where attention counts, 0 elsewhere.

    Raises:
        NeighbourError: TransformerLens reported no attention for a layer that has heads.
    """
    shares: dict[int, list[float]] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(attention: Tensor, hook: Any) -> None:
            shares[layer] = [
                detector.compute_head_attention_similarity_score(
                    head.float(),
                    detection_pattern=expected.to(head.device),
                    exclude_bos=False,
                    exclude_current_token=False,
                    error_measure="mul",
                )
                for head in attention[0]
            ]

        return read

    names = [(f"blocks.{layer}.attn.hook_pattern", reader(layer)) for layer in lm.layout.attention_layers]
    bridge.run_with_hooks(torch.tensor([ids], device=lm.device), fwd_hooks=names)
    if missing := {*lm.layout.attention_layers} - {*shares}:
        raise NeighbourError(
            f"TransformerLens reported no attention of {lm.name} in layer {min(missing)}: its head patterns cannot be measured."
        )
    return shares
