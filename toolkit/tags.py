"""Think tags, which mark the thinking in a model's responses, and ``find_tags``, which finds the tags that a tokenizer uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

DEFAULT_TAGS = ("<think>", "</think>")


class NoThinkTagsError(ValueError):
    """An operation needs think spans, but the model has no think tags or its rollouts have no think span."""


@dataclass(frozen=True)
class ThinkTags:
    """The tags by which a model marks its thinking.

    Attributes:
        open: Opening tag as text. ``None`` means that thinking starts at the first token of the response.
        close: Closing tag as text. If both tags are ``None``, the whole response counts as thinking; this is for models that do not mark
            their thinking. An opening tag without a closing tag raises ValueError, because the end of thinking would be unknown.
    """

    open: str | None = DEFAULT_TAGS[0]
    close: str | None = DEFAULT_TAGS[1]

    def __post_init__(self) -> None:
        if "" in (self.open, self.close) or (self.open is not None and self.close is None):
            raise ValueError(
                f"ThinkTags({self.open!r}, {self.close!r}): expected an opening and a closing tag that are not empty, a closing tag alone "
                "(None, CLOSE), or no tags (None, None)."
            )

    @staticmethod
    def parse(text: str) -> ThinkTags:
        """Return the tags that the value of a command-line option (``--think``) stands for.

        - ``"OPEN,CLOSE"``: the two tags.
        - ``",CLOSE"``: no opening tag; thinking starts with the response.
        - ``"response"``: ``ThinkTags(None, None)``, with which the whole response counts as thinking.

        Raise ValueError for any other text.

        >>> ThinkTags.parse("<reason>,</reason>")
        ThinkTags(open='<reason>', close='</reason>')
        """
        if text == "response":
            return ThinkTags(None, None)
        parts = text.split(",")
        if len(parts) != 2 or not parts[1]:
            raise ValueError(f'think={text!r}: give "response", or the two tags as "<think>,</think>".')
        return ThinkTags(parts[0] or None, parts[1])


@dataclass(frozen=True)
class Format:
    """The think tags of a family of models, and the texts by which the family is recognised.

    Attributes:
        tags: Think tags of the family.
        marks: Texts by which the family is recognised: its chat template contains all of them, or its vocabulary has all of them as tokens.
            In most families the marks are the two tags themselves. In the others they are special tokens that occur in the tags.
    """

    tags: ThinkTags
    marks: tuple[str, ...]


FORMATS: Mapping[str, Format] = {
    "<think>": Format(ThinkTags(), DEFAULT_TAGS),
    "Seed-OSS": Format(ThinkTags("<seed:think>", "</seed:think>"), ("<seed:think>", "</seed:think>")),
    "Magistral": Format(ThinkTags("[THINK]", "[/THINK]"), ("[THINK]", "[/THINK]")),
    "Gemma 4": Format(ThinkTags("<|channel>thought\n", "<channel|>"), ("<|channel>", "<channel|>")),
    # The final message's header closes thinking: all messages before it are thinking, with the headers between them.
    "gpt-oss": Format(ThinkTags("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"), ("<|channel|>", "<|message|>")),
}
"""The formats that ``find_tags`` knows: name of the family -> format. Nearly all reasoning models use the first."""


ENDS_MESSAGE = {FORMATS["gpt-oss"].tags.close: "<|end|><|start|>assistant"}
"""Closing tag -> text that the model writes directly before it, to end the message that holds its thinking. Only gpt-oss has such a text.

It is part of neither the think span nor the answer span.
"""


def find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    """Return the think tags that a tokenizer uses, or ``None`` if no format in ``FORMATS`` fits.

    A format fits if the chat template contains all of its marks (``Format.marks``: the tags themselves, or special tokens in them). If none
    does, a format whose marks are its tags fits a template that contains one of them. A lone ``</think>`` removes earlier thoughts in
    templates of models that write the opening tag themselves. A lone ``<think>`` opens thinking at the end of the prompt, as in OLMo 3
    Think, and the model writes the closing tag. If no format fits the template, the vocabulary decides: a format then fits if all of its
    marks are tokens of it.

    Raises:
        ValueError: several formats fit; the message names them.
    """
    template, vocabulary = json.dumps(tokenizer.chat_template or ""), set(tokenizer.get_vocab())
    in_template = [name for name, form in FORMATS.items() if all(mark in template for mark in form.marks)]
    if not in_template:
        pairs = {name: form.marks for name, form in FORMATS.items() if form.marks == (form.tags.open, form.tags.close)}
        in_template = [name for name, marks in pairs.items() if any(mark in template for mark in marks)]
    fitting = in_template or [name for name, form in FORMATS.items() if vocabulary.issuperset(form.marks)]
    if len(fitting) > 1:
        listed = " or ".join(f"{name} ({FORMATS[name].tags.open!r}, {FORMATS[name].tags.close!r})" for name in fitting)
        where = "chat template" if in_template else "vocabulary"
        raise ValueError(f"the {where} has the think tags of {listed}. Say which: tags=ThinkTags(OPEN, CLOSE), --think OPEN,CLOSE.")
    return FORMATS[fitting[0]].tags if fitting else None
