"""SVG by hand: elements as strings, and a drawing that keeps its labels inside.

A figure is inlined into a page, whose style sheet colours its classes (`ink`, `muted`, `grid`, `accent` …), so the same
figure serves light and dark mode. Coordinates are rounded to a tenth, which keeps pages small. Widths of text are
estimated, a little on the large side, because whoever draws does not know the reader's font.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]

FONT = 13.0  # of labels, in units of the view box
NARROW, WIDE = " !'(),.:;I[]`fijlrt|", "%@MWm—…"
WIDTHS = {"narrow": 0.36, "wide": 0.98, "capital": 0.72, "usual": 0.6, "full": 1.05}  # of a character, in ems
CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", 0x0A: "⏎", 0x09: "⇥", 0x0D: "␍"}


def shown(text: str) -> str:
    """Text in which everything can be seen: control characters, which XML forbids, as their pictures."""
    visible = text.translate(CONTROLS)
    return "".join("�" if _unseen(c) else c for c in visible)


def _unseen(character: str) -> bool:
    """Whether a character is a control, a line's end, half of a pair, or none at all."""
    return unicodedata.category(character) in ("Cs", "Cc", "Zl", "Zp") or character in "\ufffe\uffff"


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is at a font's size."""
    return size * sum(map(_ems, text))


def _ems(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return WIDTHS["full"]
    if character in NARROW:
        return WIDTHS["narrow"]
    if character in WIDE:
        return WIDTHS["wide"]
    return WIDTHS["capital" if character.isupper() else "usual"]


def fitted(text: str, width: float, size: float = FONT) -> str:
    """The text, or its beginning with an ellipsis, within a width."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…" if text else ""


def number(x: float) -> str:
    """A coordinate, to a tenth."""
    return f"{x:.1f}".removesuffix(".0").replace("-0", "0") if abs(x) < 0.05 else f"{x:.1f}".removesuffix(".0")


def element(name: str, *children: str, **attributes: str | float | None) -> str:
    """An element. Underscores of attributes become hyphens, a final one is dropped (`class_`); None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>"


def titled(text: str | None) -> tuple[str, ...]:
    """What a pointer that rests on an element is told."""
    return () if text is None else (element("title", escape(shown(text), quote=False)),)


class Drawing:
    """A figure of a width and a height, described by `label` to those who do not see it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._elements: list[str] = []

    def add(self, name: str, tip: str | None = None, **attributes: str | float | None) -> None:
        self._elements.append(element(name, *titled(tip), **attributes))

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def polyline(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        self.add("polyline", points=_joined(points), class_=class_)

    def polygon(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        self.add("polygon", points=_joined(points), class_=class_)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        class_: str = "muted",
        anchor: Anchor = "start",
        size: float = FONT,
    ) -> None:
        """A label that begins, is centred or ends at x; moved or shortened where it would leave the figure."""
        words = fitted(shown(words), self.width, size)
        width = text_width(words, size)
        before = {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        x = min(max(x, before), self.width - width + before)
        y = min(max(y, size), self.height - 0.3 * size)
        self._elements.append(
            element(
                "text",
                escape(words, quote=False),
                x=x,
                y=y,
                class_=class_,
                text_anchor=None if anchor == "start" else anchor,
                font_size=None if size == FONT else size,
            )
        )

    def turned_text(self, x: float, y: float, words: str, degrees: float, size: float) -> None:
        """A label that begins at (x, y) and rises; shortened where it would leave the figure."""
        angle = math.radians(-degrees)
        room = min((self.width - x - size) / math.cos(angle), (y - size) / math.sin(angle))
        words = fitted(shown(words), max(room, 0.0), size)
        turn = f"translate({number(x)} {number(y)}) rotate({number(degrees)})"
        self._elements.append(
            element("text", escape(words, quote=False), transform=turn, class_="muted", font_size=size)
        )

    def render(self) -> str:
        """The <svg> element."""
        box = f"0 0 {number(self.width)} {number(self.height)}"
        label = shown(self.label)
        return element("svg", *self._elements, viewBox=box, role="img", aria_label=label, font_size=FONT)


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
