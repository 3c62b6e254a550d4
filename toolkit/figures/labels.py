"""Labels beside the points of a scatter plot, placed so that they cover neither points nor one another."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, pixels from the top left corner of the plot."""

Size = tuple[int, int]
"""Width and height of a plot area, pixels."""

SIZES: tuple[Size, ...] = ((280, 300), (600, 340))
"""Sizes of the plot area, in pixels, at which no label may cover anything: on a phone, and beside a text."""
FONT = 12  # size of the letters, pixels
LINE = 28  # longest line, letters
_DISTANCES = (0.0, 14.0, 30.0, 48.0, 70.0, 95.0)  # pixels from the point; beyond the first, a line joins label and point
_SIDES = ((0, -1), (1, 0), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1), (0.5, -1), (-0.5, -1), (0.5, 1), (-0.5, 1))


def placed(
    points: Sequence[Point],
    texts: Sequence[str],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    lines: Sequence[tuple[Point, Point]] = (),
    sizes: Sequence[Size] = SIZES,
) -> list[dict[str, Any]]:
    """Return plotly annotations that label points. Each label stands near its point where nothing is covered at any of the sizes.

    Long labels are broken into lines. If there is no such place, one is taken where nothing is covered at the largest of the sizes; if there
    is none either, the label is put above its point. Among the places where nothing is covered, one further away is taken if the nearer ones
    are struck through by ``lines`` or by a line that joins another label to its point. The field ``name`` of an annotation is the text as
    given.

    Args:
        points: All points of the plot, which no label may cover.
        texts: Label of each point; "" for none. The first ones are placed first.
        x_range: Ends of the horizontal axis.
        y_range: Ends of the vertical axis.
        lines: Both ends of each line of the plot, such as an error bar, that labels avoid where they can.
        sizes: Sizes of the plot area for which labels are placed, smallest first.
    """
    at = [[_pixels(point, x_range, y_range, size) for point in points] for size in sizes]
    taken = [[(x - 6, y - 6, x + 6, y + 6) for x, y in places] for places in at]
    drawn = [tuple(_pixels(end, x_range, y_range, sizes[-1]) for end in line) for line in lines]
    annotations = []
    for i, name in enumerate(texts):
        if not name:
            continue
        text = "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(name, LINE, break_on_hyphens=False))
        best, least = next(_places(text)), (len(sizes), 0.0)  # the first place; sizes at which it may cover something, and its cost
        others = [box for k, box in enumerate(taken[-1]) if k != i]
        for place in sorted(_places(text), key=_distance):
            if least <= (0, _distance(place)):
                break  # no place that is left is nearer
            free = [_is_free(_box(text, at[k][i], place[:2]), taken[k], size) for k, size in enumerate(sizes)]
            if free[-1] and (cost := (free.count(False), _cost(text, at[-1][i], place, others, drawn))) < least:
                best, least = place, cost
        dx, dy, joined = best
        for places, boxes in zip(at, taken, strict=True):
            boxes.append(_box(text, places[i], (dx, dy)))
        if joined:
            x, y = at[-1][i]
            drawn.append(((x, y), (x + dx, y + dy)))
        label = {"x": points[i][0], "y": points[i][1], "name": name, "text": text, "font": {"size": FONT}, "captureevents": False}
        if joined:
            line = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": "#999999", "standoff": 5}
            annotations.append({**label, **line, "ax": dx, "ay": dy})
        else:
            annotations.append({**label, "showarrow": False, "xshift": dx, "yshift": -dy})
    return annotations


def near(points: Sequence[Point], x_range: tuple[float, float], y_range: tuple[float, float], size: Size) -> list[list[int]]:
    """Return the indices of points in groups: a point joins the first group that has a point less than 14 pixels away.

    Args:
        points: The points.
        x_range: Ends of the horizontal axis.
        y_range: Ends of the vertical axis.
        size: Size of the plot area.
    """
    at = [_pixels(point, x_range, y_range, size) for point in points]
    groups: list[list[int]] = []
    for i, place in enumerate(at):
        group = next((group for group in groups if any(math.dist(place, at[k]) < 14 for k in group)), None)
        if group is None:
            groups.append(group := [])
        group.append(i)
    return groups


def bars(x: Mapping[str, Any], y: Mapping[str, Any]) -> list[tuple[Point, Point]]:
    """Return the two error bars of a point as lines.

    Args:
        x: ``mean``, ``low`` and ``high`` of the horizontal value.
        y: The same of the vertical value.
    """
    return [((x["low"], y["mean"]), (x["high"], y["mean"])), ((x["mean"], y["low"]), (x["mean"], y["high"]))]


def _pixels(point: Point, x_range: tuple[float, float], y_range: tuple[float, float], size: Size) -> Point:
    x, y = ((value - low) / (high - low) for value, (low, high) in zip(point, (x_range, y_range), strict=True))
    return float(x * size[0]), float((1 - y) * size[1])  # plain numbers also of a table's


def _extent(text: str) -> tuple[float, float]:
    """Return the width and height of a label in pixels; a letter is about 0.6 of the font's size wide."""
    lines = text.split("<br>")
    return 0.6 * FONT * max(len(html.unescape(line)) for line in lines) + 4.0, 1.3 * FONT * len(lines) + 2.0


def _places(text: str) -> Iterator[tuple[float, float, bool]]:
    """Return places of a label from near to far: its shift from the point in pixels, and whether a line joins it to the point."""
    width, height = _extent(text)
    for distance in _DISTANCES:
        for across, down in _SIDES:
            # A label at a corner seems to belong to any point near it, so it is joined even if it is near.
            yield across * (width / 2 + 8 + distance), down * (height / 2 + 8 + distance), distance > 0 or bool(across and down)


def _box(text: str, at: tuple[float, float], shift: tuple[float, float]) -> Box:
    width, height = _extent(text)
    x, y = at[0] + shift[0], at[1] + shift[1]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap(a: Box, b: Box) -> bool:
    """Return True if two boxes overlap."""
    return not (a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1])


def _cost(
    text: str, at: Point, place: tuple[float, float, bool], others: Sequence[Box], drawn: Sequence[tuple[Point, ...]]
) -> float:
    """Return the cost of a place: its distance from the point, and as much as two steps away for each line that strikes through a text."""
    dx, dy, joined = place
    box, end = _box(text, at, (dx, dy)), (at[0] + dx, at[1] + dy)
    struck = sum(_strikes(line[0], line[1], box) for line in drawn)
    struck += joined and sum(_strikes(at, end, other) for other in others)
    return _distance(place) + 36 * struck


def _distance(place: tuple[float, float, bool]) -> float:
    """Return how far a place is from its point, in pixels, to the side or up and down."""
    return max(abs(place[0]), abs(place[1]))


def _strikes(start: Point, end: Point, box: Box) -> bool:
    """Return True if the line from start to end goes through a box."""
    first, last = 0.0, 1.0  # part of the line that is inside, as shares of its length
    for axis in (0, 1):
        way = end[axis] - start[axis]
        low, high = box[axis] - start[axis], box[axis + 2] - start[axis]
        if way == 0:
            if not low < 0 < high:
                return False
        else:
            first, last = max(first, min(low / way, high / way)), min(last, max(low / way, high / way))
    return first < last


def _is_free(box: Box, taken: Sequence[Box], size: Size) -> bool:
    """Return True if a box is inside the plot and overlaps none of the boxes ``taken``."""
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
    return inside and not any(overlap(box, other) for other in taken)
