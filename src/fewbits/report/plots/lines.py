"""Lines over an axis: a mean with its standard error, a loss curve, the distribution of a divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fewbits.report.axes import linear, logarithmic, within
from fewbits.report.numbers import number
from fewbits.report.plots.frame import Frame, frame
from fewbits.report.svg import FONT, Drawing, text_width

Mark = Literal["accent", "other"]
DOTTED = 60  # points up to which each has a dot


@dataclass(frozen=True)
class Line:
    """A line through (x, y), named at its end. errors: of each y, a band on both sides. mark: its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    mark: Mark = "accent"


@dataclass(frozen=True)
class Note:
    """A word at a place of a line."""

    x: float
    y: float
    text: str


def lines(
    drawn: Sequence[Line],
    width: float,
    height: float,
    label: str,
    across: str,
    up: str,
    *,
    log: bool = False,
    notes: Sequence[Note] = (),
) -> str:
    """The figure; across goes what is counted, up from 0, or on a logarithmic scale, where every y is above 0."""
    drawing = Drawing(width, height, label)
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    top = max([y + e for line in drawn for (_, y), e in zip(line.points, line.errors, strict=False)] + ys)
    about = int(height // 45)
    rising = logarithmic(up, min(ys), max(ys), about, fine=True) if log else None
    even = within(across, min(xs), max(xs), int(width // 80), 1.0)
    area = frame(drawing, even, rising or linear(up, 0.0, top or 1.0, about))
    for line in drawn:
        _band(drawing, area, line)
    for line in drawn:
        _line(drawing, area, line, across, up)
    for note in notes:
        _note(drawing, area, note)
    _names(drawing, area, drawn)
    return drawing.render()


def _band(drawing: Drawing, area: Frame, line: Line) -> None:
    if not line.errors:
        return
    both = list(zip(line.points, line.errors, strict=True))
    upper = [area.at(x, y + e) for (x, y), e in both]
    lower = [area.at(x, max(y - e, area.up.low)) for (x, y), e in both]
    drawing.polygon([*upper, *reversed(lower)], f"band {line.mark}")


def _line(drawing: Drawing, area: Frame, line: Line, across: str, up: str) -> None:
    if len(line.points) > 1:
        drawing.polyline([area.at(x, y) for x, y in line.points], f"line {line.mark}")
    radius = 2.6 if len(line.points) <= DOTTED else 1.2
    errors = line.errors or [0.0] * len(line.points)
    for (x, y), error in zip(line.points, errors, strict=True):
        about = f" ± {number(error, 1)}" if error else ""
        tip = f"{line.name}: {number(y, 3)}{about} at {number(x, 6)} ({up}; {across})"
        drawing.add("circle", tip, cx=area.x(x), cy=area.y(y), r=radius, class_=f"dot {line.mark}")


def _note(drawing: Drawing, area: Frame, note: Note) -> None:
    x, y = area.at(note.x, note.y)
    drawing.add("circle", f"{note.text}: {number(note.y, 3)}", cx=x, cy=y, r=4.0, class_="dot strong")
    beside = area.right - x > text_width(note.text) + 14
    drawing.text(
        x + 8 if beside else x - 8, y + (FONT if beside else -7), note.text, "ink", "start" if beside else "end"
    )


def _names(drawing: Drawing, area: Frame, drawn: Sequence[Line]) -> None:
    """Names at the lines' ends, apart from each other; one line alone is named by the figure."""
    if len(drawn) < 2:
        return
    ends = sorted(((area.y(line.points[-1][1]), line) for line in drawn), key=lambda each: each[0])
    last = -math.inf
    for y, line in ends:
        last = max(y - 8, last + 1.2 * FONT, area.top + FONT)
        drawing.text(area.right - 4, last, line.name, f"name {line.mark}", "end")
