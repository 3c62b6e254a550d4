"""The model as everything else sees it: :class:`LM`, how it is loaded, and how it is judged (:class:`Condition`).

``load(id | directory | adapter | gguf file | "tiny-reasoner" | "smol-reasoner") -> LM`` takes anything Hugging Face can load as a causal
language model whose layout has a row in ``sites.py``; an edited checkpoint is an ordinary directory. ``checkpoints`` reads the files,
``qualify`` checks the family by behaviour.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import toolkit
from toolkit import checkpoints, origins, shipped, sites, templates
from toolkit import qualify as behaviour
from toolkit.qualify import Check
from toolkit.shipped import SMOL_REASONER, TINY_REASONER, smollm2_path
from toolkit.sites import Layout, UnsupportedModelError
from toolkit.types import Provenance

__all__ = [
    "DEFAULT_TAGS", "LM", "SMOL_REASONER", "TINY_REASONER", "UNCOMPUTED", "Ask", "Check", "Condition", "Intervention", "NoThinkTagsError",
    "Rule", "ThinkTags", "UnsupportedModelError", "child", "halve_on_oom", "load", "qualify", "smollm2_path", "tiny_reasoner_path", "wrap",
]  # fmt: skip

DEFAULT_TAGS = ("<think>", "</think>")
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
        template: Switches of the chat template, such as ``{"enable_thinking": False}``: they hold for every prompt.
        folder: Directory whose files beside the weights are saved with it (a processor's, for one), or ``None``.
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
        """Provenance of an artifact made from this model now; the template's hash covers its switches, and a note names them."""
        template, switches = self.tokenizer.chat_template or "", {"template": dict(self.template)} if self.template else {}
        asked = json.dumps([template, switches] if switches else template, sort_keys=True)
        hashed = hashlib.sha256(asked.encode()).hexdigest()[:16]
        return Provenance(self.name, self.revision, self.fingerprint, hashed, toolkit.__version__, seed, {**switches, **notes})

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

    def prompt_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a chat prompt as text: the assistant's turn is opened, or, where the last message is the assistant's, continued.

        Raises:
            ValueError: the tokenizer has no chat template, or the template does not keep the assistant's message as it is.
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
                f"The chat template of {self.name} does not keep the assistant's message {content[:80]!r} as it is, so it cannot be continued: "
                "leave it out, or begin it otherwise (many templates remove blanks at the ends of a message)."
            ) from error
        self._check_begun(text, content)
        return text

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a chat prompt, see :meth:`prompt_text`. Errors as there."""
        return list(self.tokenizer(self.prompt_text(messages), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]  # of one text

    def _rendered(self, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
        options: dict[str, Any] = {**how, **self.template}
        return str(self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))

    def _check_begun(self, text: str, content: str) -> None:
        """Raise unless it can be told from a prompt's tokens where the message that it continues begins, tags included."""
        tags = [tag for tag in (self.tags.open, self.tags.close) if tag] if self.tags else []
        turn = self.text(self.turn)
        after = text.rpartition(turn)[2] if turn else ""
        if any(tag in text for tag in tags) and (not turn or any(after.count(tag) != content.count(tag) for tag in tags)):
            raise ValueError(
                f"The prompt of {self.name} that continues the assistant's message {content[:80]!r} holds think tags that may not be the "
                "message's own: its chat template adds some, or does not mark where the message begins. So it is unknown whether thinking has "
                "begun. Leave the message out, or load the model with other think tags: tags=ThinkTags(...), --think."
            )

    @cached_property
    def turn(self) -> tuple[int, ...]:
        """Token ids that open an assistant's turn, the same before a new response and before one that is continued; else empty."""
        if not self.tokenizer.chat_template:
            return ()
        asked, said = {"role": "user", "content": "1"}, {"role": "assistant", "content": "\u2020"}
        try:
            before = self._rendered([asked], add_generation_prompt=False)
            new = self._rendered([asked], add_generation_prompt=True)
            going_on = self._rendered([asked, said], continue_final_message=True).partition(said["content"])[0]
        except Exception:  # noqa: BLE001  # a template may refuse any conversation, with any error
            return ()
        shared = _common(new, going_on)
        opening = shared[len(_common(before, shared)) :]
        return tuple(self.tokenizer.encode(opening, add_special_tokens=False)) if opening.strip() else ()

    def save(self, directory: str | Path) -> Path:
        """Write an ordinary Hugging Face directory: safetensors, tokenizer, chat template, the other files that it was loaded with.

        Written beside the target and renamed when complete, so that a directory that exists is whole.

        Raises:
            FileExistsError: the directory exists and is not empty.
        """
        notes = {checkpoints.MADE_FROM: self.made_from} if self.made_from else {}
        return checkpoints.write(checkpoints.Checkpoint(self.model, self.tokenizer, self.folder), directory, notes)


def _common(one: str, other: str) -> str:
    """The text that both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


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
    template: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Load a causal language model for use with the toolkit.

    Args:
        source: ``"tiny-reasoner"``, ``"smol-reasoner"``, a local directory, a ``.gguf`` file, or a hub id. A PEFT adapter is merged into
            the base that it names.
        revision: Hub revision.
        dtype: Weight type; edits are computed in fp32 whatever it is.
        device: Where to put it; default CUDA if there is one, else CPU.
        tags: Think tags; default: found in the tokenizer's vocabulary or chat template, else none.
        template: Switches of the chat template for every prompt, such as ``{"enable_thinking": False}``.
        trust_remote_code: Whether code from the hub may run. Off unless asked for.

    Raises:
        FileNotFoundError: a path that does not exist, or a GGUF file that is not one.
        ImportError: an adapter without peft, or ``"smol-reasoner"`` without its packages; gives the command that installs them.
        store.DamagedFileError: a file is not whole.
        UnsupportedModelError: no layout row fits, the files do not describe one whole model, the chat template cannot be used or does not
            read a switch, or a site does not behave as it should (:func:`qualify`).
    """
    found = checkpoints.read(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    name = str(source)
    _check_template(name, found.tokenizer, template or {})
    torch.nn.Module.to(found.model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lm = wrap(found.model, found.tokenizer, name=name, tags=tags, revision=revision)
    lm = replace(lm, template=dict(template or {}), folder=found.folder, made_from=found.made_from)
    qualify(lm)
    return lm


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase, switches: Mapping[str, Any]) -> None:
    if tokenizer.chat_template in ("", {}):
        raise UnsupportedModelError(f"{name} has an empty chat template: copy it again, or remove the file.")
    if tokenizer.chat_template is None:
        if switches:
            raise UnsupportedModelError(f"{name} has no chat template that could read the switch {next(iter(switches))!r}.")
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
    """An :class:`LM` from a model and tokenizer already in memory. Errors as :func:`load`; not yet qualified."""
    layout = sites.find(model)
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise UnsupportedModelError(f"{name}: {behaviour.not_finite(f'weight {key}', 'values', value.dtype)}")
    lm = LM(model.eval(), tokenizer, layout, tags or _find_tags(tokenizer), name, revision)
    if len(tokenizer) > lm.vocab_size:
        raise UnsupportedModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {lm.vocab_size}: they do not belong together."
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and (not isinstance(context, int) or context < 1):
        raise UnsupportedModelError(f"{name}: max_position_embeddings is {str(context)[:40]!r}, expected a whole number above 0.")
    wrong = [i for i in lm.eos_ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < lm.vocab_size]
    if wrong or not lm.eos_ids:
        raise UnsupportedModelError(
            f"{name}: the end-of-sequence tokens are {sorted(map(str, lm.eos_ids))}, expected ids in 0..{lm.vocab_size - 1}: no response would "
            "end. Set eos_token_id in generation_config.json."
        )
    if tokenizer.pad_token_id is None:  # any will do, since padding is masked
        tokenizer.pad_token = tokenizer.eos_token or str(tokenizer.convert_ids_to_tokens(min(lm.eos_ids)))
    return lm


def _find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    known = set(tokenizer.get_vocab())
    template = json.dumps(tokenizer.chat_template or "")
    if known.issuperset(DEFAULT_TAGS) or DEFAULT_TAGS[1] in template:
        return ThinkTags()
    return None


def qualify(lm: LM, *, seed: int = 0, tokens: int = 12) -> list[Check]:
    """Check by behaviour that the sites and the attention of ``lm`` are what the toolkit takes them for (:func:`toolkit.qualify.checks`).

    Raises:
        UnsupportedModelError: a check failed, or the model does not run; names what and the deviation.
    """
    try:
        found = behaviour.checks(lm.model, lm.layout, seed=seed, tokens=tokens)
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{lm.name} cannot be run as it is ({type(error).__name__}: {str(error)[:250]}).") from error
    failed = [check for check in found if not check.passed]
    if failed:
        lines = "; ".join(f"{check.name} (deviation {check.value:.2g})" for check in failed[:2])
        raise UnsupportedModelError(
            f"{lm.name[-100:]} does not behave like {lm.layout.row.family} in {len(failed)} of {len(found)} checks: {lines}. Check its row in "
            "toolkit/sites.py."
        )
    return found


def child(lm: LM, model: PreTrainedModel, name: str, *, made_from: Sequence[origins.Record] = ()) -> LM:
    """An LM made from ``lm`` by changing weights: ``model`` replaces its model, ``lm`` becomes its parent.

    Args:
        made_from: Records of the problems that the change was made from, added to those of ``lm``.
    """
    whole = origins.distinct((*lm.made_from, *made_from))
    return replace(lm, model=model, layout=sites.find(model), name=name, revision=None, parent=lm.fingerprint, made_from=whole)


def as_type(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the number type of a model's weights in place. Buffers, such as rotary frequencies, stay as they are, as when it is loaded."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model


def halve_on_oom(rows: Sequence[Any], run: Callable[[Sequence[Any]], None]) -> None:
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
    halve_on_oom(rows[: len(rows) // 2], run)
    halve_on_oom(rows[len(rows) // 2 :], run)
