"""What stands in a drawn figure, read from its SVG."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from fewbits.report.svg import FONT, text_width

SLACK = 0.11  # of a coordinate, which is rounded to a tenth


@dataclass(frozen=True)
class Label:
    """A text and the box that it takes, by the estimate of its width."""

    text: str
    left: float
    right: float
    top: float
    bottom: float


def parsed(svg: str) -> ET.Element:
    """The root; raises where the SVG is not well-formed."""
    return ET.fromstring(svg)


def labels(root: ET.Element) -> list[Label]:
    """All that are level."""
    return [_label(each) for each in root.iter("text") if "transform" not in each.attrib]


def _label(each: ET.Element) -> Label:
    size, text = float(each.get("font-size", FONT)), each.text or ""
    width, x, y = text_width(text, size), float(each.attrib["x"]), float(each.attrib["y"])
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[each.get("text-anchor", "start")]
    return Label(text, left, left + width, y - size, y + 0.3 * size)


def turned(root: ET.Element) -> list[tuple[float, float]]:
    """Where labels end that rise at an angle."""
    found = []
    for each in root.iter("text"):
        if "transform" in each.attrib:
            x, y, degrees = map(float, re.findall(r"-?[\d.]+", each.attrib["transform"]))
            length, angle = text_width(each.text or "", float(each.attrib["font-size"])), math.radians(-degrees)
            found.append((x + length * math.cos(angle), y - length * math.sin(angle)))
    return found


def assert_inside(root: ET.Element) -> None:
    """No label leaves the view box."""
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for x, y in turned(root):
        assert -SLACK <= x <= width + SLACK
        assert -SLACK <= y <= height + SLACK
    for label in labels(root):
        assert label.left >= -SLACK, label
        assert label.right <= width + SLACK, label
        assert label.top >= -SLACK, label
        assert label.bottom <= height + SLACK, label


def tips(root: ET.Element) -> list[str]:
    return [each.text or "" for each in root.iter("title")]


def marks(root: ET.Element, name: str, class_: str) -> list[ET.Element]:
    return [each for each in root.iter(name) if class_ in each.get("class", "").split()]
