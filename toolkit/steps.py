"""Steps of thinking: where they start in the text, and which tokens they are.

A *splitter* is a function from a text to the character offsets at which its steps start; every character belongs to exactly one
step, and so does every think token. Splitters of one's own are plain functions.
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
"""Text -> character offsets of the starts of its steps, ascending; text before the first belongs to the first."""

BYTES = 4  # tokens that one character may be split into: UTF-8 has at most four bytes


@dataclass(frozen=True)
class Step:
    """One step: its tokens (positions in the full sequence; empty if a token before it holds it whole) and its text."""

    span: Span
    text: str


def lines(text: str) -> list[int]:
    """A step is a line; blank lines belong to the step before them."""
    return [m.start() for m in re.finditer(r"^[^\S\n]*\S", text, re.MULTILINE)]


def paragraphs(text: str) -> list[int]:
    """A step is a paragraph: what blank lines set apart."""
    return [m.end() for m in re.finditer(r"(?:\A|\n[^\S\n]*\n)\s*(?=\S)", text)]


def at_cues(pattern: str) -> Splitter:
    """A step starts wherever a pattern is found, e.g. ``at_cues(r"\\b(Wait|Alternatively|So)\\b")``.

    Raises:
        ValueError: the pattern is no regular expression, or matches the empty text.
    """
    try:
        cue = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"The step cue {pattern!r} is no regular expression: {error}.") from error
    if cue.match(""):
        raise ValueError(
            f"The step cue {pattern!r} matches the empty text, so it would split everywhere: make it ask for something."
        )
    return lambda text: [m.start() for m in cue.finditer(text)]


def cut(text: str, split: Splitter = lines) -> list[tuple[int, int]]:
    """Character ranges of the steps of a text; together they are the whole text. None if it is blank."""
    if not text.strip():
        return []
    starts = [0, *sorted({start for start in split(text) if 0 < start < len(text)})]
    # What stands before the first step, such as a line's end after the tag, belongs to it.
    if len(starts) > 1 and not text[: starts[1]].strip():
        starts.pop(1)
    return list(pairwise([*starts, len(text)]))


def pieces(lm: LM, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the tokens before it.

    Joined, they are the text of all. A character made of several tokens belongs to the last of them; the others are empty.
    """
    found: list[str] = []
    start = read = 0
    for stop in range(1, len(ids) + 1):
        # A token is read beside those before it, since many tokenizers drop the blank in front of a text's first token.
        before, now = lm.text(ids[start:read]), lm.text(ids[start:stop])
        if now.endswith("\ufffd") and stop < len(ids) and stop - read < BYTES:
            found.append("")
            continue
        found.append(now[len(before) :])
        start, read = read, stop
    return found


def of(lm: LM, rollout: Rollout, split: Splitter = lines) -> list[Step]:
    """The steps of a rollout's think span; a token belongs to the step in which its text begins. None without thinking."""
    if rollout.think is None:
        return []
    first, stop = rollout.think.start, rollout.think.stop
    parts = pieces(lm, rollout.token_ids[first:stop])
    text, offsets = "".join(parts), [0, *accumulate(map(len, parts))][:-1]
    ranges = cut(text, split)
    edges = [first + int(np.searchsorted(offsets, start)) for start, _ in ranges[1:]]
    spans = [Span(a, b) for a, b in pairwise([first, *edges, stop])]
    return [Step(span, text[a:b]) for span, (a, b) in zip(spans, ranges, strict=True)] if ranges else []
