"""Functions that split thinking into steps, such as lines or paragraphs, and return the text and the token span of each step.

A *splitter* is a function from a text to the character offsets at which its steps start. Every character of the text belongs to exactly one
step, and so does every think token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from toolkit.lm import LM
from toolkit.types import Rollout, Span

Splitter = Callable[[str], Sequence[int]]
"""A function from a text to the character offsets at which its steps start, in ascending order.

The text before the first offset is a step of its own. But if it is only white space, it belongs to the step that follows it.
"""

BYTES = 4  # most tokens per character: UTF-8 has at most four bytes


@dataclass(frozen=True)
class Step:
    """One step of thinking.

    Attributes:
        span: Tokens of the step, as positions in the full sequence (prompt and response). It is empty if no token begins in the step: the
            text of the step is then part of a token that begins in an earlier step.
        text: Text of the step.
    """

    span: Span
    text: str


def lines(text: str) -> list[int]:
    """Return the character offsets at which the lines of a text start. As a splitter, it makes each line a step.

    A blank line belongs to the step before it. Blank lines at the start belong to the first step.

    >>> lines("17+5=22\\n22-9=13\\n")
    [0, 8]
    """
    # [^\S\n] is white space other than a line break: a line counts from its start, indentation included.
    return [m.start() for m in re.finditer(r"^[^\S\n]*\S", text, re.MULTILINE)]


def paragraphs(text: str) -> list[int]:
    """Return the character offsets at which the paragraphs of a text start. As a splitter, it makes each paragraph a step.

    Paragraphs are separated by blank lines.
    """
    return [m.end() for m in re.finditer(r"(?:\A|\n[^\S\n]*\n)\s*(?=\S)", text)]


def whole_words(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the words in text in lower case, but not as a part of a longer word of a to z.

    >>> found = whole_words(["but", "wait"])
    >>> bool(found.search("but no")), bool(found.search("they distribute")), bool(found.match("waiting"))
    (True, False, False)
    """
    return re.compile(f"(?<![a-z])(?:{'|'.join(map(re.escape, words))})(?![a-z])")


def at_cues(pattern: str) -> Splitter:
    """Return a splitter that starts a step at every match of a regular expression, such as the word "Wait".

    In the expression, ``^`` and ``$`` match at every line (``re.MULTILINE``).

    Raises:
        ValueError: the pattern is not a regular expression, or matches the empty text.

    >>> at_cues(r"\\b(Wait|So)\\b")("5 and 3. Wait, 5 and 4. So 9.")
    [9, 24]
    """
    try:
        cue = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"The step cue {pattern!r} is not a regular expression: {error}.") from error
    if cue.match(""):
        raise ValueError(
            f"The step cue {pattern!r} matches the empty text, so it would split everywhere: give a pattern that matches some text."
        )
    return lambda text: [m.start() for m in cue.finditer(text)]


def step_ranges(text: str, split: Splitter = lines) -> list[tuple[int, int]]:
    """Return the character range ``(start, stop)`` of each step of a text, in order; an empty list if the text is only white space.

    Together the ranges cover the whole text.

    Args:
        text: The text to split.
        split: Splitter; by default each line is a step.
    """
    if not text.strip():
        return []
    starts = [0, *sorted({start for start in split(text) if 0 < start < len(text)})]
    # White space before the first step, such as the line break after the opening tag, belongs to that step.
    if len(starts) > 1 and not text[: starts[1]].strip():
        starts.pop(1)
    return list(pairwise([*starts, len(text)]))


def token_texts(lm: LM, ids: Sequence[int]) -> list[str]:
    """Return the text of each token. The texts, joined, are the decoded text of all tokens.

    If several tokens make up one character, the last of them gets the character and the others get an empty text.
    """
    texts: list[str] = []
    # ids[:read] have their texts. ids[start:read] are decoded again, only to give the next tokens their context.
    start = read = 0
    for stop in range(1, len(ids) + 1):
        # A token is decoded together with those before it, since many tokenizers drop the blank in front of a text's first token.
        before, now = lm.text(ids[start:read]), lm.text(ids[start:stop])
        # U+FFFD at the end means an incomplete character: wait for its other bytes, at most as long as a character can be.
        if now.endswith("\ufffd") and stop < len(ids) and stop - read < BYTES:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, stop
    return texts


def think_steps(lm: LM, rollout: Rollout, split: Splitter = lines) -> list[Step]:
    """Return the steps of a rollout's thinking; an empty list if there is no think span, or if its text is only white space.

    A token belongs to the step in which its text begins.

    Args:
        lm: Model whose tokenizer decodes the rollout.
        rollout: The rollout.
        split: Splitter; by default each line is a step.
    """
    if rollout.think is None:
        return []
    first, stop = rollout.think.start, rollout.think.stop
    parts = token_texts(lm, rollout.token_ids[first:stop])
    text, offsets = "".join(parts), [0, *accumulate(map(len, parts))][:-1]
    ranges = step_ranges(text, split)
    # The first token of each later step is the first whose text begins at the step's start or after it.
    edges = [first + int(np.searchsorted(offsets, start)) for start, _ in ranges[1:]]
    spans = [Span(a, b) for a, b in pairwise([first, *edges, stop])]
    return [Step(span, text[a:b]) for span, (a, b) in zip(spans, ranges, strict=True)] if ranges else []
