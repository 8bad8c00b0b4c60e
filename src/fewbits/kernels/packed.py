"""A weight as its bytes lie on disk, decoded a few rows at a time.

Codes take a byte each once they are unpacked, and numbers two or four. So whoever needs numbers takes them in blocks of
rows and drops them again: what stays in memory is the packed arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.formats import Format, QTensor
from fewbits.kernels.decode import Decoder, decoder, taken


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [out_features, in_features] in a format, as the named arrays of `Format.pack`."""

    format: Format
    shape: tuple[int, ...]
    arrays: Mapping[str, Tensor]

    @classmethod
    def of(cls, weight: QTensor) -> Packed:
        return cls(weight.format, weight.shape, weight.pack())

    @property
    def device(self) -> torch.device:
        return next(iter(self.arrays.values())).device

    def unpack(self) -> QTensor:
        """The whole tensor: a byte a weight, or more."""
        return QTensor.from_arrays(self.format, self.arrays, self.shape)

    def take(self, rows: slice | Tensor) -> QTensor:
        """Some rows, as a slice or as indices (int64 [R]).

        Only those rows are unpacked where the format is rowwise. A param that spans rows (a scale of the whole matrix)
        needs all of it unpacked first, a byte a weight.
        """
        if not self.format.rowwise:
            return taken(self.unpack(), rows)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        codes, params = self.format.unpack(arrays, (_count(arrays), *self.shape[1:]))
        return QTensor(self.format, codes, params)

    def rows(self, rows: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers of some rows, as a slice from start to stop or as indices (int64 [R]): [R, in_features]."""
        return self._numbers(decoder(self), rows, dtype)

    def blocks(self, dtype: torch.dtype, weights: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their numbers in `dtype`), block after block of so many weights."""
        decode, step = decoder(self), max(1, weights // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self._numbers(decode, rows, dtype)

    def _numbers(self, decode: Decoder, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        out = torch.empty((count, self.shape[1]), dtype=dtype, device=self.device)
        decode(rows, out)
        return out


def _count(arrays: Mapping[str, Tensor]) -> int:
    return next(iter(arrays.values())).shape[0]
