"""Tensors of an output as the source holds them: codes and params of some rows, or their numbers.

A piece may be an expert's matrix of a fused parameter, have its rows in another order, or something added (`Piece`).
Codes and params keep to their row, so an order of rows is one of both; a format whose rows share params is first
recoded into one where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fewbits.checkpoint import Reader
from fewbits.engine.tiling import taken
from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format, QTensor
from fewbits.formats.recode import recode
from fewbits.models import Piece, interleaved_order
from fewbits.pipeline._source import read_rows, row_step

PART = 1 << 20  # weights at a time, where rows can be taken apart


def spans(piece: Piece, *formats: Format, elements: int = PART) -> Iterator[range]:
    """The rows of a piece, some at a time; all at once where one of these formats has params that rows share."""
    rows = piece.shape[0] if piece.shape else 1
    step = row_step(piece, elements) if all(format.rowwise for format in formats) else max(rows, 1)
    return (range(start, min(start + step, rows)) for start in range(0, rows, step) or (0,))


def part_in(reader: Reader, piece: Piece, rows: range, format: Format) -> QTensor:
    """Rows of a piece in `format`, exactly. Raises FormatError where it cannot hold the source's numbers."""
    q = _stored(reader, piece, rows)
    return recode(q, format) if isinstance(q.format, Float) else _ordered(recode(q, format), piece)


def numbers_of(reader: Reader, piece: Piece, rows: range) -> torch.Tensor:
    """The same rows as numbers, float32."""
    q = _stored(reader, piece, rows)
    w = QTensor(Float(torch.float32), q.dequantize(), {})
    return (w if isinstance(q.format, Float) else _ordered(w, piece)).codes


def added_exactly(reader: Reader, piece: Piece) -> bool:
    """Whether FP32 holds what a piece is once something is added to it."""
    if not piece.added:
        return True
    w = reader.read(piece.source).dequantize().double()
    return torch.equal((w + piece.added).float().double(), w + piece.added)


def _stored(reader: Reader, piece: Piece, rows: range) -> QTensor:
    """Rows of a piece. Quantized ones are in the source's order, all others in that of the output."""
    format = reader.entries[piece.source].format
    if isinstance(format, Float):
        w = read_rows(reader, piece, rows.start, rows.stop)
        return QTensor(Float(w.dtype), w, {})
    if piece.transposed:
        raise UnsupportedError(
            f"{piece.source} is {format} along its inputs, and {piece.name} lies the other way round; write fewbits, "
            "which keeps fused experts as they are"
        )
    first = piece.rows[0] if piece.rows else 0
    span = slice(first + rows.start, first + rows.stop)
    if piece.expert is not None:
        return taken(_expert(reader, piece, piece.expert), span)
    return reader.read(piece.source, span if format.rowwise else None)


def _expert(reader: Reader, piece: Piece, number: int) -> QTensor:
    """One matrix of a parameter that holds those of all experts."""
    alone = reader.entries[piece.source].format.rowwise
    whole = reader.read(piece.source, slice(number, number + 1) if alone else None)
    which = 0 if alone else number
    return QTensor(whole.format, whole.codes[which], {key: param[which] for key, param in whole.params.items()})


def _ordered(q: QTensor, piece: Piece) -> QTensor:
    if piece.interleaved_heads is None:
        return q
    head = piece.shape[0] // piece.interleaved_heads
    return taken(q, interleaved_order(q.shape[0], q.shape[0] // head))
