"""Round to nearest: the baseline that everything else is measured against.

`rtn` first searches the scales for the least squared error (weighted by importance where it is known), then rounds.
`rtn-plain` takes the scales from each group's range and rounds as the format's reference encoder does: for GGUF blocks
the bytes are those of llama-quantize without an importance matrix. It is several times faster, and at 4 bits and below
clearly worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format, QTensor
from fewbits.methods.base import TensorMethod


@dataclass(frozen=True)
class RoundToNearest(TensorMethod):
    """The nearest code of every number, at searched scales."""

    summary: ClassVar[str] = "nearest code, at scales searched for the least squared error"
    wants: ClassVar[tuple[str, ...]] = ("importance",)

    @property
    def name(self) -> str:
        return "rtn"

    def quantize(self, w: Tensor, format: Format, stats: Mapping[str, Tensor]) -> QTensor:
        params = format.fit(w, column_weights(w, stats.get("importance")), search=True)
        return QTensor(format, format.round(w, params), params)


@dataclass(frozen=True)
class PlainRounding(TensorMethod):
    """The format's reference encoding. Raises UnsupportedError if it is given an importance, which it cannot use."""

    summary: ClassVar[str] = "nearest code, at scales from the range: fast, and byte for byte the reference encoder's"

    @property
    def name(self) -> str:
        return "rtn-plain"

    def quantize(self, w: Tensor, format: Format, stats: Mapping[str, Tensor]) -> QTensor:
        if "importance" in stats:
            raise UnsupportedError("rtn-plain takes scales from the range and cannot weigh errors; use rtn")
        codes, params = format.plain(w)
        return QTensor(format, codes, params)


def column_weights(w: Tensor, importance: Tensor | None) -> Tensor | None:
    """Importance of the columns ([K], [experts, K]) or of each number, as it broadcasts to w [..., N, K]."""
    if importance is None or importance.dim() in (1, w.dim()):
        return importance
    return importance.unsqueeze(-2)


RTN = (RoundToNearest(), PlainRounding())
