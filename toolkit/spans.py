"""Think and answer spans of a sequence of token ids, and the phase (prompt, think or answer) of a response while it is generated.

A tag that is a single token of the vocabulary is found by its token id. Any other tag is found in the decoded text of the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from toolkit.lm import LM
from toolkit.tags import ENDS_MESSAGE
from toolkit.types import Span

TAIL = 32  # a tag at the end of a prompt, or of an unfinished response, is searched in this number of last tokens
PHASES = ("prompt", "think", "answer")
PROMPT, THINK, ANSWER = range(3)  # indices into PHASES; a response is in PROMPT until its thinking is opened


def spans(
    lm: LM, ids: Sequence[int], prompt_len: int, *, ended: bool, results: Sequence[Span] = ()
) -> tuple[Span | None, Span | None]:
    """Return ``(think span, answer span)`` of a sequence (prompt and response); ``None`` in place of a span that the sequence lacks.

    For models with both tags, or with a closing tag only:

    - If the prompt closes thinking (some chat templates switch thinking off in this way), the think span is empty and the whole response is
      the answer.
    - Otherwise, thinking starts with the response in two cases: the model has only a closing tag; or the prompt opens thinking, by a tag at
      its end or in an unfinished assistant message there.
    - Once thinking has started, the first closing tag ends it. Without a closing tag, the think span runs to the end, and there is no
      answer.

    For models with both tags, if the prompt neither opens nor closes thinking:

    - Thinking starts after the first opening tag in the response.
    - If a closing tag comes first, with no opening tag before it, thinking starts with the response.
    - If neither tag occurs in the response, there is no think span, and the whole response is the answer.

    For other models:

    - If the model has no tags (``lm.tags`` is ``None``), there is no think span, and the whole response is the answer.
    - If ``lm.tags`` exists but has neither an opening nor a closing tag (``ThinkTags(None, None)``), the whole response is the think span.
      If the response is complete (``ended``), it is the answer span too.

    Args:
        ids: Token ids of prompt and response.
        prompt_len: Number of prompt tokens.
        ended: True if the last token is an end-of-sequence token, which belongs to no span.
        results: Tool results in the response, in order. A tag inside a result is text, not a tag. If results follow the closing tag, the
            answer starts after the last of them.
    """
    think, answer = _spans(lm, ids, prompt_len, ended, results)
    late = [result.stop for result in results if answer is not None and answer.start <= result.start]
    if late and answer is not None:
        answer = Span(min(late[-1], answer.stop), answer.stop)
    return think, answer


def _spans(lm: LM, ids: Sequence[int], prompt_len: int, ended: bool, results: Sequence[Span]) -> tuple[Span | None, Span | None]:
    """Return think span and answer span as ``spans`` does, but with an answer that may contain tool results."""
    stop = len(ids) - ended
    tags = lm.tags
    if tags is None or (tags.open is None and tags.close is None):
        whole = Span(prompt_len, stop)
        return (whole if tags else None), (whole if ended or tags is None else None)
    phase = phase_at_end(lm, ids[:prompt_len])
    if phase == ANSWER:
        return Span(prompt_len, prompt_len), Span(prompt_len, stop)
    start = prompt_len
    if phase == PROMPT:
        opening = _first(lm, ids, tags.open, Span(prompt_len, stop), results)
        closing = _first(lm, ids, tags.close, Span(prompt_len, stop), results)
        if opening is None and closing is None:
            return None, Span(prompt_len, stop)
        start = opening.stop if opening and (closing is None or opening.start < closing.start) else prompt_len
    closing = _first(lm, ids, tags.close, Span(start, stop), results)
    if closing is None:
        return Span(start, stop), None
    return Span(start, _end_of_thoughts(lm, ids, start, closing.start)), Span(closing.stop, stop)


def _end_of_thoughts(lm: LM, ids: Sequence[int], start: int, closing: int) -> int:
    """Return the stop of the think span, the position after its last token. Usually this is the position of the closing tag.

    Some models write a fixed text directly before the closing tag, to end the message that holds their thinking (see
    ``tags.ENDS_MESSAGE``). Then the think span stops where this text begins. The text belongs to no span.

    Args:
        lm: The model.
        ids: Token ids of prompt and response.
        start: Position of the first think token.
        closing: Position of the first token of the closing tag.
    """
    before = ENDS_MESSAGE.get(lm.tags.close) if lm.tags else None
    places = find_tag(lm, ids[start:closing], before)
    return start + places[-1].start if places and start + places[-1].stop == closing else closing


def answer_start(lm: LM, ids: Sequence[int], prompt_len: int, answer: Span) -> int:
    """Return the position of the first token of the answer's text, which can lie in the prompt.

    Usually this is the start of the answer span. But the prompt may end with an unfinished assistant message that already contains the
    beginning of the answer. Then the text begins inside that message, while the answer span, as part of the response, begins later.

    Args:
        lm: The model.
        ids: Token ids of prompt and response.
        prompt_len: Number of prompt tokens.
        answer: Answer span, from ``spans``.
    """
    message = _assistant_message(lm, ids[:prompt_len]) if answer.start == prompt_len else ()
    closed = find_tag(lm, message, lm.tags.close if lm.tags else None)
    return answer.start - len(message) + (closed[-1].stop if closed else 0)


def ends_with(lm: LM, prompt: Sequence[int], tag: str | None) -> bool:
    """Return True if a prompt ends with a tag, or with a tag and then white space; False if ``tag`` is ``None``."""
    places = find_tag(lm, prompt[-TAIL:], tag)
    return bool(places) and not lm.text(prompt[-TAIL:][places[-1].stop :]).strip()


def _first(lm: LM, ids: Sequence[int], tag: str | None, within: Span, results: Sequence[Span]) -> Span | None:
    """Return the first occurrence of a tag within a span, outside tool results; ``None`` if there is none."""
    inside = [result for result in results if within.start <= result.start < within.stop]
    starts, stops = [within.start, *(result.stop for result in inside)], [*(result.start for result in inside), within.stop]
    for start, stop in zip(starts, stops, strict=True):
        if places := find_tag(lm, ids[start:stop], tag):
            return Span(start + places[0].start, start + places[0].stop)
    return None


def find_tag(lm: LM, ids: Sequence[int], tag: str | None) -> list[Span]:
    """Return the spans of all occurrences of a tag in ``ids``, in order; an empty list if the tag is ``None``."""
    if tag is None:
        return []
    single = lm.token_id(tag)
    if single is not None:
        return [Span(i, i + 1) for i, token in enumerate(ids) if token == single]
    # A tag of several tokens may share its last token with the text after it ('>\n\n'); that token counts as tag.
    # pieces[i] is the text that token i adds. Decoded alone it could lack its leading blank, which many tokenizers drop at the start of a
    # text. So decode it together with token i - 1, and cut off the text of token i - 1.
    pieces = [lm.text(ids[max(i - 1, 0) : i + 1])[len(lm.text(ids[i - 1 : i])) if i else 0 :] for i in range(len(ids))]
    # ends[i]: the character offset at which token i ends. The tag's first token is the first that ends after the tag begins; its last token
    # is the first that ends at the tag's end or later.
    ends = np.cumsum([len(piece) for piece in pieces])
    text, places, at = "".join(pieces), [], 0
    while (at := text.find(tag, at)) >= 0:
        first = int(np.searchsorted(ends, at, side="right"))
        last = int(np.searchsorted(ends, at + len(tag), side="left"))
        places.append(Span(first, last + 1))
        at += len(tag)
    return places


def phase_at_end(lm: LM, prompt: Sequence[int]) -> int:
    """Return the phase in which the response to a prompt begins: PROMPT (thinking is not opened yet), THINK or ANSWER.

    The first rule that applies decides:

    - If the model has no tags (``lm.tags`` is ``None``), the phase is ANSWER.
    - If the prompt ends with a tag, or with an unfinished assistant message that contains tags, the last of these tags decides: THINK after
      an opening tag, ANSWER after a closing one.
    - If ``lm.tags`` has no opening tag, the phase is THINK.
    - Otherwise the phase is PROMPT.
    """
    tags = lm.tags
    if tags is None or ends_with(lm, prompt, tags.close):
        return ANSWER
    if tags.open is None or ends_with(lm, prompt, tags.open):
        return ANSWER if tags.open is None and find_tag(lm, _assistant_message(lm, prompt), tags.close) else THINK
    message = _assistant_message(lm, prompt)
    # Positions of the last opening and the last closing tag in the message; -1 if there is none.
    opened, closed = (max((span.start for span in find_tag(lm, message, tag)), default=-1) for tag in (tags.open, tags.close))
    return PROMPT if opened == closed == -1 else THINK if opened > closed else ANSWER


def _assistant_message(lm: LM, prompt: Sequence[int]) -> Sequence[int]:
    """Return the tokens of the assistant message at the end of a prompt: those after the last start of an assistant turn.

    The result is empty if the prompt ends directly after that start, or if no assistant turn starts in the prompt.
    """
    turn, ids = lm.turn, tuple(prompt)
    size = len(turn)
    if not size:
        return ()
    start = next((at for at in range(len(ids) - size, -1, -1) if ids[at] == turn[0] and ids[at : at + size] == turn), None)
    return () if start is None else ids[start + size :]


class Reader:
    """State of one response while it is generated token by token: its phase and its number of think tokens.

    Attributes:
        phase: Phase of the next token: PROMPT until thinking is opened, then THINK, and ANSWER once thinking is closed.
        written: Number of think tokens so far. A closing tag is recognised only when it is complete. So if it has several tokens, all but
            the last are counted here, although the think span does not contain them.
        forced: Number of sampled tokens that were replaced by decoding rules, all rules together. A decoding rule puts other tokens in
            place of a sampled one, such as "Wait" for a closing tag. ``generate`` updates this number.
        placed: Decoding rule -> number of sampled tokens that it has replaced. A rule updates its own entry, if it needs the number.
        ids: Token ids of the prompt and of the response so far, without tool results.
        kept: Decoding rule -> other facts about this response that the rule needs later, such as its earlier measurements.
    """

    def __init__(self, lm: LM, prompt: Sequence[int]) -> None:
        self.lm, self.ids = lm, list(prompt)
        self.phase, self.written, self.forced = phase_at_end(lm, prompt), 0, 0
        self.placed: Counter[Hashable] = Counter()
        self.kept: dict[Hashable, list[Any]] = {}

    @property
    def tail(self) -> list[int]:
        """The last ``TAIL`` token ids, in which a tag is searched."""
        return self.ids[-TAIL:]

    def ends(self, token: int, tag: str | None) -> bool:
        """Return True if ``token``, as the next token, would complete an occurrence of ``tag``; False if ``tag`` is ``None``."""
        if tag is None:
            return False
        single = self.lm.token_id(tag)
        if single is not None:
            return token == single
        # Decoding the whole tail is slow, and nearly every token is ruled out by its own text: it lacks the tag's last character. This holds
        # for printed ASCII characters only: decoded alone, a token may lose a blank, or part of a character of several bytes.
        if "!" <= tag[-1] <= "~" and tag[-1] not in self.lm.token_text(token):
            return False
        row = [*self.tail, token]
        return any(span.stop == len(row) for span in find_tag(self.lm, row, tag))

    def push(self, token: int) -> None:
        """Add the next token of the response: update ``phase`` and ``written``."""
        tags = self.lm.tags
        if self.phase != ANSWER and tags is not None and self.ends(token, tags.close):
            self.phase = ANSWER
        elif self.phase == PROMPT and tags is not None and self.ends(token, tags.open):
            self.phase = THINK
        elif self.phase == THINK:
            self.written += 1
        self.ids.append(token)
