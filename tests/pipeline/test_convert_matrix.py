"""The table of docs/convert.md says what `convert` finds, for every format and kind in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Event

import pytest
import torch

from fewbits.checkpoint import KINDS, Entry, Reader
from fewbits.formats import FORMATS, QTensor
from fewbits.models import Piece, Role
from fewbits.pipeline._moves import Wish, move

DOCS = Path(__file__).parents[2] / "docs" / "convert.md"
NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (256, 512)
WEIGHTS = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


class One(Reader):
    """A checkpoint of one matrix."""

    def __init__(self, q: QTensor) -> None:
        self.path, self.config = Path("one"), {}
        self.entries = {NAME: Entry(NAME, q.shape, q.format)}
        self._q = q

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        if rows is None:
            return self._q
        params = {k: p[rows] if p.shape[0] == SHAPE[0] else p for k, p in self._q.params.items()}
        return QTensor(self._q.format, self._q.codes[rows], params)


@cache
def source(name: str) -> One:
    format = FORMATS[name]
    params = format.fit(WEIGHTS)
    return One(QTensor(format, format.round(WEIGHTS, params), params))


def found(before: str, kind: str) -> str:
    """As the table has it."""
    wish = Wish(KINDS[kind], {NAME})
    format = move(source(before), Piece(NAME, NAME, Role.LINEAR, SHAPE), wish, Event()).format
    return "–" if format is None else "as it is" if format.name == before else format.name


def table() -> Iterator[tuple[str, str, str]]:
    """(format, kind, cell)."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in DOCS.read_text().splitlines()
            if re.match(r"\| (from|[\w-]+ *\|)", line)]  # fmt: skip
    head = next(row for row in rows if row[0] == "from")
    for row in rows[rows.index(head) + 1 :]:
        if row[0] in FORMATS:
            yield from ((row[0], kind, cell) for kind, cell in zip(head[1:], row[1:], strict=True))


@pytest.mark.parametrize(("before", "kind", "cell"), list(table()))
def test_the_table(before: str, kind: str, cell: str) -> None:
    assert found(before, kind) == cell


def test_the_table_is_there() -> None:
    assert len({before for before, _, _ in table()}) > 20
