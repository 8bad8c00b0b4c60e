"""The page of a run: one HTML file that asks nothing of a network, needs no JavaScript, and prints.

Text stands in `page.html.j2`, looks in `style.css`, figures are drawn by `plots`. Everything that comes from files
(names, tokens, commands) is escaped by the template.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fewbits.findings import ReadToken, Report, TensorFacts
from fewbits.report import figures
from fewbits.report.numbers import count, number, size
from fewbits.report.running import ways
from fewbits.report.svg import shown

HERE = Path(__file__).parent
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Divergences, nats, from which on a token of a passage has the next stronger colour."""

DRAWN: dict[str, Callable[[Report], str | None]] = {
    "frontier": figures.frontier,
    "bit_map": figures.bit_map,
    "error_map": figures.error_map,
    "layer_errors": figures.layer_errors,
    "positions": figures.positions,
    "distribution": figures.distribution,
    "certainty": figures.certainty,
    "memory": figures.memory,
    "losses": figures.losses,
}


def page(report: Report) -> str:
    """The page as text."""
    drawn = {name: None if (made := draw(report)) is None else Markup(made) for name, draw in DRAWN.items()}
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            r=report,
            figures=drawn,
            histograms=[(name, Markup(made)) for name, made in figures.weights(report)],
            points=sorted(figures.points_of(report), key=lambda point: point.nbytes),
            outside=[t for t in report.tensors if t.layer is None and len(t.shape) >= 2],
            formats=by_format(report.tensors),
            ways=ways(report.kind, report.name),
            style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
            steps=STEPS,
            step=step,
        )
    )


@cache
def environment() -> Environment:
    """Templates beside this file, with numbers in words as filters."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "size": size,
        "count": count,
        "number": number,
        "percent": percent,
        "shown": shown,
        "token": token,
        "shape": lambda shape: "×".join(map(str, shape)),
        "step": step,
        "plural": lambda n, name: f"{n:,} {name}" if n == 1 else f"{n:,} {name}s",
    }
    return made


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def token(text: str) -> str:
    """A token's text with its spaces to be seen."""
    return shown(text).replace(" ", "␣")


def step(token: ReadToken) -> int:
    """How strong the colour of a passage's token is, from 0 on."""
    return 0 if token.kld is None else sum(token.kld >= limit for limit in STEPS)


@dataclass(frozen=True)
class ByFormat:
    """The tensors of one format. error: the root of the mean square, by weights; None where no one knows it."""

    format: str
    tensors: int
    weights: int
    nbytes: int
    error: float | None


def by_format(tensors: tuple[TensorFacts, ...]) -> list[ByFormat]:
    """Formats of most bytes first."""
    groups: dict[str, list[TensorFacts]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.format, []).append(tensor)
    made = [_summed(format, members) for format, members in groups.items()]
    return sorted(made, key=lambda each: -each.nbytes)


def _summed(format: str, members: list[TensorFacts]) -> ByFormat:
    known = [(t.weights, t.error) for t in members if t.error is not None]
    weights = sum(w for w, _ in known)
    error = math.sqrt(sum(w * e**2 for w, e in known) / weights) if weights else None
    return ByFormat(format, len(members), sum(t.weights for t in members), sum(t.nbytes for t in members), error)
