"""Where the information a question needs stands in the tokens of its prompt.

A :class:`Haystack` is a problem with the token spans of the pieces of its prompt that the answer depends on (``needed``), of the
answer's words inside them, and the same problem without those pieces, for a contrast run. Pieces are found by *character
offsets* in the rendered chat prompt, and every span is checked to decode to text that holds its piece: nothing is searched for
among token ids (arXiv 2404.15574's released code does, and may miss the needle or take tokens of its neighbours).

Only the tokenizer and the config of a model are used here. Units: spans and lengths are tokens of the whole chat prompt.
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
    """A haystack cannot be built or located."""


class NoOffsetsError(HaystackError):
    """A tokenizer cannot say which characters its tokens stand for."""


class MissingTextError(HaystackError):
    """A piece of text is not in the prompt, or not readable from its tokens."""


class RepeatedTextError(HaystackError):
    """A piece of text occurs more than once, so that no position is the one to be read."""


class ContextTooShortError(HaystackError):
    """What the question needs does not fit the length asked for."""


class ContextTooLongError(HaystackError):
    """The length asked for is beyond what the model was made for."""


@dataclass(frozen=True)
class Haystack:
    """A problem located in the tokens of one model's chat prompt.

    Attributes:
        problem: What is asked; its meta holds ``task``, ``length``, ``depth``, ``tokens``, ...
        prompt_ids: The chat prompt, as :meth:`toolkit.lm.LM.prompt_ids` gives it.
        needed: What must be read, in the order it has to be read in.
        answers: Where the words of the answer stand, inside the needed spans; one for each part of the answer.
        query: The question.
        without: The same problem with the needed pieces taken out of the prompt; what stood after them moves up.
        control: ``prompt_ids`` with other tokens in the needed spans, so that every position stays what it was.
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
        """The one needed span.

        Raises:
            HaystackError: several are needed.
        """
        if len(self.needed) != 1:
            raise HaystackError(f"{self.problem.id} needs {len(self.needed)} spans, not one: read .needed.")
        return self.needed[0]

    @property
    def answer(self) -> Span:
        """The one span of the answer's words. Raises HaystackError if the answer has several parts."""
        if len(self.answers) != 1:
            raise HaystackError(f"The answer of {self.problem.id} has {len(self.answers)} parts, not one: read .answers.")
        return self.answers[0]


@dataclass(frozen=True)
class Pieces:
    """What is to be located: character ranges ``[start, stop)`` of the last user message.

    Attributes:
        needed, answers, query: As in :class:`Haystack`.
        without: The message without what is needed.
        stand_ins: Text that takes the place of each needed piece in the control, as far as its tokens reach, again and again.
    """

    needed: Sequence[tuple[int, int]]
    answers: Sequence[tuple[int, int]]
    query: tuple[int, int]
    without: str
    stand_ins: Sequence[str]


def user_text(problem: Problem) -> str:
    """The text of the last user message."""
    return [m["content"] for m in problem.messages if m["role"] == "user"][-1]


def with_text(problem: Problem, text: str) -> Problem:
    """The problem with another last user message."""
    messages, at = list(problem.messages), max(i for i, m in enumerate(problem.messages) if m["role"] == "user")
    messages[at] = {**messages[at], "content": text}
    return replace(problem, messages=tuple(messages))


def cut(text: str, pieces: Sequence[tuple[int, int]]) -> str:
    """``text`` without the character ranges ``pieces``."""
    kept, end = [], 0
    for start, stop in sorted(pieces):
        kept.append(text[end:start])
        end = max(end, stop)
    return "".join([*kept, text[end:]])


def find(text: str, piece: str) -> tuple[int, int]:
    """Characters ``[start, stop)`` of the one place where ``piece`` stands in ``text``.

    Raises:
        MissingTextError: nowhere.
        RepeatedTextError: in several places.
    """
    start = text.find(piece)
    if start < 0 or not piece:
        raise MissingTextError(f"{piece!r} does not occur in the text of {len(text)} characters: put it there once.")
    if (again := text.find(piece, start + 1)) >= 0:
        raise RepeatedTextError(
            f"{piece!r} occurs twice, at characters {start} and {again}: only one of them would be counted as read. "
            "Take other filler, or another needle."
        )
    return start, start + len(piece)


def spans(lm: LM, problem: Problem, pieces: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """The chat prompt and the token span of each piece of its last user message.

    Args:
        pieces: Characters ``[start, stop)`` of the last user message.

    Returns:
        The ids of the prompt and, for each piece, the tokens that hold any character of it.

    Raises:
        NoOffsetsError: the tokenizer gives no offsets, or not those of its own chat prompt.
        MissingTextError: the template does not show the message as it is, or the tokens do not hold the piece's text.
        RepeatedTextError: the message occurs twice in the prompt.
    """
    content, ids = user_text(problem), lm.prompt_ids(problem.messages)
    prompt, starts, stops, where = _offsets(lm, problem, ids)
    shown = content.strip()  # some templates strip a message
    before = find(prompt, shown)[0] - content.index(shown)
    found = []
    for start, stop in pieces:
        first, last = bisect_right(stops, before + start), bisect_left(starts, before + stop)
        piece, span = content[start:stop], Span(where[first], where[last - 1] + 1) if first < last else Span(0, 0)
        text = str(lm.tokenizer.decode(ids[span.start : span.stop], clean_up_tokenization_spaces=False))
        if "".join(piece.split()) not in "".join(text.split()) or not len(span):
            raise MissingTextError(
                f"{piece!r} stands at characters {start}-{stop}, but its tokens {span.start}-{span.stop} decode to {text!r}: "
                f"the tokenizer of {lm.name} cannot write it. Use text in its alphabet."
            )
        found.append(span)
    return tuple(ids), tuple(found)


def check_offsets(lm: LM) -> None:
    """Raise NoOffsetsError if the tokenizer of ``lm`` gives no character offsets."""
    if not lm.tokenizer.is_fast:
        raise NoOffsetsError(
            f"{lm.name} has a {type(lm.tokenizer).__name__}, which gives no character offsets, so that nothing can be located in a "
            "prompt. Load its fast tokenizer (a tokenizer.json in the directory)."
        )


def _offsets(lm: LM, problem: Problem, ids: list[int]) -> tuple[str, list[int], list[int], list[int]]:
    """The prompt as text; first and end character of every token that stands for any, and the tokens' positions."""
    check_offsets(lm)
    prompt = lm.prompt_text(problem.messages)
    coded = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if coded["input_ids"] != ids:
        raise NoOffsetsError(f"{lm.name} tokenizes its rendered chat prompt differently from the prompt: offsets would be wrong.")
    held = [(start, stop, i) for i, (start, stop) in enumerate(coded["offset_mapping"]) if start < stop]
    starts, stops, where = (list(column) for column in zip(*held, strict=True))
    return prompt, starts, stops, where


def located(lm: LM, problem: Problem, pieces: Pieces) -> Haystack:
    """A haystack from character ranges of the last user message; errors as :func:`spans`."""
    ids, found = spans(lm, problem, [*pieces.needed, *pieces.answers, pieces.query])
    own = {"tokens": len(ids), "characters": len(user_text(problem)), "needed": tuple(pieces.needed), "query": tuple(pieces.query)}
    meta = {**problem.meta, **own}
    needed, control = found[: len(pieces.needed)], list(ids)
    for span, text in zip(needed, pieces.stand_ins, strict=True):
        other = cycle(lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        control[span.start : span.stop] = islice(other, len(span))
    without = replace(with_text(problem, pieces.without), id=f"{problem.id}-without")
    return Haystack(replace(problem, meta=meta), ids, needed, found[len(needed) : -1], found[-1], without, tuple(control))


def locate_lookup(lm: LM, problem: Problem) -> Haystack:
    """A problem of ``tasks.lookup`` with the binding of every hop located (``B=K;`` then ``K=52;``), in chain order.

    Raises:
        HaystackError: not a lookup problem.
        MissingTextError, RepeatedTextError, NoOffsetsError: see :func:`spans`.
    """
    if "chain" not in problem.meta:
        raise HaystackError(f"{problem.id} has no meta['chain']: give a problem of tasks.lookup.")
    text, chain = user_text(problem), problem.meta["chain"]
    needed = [find(text, f"{name}={value};") for name, value in pairwise(chain)]
    start, stop = needed[-1]
    without = cut(text, [(a, b + text.startswith(" ", b)) for a, b in needed])
    filler = " ".join(f"{a} {b};" for a, b in pairwise(lookup.FILLER))
    pieces = Pieces(needed, [(start + len(f"{chain[-2]}="), stop - 1)], find(text, f"{chain[0]}?"), without, [filler] * len(needed))
    return located(lm, problem, pieces)


# --- sizes ---------------------------------------------------------------------------------------------------


def context_of(lm: LM) -> int | None:
    """Positions a model was made for, in tokens; ``None`` if its config does not say."""
    return getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)


def check_length(lm: LM, length: int) -> None:
    """Raise ContextTooLongError if a prompt of ``length`` tokens is beyond the model's context."""
    most = context_of(lm)
    if most is not None and length > most:
        raise ContextTooLongError(f"length={length} tokens is beyond the {most} positions of {lm.name}: ask for {most} at most.")


def lengths(lm: LM, n: int = 5, *, shortest: int = 256, response: int = 256) -> tuple[int, ...]:
    """``n`` prompt lengths, evenly spaced from ``shortest`` to the longest that leaves ``response`` tokens of the context.

    Raises:
        ContextTooLongError: the context has no room for ``shortest``.
        HaystackError: fewer than one length, or the model's config does not say how long its context is.
    """
    most = context_of(lm)
    if most is None or n < 1:
        raise HaystackError(f"n={n}, context={most}: need n >= 1 and a config with max_position_embeddings; or list the lengths.")
    if shortest > most - response:
        raise ContextTooLongError(
            f"shortest={shortest} and response={response} tokens exceed the {most} positions of {lm.name}: lower one of them."
        )
    return tuple(int(x) for x in np.linspace(shortest, most - response, n).round())


def cells(found: Sequence[Haystack | Problem], *columns: str) -> pd.DataFrame:
    """Where each problem lies in its grid: ``problem_id``, ``length``, ``depth`` and other meta ``columns``.

    To be merged with :func:`toolkit.evaluate.rollout_table` on ``problem_id``; a pivot of ``correct`` is then the heatmap of recall.
    """
    problems = [f.problem if isinstance(f, Haystack) else f for f in found]
    names = ("length", "depth", *columns)
    return pd.DataFrame([{"problem_id": p.id, **{name: p.meta.get(name) for name in names}} for p in problems])


def tags(found: Haystack) -> dict[str, float]:
    """Scope and dispersion of what is needed, after arXiv 2407.00402 (which names the axes, but defines no number; these are ours).

    Scope, how much is needed: ``scope_tokens`` and ``scope_frac``, tokens needed and their share of the prompt. Dispersion, how hard it
    is to find: ``n_spans``, pieces needed; ``gap_mean`` and ``gap_max``, tokens between neighbouring pieces (0 with one piece);
    ``redundancy``, other places of the message where a piece stands word by word, mean over the pieces; ``lexical_overlap``, share of
    the question's words that stand in a needed piece too, 0 to 1.
    """
    return _tags(found.problem, found.prompt_ids, found.needed)


def difficulty_tags(lm: LM, problem: Problem) -> dict[str, float]:
    """:func:`tags` of any problem whose meta says where its last user message holds what is needed: ``needed``, character ranges, and
    ``query``, that of the question (as ``tasks.slaq``; NaN overlap without it, as ``tasks.wordproblems``).

    Raises:
        HaystackError: the meta has no ``needed`` ranges.
        NoOffsetsError, MissingTextError, RepeatedTextError: see :func:`spans`.
    """
    if not problem.meta.get("needed"):
        raise HaystackError(
            f"{problem.id} has no meta['needed'], the character ranges of what is needed: set them, or locate a Haystack."
        )
    return _tags(problem, *spans(lm, problem, problem.meta["needed"]))


def _tags(problem: Problem, ids: Sequence[int], needed: Sequence[Span]) -> dict[str, float]:
    text, ranges, query = user_text(problem), problem.meta["needed"], problem.meta.get("query")
    scope = {i for span in needed for i in range(span.start, span.stop)}
    inner = sorted(needed, key=lambda span: span.start)
    gaps = [max(0, b.start - a.stop) for a, b in pairwise(inner)] or [0]
    # A piece needed twice is no copy of itself: only places that are not needed count.
    copies = sum(text.count(piece) for piece in {text[a:b] for a, b in ranges}) - len({tuple(r) for r in ranges})
    said, told = (_words(t) for t in (text[slice(*query)] if query else "", " ".join(text[a:b] for a, b in ranges)))
    return {
        "scope_tokens": float(len(scope)),
        "scope_frac": len(scope) / len(ids),
        "n_spans": float(len(inner)),
        "gap_mean": sum(gaps) / len(gaps),
        "gap_max": float(max(gaps)),
        "redundancy": copies / len(ranges),
        "lexical_overlap": len(said & told) / len(said) if said else math.nan,
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
