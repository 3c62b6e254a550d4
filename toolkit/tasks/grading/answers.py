"""Compare an answer's text with the gold answer: by its last number, its words, its numbered parts or its words that contain a digit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from toolkit.expressions import NUMBER, plain_numbers

_WORD = re.compile(r"[a-z0-9]+")
# _NUMBERED: a number and one of . ) : at the start of a line, perhaps after marks such as "- " or "**".
# _IDENTIFIER: a word that may contain hyphens, as in a UUID, and the markers * and & between letters or digits. (Keys of
# ``tasks.threading`` contain *.) At an end of the word, * is no marker: it makes the word bold, as in "**a1b2**".
_NUMBERED = re.compile(r"^[^\w\n]*(\d+)[.):]\**(?=\s)", re.MULTILINE)
_IDENTIFIER = re.compile(r"[a-z0-9]+(?:(?:[*&]|[*&]?-[*&]?)[a-z0-9]+)*")
RECALL = 0.5  # word recall above which the released code of arXiv 2404.15574 counts an answer as right


def last_number(text: str) -> str | None:
    r"""Return the last number in a text, without thousands separators, or ``None`` if the text has no number.

    The minus sign of Unicode is returned as ``-``. Thin spaces between thousands are left out, as in ``10\,080``.

    >>> last_number("That makes 1,250 in all.")
    '1250'
    """
    numbers = NUMBER.findall(plain_numbers(text))
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None


def word_recall(gold: str, text: str) -> float:
    """Return the share of the gold answer's words that ``text`` contains (ROUGE-1 recall, 0 to 1).

    A word that occurs twice in the gold answer counts fully only if ``text`` has it twice. Case and punctuation are ignored. The code of
    the paper "Retrieval Head" (arXiv 2404.15574) also stems the words. Here they are not, since answers should be copied word for word.

    Raises:
        ValueError: the gold answer has no letters or digits.
    """
    gold_words, text_words = (Counter(_WORD.findall(t.lower())) for t in (gold, text))
    if not gold_words:
        raise ValueError(f"The gold answer {gold!r} has no words, so its recall is undefined: give one with letters or digits.")
    return sum((gold_words & text_words).values()) / sum(gold_words.values())


def contains(gold: str, text: str) -> bool:
    """Return True if ``text`` contains the gold answer's words in order and without gaps. Case and punctuation are ignored."""
    gold_words, text_words = (" ".join(_WORD.findall(t.lower())) for t in (gold, text))
    return f" {gold_words} " in f" {text_words} "


def same_words(gold: str, text: str) -> bool:
    """Return True if the words of ``text`` are exactly those of the gold answer, in order. Case and punctuation are ignored.

    >>> same_words("Oslo", "oslo."), same_words("Oslo", "Oslo or Rome")
    (True, False)
    """
    return _WORD.findall(text.lower()) == _WORD.findall(gold.lower())


def numbered_parts(text: str, n: int) -> list[str]:
    """Split an answer to ``n`` questions into one part per question; a missing part is ``""``.

    A part begins at a line that starts with its number, such as ``1.``, ``2)`` or ``3:``, and ends at the next such line. If two parts have
    the same number, the first counts. Without numbered lines, the parts are the non-blank lines in order. For one question, the part is the
    whole text. A number outside 1 to ``n`` numbers no part: an answer such as ``4821.`` stands on a line of its own.
    """
    if n == 1:
        return [text]
    marks = [mark for mark in _NUMBERED.finditer(text) if 1 <= int(mark[1]) <= n]
    if not marks:
        lines = [line for line in text.splitlines() if line.strip()]
        return (lines + [""] * n)[:n]
    ends = [m.start() for m in marks[1:]] + [len(text)]
    # Reversed, so that the first line of a number overwrites later ones.
    by_number = {int(m[1]): text[m.end() : end] for m, end in reversed(list(zip(marks, ends, strict=True)))}
    return [by_number.get(i + 1, "") for i in range(n)]


def facts_right(golds: Sequence[str], wrong: Sequence[str], text: str) -> tuple[bool, ...]:
    """Return one flag per numbered part of an answer: True if the part contains its gold answer and no other answer from ``wrong``.

    Args:
        golds: Gold answer of each part.
        wrong: Other possible answers. A part that contains one of them is wrong, even if it also contains its gold answer. The list may
            include the gold answers: a part's own gold answer is never counted against it.
        text: The whole answer; ``numbered_parts`` splits it.
    """
    return tuple(
        contains(gold, part) and not any(contains(other, part) for other in wrong if other != gold)
        for gold, part in zip(golds, numbered_parts(text, len(golds)), strict=True)
    )


def last_digits(text: str, n: int) -> list[int] | None:
    """Return the last ``n`` digits of the last place in a text that has ``n`` digits or more without letters between them.

    Return ``None`` if the text has no such place. So a grid can be read from an answer with words around it.

    >>> last_digits("1 . / . 2 is filled as 1 2 / 2 1, so 2 rows.", 4)
    [1, 2, 2, 1]
    """
    places = re.findall(rf"(?:\d[^\w]*){{{n},}}", text)
    return [int(digit) for digit in re.findall(r"\d", places[-1])[-n:]] if places else None


def identifiers(text: str) -> list[str]:
    """Return the words of a text that contain a digit, in order. The keys and values of ``tasks.threading`` are such words."""
    return [word for word in _IDENTIFIER.findall(text.lower()) if any(c.isdigit() for c in word)]
