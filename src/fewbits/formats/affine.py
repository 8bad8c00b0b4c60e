"""Integers on a line: w = scale · (q − zero), the textbook affine scheme, INT8 to INT2.

In its four stages: *calibrate* the range of each group, *compute* scale and zero-point from it, *quantize*
q = round(w / scale) + zero, *dequantize* scale · (q − zero).

Symmetric: zero = 0 and scale = max|w| / (2^(b−1) − 1), so that ±max|w| are codes. Codes are signed, and once the scale
is searched the whole range −2^(b−1) … 2^(b−1) − 1 may be used; a searched scale may be negative, which points the one
code that has no mirror image at the longer tail.
Asymmetric: the range is stretched to hold 0 (so that zeros stay exact), scale = (max − min) / (2^b − 1), and
the zero-point is an unsigned code. Jacob et al. 2018 (arXiv:1712.05877), section 2.1.

Bytes: codes + 2^(b−1) for symmetric ones, as a dense bit stream along each row (`_bits`); scales FP16 or BF16 per
group, FP32 per row or tensor, where they cost nothing; zero-points one byte each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats._bits import pack_bits, unpack_bits, words
from fewbits.formats._search import best_affine, best_scale, inverse
from fewbits.formats.base import Arrays, ArraySpec, Lookup, Params, Scaled

GROUPS = (16, 32, 64, 128)
CLIP = {8: 0.92, 6: 0.7, 5: 0.55, 4: 0.4, 3: 0.3, 2: 0.2}
"""How far below the range's scale the search goes: the fewer the levels, the more clipping pays."""


def search_factors(bits: int) -> list[float]:
    """Candidate scales for signed codes, relative to the range's.

    Evenly spaced ratios down to CLIP. Negative ones wherever the code without a mirror image still reaches into a tail:
    near the range's scale, and at 3 bits and below everywhere.
    """
    ratio = (CLIP[bits] / 1.08) ** (1 / 11)
    down = [1.0, *(1.08 * ratio**i for i in range(12))]
    mirrored = 2.0 if bits == 8 else 0.6 if bits > 3 else 0.0
    return [*down, *(-f for f in down if f > mirrored)]


@dataclass(frozen=True)
class Affine(Scaled):
    """bits-bit integers, symmetric or with a zero-point. Params: scale, and zero (float, an integer) if asymmetric."""

    bits: int = 8
    symmetric: bool = True
    summary: ClassVar[str] = "integers: scale · (q − zero)"
    purpose: ClassVar[str] = (
        "the common choice everywhere: at 8 bits practically lossless, at 4 small, at 3 and 2 with a calibrated method"
    )

    @property
    def name(self) -> str:
        asymmetric = "" if self.symmetric else "-asym"
        return f"int{self.bits}{asymmetric}{self.suffix}"

    @property
    def cells(self) -> str:
        return ("S" if self.symmetric else "I") + (self.bits - 1) * "I"

    @property
    def levels(self) -> Tensor:
        return torch.arange(self.lowest, self.highest + 1, dtype=torch.float32)

    @property
    def lowest(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + (1 << self.bits) - 1

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        specs = {
            "packed": ArraySpec(torch.int32, (*shape[:-1], words(shape[-1], self.bits))),
            "scale": ArraySpec(self.scale_dtype, self.groups(shape)),
        }
        return specs if self.symmetric else specs | {"zero": ArraySpec(torch.uint8, self.groups(shape))}

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        if self.symmetric:
            return {"scale": self._symmetric_scale(x, importance, search=search)}
        low, high = x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0)
        scale = self.stored((high - low) / self.highest)
        zero = self._zero(-low * inverse(scale))
        if not search:
            return {"scale": scale, "zero": zero}
        return self._searched(x, low, high, scale, zero, importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        q = (x * inverse(params["scale"])).round_()
        if not self.symmetric:
            q = q.add_(params["zero"])
        return q.clamp_(self.lowest, self.highest).to(torch.int8 if self.symmetric else torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        w = codes.float()
        return (w if self.symmetric else w.sub_(params["zero"])).mul_(params["scale"])

    def offset_at(self, params: Params) -> Tensor:
        return super().offset_at(params) if self.symmetric else -params["zero"] * params["scale"]

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        params = super().placed(scale, lowest)
        if self.symmetric:
            return params
        zero = (-lowest * inverse(scale)).round_()
        outside = (zero < 0) | (zero > self.highest)
        if bool(outside.any()):
            found = float(zero[outside][0])
            raise FormatError(f"{self.name}: a zero-point is {found:g}, must be from 0 to {self.highest}")
        return {**params, "zero": zero}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        unsigned = codes.view(torch.uint8) - self.lowest if self.symmetric else codes  # bytes wrap around
        arrays = {"packed": pack_bits(unsigned, self.bits), "scale": params["scale"].to(self.scale_dtype)}
        return arrays if self.symmetric else arrays | {"zero": params["zero"].to(torch.uint8)}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        codes = unpack_bits(arrays["packed"], self.bits, shape[-1])
        params = {"scale": arrays["scale"].float()}
        if self.symmetric:
            return (codes + self.lowest).view(torch.int8), params  # bytes wrap around
        return codes, params | {"zero": arrays["zero"].float()}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        zero = None if self.symmetric else arrays["zero"].float()
        return self._lookup(arrays["packed"], shape, self.levels, arrays["scale"].float(), zero)

    def _zero(self, zero: Tensor) -> Tensor:
        return zero.round().clamp_(0, self.highest)

    def _symmetric_scale(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Tensor:
        start = x.abs().amax(-1).div_(self.highest)
        if not search:
            return self.stored(start)
        best = best_scale(x, start, search_factors(self.bits), self._nearest, importance)
        candidates = [{"scale": self.stored(scale)} for scale in (start, best)]
        return self.least_error(x, candidates, importance)["scale"]

    def _nearest(self, t: Tensor) -> Tensor:
        return t.round_().clamp_(self.lowest, self.highest)

    def _searched(
        self, x: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None
    ) -> Params:
        """Least squares in (scale, offset), then the better of its neighbouring integer zero-points and the range's."""
        factors = [1 - 0.6 * i / 9 for i in range(10)]
        solved, offset = best_affine(x, low, high, self.highest, factors, importance)
        solved = self.stored(solved.abs())
        exact = -offset * inverse(solved)
        candidates = [(scale, zero), (solved, self._zero(exact.floor())), (solved, self._zero(exact.ceil()))]
        return self.least_error(x, [{"scale": s, "zero": z} for s, z in candidates], importance)


AFFINE = tuple(
    Affine(bits=bits, symmetric=symmetric, group=group)
    for bits in (8, 6, 5, 4, 3, 2)
    for symmetric in (True, False)
    for group in ("row", "tensor", *GROUPS)
)
