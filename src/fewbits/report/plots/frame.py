"""The frame of a figure with two axes: where its area lies, grid lines, ticks, and the axes' names."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.report.axes import Axis
from fewbits.report.svg import FONT, Drawing, text_width

TOP, BOTTOM, RIGHT = 30.0, 44.0, 14.0
GAP = 8.0  # between the area and what is written at its ticks


@dataclass(frozen=True)
class Frame:
    """An area of a drawing, and its axes."""

    left: float
    top: float
    right: float
    bottom: float
    across: Axis
    up: Axis

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.across.at(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.up.at(value)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x(x), self.y(y)


def frame(drawing: Drawing, across: Axis, up: Axis) -> Frame:
    """Draw grid, ticks and names of the axes into a drawing, and say where the area is."""
    margin = max((text_width(text) for text in up.ticks.values()), default=0.0) + GAP
    made = Frame(margin, TOP, drawing.width - RIGHT, drawing.height - BOTTOM, across, up)
    drawing.text(0, FONT, up.label)
    for tick, text in up.ticks.items():
        drawing.line(made.left, made.y(tick), made.right, made.y(tick))
        drawing.text(made.left - GAP, made.y(tick) + 0.35 * FONT, text, anchor="end")
    drawing.line(made.left, made.bottom, made.right, made.bottom, "axis")
    edge = -GAP
    for tick, text in across.ticks.items():
        x, half = made.x(tick), text_width(text) / 2
        drawing.line(x, made.bottom, x, made.bottom + 4, "axis")
        if min(x - half, drawing.width - 2 * half) >= edge + GAP:  # else it would run into the last one
            drawing.text(x, made.bottom + FONT + 6, text, anchor="middle")
            edge = x + half
    drawing.text((made.left + made.right) / 2, drawing.height - 4, across.label, anchor="middle")
    return made
