"""Constraints that an instruction states in words, read by rule, and checks of whether a text meets them.

A constraint is read from one phrase, such as "at most 40 words" or ``Mention "river".``; ``KINDS`` lists all kinds with their phrases. Words
are counted as in ``stats.words``. What is not one of these phrases, such as a wish for style, is not found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from toolkit import stats

LENGTH = frozenset({"at_most", "at_least", "between"})  # kinds that bound the number of words
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Attributes:
        phrase: Sentence that states it, with ``{}`` for each argument.
        pattern: Regular expression that finds it, with one group per argument.
        check: Function from a text and the arguments to True if the text meets the constraint.
    """

    phrase: str
    pattern: str
    check: Callable[..., bool]


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()])


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "at_most": Kind("Use at most {} words.", r"at most (\d+) words", lambda t, n: stats.words(t) <= int(n)),
        "at_least": Kind("Use at least {} words.", r"at least (\d+) words", lambda t, n: stats.words(t) >= int(n)),
        "between": Kind(
            "Use between {} and {} words.", r"between (\d+) and (\d+) words", lambda t, a, b: int(a) <= stats.words(t) <= int(b)
        ),
        "mention": Kind('Mention "{}".', r'mention "([^"]+)"', _has),
        "avoid": Kind('Do not use "{}".', r'do not use "([^"]+)"', lambda t, word: not _has(t, word)),
        "end": Kind('End with "{}".', r'end with "([^"]+)"', lambda t, end: t.rstrip().endswith(end)),
        "paragraphs": Kind("Write exactly {} paragraphs.", r"exactly (\d+) paragraphs", lambda t, n: _paragraphs(t) == int(n)),
        "bullets": Kind(
            "Use exactly {} bullet points.", r"exactly (\d+) bullet points", lambda t, n: len(_BULLET.findall(t)) == int(n)
        ),
        "no_commas": Kind("Use no commas.", r"use no (commas)", lambda t, _: bool(t.strip()) and "," not in t),
        "lower_case": Kind("Write in lower case.", r"in (lower case)", lambda t, _: bool(t.strip()) and t == t.lower()),
    }
)
"""Name of a kind of constraint -> its phrase, the pattern that finds it, and its check."""


@dataclass(frozen=True)
class Constraint:
    """One constraint.

    Attributes:
        kind: Name of the kind, a key of ``KINDS``.
        arguments: Its arguments as texts, such as ``("40",)``.
    """

    kind: str
    arguments: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """Sentence that states the constraint."""
        return KINDS[self.kind].phrase.format(*self.arguments)

    def met(self, text: str) -> bool:
        """Return True if a text meets the constraint.

        >>> Constraint("at_most", ("3",)).met("one two three"), Constraint("mention", ("river",)).met("rivers")
        (True, False)
        """
        return KINDS[self.kind].check(text, *self.arguments)


def extract(instruction: str) -> tuple[Constraint, ...]:
    """Return the constraints that an instruction states, in the order in which they stand there.

    >>> [c.kind for c in extract('Describe soil. Use between 20 and 40 words. Mention "rain". Write in lower case.')]
    ['between', 'mention', 'lower_case']

    Args:
        instruction: Text of the instruction. Letter case does not matter, except within quotes.
    """
    found = [
        (m.start(), Constraint(name, m.groups()))
        for name, kind in KINDS.items()
        for m in re.finditer(kind.pattern, instruction, re.IGNORECASE)
    ]
    return tuple(constraint for _, constraint in sorted(found, key=lambda pair: pair[0]))


def length_score(constraint: Constraint, text: str) -> float:
    """Return from 0 to 1 how near the number of words is to the range of a length constraint: 1 within it.

    Below the range the score is ``words / lowest``, above it ``highest / words``.

    >>> length_score(Constraint("between", ("20", "40")), "word " * 10), length_score(Constraint("at_most", ("4",)), "word " * 8)
    (0.5, 0.5)

    Raises:
        ValueError: it is no length constraint.
    """
    if constraint.kind not in LENGTH:
        raise ValueError(f"{constraint} is no length constraint: give one of {', '.join(sorted(LENGTH))}.")
    n, bounds = stats.words(text), [int(a) for a in constraint.arguments]
    low = 0 if constraint.kind == "at_most" else bounds[0]
    high = float("inf") if constraint.kind == "at_least" else bounds[-1]
    return n / low if n < low else high / n if n > high else 1.0
