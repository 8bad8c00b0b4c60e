"""A map of numbers over rows and columns: the stronger a cell's colour, the larger its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fewbits.report.svg import Drawing, text_width

SMALL = 12.0
LEAST, MOST = 0.05, 0.62  # opacity of the smallest and the largest number; black or white can be read on both
TALL, LOW = 24.0, 13.0  # rows, where there are few of them and where there are many
FEW, MANY = 16, 64


@dataclass(frozen=True)
class Cell:
    """A number, and what is told of it. shade: what its colour goes by, if not the number."""

    value: float
    tip: str
    shade: float | None = None

    @property
    def weight(self) -> float:
        return self.value if self.shade is None else self.shade


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], Cell],
    width: float,
    label: str,
    written: Callable[[float], str],
    corner: str = "",
) -> str:
    """The map, as high as its rows need. cells: (row, column) -> Cell, not all of them need to be there."""
    tall = _row_height(len(rows))
    left = max(text_width(text, SMALL) for text in (*rows, corner)) + 8
    across = (width - left) / max(1, len(columns))
    heads = [column.split("_") for column in columns]
    slanted = any(text_width(word, SMALL) > across - 3 for head in heads for word in head)
    top = _slanted_height(columns) if slanted else SMALL * 1.2 * max(map(len, heads), default=1) + 6
    drawing = Drawing(width, top + tall * len(rows) + 2, label)
    drawing.text(left - 8, top - 6, corner, anchor="end", size=SMALL)
    for j, head in enumerate(heads):
        x = left + (j + 0.5) * across
        _head(drawing, x, top, columns[j] if slanted else head)
    for i, row in enumerate(rows):
        drawing.text(left - 8, top + (i + 0.5) * tall + 0.35 * SMALL, row, anchor="end", size=min(SMALL, tall - 2))
    scale = _scale([cell.weight for cell in cells.values()])
    for (i, j), cell in cells.items():
        _cell(drawing, (left + j * across, top + i * tall, across, tall), cell, scale(cell.weight), written(cell.value))
    return drawing.render()


def _row_height(rows: int) -> float:
    share = (min(max(rows, FEW), MANY) - FEW) / (MANY - FEW)
    return TALL + share * (LOW - TALL)


def _slanted_height(columns: Sequence[str]) -> float:
    return max(text_width(column, SMALL) for column in columns) * math.sin(math.radians(60)) + 14


def _head(drawing: Drawing, x: float, top: float, words: str | Sequence[str]) -> None:
    if isinstance(words, str):
        drawing.turned_text(x + 0.3 * SMALL, top - 6, words, -60, SMALL)
        return
    for line, word in enumerate(words):
        drawing.text(x, top - 6 - 1.2 * SMALL * (len(words) - 1 - line), word, anchor="middle", size=SMALL)


def _cell(drawing: Drawing, box: tuple[float, float, float, float], cell: Cell, opacity: float, text: str) -> None:
    x, y, width, height = box
    shade = f"{opacity:.2f}"
    drawing.add(
        "rect", cell.tip, class_="heat", x=x + 1, y=y + 1, width=width - 2, height=height - 2, fill_opacity=shade
    )
    size = min(SMALL, height - 2)
    if text_width(text, size) <= width - 4 and size >= 9:
        drawing.text(x + width / 2, y + height / 2 + 0.35 * size, text, "ink through", "middle", size)


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high <= low:
        return lambda value: (LEAST + MOST) / 3
    return lambda value: LEAST + (MOST - LEAST) * (value - low) / (high - low)
