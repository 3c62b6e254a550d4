"""Labels beside the points of a scatter plot, placed so that they cover neither points nor one another."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, pixels from the top left corner of the plot."""

SIZES = ((280, 300), (600, 340))
"""Sizes of the plot area, in pixels, at which no label may cover anything: on a phone, and beside a text."""
FONT = 12  # size of the letters, pixels
LINE = 28  # longest line, letters
_DISTANCES = (0.0, 14.0, 30.0, 48.0, 70.0, 95.0)  # pixels from the point; beyond the first, a line joins label and point
_SIDES = ((0, -1), (1, 0), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


def placed(
    points: Sequence[tuple[float, float]], texts: Sequence[str], x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[dict[str, Any]]:
    """Return plotly annotations that label points. Each label stands at the nearest place where nothing is covered at either of ``SIZES``.

    Long labels are broken into lines. If there is no such place, one is taken where nothing is covered at the largest of the sizes; if there
    is none either, the label is put above its point. The field ``name`` of an annotation is the text as given.

    Args:
        points: All points of the plot, which no label may cover.
        texts: Label of each point; "" for none. The first ones are placed first.
        x_range: Ends of the horizontal axis.
        y_range: Ends of the vertical axis.
    """
    at = [[_pixels(point, x_range, y_range, size) for point in points] for size in SIZES]
    taken = [[(x - 6, y - 6, x + 6, y + 6) for x, y in places] for places in at]
    annotations = []
    for i, name in enumerate(texts):
        if not name:
            continue
        text = "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(name, LINE))
        best, fewest = next(_places(text)), len(SIZES)  # the first place, and the number of sizes at which it may cover something
        for place in _places(text):
            free = [_is_free(_box(text, at[k][i], place[:2]), taken[k], size) for k, size in enumerate(SIZES)]
            if free[-1] and free.count(False) < fewest:
                best, fewest = place, free.count(False)
            if fewest == 0:
                break
        dx, dy, joined = best
        for places, others in zip(at, taken, strict=True):
            others.append(_box(text, places[i], (dx, dy)))
        label = {"x": points[i][0], "y": points[i][1], "name": name, "text": text, "font": {"size": FONT}, "captureevents": False}
        if joined:
            line = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": "#999999", "standoff": 5}
            annotations.append({**label, **line, "ax": dx, "ay": dy})
        else:
            annotations.append({**label, "showarrow": False, "xshift": dx, "yshift": -dy})
    return annotations


def _pixels(
    point: tuple[float, float], x_range: tuple[float, float], y_range: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float]:
    x, y = ((value - low) / (high - low) for value, (low, high) in zip(point, (x_range, y_range), strict=True))
    return x * size[0], (1 - y) * size[1]


def _extent(text: str) -> tuple[float, float]:
    """Return the width and height of a label in pixels; a letter is about 0.6 of the font's size wide."""
    lines = text.split("<br>")
    return 0.6 * FONT * max(len(html.unescape(line)) for line in lines) + 4.0, 1.3 * FONT * len(lines) + 2.0


def _places(text: str) -> Iterator[tuple[float, float, bool]]:
    """Return places of a label from near to far: its shift from the point in pixels, and whether a line joins it to the point."""
    width, height = _extent(text)
    for distance in _DISTANCES:
        for across, down in _SIDES:
            yield across * (width / 2 + 8 + distance), down * (height / 2 + 8 + distance), distance > 0


def _box(text: str, at: tuple[float, float], shift: tuple[float, float]) -> Box:
    width, height = _extent(text)
    x, y = at[0] + shift[0], at[1] + shift[1]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap(a: Box, b: Box) -> bool:
    """Return True if two boxes overlap."""
    return not (a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1])


def _is_free(box: Box, taken: Sequence[Box], size: tuple[int, int]) -> bool:
    """Return True if a box is inside the plot and overlaps none of the boxes ``taken``."""
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
    return inside and not any(overlap(box, other) for other in taken)
