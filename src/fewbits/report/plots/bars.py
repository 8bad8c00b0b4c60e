"""Bars: shares that stand in a row, and bytes that lie end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewbits.report.axes import linear, within
from fewbits.report.numbers import size
from fewbits.report.plots.frame import frame
from fewbits.report.svg import FONT, Drawing, fitted, text_width

SMALL = 12.0
ROW, BAR = 48.0, 22.0  # of a stack: its line with what is written above it, and the bar
SHADES = (0.6, 0.42, 0.28, 0.18, 0.1)  # opacities of parts, on which text can be read


@dataclass(frozen=True)
class Bar:
    """From `low` to `high` on the axis across, a share high."""

    low: float
    high: float
    share: float
    tip: str


@dataclass(frozen=True)
class Stack:
    """Parts of a whole, (name, bytes) each."""

    name: str
    parts: Sequence[tuple[str, float]]

    @property
    def total(self) -> float:
        return sum(nbytes for _, nbytes in self.parts)


def shares(bars: Sequence[Bar], width: float, height: float, label: str, across: str, up: str) -> str:
    """Bars from 0 to 100 %, each with its per cent above it where there is room."""
    drawing = Drawing(width, height, label)
    ends = [bar.low for bar in bars] + [bar.high for bar in bars]
    area = frame(drawing, within(across, min(ends), max(ends), int(width // 80)), linear(up, 0, 100, 5))
    for bar in bars:
        x, right, y = area.x(bar.low), area.x(bar.high), area.y(100 * bar.share)
        drawing.add("rect", bar.tip, x=x + 1, y=y, width=right - x - 2, height=area.bottom - y, class_="bar")
        text = f"{100 * bar.share:.0f}"
        if text_width(text, SMALL) < right - x:
            drawing.text((x + right) / 2, y - 4, text, "ink", "middle", SMALL)
    return drawing.render()


def stacks(drawn: Sequence[Stack], width: float, label: str) -> str:
    """A bar for each whole, on one scale; names of parts inside them where there is room."""
    drawing = Drawing(width, ROW * len(drawn) + 4, label)
    largest = max((stack.total for stack in drawn), default=0) or 1
    for i, stack in enumerate(drawn):
        top = ROW * i
        drawing.text(0, top + FONT, stack.name, "ink")
        drawing.text(width, top + FONT, size(stack.total), "ink", "end")
        x = 0.0
        for j, (name, nbytes) in enumerate(stack.parts):
            wide = width * nbytes / largest
            _part(drawing, x, top + FONT + 6, wide, name, nbytes, SHADES[min(j, len(SHADES) - 1)])
            x += wide
    return drawing.render()


def _part(drawing: Drawing, x: float, y: float, wide: float, name: str, nbytes: float, shade: float) -> None:
    box = {"x": x, "y": y, "width": max(wide - 1, 0.5), "height": BAR}
    drawing.add("rect", f"{name}: {size(nbytes)}", class_="heat", fill_opacity=f"{shade:.2f}", **box)
    text = fitted(name, wide - 12, SMALL)
    if text == name:
        drawing.text(x + 6, y + BAR / 2 + 0.35 * SMALL, text, "ink through", size=SMALL)
