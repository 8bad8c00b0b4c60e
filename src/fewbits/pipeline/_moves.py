"""Which format each tensor moves to: the smallest one of the target's that holds its very numbers.

Nothing is decided by names of formats. The candidates are those that the target kind admits at this name and shape: the
source's own first, then those with its groups, then the others, by size. Each is tried on the tensor itself, a few rows
first and then all, and the first that holds every number is taken. So a tensor costs one more reading, and what is
written is known to be exact before a byte of it is.

Matrices stay quantized, or are refused with the reason of the candidate nearest in size; embeddings and the projection
to the vocabulary, which many kinds keep in floating point, may be decoded, into the smallest type that holds them.
Where rounding is allowed, the candidate of the source's bits and size with the least error takes what none holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from threading import Event

import torch

from fewbits.checkpoint import Entry, Kind, Reader
from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import FORMATS, Float, Format, QTensor
from fewbits.formats.base import SCALE_TYPES
from fewbits.models import Piece, Role
from fewbits.pipeline._parts import numbers_of, part_in, spans

BF16, FP16, FP32 = Float(torch.bfloat16), Float(torch.float16), Float(torch.float32)
VOCABULARY = (Role.EMBEDDING, Role.OUTPUT)
TRIED = 1 << 12  # weights that a candidate has to hold before it is tried on all
MEASURED = 1 << 16  # weights that candidates for rounding are compared on
LARGER = 1.1  # than the source, at most, is what is rounded to


@dataclass(frozen=True)
class Wish:
    """What is asked of the target. names: of all its tensors. format: of matrices, None for what follows from them."""

    kind: Kind
    names: Collection[str]
    format: Format | None = None


@dataclass(frozen=True)
class Move:
    """Where a tensor goes: with its numbers, or rounded; nowhere where format is None. reason: why not with them."""

    piece: Piece
    before: Format
    format: Format | None
    rounded: bool = False
    reason: str | None = None


def move(reader: Reader, piece: Piece, wish: Wish, stop: Event) -> Move:
    """The best candidate for a piece."""
    before = reader.entries[piece.source].format
    reasons: list[tuple[tuple[int, int], str]] = []
    for format in candidates(before, piece, wish):
        try:
            trouble = _trouble(reader, piece, format, wish.kind, stop)
        except FormatError as error:
            reasons.append((_distance(format, before, piece.shape), str(error)))
            continue
        if trouble is None:
            return Move(piece, before, format)
        reasons = [((0, 0), trouble)]  # the numbers fit the format and not the file: a wider format is no answer
        break
    reason = min(reasons, key=lambda each: each[0])[1] if reasons else _not_admitted(before, piece, wish)
    return Move(piece, before, None, reason=reason)


def with_rounding(reader: Reader, moves: Sequence[Move], wish: Wish) -> list[Move]:
    """The moves, those that led nowhere with a format to round to: one for all tensors of a source format, where it
    can be.
    """
    found: dict[Format, Format] = {}
    made = []
    for each in moves:
        if each.format is None:
            format = found.get(each.before)
            if format is None or not _admitted(format, each.piece, wish):
                format = found[each.before] = rounded_format(reader, each.piece, wish)
            made.append(replace(each, format=format, rounded=True))
        else:
            made.append(each)
    return made


def keeps(reader: Reader, piece: Piece, kind: Kind) -> bool:
    """Whether a kind holds a piece in its own format."""
    before = reader.entries[piece.source].format
    entry = kind.entry(piece.name, piece.shape, before)
    return kind.admits(entry) is None and _trouble(reader, piece, before, kind, Event()) is None


def candidates(before: Format, piece: Piece, wish: Wish) -> Iterator[Format]:
    """Formats that could hold a piece, in the order in which they are tried."""
    every: list[Format]
    if isinstance(before, Float):
        asked = wish.format if isinstance(wish.format, Float) and before.dtype.is_floating_point else before
        every = [asked, FP32] if len(piece.shape) < 2 else [asked]  # GGUF has vectors in FP32 only
    elif isinstance(wish.format, Float):
        every = [wish.format]
    elif wish.format is not None and piece.role not in VOCABULARY:
        every = in_all_scales(wish.format)
    else:
        every = [f for f in (before, *_alike(before, piece.shape)) if _admitted(f, piece, wish)]
        every += [FP16, BF16, FP32] if piece.role in VOCABULARY or not every else []
    return (format for format in dict.fromkeys(every) if _admitted(format, piece, wish))


def in_all_scales(format: Format) -> list[Format]:
    """A format with its scales in each type that it can have them in, as it is first."""
    return list(dict.fromkeys((format, *(format.with_scales_in(dtype) for dtype in SCALE_TYPES))))


def rounded_format(reader: Reader, piece: Piece, wish: Wish) -> Format:
    """The format to round to: of the candidates no larger than the source and nearest to its bits, that with the least
    error.

    Raises UnsupportedError where the kind has none.
    """
    before = reader.entries[piece.source].format
    found = list(candidates(before, piece, wish))
    if not found:
        raise UnsupportedError(_not_admitted(before, piece, wish))
    most = LARGER * before.nbytes(piece.shape)
    small = [format for format in found if format.nbytes(piece.shape) <= most] or found[:1]
    bits = min(_bits_apart(format, before) for format in small)
    near = [format for format in small if _bits_apart(format, before) == bits]
    numbers = numbers_of(reader, piece, next(iter(spans(piece, before, elements=MEASURED))))
    return min(near, key=lambda format: _error(numbers, format, piece, wish.kind))


def rounded(numbers: torch.Tensor, format: Format) -> QTensor:
    """Numbers in a format that does not hold them all: its params searched, its codes the nearest."""
    params = format.fit(numbers, search=True)
    return QTensor(format, format.round(numbers, params), params)


def smallest_float(reader: Reader, pieces: Collection[Piece]) -> Float:
    """The smallest of BF16, FP16 and FP32 that holds every number of the model."""
    floating = [piece for piece in pieces if not _is_integer(reader, piece)]
    for format in (BF16, FP16):
        if all(_holds(reader, piece, format) for piece in floating):
            return format
    return FP32


def _is_integer(reader: Reader, piece: Piece) -> bool:
    """Whether a piece is a buffer of integers, which has no format but its own."""
    format = reader.entries[piece.source].format
    return isinstance(format, Float) and not format.dtype.is_floating_point


def _holds(reader: Reader, piece: Piece, format: Format) -> bool:
    try:
        for rows in spans(piece, reader.entries[piece.source].format, format):
            part_in(reader, piece, rows, format)
    except FormatError:
        return False
    return True


def _trouble(reader: Reader, piece: Piece, format: Format, kind: Kind, stop: Event) -> str | None:
    """Why the kind cannot store these numbers in `format`. Raises FormatError where the format cannot hold them."""
    before, entry = reader.entries[piece.source].format, Entry(piece.name, piece.shape, format)
    few = next(iter(spans(piece, before, format, elements=TRIED)))
    for rows in chain((few,), spans(piece, before, format)):
        if stop.is_set():
            return None
        trouble = kind.number_trouble(entry, part_in(reader, piece, rows, format))
        if trouble is not None:
            return trouble
    return None


def _alike(before: Format, shape: tuple[int, ...]) -> list[Format]:
    """Every quantized format in which a tensor of this shape can be: those with the same groups first, then by size."""
    every = dict.fromkeys(scaled for format in FORMATS.values() for scaled in in_all_scales(format))
    fitting = [format for format in every if not isinstance(format, Float) and _fits(format, shape)]
    group = getattr(before, "group", None)
    return sorted(fitting, key=lambda format: (getattr(format, "group", None) != group, format.nbytes(shape)))


def _fits(format: Format, shape: tuple[int, ...]) -> bool:
    try:
        format.check(shape)
    except FormatError:
        return False
    return True


def _admitted(format: Format, piece: Piece, wish: Wish) -> bool:
    entry = wish.kind.entry(piece.name, piece.shape, format)
    return _fits(format, piece.shape) and wish.kind.admits_beside(entry, wish.names) is None


def _bits_apart(a: Format, b: Format) -> int:
    return abs(len(a.cells) - len(b.cells))


def _distance(a: Format, b: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    """How unlike two formats are: in bits of a code, then in bytes."""
    return _bits_apart(a, b), abs(a.nbytes(shape) - b.nbytes(shape))


def _not_admitted(before: Format, piece: Piece, wish: Wish) -> str:
    """Why the kind takes no candidate at all."""
    format = wish.format or before
    entry = wish.kind.entry(piece.name, piece.shape, format)
    return wish.kind.admits_beside(entry, wish.names) or f"{piece.name}: {format} does not hold {before}'s numbers"


def _error(numbers: torch.Tensor, format: Format, piece: Piece, kind: Kind) -> float:
    """Squared error of rounding; infinite where that cannot be stored."""
    try:
        q = rounded(numbers, format)
    except FormatError:
        return torch.inf
    if kind.number_trouble(Entry(piece.name, piece.shape, format), q) is not None:
        return torch.inf
    return float((q.dequantize() - numbers).square().sum())
