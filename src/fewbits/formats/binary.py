"""Binary: every weight is its sign times the group's scale.

The scale with the least squared error is the mean magnitude (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279,
section 3.1), importance-weighted where importance is known, so there is nothing left to search. One bit a weight and
the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats._bits import pack_bits, unpack_bits, words
from fewbits.formats.base import Arrays, ArraySpec, Lookup, Params, Scaled
from fewbits.formats.ternary import mean_magnitude


@dataclass(frozen=True)
class Binary(Scaled):
    """Codes 0 (minus) and 1 (plus), uint8. Param: scale."""

    summary: ClassVar[str] = "sign times scale"
    purpose: ClassVar[str] = "models trained with two values; others lose nearly all they know"

    @property
    def name(self) -> str:
        return f"binary{self.suffix}"

    @property
    def cells(self) -> str:
        return "S"

    @property
    def levels(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "signs": ArraySpec(torch.int32, (*shape[:-1], words(shape[-1], 1))),
            "scale": ArraySpec(self.scale_dtype, self.groups(shape)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        return {"scale": self.stored(mean_magnitude(x, importance))}

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return (x >= 0).to(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return (2.0 * codes - 1).mul_(params["scale"])

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"signs": pack_bits(codes, 1), "scale": params["scale"].to(self.scale_dtype)}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return unpack_bits(arrays["signs"], 1, shape[-1]), {"scale": arrays["scale"].float()}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        return self._lookup(arrays["signs"], shape, self.levels, arrays["scale"].float())


BINARY = (Binary(), Binary(group=64), Binary(group=128), Binary(group="tensor"))
