"""Size against divergence: plans joined to their frontier, presets, other programs' models, and the model itself.

Divergence lies on a logarithmic axis, since each bit less multiplies it, and size on a linear one. What was measured is
filled, what is expected hollow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from fewbits.report.axes import axes_of
from fewbits.report.labels import Box, place
from fewbits.report.numbers import number, size
from fewbits.report.plots.frame import Frame, frame
from fewbits.report.svg import FONT, Drawing, text_width
from fewbits.results import FrontierPoint

RADIUS = 5.0
APART = 4.0  # between two names
SMALL = 12.0  # font of the points' names


def scatter(points: Sequence[FrontierPoint], width: float, height: float, label: str) -> str:
    """The figure. Raises FewbitsError for no points, or one without a logarithm."""
    drawing = Drawing(width, height, label)
    across, up = axes_of(points, across=int(width // 90), up=int(height // 45))
    area = frame(drawing, across, up)
    best = sorted((p for p in points if p.kind == "plan" and not p.measured), key=lambda p: p.nbytes)
    corners = [area.at(p.nbytes, p.divergence) for p in best]
    if len(corners) > 1:
        drawing.polyline(corners, "frontier")
    taken = [*_along(corners), *(_box(area, point) for point in points)]
    for point in sorted(points, key=lambda p: p.measured):
        _mark(drawing, area, point)
    for point in sorted(points, key=lambda p: not p.measured):
        if point.name:
            taken.append(_name(drawing, area, point, taken))
    return drawing.render()


def _mark(drawing: Drawing, area: Frame, point: FrontierPoint) -> None:
    x, y = area.at(point.nbytes, point.divergence)
    tip = f"{point.name or 'best plan of this size'}: {size(point.nbytes)}, {number(point.divergence, 3)} nats a token"
    class_ = f"{point.kind} {'measured' if point.measured else 'expected'}"
    tip += ", measured" if point.measured else ", expected"
    if point.kind == "plan":
        radius = RADIUS + 1.5 if point.measured else RADIUS - (0 if point.name else 1.5)
        drawing.add("circle", tip, cx=x, cy=y, r=radius, class_=class_)
    elif point.kind == "preset":
        drawing.add("path", tip, d=f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z", class_=class_)
    else:
        drawing.add("rect", tip, x=x - 4.5, y=y - 4.5, width=9.0, height=9.0, class_=class_)


def _name(drawing: Drawing, area: Frame, point: FrontierPoint, taken: Sequence[Box]) -> Box:
    """Write a point's name beside it, and say where; nowhere if there is no room."""
    marker = _box(area, point)
    font = FONT if point.kind == "plan" else SMALL
    inside = Box(area.left, area.top, area.right - area.left, area.bottom - area.top)
    others = [box for box in taken if box != marker]
    box = place(marker, text_width(point.name, font) + 2, 1.25 * font, others, inside, gap=3, reach=2)
    covered = sum(box.shared(other) for other in others) / box.area
    if point.kind != "plan" and (covered > 0.12 or box.shared(inside) < 0.99 * box.area):
        return Box(0, 0, 0.01, 0.01)
    _hair(drawing, marker, box)
    drawing.text(box.x + 1, box.y + font, point.name, f"name {point.kind}", size=font)
    return Box(box.x - APART, box.y, box.width + 2 * APART, box.height)


def _hair(drawing: Drawing, marker: Box, box: Box) -> None:
    """A line from a marker to a name that stands a line or more away from it."""
    x, y = marker.x + marker.width / 2, marker.y + marker.height / 2
    middle = box.y + box.height / 2
    if abs(middle - y) > 1.4 * box.height:
        near = box.y + box.height if middle < y else box.y + 2
        drawing.line(x, y + math.copysign(RADIUS, middle - y), min(max(x, box.x), box.x + box.width), near, "hair")


def _box(area: Frame, point: FrontierPoint) -> Box:
    x, y = area.at(point.nbytes, point.divergence)
    return Box(x - RADIUS - 2, y - RADIUS - 2, 2 * RADIUS + 4, 2 * RADIUS + 4)


def _along(corners: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Small boxes along a line through these corners."""
    for (x, y), (to_x, to_y) in pairwise(corners):
        steps = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / 4))
        for i in range(steps):
            yield Box(x + (to_x - x) * i / steps - 2, y + (to_y - y) * i / steps - 2, 4, 4)
