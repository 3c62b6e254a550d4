"""Find the token spans of those pieces of a prompt that the answer depends on.

A ``Haystack`` is a problem with the token spans of three things: the pieces of its prompt that the answer depends on (``needed``), the
answer's words inside those pieces, and the question. It also holds two controls, to test whether a model uses the needed pieces. In the
first (``without``), they are removed. In the second (``control``), other tokens replace them, one for one.

Pieces are located by *character offsets* in the rendered chat prompt, and the tokens of every span must decode to text that contains the
piece. The released code of the paper "Retrieval Head" (arXiv 2404.15574) searches among token ids instead. That may miss a piece or include
neighbouring tokens.

No model is run; only its tokenizer and config are used. Units: spans and lengths are in tokens of the whole chat prompt.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise

import numpy as np
import pandas as pd

from toolkit.lm import LM
from toolkit.tasks import lookup
from toolkit.types import Problem, Span


class HaystackError(ValueError):
    """A prompt with its token spans (a ``Haystack``) cannot be built, or pieces of text cannot be located in a prompt."""


class NoOffsetsError(HaystackError):
    """The offsets of a prompt's tokens (which characters each token covers) cannot be determined.

    The tokenizer does not give offsets, or the prompt's text does not tokenize to the prompt's token ids.
    """


class MissingTextError(HaystackError):
    """A piece of text is not in the prompt, or its tokens do not decode to it."""


class RepeatedTextError(HaystackError):
    """A piece of text occurs more than once, so its position is ambiguous."""


class ContextTooShortError(HaystackError):
    """The requested prompt length is too small for the question and the pieces of text that its answer depends on."""


class ContextTooLongError(HaystackError):
    """The requested prompt length exceeds the model's maximum context."""


@dataclass(frozen=True)
class Haystack:
    """A problem as a chat prompt in one model's tokens, with the token spans of the pieces of text that its answer depends on.

    Those pieces are called *needed*. Two control prompts serve to test whether the model uses them: in ``without`` they are removed, in
    ``control`` other tokens replace them.

    Attributes:
        problem: The problem. Its ``meta`` has four additional fields. ``tokens``: length of the chat prompt. ``characters``: length of the
            last user message. ``needed`` and ``query``: character ranges of the needed pieces and of the question in that message.
        prompt_ids: Token ids of the chat prompt.
        needed: Token spans of the pieces that the answer depends on, in the order in which a solver uses them.
        answers: Token spans of the answer's words inside the needed pieces. An answer with several parts, such as several values, has one
            span per part.
        query: Token span of the question.
        without: The same problem without the needed pieces. Its prompt is shorter.
        control: Token ids of a prompt of equal length: ``prompt_ids`` with the tokens of the needed spans replaced by as many others. All
            other tokens keep their positions.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    needed: tuple[Span, ...]
    answers: tuple[Span, ...]
    query: Span
    without: Problem
    control: tuple[int, ...]

    @property
    def needle(self) -> Span:
        """Token span of the piece that the answer depends on. Raises HaystackError unless there is exactly one such piece."""
        if len(self.needed) != 1:
            raise HaystackError(f"{self.problem.id} needs {len(self.needed)} spans, not one: read .needed.")
        return self.needed[0]

    @property
    def answer(self) -> Span:
        """Token span of the answer's words. Raises HaystackError unless the answer has exactly one part, such as one value."""
        if len(self.answers) != 1:
            raise HaystackError(f"The answer of {self.problem.id} has {len(self.answers)} parts, not one: read .answers.")
        return self.answers[0]


@dataclass(frozen=True)
class Pieces:
    """Pieces of text to locate in a prompt, for ``locate``.

    A range ``(start, stop)`` counts characters of the problem's last user message, from 0; ``stop`` is excluded.

    Attributes:
        needed: Ranges of the pieces that the answer depends on, in the order in which a solver uses them.
        answers: Ranges of the answer's words inside the needed pieces, one per part of the answer.
        query: Range of the question.
        without: Text of the message without the needed pieces.
        stand_ins: One replacement text per needed piece, for the control prompt in which other tokens replace these pieces. The tokens of
            each text are repeated or cut to the piece's number of tokens.
    """

    needed: Sequence[tuple[int, int]]
    answers: Sequence[tuple[int, int]]
    query: tuple[int, int]
    without: str
    stand_ins: Sequence[str]


def user_text(problem: Problem) -> str:
    """Return the text of a problem's last user message."""
    return [m["content"] for m in problem.messages if m["role"] == "user"][-1]


def with_text(problem: Problem, text: str) -> Problem:
    """Return a copy of the problem with ``text`` as its last user message."""
    messages, at = list(problem.messages), max(i for i, m in enumerate(problem.messages) if m["role"] == "user")
    messages[at] = {**messages[at], "content": text}
    return replace(problem, messages=tuple(messages))


def without_ranges(text: str, ranges: Sequence[tuple[int, int]]) -> str:
    """Return ``text`` without the characters in ``ranges``. Each range is ``[start, stop)``; ranges may overlap."""
    parts, end = [], 0
    for start, stop in sorted(ranges):
        parts.append(text[end:start])
        end = max(end, stop)
    return "".join([*parts, text[end:]])


def find_once(text: str, piece: str) -> tuple[int, int]:
    """Return the character range ``(start, stop)`` of the only occurrence of ``piece`` in ``text``.

    Raises:
        MissingTextError: ``piece`` does not occur.
        RepeatedTextError: ``piece`` occurs several times.
    """
    start = text.find(piece)
    if start < 0 or not piece:
        raise MissingTextError(f"{piece!r} does not occur in the text of {len(text)} characters: put it there once.")
    if (again := text.find(piece, start + 1)) >= 0:
        raise RepeatedTextError(
            f"{piece!r} occurs twice, at characters {start} and {again}: only one of them would be counted as read. "
            "Use other filler, or another needle."
        )
    return start, start + len(piece)


def token_spans(lm: LM, problem: Problem, pieces: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Return the token ids of a problem's chat prompt, and the token span of each piece in it.

    A piece's span covers all tokens that contain any character of the piece.

    Args:
        pieces: Character ranges ``[start, stop)`` of the problem's last user message, one per piece.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets, or the prompt's text does not tokenize to the prompt's token ids.
        MissingTextError: the chat template changes the message, or the tokens of a piece do not decode to its text.
        RepeatedTextError: the message occurs twice in the prompt.
    """
    content, ids = user_text(problem), lm.prompt_ids(problem.messages)
    # where: position of each token in ids, for the tokens that have characters.
    prompt, starts, stops, where = _offsets(lm, problem, ids)
    stripped = content.strip()  # some templates strip a message
    before = find_once(prompt, stripped)[0] - content.index(stripped)  # offset: message characters -> prompt characters
    located = []
    for start, stop in pieces:
        # The tokens from first to last - 1 overlap the piece. There may be none, for example if the template stripped the piece.
        first, last = bisect_right(stops, before + start), bisect_left(starts, before + stop)
        piece, span = content[start:stop], Span(where[first], where[last - 1] + 1) if first < last else Span(0, 0)
        text = str(lm.tokenizer.decode(ids[span.start : span.stop], clean_up_tokenization_spaces=False))
        # White space is ignored here, as decoding may change it.
        if "".join(piece.split()) not in "".join(text.split()) or not len(span):
            raise MissingTextError(
                f"{piece!r} stands at characters {start}-{stop}, but its tokens {span.start}-{span.stop} decode to {text!r}: "
                f"the tokenizer of {lm.name} cannot write it. Use text in its alphabet."
            )
        located.append(span)
    return tuple(ids), tuple(located)


def check_offsets(lm: LM) -> None:
    """Raise NoOffsetsError if the tokenizer of ``lm`` gives no character offsets."""
    if not lm.tokenizer.is_fast:
        raise NoOffsetsError(
            f"{lm.name} has a {type(lm.tokenizer).__name__}, which gives no character offsets, so that nothing can be located in a "
            "prompt. Load its fast tokenizer (a tokenizer.json in the directory)."
        )


def _offsets(lm: LM, problem: Problem, ids: list[int]) -> tuple[str, list[int], list[int], list[int]]:
    """Return the prompt's text and three lists: per token, the start and the end of its characters in that text, and its index in ``ids``.

    The end is the position after the last character. Tokens without characters have no entry in the lists.
    """
    check_offsets(lm)
    prompt = lm.prompt_text(problem.messages)
    coded = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if coded["input_ids"] != ids:
        raise NoOffsetsError(
            f"{lm.name} gives other tokens for the text of a chat prompt than for its messages, so nothing can be located in a prompt."
        )
    tokens = [(start, stop, i) for i, (start, stop) in enumerate(coded["offset_mapping"]) if start < stop]
    starts, stops, where = (list(column) for column in zip(*tokens, strict=True))
    return prompt, starts, stops, where


def locate(lm: LM, problem: Problem, pieces: Pieces) -> Haystack:
    """Locate pieces of text in the chat prompt of a problem. Return a Haystack: the problem, the token spans and two control prompts.

    The control prompts are ``Haystack.without`` (needed pieces removed) and ``Haystack.control`` (their tokens replaced).

    Args:
        pieces: Character ranges of the pieces, and the texts from which the control prompts are made.

    Raises:
        NoOffsetsError: the tokenizer gives no character offsets, or the prompt's text does not tokenize to the prompt's token ids.
        MissingTextError: the chat template changes the message, or the tokens of a piece do not decode to its text.
        RepeatedTextError: the message occurs twice in the prompt.
    """
    ids, located = token_spans(lm, problem, [*pieces.needed, *pieces.answers, pieces.query])
    about = {
        "tokens": len(ids),
        "characters": len(user_text(problem)),
        "needed": tuple(pieces.needed),
        "query": tuple(pieces.query),
    }
    meta = {**problem.meta, **about}
    needed, control = located[: len(pieces.needed)], list(ids)
    for span, text in zip(needed, pieces.stand_ins, strict=True):
        other = cycle(lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        control[span.start : span.stop] = islice(other, len(span))
    without = replace(with_text(problem, pieces.without), id=f"{problem.id}-without")
    return Haystack(replace(problem, meta=meta), ids, needed, located[len(needed) : -1], located[-1], without, tuple(control))


def locate_lookup(lm: LM, problem: Problem) -> Haystack:
    """Locate the assignments that the answer to a ``tasks.lookup`` problem depends on.

    They lead from the variable in the question to its value. In ``K=5; lamp rose; B=K; B?``, they are ``B=K;`` and ``K=5;``, in this order.
    Return a Haystack: the problem with the token spans of these assignments, of the value and of the question.

    Raises:
        HaystackError: the problem is not of ``tasks.lookup``.
        NoOffsetsError, MissingTextError, RepeatedTextError: its pieces cannot be located (see ``locate``). These are subclasses of
            HaystackError.
    """
    if "chain" not in problem.meta:
        raise HaystackError(f"{problem.id} has no meta['chain']: give a problem of tasks.lookup.")
    text, chain = user_text(problem), problem.meta["chain"]
    needed = [find_once(text, f"{name}={value};") for name, value in pairwise(chain)]
    start, stop = needed[-1]  # the assignment of the value, such as "K=5;"
    # Each assignment is removed together with the blank after it, if there is one: startswith is True, that is 1, if a blank is at b.
    without = without_ranges(text, [(a, b + text.startswith(" ", b)) for a, b in needed])
    filler = " ".join(f"{a} {b};" for a, b in pairwise(lookup.FILLER))
    answer, query = (start + len(f"{chain[-2]}="), stop - 1), find_once(text, f"{chain[0]}?")
    return locate(lm, problem, Pieces(needed, [answer], query, without, [filler] * len(needed)))


# --- sizes ---------------------------------------------------------------------------------------------------


def check_length(lm: LM, length: int) -> None:
    """Raise ContextTooLongError if a prompt of ``length`` tokens exceeds the model's maximum context."""
    most = lm.context
    if most is not None and length > most:
        raise ContextTooLongError(f"length={length} tokens is beyond the {most} positions of {lm.name}: ask for at most {most}.")


RESPONSE = 256
"""Tokens of context that the default prompt lengths leave free for the response. With a larger token budget, they leave that many."""


def lengths(lm: LM, n: int = 5, *, shortest: int = 256, response: int = RESPONSE) -> tuple[int, ...]:
    """Return ``n`` prompt lengths in tokens, evenly spaced from ``shortest`` to the model's maximum context minus ``response``.

    Args:
        n: Number of lengths. With 1, only ``shortest`` is returned.
        shortest: Smallest prompt length in tokens.
        response: Tokens of context to leave free for the response.

    Raises:
        ContextTooLongError: the context is shorter than ``shortest`` and ``response`` together.
        HaystackError: ``n`` is below 1, or the model's config gives no maximum context.
    """
    most = lm.context
    if most is None or n < 1:
        raise HaystackError(f"n={n}, context={most}: need n >= 1 and a config with max_position_embeddings; or list the lengths.")
    if shortest > most - response:
        raise ContextTooLongError(
            f"The shortest prompt (shortest={shortest} tokens) and the token budget of a response (response={response}) do not fit the context "
            f"of {lm.name}, {most} tokens: lower the token budget (max_new_tokens, --max-new-tokens) to at most {max(0, most - shortest)}, or "
            "list the prompt lengths."
        )
    return tuple(int(x) for x in np.linspace(shortest, most - response, n).round())


def grid_cells(haystacks: Sequence[Haystack | Problem], *columns: str) -> pd.DataFrame:
    """Return a table of prompts that hide a fact in a long text (haystacks), with their lengths and depths, one row per prompt.

    The table has the columns ``problem_id``, ``length`` and ``depth``, and one column per name in ``columns``. ``length`` is the requested
    prompt length in tokens. ``depth`` is the requested place of the fact that is asked about, from 0 at the start of the text to 1 at its
    end. A value is missing (``None`` or NaN) if the problem's ``meta`` lacks it.

    For a heat map of accuracy, merge this table with ``toolkit.evaluate.rollout_table`` on ``problem_id``, and make a pivot table of
    ``correct`` by ``length`` and ``depth``.

    Args:
        haystacks: Haystacks or their problems, for example from ``needle.grid`` or ``needle.load``.
        columns: Names of fields of each problem's ``meta``.
    """
    # Problems are accepted too, since the problems of ``needle.load`` carry the same meta.
    problems = [h.problem if isinstance(h, Haystack) else h for h in haystacks]
    names = ("length", "depth", *columns)
    return pd.DataFrame([{"problem_id": p.id, **{name: p.meta.get(name) for name in names}} for p in problems])


def haystack_tags(haystack: Haystack) -> dict[str, float]:
    """Return numbers that describe how hard it is to retrieve the *needed* pieces of a prompt: those that the answer depends on.

    There are two groups, *scope* and *dispersion*. Both terms are from arXiv 2407.00402, which does not say how to measure them. These
    measures are ours.

    Scope, how much information is needed:
        ``scope_tokens``: number of tokens in the needed pieces. ``scope_frac``: their share of the prompt's tokens, 0 to 1.

    Dispersion, how hard the information is to find:
        ``n_spans``: number of needed pieces. ``gap_mean``, ``gap_max``: mean and largest number of tokens between neighbouring pieces; 0 if
        there is only one piece.

    Two more numbers of this group are larger if the information is easier to find:
        ``redundancy``: number of other places in the message that repeat a needed piece word for word, divided by the number of pieces.
            A piece inside a longer word or number does not count: 3 does not occur in 13.
        ``lexical_overlap``: share of the question's words that also occur in a needed piece, 0 to 1; NaN without a question.
    """
    return _tags(haystack.problem, haystack.prompt_ids, haystack.needed)


def difficulty_tags(lm: LM, problem: Problem) -> dict[str, float]:
    """Return numbers that describe how hard it is to retrieve the pieces of a prompt that the answer depends on.

    The numbers are those of ``haystack_tags``, which takes a Haystack. This function takes any problem whose ``meta`` marks the pieces.
    ``meta["needed"]`` must hold the character ranges of these pieces in the last user message. ``meta["query"]`` may hold the range of the
    question, as in ``tasks.slaq``. Without it, as in ``tasks.wordproblems``, ``lexical_overlap`` is NaN.

    Raises:
        HaystackError: ``meta`` has no ``needed`` ranges.
        NoOffsetsError, MissingTextError, RepeatedTextError: the ranges cannot be located in the prompt (see ``token_spans``). These are
            subclasses of HaystackError.
    """
    if not problem.meta.get("needed"):
        raise HaystackError(
            f"{problem.id} has no meta['needed'], the character ranges of the pieces that it needs: set them, or locate a Haystack."
        )
    return _tags(problem, *token_spans(lm, problem, problem.meta["needed"]))


def _tags(problem: Problem, ids: Sequence[int], needed: Sequence[Span]) -> dict[str, float]:
    text, ranges, query = user_text(problem), problem.meta["needed"], problem.meta.get("query")
    scope = {i for span in needed for i in range(span.start, span.stop)}
    ordered = sorted(needed, key=lambda span: span.start)
    # Neighbouring pieces may share a token; then the gap is 0, not negative.
    gaps = [max(0, b.start - a.stop) for a, b in pairwise(ordered)] or [0]
    # The needed places themselves are not copies, even if two of them have equal text; nor is a piece inside a longer word or number.
    places = {m.span() for a, b in ranges for m in re.finditer(rf"(?<!\w){re.escape(text[a:b])}(?!\w|[.,]\d)", text)}
    copies = len(places - {(a, b) for a, b in ranges})
    of_query, of_pieces = (_words(t) for t in (text[slice(*query)] if query else "", " ".join(text[a:b] for a, b in ranges)))
    return {
        "scope_tokens": float(len(scope)),
        "scope_frac": len(scope) / len(ids),
        "n_spans": float(len(ordered)),
        "gap_mean": sum(gaps) / len(gaps),
        "gap_max": float(max(gaps)),
        "redundancy": copies / len(ranges),
        "lexical_overlap": len(of_query & of_pieces) / len(of_query) if of_query else math.nan,
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
