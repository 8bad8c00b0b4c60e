"""Weights and the levels that they become: the original's numbers as an area, levels as sticks."""

from __future__ import annotations

from itertools import pairwise

from fewbits.findings import Histogram
from fewbits.report.axes import Axis, linear, within
from fewbits.report.numbers import number
from fewbits.report.plots.frame import frame
from fewbits.report.svg import Drawing

HEADROOM = 1.08  # of the area, where there are no sticks


def histogram(found: Histogram, width: float, height: float, label: str) -> str:
    """Sticks are as high as the share of weights at their level; the area, as high as the highest stick, is the
    distribution of the original's weights, so it has no scale of its own."""
    drawing = Drawing(width, height, label)
    highest = 100 * max(found.shares, default=0.0)
    across = within("weight, in units of its group’s scale", found.low, found.high, int(width // 70))
    shares = linear("% of weights at a level", 0, highest, 4) if found.levels else Axis("", 0, HEADROOM, {})
    area = frame(drawing, across, shares)
    if found.counts:
        top = (highest or 1.0) / max(found.counts)
        step = (found.high - found.low) / len(found.counts)
        edges = [found.low + i * step for i in range(len(found.counts) + 1)]
        outline = [
            area.at(x, count * top)
            for (left, right), count in zip(pairwise(edges), found.counts, strict=True)
            for x in (left, right)
        ]
        drawing.polygon([area.at(found.low, 0), *outline, area.at(found.high, 0)], "area")
    for level, share in zip(found.levels, found.shares, strict=True):
        x, y = area.at(level, 100 * share)
        drawing.add("line", x1=x, y1=area.bottom, x2=x, y2=y, class_="stick")
        tip = f"level {number(level, 4)}: {100 * share:.2f} % of the weights"
        drawing.add("circle", tip, cx=x, cy=y, r=3.6, class_="dot strong")
    return drawing.render()
