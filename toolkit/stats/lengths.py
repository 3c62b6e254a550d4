"""Detection of loops at the end of responses, and scores of how well lengths match their targets (Ruler, arXiv:2409.18943)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray


def looping(tokens: Sequence[int], *, longest_period: int = 64, repeats: int = 4) -> bool:
    """Return True if a response ends in a loop: a block of tokens that is repeated up to the end of the response.

    The block has to occur at least ``repeats`` times in a row, and its occurrences have to cover at least 16 tokens together. The last
    occurrence may be incomplete. This definition and its numbers are the toolkit's, not from a paper.

    Args:
        tokens: Token ids of the response.
        longest_period: Largest length of the block, in tokens.
        repeats: Smallest number of occurrences of the block, including the first.

    >>> looping([7, 8, *[1, 2, 3] * 6]), looping([7, 8, *[1, 2, 3] * 3])
    (True, False)
    """
    n = len(tokens)
    for period in range(1, min(longest_period, n // repeats) + 1):
        span = max(period * repeats, 16)  # number of tokens at the end that have to be periodic
        if span <= n and all(tokens[i] == tokens[i - period] for i in range(n - span + period, n)):
            return True
    return False


# --- lengths against targets (Ruler, arXiv:2409.18943) -------------------------------------------------------

Number = float | int
Ranges = Mapping[Number, tuple[Number, Number]]
"""Target length -> ``(low, high)``: a length matches the target if ``low < length <= high``.

An infinite ``high`` stands for a target "more than ``low``".
"""

# The tables of the Ruler paper, with lengths in words. Its metric PM uses the precise (narrow) ranges, FM the flexible (wide) ones. The
# target 800 stands for ">800".
RULER_PRECISE: Ranges = {
    10: (0, 20), 30: (20, 40), 50: (40, 60), 80: (70, 90), 150: (130, 170),
    300: (280, 320), 500: (450, 550), 700: (630, 770), 800: (800, math.inf),
}  # fmt: skip
RULER_FLEXIBLE: Ranges = {
    10: (0, 20), 30: (20, 40), 50: (40, 60), 80: (60, 100), 150: (100, 200),
    300: (200, 400), 500: (400, 600), 700: (600, 800), 800: (800, math.inf),
}  # fmt: skip
RULER_LEVELS: Mapping[str, tuple[Number, ...]] = {"level 0": (10, 30, 50, 80), "level 1": (150, 300, 500), "level 2": (700, 800)}
assumed_precise, assumed_flexible = (
    0.1,
    0.2,
)  # half width of a range, as a share of the target; our choice, equal to Ruler's at 500 words


def words(text: str) -> int:
    """Return the number of words in a text: runs of letters, digits and underscores, as in the paper Ruler (arXiv:2409.18943).

    >>> words("Two plus two isn't five.")
    6
    """
    return len(re.findall(r"\w+", text))


def ranges_around(targets: Sequence[Number], share: float) -> Ranges:
    """Return a range of matching lengths per target T: a dict ``T -> (T - share * T, T + share * T)``.

    The paper Ruler (arXiv:2409.18943) has ranges only for a few targets in words: ``RULER_PRECISE`` (narrow) and ``RULER_FLEXIBLE``
    (wide). This function makes ranges for any target.

    Args:
        targets: Target lengths, positive, in any unit.
        share: Half width of each range, as a share of its target, in (0, 1].

    >>> ranges_around([100, 200], 0.1)
    {100: (90.0, 110.0), 200: (180.0, 220.0)}
    """
    if not 0 < share <= 1 or any(t <= 0 for t in targets):
        raise ValueError(f"share={share}, targets={list(targets)}: need 0 < share <= 1 and positive targets.")
    return {t: (t - share * t, t + share * t) for t in targets}


def hits(lengths: Sequence[Number] | ndarray, targets: Sequence[Number] | ndarray, ranges: Ranges) -> ndarray:
    """Return one boolean per length: True if the length is in the range of its target, ``low < length <= high``.

    Args:
        lengths: Lengths, in the unit of ``ranges``.
        targets: Target of each length.
        ranges: Target -> ``(low, high)``.

    Raises:
        KeyError: a target has no range in ``ranges``.

    >>> hits([95, 130], [100, 100], ranges_around([100], 0.1)).tolist()
    [True, False]
    """
    if missing := sorted({float(t) for t in targets} - {float(t) for t in ranges}):
        known = ", ".join(f"{t:g}" for t in ranges)
        raise KeyError(f"No range for the targets {missing}: ranges has {known}. Make ranges with ranges_around(targets, share).")
    low, high = np.array([ranges[t] for t in np.asarray(targets, float).tolist()], float).reshape(-1, 2).T
    return (low < np.asarray(lengths, float)) & (np.asarray(lengths, float) <= high)


@dataclass(frozen=True)
class LengthMatch:
    """Scores of how well the lengths of some responses match their targets.

    Every target has two ranges of lengths that match it, a narrow and a wide one: the arguments ``precise`` and ``flexible`` of
    ``length_match``. A target is *open* if its ranges have no upper end, such as "more than 800 words". Responses with open targets do not
    count in ``exact`` and ``rmse``. Both are NaN if all targets are open.

    Attributes:
        n: Number of responses, including those with open targets.
        precise: Percentage (0 to 100) of responses within the narrow range of their target. This is PM (precise match) of Ruler
            (arXiv:2409.18943).
        flexible: Percentage (0 to 100) of responses within the wide range of their target: Ruler's FM (flexible match).
        exact: Percentage (0 to 100) of responses whose length equals the target.
        rmse: Root mean square of ``length - target``, in the unit of the lengths.
    """

    n: int
    precise: float
    flexible: float
    exact: float
    rmse: float


def length_match(
    lengths: Sequence[Number] | ndarray,
    targets: Sequence[Number] | ndarray,
    *,
    precise: Ranges = RULER_PRECISE,
    flexible: Ranges = RULER_FLEXIBLE,
    levels: Mapping[str, Sequence[Number]] = RULER_LEVELS,
) -> dict[str, LengthMatch]:
    """Return scores of how well lengths match their targets: per target, per level (group of targets) and over all responses.

    The scores are those of the paper Ruler (arXiv:2409.18943). So are the default ranges and levels; they are for lengths in words. For
    lengths in tokens, or for other targets, pass your own ranges and levels. ``ranges_around(targets, 0.1)`` makes a range of +- 10 %
    around each target. For such ranges, the toolkit uses 10 % (``assumed_precise``) as narrow and 20 % (``assumed_flexible``) as wide. Both
    are our choice, not from a paper.

    Args:
        lengths: Length of each response, in the unit of the ranges.
        targets: Target length of each response.
        precise: Target -> narrow range ``(low, high)``.
        flexible: Target -> wide range ``(low, high)``.
        levels: Name of a level -> its targets. A level is a set of targets whose responses are scored together. ``{}`` means no levels.

    Returns:
        A dict from name to scores. There is one name per target (``"10"``, ``"30"``, ...), one per level (``"level 0"``, ...), and
        ``"all"``. A target whose range has no upper end is named with ``>``, such as ``">800"``. Targets and levels without responses are
        left out.

    Raises:
        ValueError: there are no lengths, or not as many targets as lengths.
        KeyError: a target has no range.
    """
    n, t = np.asarray(lengths, float), np.asarray(targets, float)
    if not len(n) or n.shape != t.shape:
        raise ValueError(f"{len(n)} lengths and {len(t)} targets: need one target for each of at least one length.")
    pm, fm = hits(n, t, precise), hits(n, t, flexible)
    is_open = np.isinf([precise[x][1] for x in t.tolist()])

    def over(rows: ndarray) -> LengthMatch:
        error = (n - t)[rows & ~is_open]
        exact, rmse = (100 * (error == 0).mean(), np.sqrt(np.square(error).mean())) if len(error) else (math.nan, math.nan)
        return LengthMatch(int(rows.sum()), 100 * float(pm[rows].mean()), 100 * float(fm[rows].mean()), float(exact), float(rmse))

    groups = {f">{x:g}" if math.isinf(precise[x][1]) else f"{x:g}": t == x for x in sorted(set(t.tolist()))}
    groups |= {name: np.isin(t, list(members)) for name, members in levels.items()}
    return {name: over(rows) for name, rows in (groups | {"all": np.ones(len(t), bool)}).items() if rows.any()}
