"""Ternary: every weight is −scale, 0 or +scale.

The scale that rounding starts from is the group's mean magnitude, and a weight becomes 0 below half of it (BitNet
b1.58, Ma et al. 2024, arXiv:2402.17764, equation 3); the search then takes the threshold that leaves the least squared
error, with the scale that is best for it (Li and Liu 2016, arXiv:1605.04711).
Five trits share a byte in base 3: 1.6 bits a weight and the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats._bits import pack_trits, unpack_trits
from fewbits.formats._search import best_scale, inverse, weighted_sum
from fewbits.formats.base import Arrays, ArraySpec, Params, Scaled


@dataclass(frozen=True)
class Ternary(Scaled):
    """Codes −1, 0, 1 (int8). Param: scale."""

    summary: ClassVar[str] = "−scale, 0 or +scale"
    purpose: ClassVar[str] = "models trained with three values (BitNet); others lose most of what they know"

    @property
    def name(self) -> str:
        return f"ternary{self.suffix}"

    @property
    def cells(self) -> str:
        return "T"

    @property
    def levels(self) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0])

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "trits": ArraySpec(torch.uint8, (*shape[:-1], -(-shape[-1] // 5))),
            "scale": ArraySpec(self.scale_dtype, self.groups(shape)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        mean = mean_magnitude(x, importance)
        plain = {"scale": self.stored(mean)}
        if not search:
            return plain
        factors = [0.6 + 0.15 * i for i in range(12)]
        best = best_scale(x, mean, factors, lambda t: t.round_().clamp_(-1, 1), importance)
        return self.least_error(x, [plain, {"scale": self.stored(best)}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return (x * inverse(params["scale"])).round_().clamp_(-1, 1).to(torch.int8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes * params["scale"]

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"trits": pack_trits((codes + 1).to(torch.uint8)), "scale": params["scale"].to(self.scale_dtype)}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        codes = unpack_trits(arrays["trits"], shape[-1]).to(torch.int8) - 1
        return codes, {"scale": arrays["scale"].float()}


def mean_magnitude(x: Tensor, importance: Tensor | None) -> Tensor:
    """Σ h·|x| / Σ h over the last dimension; where nothing is important, everything equally is."""
    if importance is None:
        return x.abs().mean(-1)
    total = importance.expand_as(x).sum(-1)
    weighted = weighted_sum(x.abs(), torch.ones_like(x), importance) * inverse(total)
    return torch.where(total > 0, weighted, x.abs().mean(-1))


TERNARY = (Ternary(), Ternary(group=64), Ternary(group=128), Ternary(group="tensor"))
