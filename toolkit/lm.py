"""Loading models: ``load(id | directory | gguf file | "tiny-reasoner" | "smol-reasoner") -> LM``, and checking them by behaviour.

The only room that calls ``from_pretrained`` or ``save_pretrained``. Anything Hugging Face can load as a causal
language model works if its layout has a row in ``sites.py``; an edited checkpoint is an ordinary directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import toolkit
from toolkit import hooks, origins, shipped, sites, store
from toolkit.shipped import SMOL_REASONER, TINY_REASONER, smollm2_path
from toolkit.sites import Layout, Site, UnsupportedModelError
from toolkit.types import Provenance

DEFAULT_TAGS = ("<think>", "</think>")
MADE_FROM = "made_from.json"  # beside the weights: the problems that edits and training were made from, see ``origins``
UNCOMPUTED = frozenset((
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
))  # fmt: skip
"""Entries of a config that say nothing about what the weights compute; everything else is part of a fingerprint."""


class NoThinkTagsError(ValueError):
    """A model or its rollouts have no think span where one is needed."""


@dataclass(frozen=True)
class ThinkTags:
    """How a model marks its thinking.

    Attributes:
        open: Opening tag as text, or ``None``: thinking starts with the response.
        close: Closing tag as text, or ``None``: the whole response counts as thinking (``"response"`` mode, for
            models that do not mark their thinking; their spans are named so in every report).
    """

    open: str | None = DEFAULT_TAGS[0]
    close: str | None = DEFAULT_TAGS[1]

    @staticmethod
    def parse(text: str) -> ThinkTags:
        """``"response"`` for no tags at all, or ``"OPEN,CLOSE"`` for custom ones."""
        if text == "response":
            return ThinkTags(None, None)
        parts = text.split(",")
        if len(parts) != 2 or not parts[1]:
            raise ValueError(f'think={text!r}: give "response", or the two tags as "<think>,</think>".')
        return ThinkTags(parts[0] or None, parts[1])


@dataclass(frozen=True)
class LM:
    """A model with everything the toolkit needs to know about it. Never modified: edits return a new LM.

    Attributes:
        name: Id, directory or description; ``parent`` is the fingerprint of the LM this one was made from.
        tags: Its think tags, or ``None`` if it has none (methods then raise :class:`NoThinkTagsError`).
        made_from: Records (see ``origins``) of the problems that its edits and its training were made from; saved beside the weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    tags: ThinkTags | None
    name: str
    revision: str | None = None
    parent: str | None = None
    made_from: tuple[origins.Record, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token id that ends a response: the generation config's (all of them) and the tokenizer's."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        found = set(ids) if isinstance(ids, list | tuple) else {ids}
        return frozenset(i for i in found | {self.tokenizer.eos_token_id} if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of all weights, and what the config says of computing with them (rotary base,
        sliding window, ...). Computed once; a few seconds per billion weights."""
        config = {k: v for k, v in self.model.config.get_text_config().to_dict().items() if k not in UNCOMPUTED}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()

    def provenance(self, seed: int | None = None, **notes: Any) -> Provenance:
        """Provenance of an artifact made from this model now."""
        template = self.tokenizer.chat_template or ""
        hashed = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]
        return Provenance(self.name, self.revision, self.fingerprint, hashed, toolkit.__version__, seed, notes)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; the tokenizer may name fewer."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # a Parameter, typed as Tensor or Module

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        # The tokenizer builds it anew each time it is asked.
        return self.tokenizer.get_vocab()

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so, or ``None``."""
        return self._vocabulary.get(text)

    def text(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Decoded token ids; ``special=False`` leaves special tokens out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat prompt, generation prompt included.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.name} has no chat template, so a prompt cannot be built. "
                "Set tokenizer.chat_template (or add chat_template.jinja to the directory) and load again."
            )
        ids = self.tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, return_dict=False)
        return list(ids)

    def save(self, directory: str | Path) -> Path:
        """Write an ordinary Hugging Face directory (safetensors, tokenizer, chat template).

        Written beside the target and renamed when complete, so that a directory that exists is whole.

        Raises:
            FileExistsError: the directory exists and is not empty.
        """
        with store.filling(directory) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            if self.made_from:
                store.write_json(self.made_from, partial / MADE_FROM)
        return Path(directory)


Intervention = Callable[[LM], AbstractContextManager[None]]
"""Something that changes a model while it runs: ``with intervention(lm): ...``."""


Rule = Callable[[LM, Any, int], Sequence[int] | None]
"""What is placed instead of a drawn token: ``rule(lm, reader, drawn)``, see ``baselines``; ``None`` keeps it."""

Ask = Callable[[Sequence[Mapping[str, str]]], Sequence[Mapping[str, str]]]
"""A change of the prompt: messages to messages."""


@dataclass(frozen=True)
class Condition:
    """A model as it is judged: an LM, and what is done to it while it runs.

    Attributes:
        during: Interventions active in prefill and decode, in order.
        note: One line for the report.
        rules: Rules that replace drawn tokens; the first that does so wins.
        ask: Change of the prompt, or ``None``.
    """

    lm: LM
    during: tuple[Intervention, ...] = field(default=())
    note: str = ""
    rules: tuple[Rule, ...] = ()
    ask: Ask | None = None

    @property
    def acts(self) -> list[str]:
        """What is done to the model, in words: they tell conditions of one model apart."""
        return [str(act) for act in (*self.during, *self.rules, *([self.ask] if self.ask else []))]

    @contextmanager
    def active(self):
        """Context in which the interventions act."""
        with ExitStack() as stack:
            for intervention in self.during:
                stack.enter_context(intervention(self.lm))
            yield self.lm


def tiny_reasoner_path() -> Path:
    """Directory of the tiny reasoner."""
    return shipped.path_of(TINY_REASONER)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    tags: ThinkTags | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Load a causal language model for use with the toolkit.

    Args:
        source: ``"tiny-reasoner"``, ``"smol-reasoner"``, a local directory, a ``.gguf`` file, or a hub id.
        revision: Hub revision.
        dtype: Weight type; edits are computed in fp32 whatever it is.
        device: Where to put it; default CUDA if there is one, else CPU.
        tags: Think tags; default: found in the tokenizer's vocabulary or chat template, else none.
        trust_remote_code: Whether code from the hub may run. Off unless asked for.

    Raises:
        FileNotFoundError: a path that does not exist, or a GGUF file that is not one.
        shipped.MissingPackageError: ``"smol-reasoner"`` without its packages; gives the command that installs them.
        UnsupportedModelError: no layout row fits, weights are not finite, the vocabulary does not fit the model,
            or a site does not behave as it should (:func:`qualify`).
    """
    adapter = shipped.path_of(SMOL_REASONER) if source == SMOL_REASONER else None
    path = smollm2_path() if adapter else tiny_reasoner_path() if source == TINY_REASONER else Path(source)
    where, extra = str(path) if path.exists() else str(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"No GGUF file at {path}.")
        where, extra = str(path.parent), {"gguf_file": path.name}
    elif not path.exists() and (path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1):
        raise FileNotFoundError(f"{path} is neither a directory nor a GGUF file, and not a hub id (owner/name).")
    common = {"revision": revision, "trust_remote_code": trust_remote_code, **extra}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        read_as = torch.float32 if adapter else dtype
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=read_as, output_loading_info=True, **common)
        model, info = loaded
    except SafetensorError as error:
        raise store.DamagedFileError(
            f"The weights in {where} are not whole safetensors files: {error}. Copy them again."
        ) from error
    except (OSError, ValueError) as error:
        raise type(error)(f"{where} cannot be loaded as a causal language model: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModelError(
            f"{where} lacks the weights {', '.join(missing[:5])} (of {len(missing)} missing): it is not whole."
        )
    if path.suffix == ".gguf":
        _forget_quantization(model)
    if adapter:
        model, tokenizer.chat_template = shipped.merged(model, adapter, dtype), shipped.template(adapter)
    torch.nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lm = wrap(model, tokenizer, name=str(source), tags=tags, revision=revision)
    lm = replace(lm, made_from=tuple(store.read_json(path / MADE_FROM)) if (path / MADE_FROM).is_file() else ())
    qualify(lm)
    return lm


def _forget_quantization(model: PreTrainedModel) -> None:
    # A GGUF file is turned into plain weights while loading, yet transformers would still refuse to save or train them.
    model.hf_quantizer = None  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    tags: ThinkTags | None = None,
    revision: str | None = None,
) -> LM:
    """An :class:`LM` from a model and tokenizer already in memory. Errors as :func:`load`; not yet qualified."""
    layout = sites.find(model)
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise UnsupportedModelError(f"{name}: weight {key} holds NaN or infinity; the checkpoint is damaged.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    lm = LM(model.eval(), tokenizer, layout, tags or _find_tags(tokenizer), name, revision)
    if len(tokenizer) > lm.vocab_size:
        raise UnsupportedModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {lm.vocab_size}: they do not belong together."
        )
    return lm


def _find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    known = set(tokenizer.get_vocab())
    template = json.dumps(tokenizer.chat_template or "")
    if known.issuperset(DEFAULT_TAGS) or DEFAULT_TAGS[1] in template:
        return ThinkTags()
    return None


@dataclass(frozen=True)
class Check:
    """One line of :func:`qualify`: what was checked, the largest deviation seen, and whether it passed."""

    name: str
    value: float
    passed: bool


@torch.inference_mode()
def qualify(lm: LM, *, seed: int = 0, tokens: int = 12) -> list[Check]:
    """Check by behaviour that every site of ``lm`` is what its name says, on one random sequence.

    A recorded value written back is a no-op (bitwise); a perturbed value moves the logits (each site is causal);
    head contributions plus bias sum to ``attn_out``.

    Raises:
        UnsupportedModelError: a check failed; names the site and the deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, lm.model.config.get_text_config().vocab_size, (1, tokens), generator=generator).to(lm.device)
    layout, checks = lm.layout, []
    base = lm.model(input_ids=ids).logits
    everything = [Site(kind, layer) for kind in sites.KINDS for layer in range(layout.n_layers)]
    with hooks.record(layout, everything) as values:
        lm.model(input_ids=ids)
    for kind in sites.KINDS:
        written = {site: _constant(values[site]) for site in everything if site.kind == kind}
        with hooks.rewrite(layout, written):
            change = (lm.model(input_ids=ids).logits - base).abs().max().item()
        checks.append(Check(f"{kind}: written back is a no-op", change, change == 0.0))
        for layer in (0, layout.n_layers - 1):
            with hooks.rewrite(layout, {Site(kind, layer): _perturbed(seed)}):
                change = (lm.model(input_ids=ids).logits - base).abs().max().item()
            checks.append(Check(f"{kind} {layer}: is causal", change, change > 1e-6))
    for layer in range(layout.n_layers):
        checks += _sums(layout, layer, {site.kind: value.float() for site, value in values.items() if site.layer == layer})
    failed = [c for c in checks if not c.passed]
    if failed:
        lines = "; ".join(f"{c.name} (deviation {c.value:.2g})" for c in failed)
        raise UnsupportedModelError(
            f"{lm.name} does not behave like {layout.row.family}: {lines}. Check its row in toolkit/sites.py."
        )
    return checks


def _sums(layout: Layout, layer: int, seen: Mapping[str, Tensor]) -> list[Check]:
    """What must add up in a block: heads to ``attn_out``, attention's share to ``resid_mid``, the MLP's to ``resid_post``."""
    block, W_O, b_O = layout.blocks[layer], layout.W_O(layer).float(), layout.b_O(layer)
    parts = [seen["z"][..., layout.head(h)] @ W_O[:, layout.head(h)].T for h in range(layout.n_heads)]
    heads = torch.stack(parts).sum(dim=0) + (b_O.float() if b_O is not None else 0.0)

    def added(kind: str, norm: torch.nn.Module | None) -> Tensor:
        return seen[kind] if norm is None else norm(seen[kind].to(layout.W_O(layer).dtype)).float()

    expected = {
        "attn_out: heads + bias sum to it": (heads, seen["attn_out"]),
        "resid_mid: resid_pre + attention": (seen["resid_pre"] + added("attn_out", block.post_attention_norm), seen["resid_mid"]),
        "resid_post: resid_mid + MLP": (seen["resid_mid"] + added("mlp_out", block.post_mlp_norm), seen["resid_post"]),
    }
    allowed = 1e-4 if layout.W_O(layer).dtype == torch.float32 else 3e-2
    checks = []
    for name, (got, wanted) in expected.items():
        # Heads of a wrong module may not even have the right shape.
        same = got.shape == wanted.shape
        error = ((got - wanted).abs().max() / wanted.abs().max()).item() if same else float("inf")
        checks.append(Check(f"{layer} {name}", error, error < allowed))
    return checks


def _constant(recorded: Tensor) -> hooks.Rewrite:
    # Equal to the value, yet another tensor, so that the write really happens.
    return lambda value, inputs: recorded.clone()


def _perturbed(seed: int) -> hooks.Rewrite:
    def fn(value: Tensor, inputs: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        return value + 0.5 * value.float().std().to(value) * noise.to(value)

    return fn


def child(lm: LM, model: PreTrainedModel, name: str, *, made_from: Sequence[origins.Record] = ()) -> LM:
    """An LM made from ``lm`` by changing weights: ``model`` replaces its model, ``lm`` becomes its parent.

    Args:
        made_from: Records of the problems that the change was made from, added to those of ``lm``.
    """
    whole = (*lm.made_from, *(one for one in made_from if one not in lm.made_from))
    return replace(lm, model=model, layout=sites.find(model), name=name, revision=None, parent=lm.fingerprint, made_from=whole)


def as_type(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the number type of a model's weights in place. Buffers, such as rotary frequencies, stay as they are, as when it is loaded."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model


def halving(rows: Sequence[Any], run: Callable[[Sequence[Any]], None]) -> None:
    """Run ``run(rows)``; when memory runs out, run the two halves instead, down to single rows.

    ``run`` must change nothing outside before it can no longer fail.
    """
    try:
        run(rows)
        return
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError.
        if len(rows) == 1 or not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    halving(rows[: len(rows) // 2], run)
    halving(rows[len(rows) // 2 :], run)
