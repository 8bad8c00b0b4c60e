"""A model card as the hub expects it: YAML in front, then what was lost, how to run it, and how it was made.

What nobody knows is left out of the front matter (the hub refuses a `base_model` that is no model of its own). Paths in
the command are cut to their last part: a card is public, and a reader has other folders.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from fewbits.findings import Report
from fewbits.report.page import by_format, environment
from fewbits.report.running import library, ways
from fewbits.report.svg import shown

MARKER = "<!-- written by fewbits report -->"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")  # that YAML takes for something else


def card(report: Report, base_model: str | None = None) -> str:
    """The card as text. base_model: OWNER/NAME on the hub, where the report does not know it."""
    base = base_model or report.base_model
    made = environment()
    made.filters["cell"] = cell
    text = made.get_template("card.md.j2").render(
        r=report,
        front=front_matter(report, base),
        marker=MARKER,
        base=f"[{base}](https://huggingface.co/{base})" if base else cell(report.source or ""),
        formats=by_format(report.tensors),
        ways=ways(report.kind, report.name),
        command=None if report.made_by is None else without_folders(report.made_by),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def front_matter(report: Report, base: str | None) -> Mapping[str, str | Sequence[str]]:
    """Key -> value or values, as YAML takes them."""
    found: dict[str, str | Sequence[str]] = {}
    if base:
        found["base_model"] = yaml(base)
        found["base_model_relation"] = "quantized"
    if report.license:
        found["license"] = yaml(report.license)
    found["library_name"] = library(report.kind)
    if report.language_model:
        found["pipeline_tag"] = "text-generation"
    formats = [each.format for each in by_format(tuple(t for t in report.tensors if not t.floating))]
    found["tags"] = [yaml(tag) for tag in dict.fromkeys(("fewbits", "quantized", report.kind, *formats))]
    return found


def yaml(text: str) -> str:
    """A string of YAML: plain where nothing in it means something, else as JSON writes it."""
    text = shown(text)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text, ensure_ascii=False)


def cell(text: str) -> str:
    """Text that stays in its line and its column, and is no markup."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", shown(text))


def without_folders(command: str) -> str:
    """A command with each absolute path cut to its last part."""
    try:
        words = shlex.split(command)
    except ValueError:  # somebody changed it
        words = command.split()
    return shown(shlex.join(PurePath(word).name if PurePath(word).is_absolute() else word for word in words))
