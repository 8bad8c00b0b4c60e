"""Unsigned integers with a scale and an offset per group, both floating point: w = scale · q + offset.

What MLX calls affine quantization (mlx.core.quantize), where the offset is called bias. `Affine` puts its zero on a
code instead, (q − zero) · scale: fewer bytes, and zeros are exact; here the range's lower end is free, at 16 bits a
group, and a scale may be negative, with the offset at the upper end.

The range's params put the end of larger magnitude on code 0 and stretch the scale so that zero falls on a code, as MLX
does: to the precision of the stored scale, zeros stay zeros. Bytes: codes as a dense bit stream along each row
(`_bits`), scale and offset in FP16, or in BF16 or FP32 where the name says so. Groups must divide in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats._bits import pack_bits, unpack_bits, words
from fewbits.formats._search import best_affine, inverse
from fewbits.formats.base import Arrays, ArraySpec, Params, Scaled, exactly

GROUPS = (64, 32, 128)


@dataclass(frozen=True)
class Offset(Scaled):
    """bits-bit codes (uint8). Params: scale, offset."""

    group: int = 64
    bits: int = 4

    summary: ClassVar[str] = "integers: scale · q + offset (MLX)"
    purpose: ClassVar[str] = "Apple's GPUs, by MLX"

    @property
    def name(self) -> str:
        return f"mlx{self.bits}{self.suffix}"

    @property
    def cells(self) -> str:
        return self.bits * "I"

    @property
    def span(self) -> int:
        return self.group

    @property
    def levels(self) -> Tensor:
        return torch.arange(self.highest + 1, dtype=torch.float32)

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if shape[-1] % self.group:
            raise FormatError(
                f"{self.name}: in_features {shape[-1]} is not a multiple of its group of {self.group}; choose a "
                "smaller group, or a format that allows a ragged tail, such as int4-asym-g64"
            )

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "packed": ArraySpec(torch.int32, (*shape[:-1], words(shape[-1], self.bits))),
            "scale": ArraySpec(self.scale_dtype, self.groups(shape)),
            "offset": ArraySpec(self.scale_dtype, self.groups(shape)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        low, high = x.amin(-1), x.amax(-1)
        plain = self._range(low, high)
        if not search:
            return plain
        factors = [1.05 - 0.05 * i for i in range(10)]
        scale, offset = best_affine(x, low, high, self.highest, factors, importance)
        return self.least_error(x, [plain, self._stored(scale, offset)], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        q = (x - params["offset"]).mul_(inverse(params["scale"])).round_()
        return q.clamp_(0, self.highest).to(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(params["scale"]).add_(params["offset"])

    def offset_at(self, params: Params) -> Tensor:
        return params["offset"]

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        offset = exactly(lowest, self.scale_dtype, f"{self.name}: an offset")
        return {**super().placed(scale, lowest), "offset": offset}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return self._stored(params["scale"] * factor, params["offset"] * factor)

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        scales = {key: params[key].to(self.scale_dtype) for key in ("scale", "offset")}
        return {"packed": pack_bits(codes, self.bits)} | scales

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        params = {key: arrays[key].float() for key in ("scale", "offset")}
        return unpack_bits(arrays["packed"], self.bits, shape[-1]), params

    def _range(self, low: Tensor, high: Tensor) -> Params:
        """Params from a group's range, with a code for 0 where 0 lies inside it."""
        edge = torch.where(-low > high, low, high)
        step = (high - low) / self.highest
        steps = (edge.abs() * inverse(step)).round()  # from the edge to 0
        scale = torch.where(steps == 0, step, -edge / steps)
        return self._stored(scale, torch.where(steps == 0, low, edge))

    def _stored(self, scale: Tensor, offset: Tensor) -> Params:
        return {"scale": self.stored(scale), "offset": self.stored(offset)}


OFFSET = tuple(Offset(bits=bits, group=group) for bits in (8, 6, 5, 4, 3, 2) for group in GROUPS)
