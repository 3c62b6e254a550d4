"""Language models: the class ``LM``, loading a model (``load``), and a model under interventions (``Condition``).

``load`` takes every causal language model of Hugging Face whose modules match a row in ``sites.py``, and checks its behaviour
(``qualify``). An edited model is saved as an ordinary model directory, and is loaded like any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import toolkit
from toolkit import checkpoints, origins, shipped, sites, templates, tensors
from toolkit import qualify as behaviour
from toolkit.qualify import Check
from toolkit.shipped import SMOL_REASONER, TINY_REASONER, TINY_SEARCHER, smollm2_path
from toolkit.sites import Layout, UnsupportedModelError
from toolkit.tags import DEFAULT_TAGS, NoThinkTagsError, ThinkTags, find_tags
from toolkit.tools import Toolbox
from toolkit.types import Ask, Provenance

__all__ = [
    "DEFAULT_TAGS", "LM", "SMOL_REASONER", "TINY_REASONER", "TINY_SEARCHER", "UNCOMPUTED", "Ask", "Check", "Condition", "Intervention",
    "NoThinkTagsError", "Rule", "ThinkTags", "UnsupportedModelError", "check_thinking", "child", "load", "qualify", "smollm2_path", "tiny_reasoner_path", "wrap",
]  # fmt: skip

log = logging.getLogger(__name__)

UNCOMPUTED = frozenset((
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
))  # fmt: skip
"""Entries of a config that do not change the model's computation. All others are part of the fingerprint."""


@dataclass(frozen=True)
class LM:
    """A model and its tokenizer, with facts about them such as layout and think tags. An LM is never modified: edits return a new one.

    Attributes:
        model: The model, from transformers.
        tokenizer: Its tokenizer.
        layout: The model's modules, and the number and size of its attention heads; see ``sites.Layout``.
        tags: The model's think tags, or ``None`` if it has none. Methods that need thinking then raise ``NoThinkTagsError``.
        name: Hub id, directory or description.
        revision: Hub revision (branch, tag or commit), or ``None``.
        parent: Fingerprint of the LM that this one was made from by editing or training, or ``None``. Directions of the parent can be used
            with this LM.
        made_from: Records (see ``origins``) of the problems that were used to edit or train the model. ``save`` writes them beside the
            weights.
        template: Values that are set for variables of the chat template in every prompt, such as ``{"enable_thinking": False}``. A template
            that prints today's date is given a fixed date; ``{"strftime_now": "2026-11-27"}`` sets another (see ``switches``).
        folder: Directory that the model was read from, or ``None``. ``save`` copies files from it that are neither weights nor tokenizer,
            such as those of a multimodal processor.
        known_digests: Name -> hash, for the weights that this LM shares with its parent. ``digests`` does not compute these hashes again.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    tags: ThinkTags | None
    name: str
    revision: str | None = None
    parent: str | None = None
    made_from: tuple[origins.Record, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict, hash=False)
    folder: Path | None = None
    # Not an argument, so that a copy with another model (dataclasses.replace) does not get hashes of this one.
    known_digests: Mapping[str, str] = field(default_factory=dict, init=False, hash=False, compare=False, repr=False)

    def __repr__(self) -> str:
        heads = "/".join(map(str, sorted(set(self.layout.heads))))
        tags = "no think tags" if self.tags is None else f"thinks between {self.tags.open!r} and {self.tags.close!r}"
        return f"LM({self.name}: {self.layout.n_layers} layers x {heads} heads, d_model {self.layout.d_model}, {tags})"

    @property
    def device(self) -> torch.device:
        """Device on which the model computes. Offloaded weights are stored elsewhere."""
        return tensors.device(self.model)

    @property
    def body(self) -> PreTrainedModel:
        """The model without its LM head. Its output holds the last hidden states."""
        base: Any = self.model.base_model
        # Llama 4 names its base by another name than it has: then transformers returns the model itself.
        return sites.text_model(self.model) if base is self.model else base

    @cached_property
    def caches_keys(self) -> bool:
        """True if the KV cache holds exactly the keys and values that attention reads; False for latent attention (compressed keys)."""
        return behaviour.caches_keys(self.body, self.layout)

    @cached_property
    def gated_layers(self) -> frozenset[int]:
        """Indices of the layers in which a gate or a norm stands between the attention function and the output projection ``W_O``."""
        return behaviour.gated_layers(self.body, self.layout)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """All token ids that end a response: those in the generation config, and the tokenizer's end-of-sequence token."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        configured = set(ids) if isinstance(ids, list | tuple) else {ids}
        return frozenset(i for i in configured | {self.tokenizer.eos_token_id} if i is not None)

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of every weight and persistent buffer: name -> hash of shape, dtype and bytes.

        Computed once; one thread hashes about 1 GB per second. An edited LM shares most weights with its parent and hashes only the others.
        """
        return tensors.digests(self.model, self.known_digests)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all weights and persistent buffers with their names, and over the config without the entries in ``UNCOMPUTED``."""
        config = {k: v for k, v in self.model.config.get_text_config().to_dict().items() if k not in UNCOMPUTED}
        text = json.dumps([config, sorted(self.digests.items())], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def provenance(self, seed: int | None = None, **notes: Any) -> Provenance:
        """Return the provenance of a value that is computed with this model: facts about the model and settings, stored with the value.

        If variables of the chat template, such as ``enable_thinking``, are set (``switches``), they are added to the notes, and the
        template's hash depends on them.

        Args:
            seed: Random seed, or ``None`` if nothing was random.
            notes: Other facts about the value, JSON-serialisable.
        """
        template, switches = self.tokenizer.chat_template or "", {"template": self.switches} if self.switches else {}
        text = json.dumps([template, switches] if switches else template, sort_keys=True)
        hashed = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Provenance(self.name, self.revision, self.fingerprint, hashed, toolkit.__version__, seed, {**switches, **notes})

    @property
    def switches(self) -> dict[str, Any]:
        """Values of the chat template's variables in every prompt: those of ``template``, and the date if the chat template prints today's.

        The date is ``templates.DATE``, which never changes, unless ``template`` sets ``strftime_now``. So prompts do not depend on the day
        on which they are made. The date is recorded with rollouts and in provenance, and is a part of cache keys, as all switches are.
        """
        prints_date = templates.CLOCK in json.dumps(self.tokenizer.chat_template or "")
        return {**({templates.CLOCK: templates.DATE} if prints_date else {}), **self.template}

    @property
    def _dated_template(self) -> str | None:
        """The chat template with the date in ``switches``; ``None`` (transformers then takes the tokenizer's) if it prints no date."""
        date = self.switches.get(templates.CLOCK)
        return None if date is None else templates.with_date(self.tokenizer.get_chat_template(), date)

    def dated_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer for a library that renders prompts itself, such as TRL.

        If the chat template prints today's date, this is a copy of the tokenizer whose template prints the date in ``switches``. Else it is
        the tokenizer itself.
        """
        if (template := self._dated_template) is None:
            return self.tokenizer
        tokenizer = deepcopy(self.tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding matrix. The tokenizer may have fewer tokens, or a few special tokens more (see ``prompt_ids``)."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]  # a Parameter, typed as Tensor or Module

    @property
    def context(self) -> int | None:
        """Longest text in tokens, prompt and response together, by the model's config; ``None`` if the config gives no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def frequency_limit(self) -> int | None:
        """Longest sequence in tokens for which the rotary frequencies are the usual ones; ``None`` if they do not depend on the length.

        With rotary embeddings of the types longrope (Phi-3.5, Phi-4-mini) and dynamic, transformers takes other frequencies in every pass
        whose longest row is longer than this, for all rows and positions of the pass. Keys in a KV cache keep the old ones. So no row may
        grow beyond the limit in a cache, and rows on both sides of it must not share a pass (``decode.check_growth``, ``decode.batches``).
        """
        limits: list[int] = []
        rotary: list[Any] = [module for module in self.model.modules() if hasattr(module, "rope_type")]
        for module in rotary:
            rope: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            for one in [rope] if "rope_type" in rope else rope.values():  # some models have several, by kind of layer
                kind = str(one.get("rope_type")) if isinstance(one, Mapping) else ""
                if kind == "longrope" and one["short_factor"] != one["long_factor"]:
                    limits.append(int(one["original_max_position_embeddings"]))
                elif "dynamic" in kind:
                    limits.append(int(module.original_max_seq_len))
        return min(limits, default=None)

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        # The tokenizer builds a new dictionary at every call.
        return self.tokenizer.get_vocab()

    def token_id(self, text: str) -> int | None:
        """Return the id of the token whose text in the vocabulary is ``text``, or ``None`` if there is none."""
        return self._vocabulary.get(text)

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def token_text(self, token: int) -> str:
        """Return the text of one token, decoded on its own. The text is cached."""
        if token not in self._token_texts:
            self._token_texts[token] = self.text([token])
        return self._token_texts[token]

    def text(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Return token ids decoded to text. ``special=False`` leaves out special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def prompt_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return chat messages as the text of a prompt.

        The prompt ends where the model's response begins: after the header of the assistant's turn. If the last message is the assistant's,
        the prompt ends with that message, and the model continues it. A chat template that prints today's date prints a fixed date instead
        (see ``switches``).

        Raises:
            ValueError: the tokenizer has no chat template; the template changes the assistant's message that is to be continued; or the
                template may have added think tags to the assistant's turn.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.name} has no chat template, so a prompt cannot be built. "
                "Set tokenizer.chat_template (or add chat_template.jinja to the directory) and load again."
            )
        if not messages or messages[-1]["role"] != "assistant":
            return self._rendered(messages, add_generation_prompt=True)
        content = str(messages[-1]["content"])
        try:
            text = self._rendered(messages, continue_final_message=True)
            if not text.endswith(content):
                raise ValueError(f"it becomes {text[-80:]!r}")
        except ValueError as error:
            raise ValueError(
                f"The chat template of {self.name} changes the assistant's message {content[:80]!r}, so it cannot be continued: leave the "
                "message out, or change its text (many templates strip blanks at both ends)."
            ) from error
        self._check_begun(text, content)
        return text

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of ``prompt_text(messages)``.

        Raises:
            ValueError: as ``prompt_text`` does; or the prompt contains a special token that the model does not embed. The text models of
                Gemma 3, for example, have no embedding of ``<image_soft_token>``, which their tokenizer knows.
        """
        ids: list[int] = list(self.tokenizer(self.prompt_text(messages), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]  # of one text
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(
                f"The prompt contains the token {self.text([max(ids)])!r} with id {max(ids)}, but {self.name} embeds only the ids "
                f"0..{self.vocab_size - 1}: leave the token out of the messages."
            )
        return ids

    def _rendered(self, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
        options: dict[str, Any] = {**how, **templates.without_date(self.switches)}
        return str(
            self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], chat_template=self._dated_template, tokenize=False, **options
            )
        )

    def _check_begun(self, text: str, content: str) -> None:
        """Raise ValueError if the chat template may have added think tags to the assistant's turn, which the model is to continue.

        Args:
            text: Text of the prompt.
            content: The assistant's message, with which the prompt ends.
        """
        tags = [tag for tag in (self.tags.open, self.tags.close) if tag] if self.tags else []
        turn = self.text(self.turn)
        after = text.rpartition(turn)[2] if turn else ""
        if any(tag in text for tag in tags) and (not turn or any(after.count(tag) != content.count(tag) for tag in tags)):
            raise ValueError(
                f"The prompt of {self.name} that continues the assistant's message {content[:80]!r} has think tags that may not belong to the "
                "message: the chat template adds some, or does not mark where the message begins. Whether thinking has begun is unknown. Leave "
                "the message out, or load the model with other think tags: tags=ThinkTags(...), --think."
            )

    @cached_property
    def thinking(self) -> str:
        """Text for logs: the think tags, who writes them, and the chat template's variables.

        "The prompt opens it" means that the opening tag is at the end of the prompt, so the model does not write it. "The prompt closes it"
        means that the closing tag is there too, so the model does not think.
        """
        if self.tags is None:
            return "no think tags found, so responses count as answers (set tags=ThinkTags(OPEN, CLOSE), --think OPEN,CLOSE)"
        if self.tags.close is None:
            return "whole responses count as thinking"
        marked = (
            f"thinks until {self.tags.close!r}"
            if self.tags.open is None
            else f"thinks between {self.tags.open!r} and {self.tags.close!r}"
        )
        if not self.tokenizer.chat_template:
            return marked
        prompt = self._rendered([{"role": "user", "content": "1"}], add_generation_prompt=True).rstrip()
        opened, closed = (bool(tag) and prompt.endswith(str(tag).rstrip()) for tag in (self.tags.open, self.tags.close))
        by = "the prompt opens it" if opened else "the prompt closes it" if closed else "the model opens it"
        switches = sorted(templates.variables(self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map))
        used = f" (set: {json.dumps(self.switches, sort_keys=True)})" if self.switches else ""
        return f"{marked}; {by}" + (f"; template switches: {', '.join(switches)}{used}" if switches else "")

    @cached_property
    def turn(self) -> tuple[int, ...]:
        """Token ids of the header at the start of the assistant's turn in a prompt; empty if the chat template has no such header."""
        if not self.tokenizer.chat_template:
            return ()
        # The header is the text that two prompts share after the question: one that ends before the response, and one that continues a
        # response. A dagger is a response that no template contains.
        question, response = {"role": "user", "content": "1"}, {"role": "assistant", "content": "\u2020"}
        try:
            before = self._rendered([question], add_generation_prompt=False)
            new = self._rendered([question], add_generation_prompt=True)
            continued = self._rendered([question, response], continue_final_message=True).partition(response["content"])[0]
        except Exception:  # noqa: BLE001  # a template may refuse any conversation, with any error
            return ()
        shared = _common(new, continued)
        opening = shared[len(_common(before, shared)) :]
        return tuple(self.tokenizer.encode(opening, add_special_tokens=False)) if opening.strip() else ()

    def save(self, directory: str | Path) -> Path:
        """Save the model as an ordinary Hugging Face directory and return its path.

        The directory holds the weights, tokenizer and chat template. Other files, such as those of a multimodal processor, are copied from
        ``LM.folder``, the directory that the model was read from. The new directory is written under a temporary name and renamed when
        complete. So if it exists, it is complete.

        Raises:
            FileExistsError: the directory exists and is not empty.
        """
        notes = {checkpoints.MADE_FROM: self.made_from} if self.made_from else {}
        return checkpoints.write(checkpoints.Checkpoint(self.model, self.tokenizer, self.folder), directory, notes)


def _common(one: str, other: str) -> str:
    """Return the longest common prefix of two texts."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


Intervention = Callable[[LM], AbstractContextManager[None]]
"""A function that returns a context manager. Inside ``with intervention(lm):``, the model's behaviour is changed, for example by steering.

An intervention may have an attribute ``recordable = True``. It promises that, after the first pass, every decoding step runs the same
operations on the same tensors, whose values are changed in place. So its Python code must not branch on the values of tensors, and must not
count steps in Python variables. Then sampling on a GPU can capture one decoding step as a CUDA graph and replay it (see ``recording``)."""

Rule = Callable[[LM, Any, int], Sequence[int] | None]
"""A change of decoding: ``rule(lm, reader, drawn)`` is called after a token is drawn, and may replace it.

It returns the token ids to place instead of the token id ``drawn``, or ``None`` to keep that token. ``reader``, a ``spans.Reader``, holds
the phase (prompt, think or answer) of the response so far and its number of think tokens. The module ``baselines`` has examples."""


@dataclass(frozen=True)
class Condition:
    """An LM with interventions, decoding rules, a change of the prompt, and tools. Responses are sampled from conditions to compare them.

    Attributes:
        lm: The model.
        during: Interventions that act in prefill and decoding. Their contexts are entered in this order.
        note: One line that describes the condition in reports.
        rules: Rules that replace drawn tokens. For each drawn token they are called in this order, until one returns tokens.
        ask: Change of the prompt, or ``None``.
        tools: Tools that the responses may call, or ``None``. The prompt does not mention them: the model knows the marks of calls from
            training, or ``ask`` explains them.
    """

    lm: LM
    during: tuple[Intervention, ...] = field(default=())
    note: str = ""
    rules: tuple[Rule, ...] = ()
    ask: Ask | None = None
    tools: Toolbox | None = None

    @contextmanager
    def active(self):
        """Context manager in which the interventions act; it yields the LM."""
        _ = self.lm.caches_keys, self.lm.gated_layers  # measured once, by short passes that no intervention may change
        with ExitStack() as stack:
            for intervention in self.during:
                stack.enter_context(intervention(self.lm))
            yield self.lm


def tiny_reasoner_path() -> Path:
    """Return the directory of the tiny reasoner, a small model that comes with the toolkit."""
    return shipped.path_of(TINY_REASONER)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Any = None,
    tags: ThinkTags | None = None,
    template: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Load a causal language model with its tokenizer, check that it behaves as the toolkit assumes, and return it as an ``LM``.

    Args:
        source: A local directory, a ``.gguf`` file, a hub id, or a model that comes with the toolkit: ``"tiny-reasoner"``,
            ``"tiny-searcher"`` or ``"smol-reasoner"``. If it is a PEFT adapter, the base model that its config names is loaded, and the adapter merged into it.
        revision: Hub revision (branch, tag or commit).
        dtype: Dtype of the weights. Edits are computed in fp32 in any case.
        device: Device of the model. Default: CUDA if available, else CPU.
        device_map: Distribution of a big model over devices, in place of ``device``. ``"auto"`` puts as much of the model on the GPU as
            fits, and offloads the rest to the CPU. A dict maps module names to devices, which may be ``"cpu"`` or ``"disk"``, as in
            accelerate. Offloaded weights cannot be edited or trained.
        quantization: ``"4bit"`` or ``"8bit"`` to quantise the weights with bitsandbytes when they are loaded, or a quantisation config of
            transformers. Quantised weights cannot be edited or trained; interventions at run time work.
        tags: Think tags. Default: those that ``tags.find_tags`` finds in the chat template or the vocabulary, if any.
        template: Variables to set in the chat template for every prompt, such as ``{"enable_thinking": False}``. If the chat template prints
            today's date, ``{"strftime_now": "2026-11-27"}`` sets the date that it prints. Default: ``templates.DATE``.
        trust_remote_code: True to run code from the hub repository.

    Raises:
        FileNotFoundError: there is no directory or GGUF file at the path.
        ImportError: a package that the model, ``device_map`` or ``quantization`` needs is not installed; the message says which.
        ValueError: both ``device`` and ``device_map`` are given, or ``quantization`` is unknown.
        store.DamagedFileError: a file is truncated or damaged.
        UnsupportedModelError: the architecture is unknown, the files do not describe one complete model, the chat template cannot be
            used or does not read one of the variables in ``template``, or a check of ``qualify`` fails.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of them.")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    files = checkpoints.read(
        source,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        placement=checkpoints.Placement(place, device_map, quantization),
    )
    name = str(source)
    _check_template(name, files.tokenizer, template or {})
    lm = wrap(files.model, files.tokenizer, name=name, tags=tags, revision=revision)
    lm = replace(lm, template=dict(template or {}), folder=files.folder, made_from=files.made_from)
    qualify(lm)
    log.log(logging.INFO if tags is None else logging.DEBUG, f"{name}: {lm.thinking}.")  # commands show it; given tags are known
    return lm


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase, switches: Mapping[str, Any]) -> None:
    if tokenizer.chat_template in ("", {}):
        raise UnsupportedModelError(f"{name} has an empty chat template: copy it again, or remove the file.")
    if tokenizer.chat_template is None:
        if switches:
            raise UnsupportedModelError(f"{name} has no chat template, so nothing reads the switch {next(iter(switches))!r}.")
        return
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    try:
        templates.check(tokenizer.get_chat_template(), tokens, switches)
    except (templates.TemplateProblem, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"{name}: {error}") from error


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    tags: ThinkTags | None = None,
    revision: str | None = None,
) -> LM:
    """Return an ``LM`` made of a model and a tokenizer in memory. The checks of ``qualify`` are not run.

    Args:
        model: The model; it is set to eval mode.
        tokenizer: Its tokenizer. If it has no padding token, one is set.
        name: Name for reports.
        tags: Think tags. Default: those that ``tags.find_tags`` finds in the chat template or the vocabulary, if any.
        revision: Hub revision (branch, tag or commit), if the model is from the hub.

    Raises:
        UnsupportedModelError: the architecture is unknown, a weight is not finite, or model and tokenizer do not fit together.
    """
    layout = sites.find(model)
    if (bad := tensors.not_finite(model)) is not None:
        raise UnsupportedModelError(f"{name}: {behaviour.not_finite_message(f'weight {bad}', 'values', model.dtype)}")
    try:
        found_tags = tags or find_tags(tokenizer)
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    lm = LM(model.eval(), tokenizer, layout, found_tags, name, revision)
    _check_surplus(lm)
    if lm.context is not None and (not isinstance(lm.context, int) or lm.context < 1):
        raise UnsupportedModelError(
            f"{name}: max_position_embeddings is {str(lm.context)[:40]!r}, expected a whole number above 0."
        )
    wrong = [i for i in lm.eos_ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < lm.vocab_size]
    if wrong or not lm.eos_ids:
        raise UnsupportedModelError(
            f"{name}: the end-of-sequence tokens are {sorted(map(str, lm.eos_ids))}, expected ids in 0..{lm.vocab_size - 1}, else no response "
            "ends. Set eos_token_id in generation_config.json."
        )
    # Any token that the model embeds will do, since padding is masked.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= lm.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or str(tokenizer.convert_ids_to_tokens(min(lm.eos_ids)))
    return lm


def _check_surplus(lm: LM) -> None:
    """Raise UnsupportedModelError if the tokenizer has tokens without an embedding that text may contain.

    Special tokens without an embedding are allowed if the chat template does not contain them. Gemma 3 270M and 1B have one: the tokenizer
    of the family has a token for images, which the text models do not embed. No such token is ever sampled, since it has no logit, and
    ``LM.prompt_ids`` refuses a prompt with it.
    """
    surplus = {text: i for text, i in lm._vocabulary.items() if i >= lm.vocab_size}
    special, template = lm.tokenizer.added_tokens_decoder, json.dumps(lm.tokenizer.chat_template or "", ensure_ascii=False)
    needed = [text for text, i in surplus.items() if i not in special or not special[i].special or text in template]
    if needed:
        raise UnsupportedModelError(
            f"{lm.name}: the tokenizer has {len(lm.tokenizer)} tokens, the model embeds only {lm.vocab_size}. Use the model's tokenizer. "
            f"(Tokens without an embedding, such as {min(needed)[:40]!r}, are allowed only if they are special tokens that the chat template "
            "does not contain.)"
        )


def qualify(lm: LM, *, seed: int = 0, tokens: int = 12) -> list[Check]:
    """Check on random tokens that a model behaves as the toolkit assumes, and return the results. ``toolkit.qualify`` lists the checks.

    Args:
        seed: Seed of the random tokens.
        tokens: Number of random tokens.

    Raises:
        UnsupportedModelError: the model cannot run, or a check failed; the message names the check and the measured value.
    """
    try:
        results = behaviour.checks(lm.model, lm.layout, seed=seed, tokens=tokens)
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{lm.name} cannot run ({type(error).__name__}: {str(error)[:250]}).") from error
    failed = [check for check in results if not check.passed]
    if failed:
        lines = "; ".join(f"{check.name} (deviation {check.value:.2g})" for check in failed[:2])
        raise UnsupportedModelError(
            f"{lm.name[-100:]} does not behave like {lm.layout.row.family} in {len(failed)} of {len(results)} checks: {lines}. Check its row "
            "in toolkit/sites.py."
        )
    return results


def child(lm: LM, model: PreTrainedModel, name: str, *, made_from: Sequence[origins.Record] = ()) -> LM:
    """Return a copy of ``lm`` with another model, such as an edited one; ``lm`` becomes its parent.

    Args:
        model: The other model. It may share weights (the same memory) with the model of ``lm``. Shared weights must not be changed later.
        name: Name of the new LM.
        made_from: Records (see ``origins``) of the problems that were used to change the model. The new LM has these and those of ``lm``.
    """
    records = origins.distinct((*lm.made_from, *made_from))
    known = {key: lm.digests[key] for key in tensors.shared(lm.model, model)}
    layout = sites.find(model)
    new = replace(lm, model=model, layout=layout, name=name, revision=None, parent=lm.fingerprint, made_from=records)
    object.__setattr__(new, "known_digests", known)  # the class is frozen
    return new


def check_thinking(lm: LM) -> None:
    """Check, before sampling, that a model marks its thinking: without marks, no response has a think length.

    Raises:
        NoThinkTagsError: the model has no think tags.
    """
    if lm.tags is None:
        raise NoThinkTagsError(
            f"{lm.name} has no think tags, so its responses count as answers, and none is short or long thinking. Count whole responses as "
            "thinking (tags=ThinkTags(None, None), --think response), or name the tags (tags=ThinkTags(OPEN, CLOSE), --think OPEN,CLOSE; in a "
            "plan: model.think). Rollouts that were sampled without think tags must be sampled again."
        )


def check_plain(lm: LM, doing: str, instead: str) -> None:
    """Check that the weights of a model can be changed. Quantised and offloaded weights cannot.

    Args:
        doing: Name of the intended change, for the error message, such as ``"editing the weights"``.
        instead: Advice to the user, put at the end of the error message.

    Raises:
        UnsupportedModelError: the weights are quantised or offloaded.
    """
    if how := tensors.storage(lm.model):
        raise UnsupportedModelError(f"{lm.name} has {how} weights, so {doing} is not possible. {instead}")


def as_type(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert a model's weights to a dtype, in place, and return the model.

    Buffers, such as rotary frequencies, keep their dtype, as they do when a model is loaded.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model
