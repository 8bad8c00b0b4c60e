"""A weight as its bytes lie on disk, decoded a few rows at a time.

Codes take a byte each once they are unpacked, and the unpacking itself up to eight bytes a weight. So whoever needs
numbers takes them in blocks of rows and drops them again: what stays in memory is the packed arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fewbits.formats import Format, QTensor

BLOCK = 1 << 18
"""Weights decoded at a time: 1 MB of float32, which stays in a core's cache until it is multiplied."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [out_features, in_features] in a format, as the named arrays of `Format.pack`."""

    format: Format
    shape: tuple[int, ...]
    arrays: Mapping[str, Tensor]

    @classmethod
    def of(cls, weight: QTensor) -> Packed:
        return cls(weight.format, weight.shape, weight.pack())

    def unpack(self) -> QTensor:
        """The whole tensor: a byte a weight, or more."""
        return QTensor.from_arrays(self.format, self.arrays, self.shape)

    def take(self, rows: slice | Tensor) -> QTensor:
        """Some rows, as a slice or as indices (int64 [R]).

        Only those rows are unpacked where the format is rowwise. A param that spans rows (a scale of the whole matrix)
        needs all of it unpacked first, a byte a weight.
        """
        if not self.format.rowwise:
            return _take(self.unpack(), rows)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        codes, params = self.format.unpack(arrays, (_count(arrays), *self.shape[1:]))
        return QTensor(self.format, codes, params)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their numbers as float32), block after block."""
        source = self if self.format.rowwise else self.unpack()
        step = max(1, BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            part = source.take(rows) if isinstance(source, Packed) else _take(source, rows)
            yield rows, part.dequantize()


def _take(weight: QTensor, rows: slice | Tensor) -> QTensor:
    """Rows of an unpacked matrix: a param has a row for each of them, or is shared by all."""
    n = weight.shape[0]
    params = {key: p[rows] if p.dim() > 1 and p.shape[0] == n else p for key, p in weight.params.items()}
    return QTensor(weight.format, weight.codes[rows], params)


def _count(arrays: Mapping[str, Tensor]) -> int:
    return next(iter(arrays.values())).shape[0]
