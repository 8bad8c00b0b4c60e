"""Size against divergence, drawn: in characters for a terminal, and as a figure for a page.

Divergence lies on a logarithmic axis, since each bit less multiplies it, and size on a linear one. Plans are joined to
the frontier that they form: whatever lies above the line is worse than a plan of its size. A filled marker was
measured, a hollow one predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from fewbits.cli._print import number, size
from fewbits.errors import FewbitsError, OutputError
from fewbits.report.axes import Axis, axes_of
from fewbits.report.labels import Box, place
from fewbits.results import FrontierPoint

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

KINDS = {"plan": "fewbits plan", "preset": "llama.cpp preset", "peer": "other program"}

MARKERS = {"plan": "●○", "preset": "◆◇", "peer": "■□"}  # measured, predicted
BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of a character's 2 columns of 4 dots
NARROWEST, LOWEST = 60, 12  # columns and lines that a figure in characters can be read at

SUFFIXES = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # without the date: the same bytes
SHAPES = {"plan": "o", "preset": "D", "peer": "s"}
COLOURS = {"plan": "#0b5cad", "preset": "#c2570c", "peer": "#5f6773"}
INK, PALE = "#22262b", "#e3e6ea"
HAIR = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}


def draw_terminal(points: Sequence[FrontierPoint], width: int, height: int) -> str:
    """The figure as `height` lines of at most `width` columns, without colour; below, names there was no room for.

    Raises FewbitsError where there is nothing to draw: no points, a divergence without a logarithm, too little room.
    """
    if width < NARROWEST or height < LOWEST:
        raise FewbitsError(f"a figure of {width} × {height} characters; it needs {NARROWEST} × {LOWEST}")
    across, up = axes_of(points, across=width // 14, up=height // 2)
    margin = max(map(len, up.ticks.values()))
    canvas = Canvas(width - margin - 3, height - 5, across, up)
    canvas.draw(points)
    written = {canvas.row(tick): text for tick, text in up.ticks.items()}
    rows = [
        f"{written.get(i, ''):>{margin}} {'┤' if i in written else '│'}{''.join(row)}"
        for i, row in enumerate(canvas.cells)
    ]
    ruler, labels = canvas.ruler()
    pad = " " * (margin + 1)
    lines = [
        up.label,
        *rows,
        f"{pad}└{ruler}",
        f"{pad} {labels}",
        f"{pad} {across.label:^{canvas.columns}}",
        _key(points),
    ]
    return "\n".join(line.rstrip() for line in [*lines, *_unwritten(canvas.nameless, width)])


def draw_image(points: Sequence[FrontierPoint], path: Path, title: str = "", caption: str = "") -> None:
    """The figure as a file of the kind that its suffix says: PNG, SVG or PDF.

    Raises FewbitsError like draw_terminal, and where matplotlib is not installed; OutputError if it cannot be written.
    """
    across, up = axes_of(points, across=8, up=10)
    if path.suffix.lower() not in SUFFIXES:
        raise FewbitsError(f"figure {path}: '{path.suffix}' is no kind of picture; it must be {', '.join(SUFFIXES)}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FewbitsError(f"figure {path}: drawing it needs matplotlib; pip install 'fewbits[plot]'") from error
    with rc_context({"font.size": 10, "text.color": INK, "svg.hashsalt": "fewbits"}):
        figure = Figure(figsize=(9, 5.8), dpi=72)  # a pixel is a point
        axes = figure.add_axes((0.075, 0.15, 0.9, 0.715))
        _image_axes(axes, across, up)
        _image_points(axes, points)
        _image_names(axes, points)
        figure.text(0.03, 0.948, title, fontsize=14, fontweight="bold")
        figure.text(0.03, 0.03, caption, fontsize=9, color=COLOURS["peer"])
        try:
            figure.savefig(path, dpi=200, metadata=SUFFIXES[path.suffix.lower()])
        except OSError as error:
            raise OutputError(f"figure {path} cannot be written: {error.strerror}") from error


def _frontier(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    return sorted((point for point in points if point.kind == "plan"), key=lambda point: point.nbytes)


class Canvas:
    """Characters in rows, the highest divergence in the first. nameless: points whose names had no room."""

    def __init__(self, columns: int, rows: int, across: Axis, up: Axis) -> None:
        self.columns, self.rows, self.across, self.up = columns, rows, across, up
        self.cells = [[" "] * columns for _ in range(rows)]
        self.nameless: list[FrontierPoint] = []

    def column(self, nbytes: float) -> int:
        return round(self.across.at(nbytes) * (self.columns - 1))

    def row(self, divergence: float) -> int:
        return round((1 - self.up.at(divergence)) * (self.rows - 1))

    def draw(self, points: Sequence[FrontierPoint]) -> None:
        """The frontier, then markers, then the names of all but plans."""
        for left, right in pairwise(_frontier(points)):
            self._segment(left, right)
        for point in points:
            self.cells[self.row(point.divergence)][self.column(point.nbytes)] = MARKERS[point.kind][not point.measured]
        for point in points:
            if point.kind != "plan":
                self._name(point, points)

    def _segment(self, left: FrontierPoint, right: FrontierPoint) -> None:
        """A line of Braille dots, two across and four down in a character."""
        (x, y), (to_x, to_y) = self._dot(left), self._dot(right)
        steps = max(abs(to_x - x), abs(to_y - y), 1)
        for i in range(steps + 1):
            across, down = x + (to_x - x) * i // steps, y + (to_y - y) * i // steps
            row = self.cells[down // 4]
            dots = 0x2800 if row[across // 2] == " " else ord(row[across // 2])
            row[across // 2] = chr(dots | BRAILLE[across % 2][down % 4])

    def _dot(self, point: FrontierPoint) -> tuple[int, int]:
        """The dot in the middle of the point's character."""
        return 2 * self.column(point.nbytes), 4 * self.row(point.divergence) + 1

    def _name(self, point: FrontierPoint, points: Sequence[FrontierPoint]) -> None:
        """Write the point's name if there is room: two columns from other markers, or it would seem to be theirs."""
        marker, inside = self._box(point), Box(0, 0, self.columns, self.rows)
        others = [box for box in map(self._box, points) if box != marker]
        taken = [*self._written(), *(Box(box.x - 2, box.y, 5, 1) for box in others)]
        box = place(marker, len(point.name) + 2, 1, taken, inside)
        if box.shared(inside) < box.area or any(box.shared(other) for other in taken):
            self.nameless.append(point)
        else:
            start = int(box.x) + 1
            self.cells[int(box.y)][start : start + len(point.name)] = point.name

    def _box(self, point: FrontierPoint) -> Box:
        return Box(self.column(point.nbytes), self.row(point.divergence), 1, 1)

    def _written(self) -> Iterator[Box]:
        for y, row in enumerate(self.cells):
            yield from (Box(x, y, 1, 1) for x, cell in enumerate(row) if cell != " ")

    def ruler(self) -> tuple[str, str]:
        """The lower edge with its ticks, and what is written below them."""
        edge, text = ["─"] * self.columns, [" "] * (self.columns + 1)
        for tick, written in self.across.ticks.items():
            column = self.column(tick)
            edge[column] = "┬"
            start = min(max(column - len(written) // 2, 0), len(text) - len(written))
            text[start : start + len(written)] = written
        return "".join(edge), "".join(text)


def _key(points: Sequence[FrontierPoint]) -> str:
    """What the markers mean, of those kinds that occur."""
    kinds = [kind for kind in KINDS if any(point.kind == kind for point in points)]
    named = [f"{MARKERS[kind][0]} {KINDS[kind]}" for kind in kinds]
    hollow = "".join(MARKERS[kind][1] for kind in kinds)
    return "   ".join([*named, f"{hollow} predicted"] if not all(point.measured for point in points) else named)


def _unwritten(points: Sequence[FrontierPoint], width: int) -> list[str]:
    """Lines that name points by where they lie."""
    named = [f"{MARKERS[p.kind][not p.measured]} {p.name} {size(p.nbytes)}, {number(p.divergence, 2)}" for p in points]
    lines = wrap(";  ".join(name.replace(" ", "\0") for name in named), width, break_long_words=False)
    return [line.replace("\0", " ") for line in (["without room for their names:", *lines] if named else [])]


def _image_axes(axes: Axes, across: Axis, up: Axis) -> None:
    axes.set_yscale("log")
    axes.set_xlim(across.low, across.high)
    axes.set_ylim(up.low, up.high)
    axes.set_xticks(list(across.ticks), list(across.ticks.values()))
    axes.set_yticks(list(up.ticks), list(up.ticks.values()))
    axes.minorticks_off()
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=COLOURS["peer"], pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["peer"])
    axes.set_xlabel(across.label, color=INK, labelpad=8)
    axes.set_ylabel(up.label, color=INK, rotation=0, ha="left")
    axes.yaxis.set_label_coords(-0.05, 1.03)


def _image_points(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    plans = _frontier(points)
    axes.plot([p.nbytes for p in plans], [p.divergence for p in plans], color=COLOURS["plan"], linewidth=1.8)
    for point in points:
        axes.plot(point.nbytes, point.divergence, zorder=3, **_style(point.kind, measured=point.measured))
    for kind, label in KINDS.items():
        if any(point.kind == kind for point in points):
            axes.plot([], [], label=label, **_style(kind, measured=True))
    if not all(point.measured for point in points):
        axes.plot([], [], label="hollow: predicted", **_style("plan", measured=False) | {"markeredgecolor": INK})
    axes.legend(loc="upper right", framealpha=1, edgecolor="white", handletextpad=0.3, labelspacing=0.5)


def _style(kind: str, *, measured: bool) -> dict[str, Any]:
    filling, edge = (COLOURS[kind], "white") if measured else ("white", COLOURS[kind])
    return {
        "marker": SHAPES[kind],
        "markersize": (6.8 if kind == "preset" else 7.8) - (0 if measured else 1.4),  # in sum they look equally large
        "markerfacecolor": filling,
        "markeredgecolor": edge,
        "markeredgewidth": 0.8 if measured else 1.4,
        "linestyle": "none",
    }


def _image_names(axes: Axes, points: Sequence[FrontierPoint]) -> None:
    """Names beside the markers of presets and peers, joined to them by a hair where there was no room nearby."""
    at = {point: axes.transData.transform((point.nbytes, point.divergence)) for point in points}
    markers = {point: Box(x - 4.5, y - 4.5, 9, 9) for point, (x, y) in at.items()}
    taken = [*markers.values(), *_along([at[point] for point in _frontier(points)])]
    legend = axes.get_legend()
    taken += [_box(legend)] if legend else []
    for point in points:
        if point.kind != "plan":
            taken.append(_name(axes, point, markers[point], taken))


def _name(axes: Axes, point: FrontierPoint, marker: Box, taken: Sequence[Box]) -> Box:
    """Write the point's name and return where."""
    text = _beside(axes, point, (0, 0), point.name, va="bottom", color=COLOURS[point.kind], fontsize=9)
    written = _box(text)
    box = place(marker, written.width, written.height, taken, _box(axes), gap=2.5, reach=3)
    x, y = box.x - marker.x - marker.width / 2, box.y - marker.y - marker.height / 2
    text.set_position((x, y))
    if abs(y + box.height / 2) > 1.5 * box.height:
        end = (min(max(0, x), x + box.width), y if y > 0 else y + box.height)
        _beside(axes, point, end, "", arrowprops=HAIR | {"color": COLOURS[point.kind]})
    return box


def _beside(axes: Axes, point: FrontierPoint, offset: tuple[float, float], text: str, **settings: Any) -> Annotation:
    """A text so many points to the right of a point of the figure and above it."""
    at = (point.nbytes, point.divergence)
    return axes.annotate(text, at, xytext=offset, textcoords="offset points", **settings)


def _box(drawn: Artist) -> Box:
    return Box(*drawn.get_window_extent().bounds)


def _along(corners: Sequence[Any]) -> Iterator[Box]:
    """Small boxes along a line through these corners, (x, y) each."""
    for (x, y), (to_x, to_y) in pairwise(corners):
        steps = math.ceil(math.hypot(to_x - x, to_y - y) / 3)
        for i in range(steps):
            yield Box(x + (to_x - x) * i / steps - 1.5, y + (to_y - y) * i / steps - 1.5, 3, 3)
