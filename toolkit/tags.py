"""Think tags: how a model marks its thinking, and how to find the tags of a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

DEFAULT_TAGS = ("<think>", "</think>")


class NoThinkTagsError(ValueError):
    """A model has no think tags, or its rollouts have no think span, but the operation needs one."""


@dataclass(frozen=True)
class ThinkTags:
    """The tags by which a model marks its thinking.

    Attributes:
        open: Opening tag as text; ``None`` means that thinking starts with the response.
        close: Closing tag as text; ``None`` means that the whole response counts as thinking, for models that do not mark their
            thinking.
    """

    open: str | None = DEFAULT_TAGS[0]
    close: str | None = DEFAULT_TAGS[1]

    @staticmethod
    def parse(text: str) -> ThinkTags:
        """Return the tags of ``"OPEN,CLOSE"``, or of ``"response"``: no tags, so that the whole response counts as thinking.

        ``",CLOSE"`` has no opening tag: thinking starts with the response.

        >>> ThinkTags.parse("<reason>,</reason>")
        ThinkTags(open='<reason>', close='</reason>')
        """
        if text == "response":
            return ThinkTags(None, None)
        parts = text.split(",")
        if len(parts) != 2 or not parts[1]:
            raise ValueError(f'think={text!r}: give "response", or the two tags as "<think>,</think>".')
        return ThinkTags(parts[0] or None, parts[1])


def find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    """Return ``<think>`` and ``</think>`` if the vocabulary holds both or the chat template holds ``</think>``; else ``None``."""
    template = json.dumps(tokenizer.chat_template or "")
    if set(tokenizer.get_vocab()).issuperset(DEFAULT_TAGS) or DEFAULT_TAGS[1] in template:
        return ThinkTags()
    return None
