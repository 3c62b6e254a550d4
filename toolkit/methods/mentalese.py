"""ORION: teaching language models to reason efficiently in the language of thought, arXiv:2511.22891. Traces in *Mentalese*.

The model is fine-tuned on short symbolic traces, then trained with SLPO (``rewards.slpo``), which favours the shortest right response.

Our rule, from a trace to Mentalese::

    1. read every equation of every step, ``a + b = c``; drop all other text, and steps without an equation
    2. an equation with the same left side as the one before it is a re-check: it replaces that one
    3. write an equation without its first number where that number is the result before; join everything without blanks

    17+5=22 / wait 17+5=22 ok / 22-9=13     ->     17+5=22-9=13

Compression of a trace is its length divided by the length of its Mentalese.

Deviations: the paper's data (MentaleseR-40k) were written by a large model in its own notation and could not be read; the rule and the
notation are ours, for arithmetic. ``expand`` restores the equations, so nothing but words and re-checks is lost. The paper has no control;
ours, ``thinned``, removes steps at random to the same length.

Units and signs: lengths by a function of the caller, such as tokens. Cost: none beyond fine-tuning. ``data/mentalese`` measures it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from toolkit import steps
from toolkit.stats import Number

_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"(?P<left>-?{_NUMBER}(?:[-+*/]{_NUMBER})*)?=(?P<right>-?{_NUMBER})")


def equations(trace: str) -> list[tuple[str, str]]:
    """Return the equations of a trace in order, as pairs of left side and result, without those that a re-check repeats or corrects.

    A left side is empty where a step states a result alone, such as ``=36``.

    >>> equations("17+5=21\\nwait 17+5=22 fix\\nNow 22 - 9 = 13.\\n=13\\n")
    [('17+5', '22'), ('22-9', '13'), ('', '13')]
    """
    found: list[tuple[str, str]] = []
    for start, stop in steps.step_ranges(trace):
        for match in _EQUATION.finditer(re.sub(r"[^\S\n]*([-+*/=])[^\S\n]*", r"\1", trace[start:stop])):
            left = match["left"] or ""
            if left and found and found[-1][0] == left:
                found.pop()
            found.append((left, match["right"]))
    return found


def compress(trace: str) -> str:
    """Return the Mentalese of a trace; "" if it has no equation.

    >>> compress("17+5=22\\nwait 17+5=22 ok\\n22-9=13\\n2*3=6\\n")
    '17+5=22-9=13;2*3=6'
    """
    text, result = "", None
    for left, right in equations(trace):
        rest = left.removeprefix(result) if result is not None else left
        follows = result is not None and left.startswith(result) and rest[:1] in tuple("+-*/")
        text += (rest if follows else (";" if text else "") + left) + f"={right}"
        result = right
    return text


def expand(mentalese: str) -> str:
    """Return the equations of a text in Mentalese, one per line: the inverse of ``compress``, up to words and repetitions.

    >>> expand("17+5=22-9=13;2*3=6")
    '17+5=22\\n22-9=13\\n2*3=6\\n'
    """
    lines = []
    for chain in mentalese.split(";"):
        first, *parts = chain.split("=")
        left = first
        for part in parts:
            right = re.match(rf"-?{_NUMBER}", part)
            if right is None:
                raise ValueError(f"{chain!r} has no number after an equals sign: expected Mentalese such as '17+5=22-9=13'.")
            lines.append(f"{left}={right[0]}\n")
            left = part
    return "".join(lines) if mentalese else ""


def thinned(
    trace: str, length: Number, rng: random.Random, *, measure: Callable[[str], Number] = len, split: steps.Splitter = steps.lines
) -> str:
    """Return a trace without some steps, chosen at random, so that its length comes as near to ``length`` as one order of removal allows.

    Args:
        trace: The trace.
        length: Wanted length, in the unit of ``measure``.
        rng: Source of the order in which steps are removed.
        measure: Function from a text to its length; characters by default.
        split: Splitter; by default each line is a step.
    """
    parts = [trace[a:b] for a, b in steps.step_ranges(trace, split)]
    kept = set(range(len(parts)))

    def text() -> str:
        return "".join(part for i, part in enumerate(parts) if i in kept)

    for i in rng.sample(range(len(parts)), len(parts)):
        before = abs(measure(text()) - length)
        kept.remove(i)
        if abs(measure(text()) - length) >= before:
            kept.add(i)
            break
    return text()
