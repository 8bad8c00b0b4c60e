"""Matrices that lie down: a format whose groups run along the last but one dimension of the tensor.

gpt-oss keeps the experts of a layer in one parameter [E, in_features, out_features] and multiplies x · W, but its file
has each of them [out_features, in_features] in MXFP4, 32 inputs to a scale. So the tensor's numbers are those of
`inner` with the last two dimensions exchanged, and the bytes are `inner`'s own. At least one dimension lies before
these two, and can be cut anywhere. Nothing here is solved: it is what other people's checkpoints are read in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.base import Arrays, ArraySpec, Format, Grouped, Params


@dataclass(frozen=True)
class Turned(Format):
    """Codes [..., K, N]; params of `inner`, [..., N, G]."""

    inner: Grouped

    summary = "matrices that lie down, [in_features, out_features], their bytes upright"
    purpose = "experts of gpt-oss"
    columnwise = False

    @property
    def name(self) -> str:
        return f"{self.inner.name}-turned"

    @property
    def cells(self) -> str:
        return self.inner.cells

    @property
    def levels(self) -> Tensor | None:
        return self.inner.levels

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 3:
            raise FormatError(
                f"{self.name}: {list(shape)} has no dimension before the two of a matrix; use {self.inner}"
            )
        self.inner.check(_turned(shape))

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return self.inner.arrays(_turned(shape))

    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        """importance: broadcastable to w, as everywhere, so of an input it is [K, 1] here."""
        self.check(tuple(w.shape))
        weights = None if importance is None else importance.expand(w.shape).mT
        return self.inner.fit(w.mT, weights, search=search)

    def round(self, w: Tensor, params: Params) -> Tensor:
        return self.inner.round(w.mT, params).mT.contiguous()

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.inner.decode(codes.mT, params).mT.contiguous()

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return self.inner.pack(codes.mT.contiguous(), params)

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        codes, params = self.inner.unpack(arrays, _turned(shape))
        return codes.mT.contiguous(), params


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])
