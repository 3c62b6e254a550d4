"""Needle in a haystack: a question about one fact (the needle) in filler text, over a grid of prompt lengths and needle depths.

The task is that of the paper "Retrieval Head" (Wu et al., arXiv 2404.15574). Facts and filler are generated from the word lists in this
module. The lists for facts and for filler share no content word, so only the needle gives the answer. A text file can serve as filler
instead (``read_filler``).

Deviations: an answer is right if it has more than half of the gold answer's words, as in the paper's code (grader ``recall``). The facts
here have gold answers that are half function words, such as "on Monday at the wooden piano". So that criterion has a floor: another random
answer of the same form is right in 32 % of "when and where" questions and in 11 % of "where" questions. The argument ``grader="contains"``
of ``facts``, ``spread`` and ``load`` demands the whole gold answer. The paper has three facts; here many are generated. The needle is put between two sentences of the filler, as near to the
requested depth as possible. It is located by character offsets, not by a search among token ids (``haystack.py``).

Units: lengths are in tokens of the whole chat prompt. A depth is the share of the filler's tokens that come before the needle, 0 to 1.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import store
from toolkit.lm import LM
from toolkit.tasks import haystack, splits
from toolkit.tasks.haystack import ContextTooShortError, Haystack, HaystackError
from toolkit.types import Problem

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GRADERS = ("recall", "contains")  # of arXiv 2404.15574, and the strict one (see ``Needle``)

NAMES = ("Mara", "Tobias", "Ines", "Viktor", "Salma", "Henrik", "Noor", "Piotr", "Lucia", "Ravi", "Greta", "Omar", "Yuki", "Dario")
COLOURS = ("red", "blue", "silver", "yellow", "purple", "orange", "pink", "golden")
THINGS = ("key", "violin", "map", "letter", "ring", "lantern", "compass", "diary", "coin", "mask", "whistle", "passport")
PLACES = ("piano", "oven", "staircase", "bathtub", "bookcase", "chimney", "wardrobe", "fountain", "doormat", "freezer")
TEXTURES = ("wooden", "broken", "marble", "iron", "painted", "carved", "velvet", "plastic")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SECRETS = ("tiger", "helium", "saddle", "walnut", "domino", "pepper", "rocket", "anchor", "magnet", "cactus", "trumpet", "zebra")

_SUBJECTS = ("river", "mill", "meadow", "harbour", "forest", "village", "road", "bridge", "orchard", "valley", "market", "garden")
_QUALITIES = ("quiet", "old", "wide", "narrow", "green", "distant", "pale", "dusty", "gentle", "low", "grey", "warm")
_VERBS = ("lies", "waits", "stretches", "rests", "winds", "sleeps", "changes", "fades", "stays", "wakes")
_MANNERS = ("slowly", "calmly", "for hours", "all day", "without a sound", "as ever", "in the rain", "in the evening", "again")
_WHERE = ("behind", "near", "beyond", "above", "below", "along", "before", "past")


@dataclass(frozen=True)
class Needle:
    """A fact, stated in one sentence, and a question about it.

    Attributes:
        question: The question.
        sentence: The sentence that states the fact.
        answer: The gold answer, copied word for word from ``sentence``.
        grader: ``"recall"``: more than half of the gold answer's words are right, as published. ``"contains"``: all of them are needed, in
            order and without gaps.

    Raises:
        HaystackError: the sentence does not contain the answer exactly once, or another grader.
    """

    question: str
    sentence: str
    answer: str
    grader: str = GRADERS[0]

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise HaystackError(f"grader={self.grader!r}: choose one of {', '.join(GRADERS)}.")
        if not self.answer or self.sentence.count(self.answer) != 1:
            raise HaystackError(
                f"The answer {self.answer!r} occurs {self.sentence.count(self.answer) if self.answer else 0} times in its sentence "
                f"{self.sentence!r}: it must occur there once, word for word."
            )


class FillerError(HaystackError):
    """The text that a fact is to be hidden in (*filler*) is empty, or too short for the requested prompt length."""


# --- facts and filler ----------------------------------------------------------------------------------------


def facts(split: str, n: int = 3, seed: int = 0, *, grader: str = GRADERS[0]) -> list[Needle]:
    """Return ``n`` facts of ``split`` with different questions. Equal seeds give equal facts. No question is in two splits.

    Args:
        grader: How answers are graded (see ``Needle``).

    Raises:
        ValueError: unknown split, or fewer than ``n`` different questions.
        HaystackError: unknown grader.
    """
    splits.check_split(split)
    rng = random.Random(f"needle-{split}-{seed}")
    by_question: dict[str, Needle] = {}

    def draw() -> Problem:
        while splits.split_of((fact := _fact(rng)).question) != split:
            pass
        by_question.setdefault(fact.question, replace(fact, grader=grader))
        return Problem(fact.question, (), fact.answer)

    return [by_question[p.id] for p in splits.distinct(draw, n)]


def _fact(rng: random.Random) -> Needle:
    who, other = rng.sample(NAMES, 2)
    what = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    where = f"the {rng.choice(TEXTURES)} {rng.choice(PLACES)}"
    match rng.randrange(4):
        case 0:
            answer = f"{rng.choice(('under', 'inside'))} {where}"
            return Needle(f"Where did {who} hide the {what}?", f"{who} hid the {what} {answer}.", answer)
        case 1:
            answer = " ".join(rng.sample(SECRETS, 3))
            return Needle(f"What is written on the {what} of {who}?", f"On the {what} of {who} is written {answer}.", answer)
        case 2:
            answer = f"on {rng.choice(DAYS)} at {where}"
            return Needle(f"When and where will {who} meet {other}?", f"{who} will meet {other} {answer}.", answer)
    answer = str(rng.randint(10_000, 99_999))
    return Needle(f"What is the number of the {what} of {who}?", f"The number of the {what} of {who} is {answer}.", answer)


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield random filler sentences without end. Each has at least eight words and shares no name, number or thing with the facts."""
    while True:
        a, b = rng.sample(_SUBJECTS, 2)
        p, q = rng.sample(_QUALITIES, 2)
        verb, manner, where = rng.choice(_VERBS), rng.choice(_MANNERS), rng.choice(_WHERE)
        yield rng.choice(
            (
                f"The {p} {a} {verb} {where} the {q} {b} {manner}.",
                f"{where.capitalize()} the {p} {b} the {q} {a} {verb} {manner}.",
                f"No one asks why the {p} {a} {verb} {where} the {b}.",
            )
        )


def read_filler(path: str | Path) -> tuple[str, ...]:
    """Return the sentences of a text file, for use as filler in ``place`` and ``grid``. A sentence ends with ``.``, ``!`` or ``?``.

    Raises:
        FileNotFoundError: no such file.
        FillerError: the file has no text.
    """
    text = " ".join(line.strip() for line in store.read_lines(store.existing_file(path)))
    if not text:
        raise FillerError(f"{path} holds no text: give a file with sentences.")
    return tuple(re.split(r"(?<=[.!?])\s+", text))


# --- haystacks -----------------------------------------------------------------------------------------------


def message(needle: Needle, before: Sequence[str], after: Sequence[str], *, bare: bool = False) -> str:
    """Return the user's message: the sentences ``before``, the needle (left out if ``bare``), the sentences ``after``, the question."""
    text = " ".join([*before, *([] if bare else [needle.sentence]), *after])
    return f"{text}\n\nQuestion: {needle.question} Answer in the words of the text."


def place(lm: LM, needle: Needle, length: int, depth: float, *, seed: int = 0, filler: Sequence[str] | None = None) -> Haystack:
    """Hide a fact in filler text. Return a Haystack: a prompt of at most ``length`` tokens, with the token spans of fact and question.

    The prompt has as many whole filler sentences as fit. They are the first sentences of a text that depends only on the seed, the needle
    and ``filler``. So results for different lengths and depths can be compared.

    Args:
        needle: The fact to hide, with its question.
        length: Largest number of tokens of the chat prompt, including question and chat template.
        depth: Share of the filler's tokens before the needle, 0 to 1. At 0 the needle comes first, at 1 right before the question.
        seed: Seed of the filler.
        filler: Filler sentences, for example from ``read_filler``. The text begins with a random one of them and continues in order; the
            last sentence is followed by the first. Default: generated sentences.

    Raises:
        ValueError: a depth outside [0, 1].
        ContextTooLongError: ``length`` is beyond the model's maximum context.
        ContextTooShortError: needle and question alone are longer than ``length``.
        FillerError: the filler is too short to fill ``length`` tokens.
        RepeatedTextError: the filler also contains the needle.
        NoOffsetsError: the tokenizer gives no character offsets, or the prompt's text does not tokenize to the prompt's token ids.
        MissingTextError: the chat template changes the message, or the needle's tokens do not decode to its text.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: give the share of the filler before the needle, from 0 to 1.")
    haystack.check_length(lm, length)
    haystack.check_offsets(lm)
    before, after, spare = _fit(lm, needle, length, depth, _filler(needle, length, seed, filler))
    text = message(needle, before, after)
    start, stop = haystack.find_once(text, needle.sentence)
    answer, query = start + needle.sentence.index(needle.answer), text.rindex(needle.question)
    pieces = haystack.Pieces(
        [(start, stop)],
        [(answer, answer + len(needle.answer))],
        (query, query + len(needle.question)),
        message(needle, before, after, bare=True),
        [spare],
    )
    return haystack.locate(lm, _problem(needle, text, length, depth), pieces)


def _problem(needle: Needle, text: str, length: int, depth: float) -> Problem:
    meta = {
        "task": "needle",
        "split": splits.split_of(needle.question),
        "difficulty": length,
        "grader": needle.grader,
        "length": length,
        "depth": depth,
        "question": needle.question,
    }
    return Problem(f"needle-{splits.digest(text)}-{length}-{depth:g}", ({"role": "user", "content": text},), needle.answer, meta)


def _filler(needle: Needle, length: int, seed: int, filler: Sequence[str] | None) -> list[str]:
    rng = random.Random(f"filler-{seed}-{needle.sentence}")
    if filler is None:
        endless = sentences(rng)
        # A sentence has at least 8 tokens, so length // 8 of them fill the prompt. The other 8 are for ``Haystack.control``.
        return [next(endless) for _ in range(length // 8 + 8)]
    start = rng.randrange(len(filler)) if filler else 0
    return [*filler[start:], *filler[:start]]


def _fit(lm: LM, needle: Needle, length: int, depth: float, filler: list[str]) -> tuple[list[str], list[str], str]:
    """Return three parts: the filler sentences before the needle, those after it, and the needle's replacement in ``Haystack.control``.

    As many filler sentences are used as fit into ``length`` tokens. The needle goes between the two sentences that bring it nearest to
    ``depth``. Its replacement consists of unused filler sentences, or of the first ones if all are used.
    """
    ends = _token_ends(lm, filler)

    def halves(n: int) -> tuple[list[str], list[str]]:
        # The first n sentences, split where the needle goes.
        at = min(range(n + 1), key=lambda i: abs(ends[i] - depth * ends[n]))
        return filler[:at], filler[at:n]

    def size(n: int) -> int:
        return len(lm.prompt_ids([{"role": "user", "content": message(needle, *halves(n))}]))

    if (least := size(0)) > length:
        raise ContextTooShortError(
            f"Needle and question take {least} tokens of {lm.name}'s prompt, more than length={length}: ask for at least {least}."
        )
    n = bisect_right(ends, length - least) - 1  # estimate of the number of sentences that fit; corrected below
    while size(n) > length:  # joining sentences may add a token
        n -= 1
    while n < len(filler) and size(n + 1) <= length:
        n += 1
    if n == len(filler) and size(n) < length:
        raise FillerError(
            f"The filler has {ends[-1]} tokens, too few for length={length}: give a longer text, or ask for {size(n)} tokens at most."
        )
    return *halves(n), " ".join(filler[n : n + 8] or filler[:8] or ["nothing to be read here"])


def _token_ends(lm: LM, filler: list[str]) -> list[int]:
    """Return a list whose entry n is the number of tokens in the first n filler sentences, for n from 0 to ``len(filler)``."""
    coded = lm.tokenizer(" ".join(filler), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, counts, end = [start for start, _ in coded["offset_mapping"]], [0], -1  # -1: no space before the first sentence
    for sentence in filler:
        end += len(sentence) + 1
        counts.append(bisect_left(starts, end))
    return counts


def grid(
    lm: LM,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    needles: Sequence[Needle],
    seed: int = 0,
    filler: Sequence[str] | None = None,
) -> list[Haystack]:
    """Return one prompt with a hidden fact (a Haystack, see ``place``) per combination of fact, length and depth.

    In the list, the depth varies fastest and the fact slowest. ``haystack.grid_cells`` makes a table of the lengths and depths.

    Args:
        lengths: Prompt lengths in tokens.
        depths: Shares of the filler's tokens before the needle, 0 to 1.
        needles: Facts to ask about, for example from ``facts``.
        seed: Seed of the filler.
        filler: Filler sentences, as in ``place``. Default: generated sentences.

    Raises:
        ValueError: no length, depth or needle, or a depth outside [0, 1].
        HaystackError: a haystack cannot be built; ``place`` lists the subclasses.
    """
    if not (lengths and depths and needles):
        raise ValueError(
            f"{len(lengths)} lengths, {len(depths)} depths, {len(needles)} needles: a grid needs at least one of each."
        )
    return [place(lm, fact, length, depth, seed=seed, filler=filler) for fact in needles for length in lengths for depth in depths]


def spread(
    lm: LM,
    split: str = "test",
    n: int = 200,
    seed: int = 0,
    *,
    lengths: Sequence[int] = (),
    response: int = haystack.RESPONSE,
    grader: str = GRADERS[0],
) -> list[Haystack]:
    """Return ``n`` prompts, each with a different hidden fact (a Haystack, see ``place``).

    The prompts cycle through all combinations of ``lengths`` and the five depths 0, 0.25, 0.5, 0.75 and 1.

    Args:
        lengths: Prompt lengths in tokens. Default: five lengths, evenly spaced. The shortest is 256 tokens. The longest leaves ``response``
            tokens of the model's context free (see ``haystack.lengths``).
        response: Token budget of a response. Not used if ``lengths`` is given.
        grader: How answers are graded (see ``Needle``).

    Raises:
        ValueError: unknown split, or fewer than ``n`` different questions.
        HaystackError: a haystack cannot be built (``place`` lists the subclasses), the default lengths do not fit the model, or the grader
            is unknown.
    """
    sizes = lengths or haystack.lengths(lm, response=response)
    places = [(length, depth) for length in sizes for depth in DEPTHS]
    return [place(lm, fact, *places[i % len(places)], seed=seed) for i, fact in enumerate(facts(split, n, seed, grader=grader))]


def load(
    lm: LM, split: str = "test", n: int = 200, seed: int = 0, *, response: int = haystack.RESPONSE, grader: str = GRADERS[0]
) -> list[Problem]:
    """Return ``n`` problems, each a question about a different fact hidden in a long text.

    They cycle through five prompt lengths and five depths. The longest prompts leave ``response`` tokens of the context free. ``spread``
    has the details, and lists the errors.

    Args:
        response: Token budget of a response.
        grader: How answers are graded (see ``Needle``).
    """
    return [h.problem for h in spread(lm, split, n, seed, response=response, grader=grader)]
