"""Where labels go beside their markers, for figures in characters and in points alike.

Each label tries the places around its marker, nearest first, and takes the one that covers least of what is there:
markers, lines, and labels that have found their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FURTHER = 0.02  # what a place further away costs; covering something whole costs 1
OUTSIDE = 10.0  # what it costs to lie outside the figure


@dataclass(frozen=True)
class Box:
    """A rectangle from (x, y) on, y growing in whichever direction the figure's does."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)


def place(
    marker: Box, width: float, height: float, taken: Sequence[Box], inside: Box, gap: float = 0.0, reach: int = 1
) -> Box:
    """The best place for a label of this size inside the figure, `gap` beside the marker or up to `reach` lines off."""

    def cost(candidate: tuple[int, Box]) -> float:
        rank, box = candidate
        covered = sum(box.shared(other) / min(box.area, other.area) for other in taken)
        return covered + OUTSIDE * (1 - box.shared(inside) / box.area) + FURTHER * rank

    return min(enumerate(_around(marker, width, height, gap, reach)), key=cost)[1]


def _around(marker: Box, width: float, height: float, gap: float, reach: int) -> Iterator[Box]:
    """Places to the right, to the left, above and below, then the same further off."""
    right, left = marker.x + marker.width + gap, marker.x - gap - width
    centred = marker.x + (marker.width - width) / 2
    level = marker.y + (marker.height - height) / 2
    yield Box(right, level, width, height)
    yield Box(left, level, width, height)
    for lines in range(1, reach + 1):
        for y in (level + lines * height, level - lines * height):
            yield from (Box(x, y, width, height) for x in (right, left, centred))
