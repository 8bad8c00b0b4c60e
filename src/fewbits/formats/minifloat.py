"""Eight- and four-bit floats with a scale: FP8 E4M3 and E5M2, MXFP4, NVFP4.

    w = scale · v,   v one of the values of a tiny floating-point type

FP8 has one FP32 scale per row or tensor, or, as DeepSeek-V3 was trained (arXiv:2412.19437, section 3.3), one for each
block of 128×128: `fp8-e4m3-b128`.
E4M3 reaches ±448 and has no infinities, E5M2 reaches ±57344; both as in Micikevicius et al. 2022 (arXiv:2209.05433).
E2M1 has the sixteen values ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}.
MXFP4 (OCP Microscaling 1.0, section 5.2) gives each 32 values one E8M0 scale, a power of two.
NVFP4 gives each 16 values an E4M3 scale and the matrix one FP32 scale above them, chosen so that the largest group's
scale is the largest E4M3 number: global = 448 · 6 / max|w|, stored that way up, and w = v · scale / global.

Rounding is torch's own cast for FP8 (to nearest, ties to even) and the same rule for E2M1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.errors import FormatError
from fewbits.formats._bits import pack_bits, unpack_bits
from fewbits.formats._search import best_scale, inverse
from fewbits.formats.base import Arrays, ArraySpec, Grouped, Lookup, Params

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # code 0..7; bit 3 is the sign
E2M1_BY_CODE = (*E2M1, *(-v for v in E2M1))
E4M3_MAX = 448.0
SEARCH = tuple(1.0 - 0.05 * i for i in range(-2, 8))  # candidate scales, relative to the range's


@dataclass(frozen=True)
class Fp8(Grouped):
    """FP8 numbers times an FP32 scale per row, tensor or block. Codes are the bytes (uint8); param: scale.

    rows: of a block of `group` columns. The param has a line for each row all the same, as everybody's; the bytes have
    one for each block.
    """

    exponent: int = 4
    rows: int = 1

    summary: ClassVar[str] = "8-bit floating point times a scale"
    purpose: ClassVar[str] = "GPUs with FP8 units: half of BF16's bytes at almost no loss"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.exponent == 4 else torch.float8_e5m2

    @property
    def name(self) -> str:
        return f"fp8-e{self.exponent}m{7 - self.exponent}{self.suffix}"

    def fitted_together(self, sums: Tensor) -> Tensor:
        if self.rows == 1:
            return sums
        blocks = pad(sums, (0, 0, 0, -sums.shape[-2] % self.rows)).unflatten(-2, (-1, self.rows))
        return self._by_row(blocks.sum(-2), sums.shape[-2])

    @property
    def suffix(self) -> str:
        if self.rows == 1:
            return super().suffix
        return f"-b{self.rows}" if self.rows == self.group else f"-b{self.rows}x{self.group}"

    @property
    def rowwise(self) -> bool:
        return super().rowwise and self.rows == 1

    @property
    def cells(self) -> str:
        return "S" + self.exponent * "E" + (7 - self.exponent) * "M"

    @property
    def levels(self) -> Tensor:
        values = torch.arange(256, dtype=torch.uint8).view(self.dtype).float()
        distinct: Tensor = torch.unique(values[values.isfinite()])
        return distinct

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        *matrices, lines, groups = self.groups(shape)
        blocks = (*matrices, -(-lines // self.rows), groups)
        return {"weight": ArraySpec(self.dtype, shape), "scale": ArraySpec(torch.float32, blocks)}

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        if self.rows == 1:
            return self._fit(x, importance, search=search)
        blocks = self._blocks(x)
        params = self._fit(blocks, None if importance is None else self._blocks(importance), search=search)
        return {"scale": self._by_row(params["scale"], x.shape[-3])}

    def _fit(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        start = x.abs().amax(-1).div_(torch.finfo(self.dtype).max)
        if not search:
            return {"scale": start}
        best = best_scale(x, start, SEARCH, self._nearest, importance)
        return self.least_error(x, [{"scale": start}, {"scale": best}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self._cast(x * inverse(params["scale"])).view(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.view(self.dtype).float().mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": scale}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        if self.rows > 1:
            return params  # a row's scale is that of its block
        return {"scale": params["scale"] * factor}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        scale = params["scale"] if self.rows == 1 else params["scale"][..., :: self.rows, :].contiguous()
        return {"weight": codes.view(self.dtype), "scale": scale}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return arrays["weight"].view(torch.uint8), {"scale": self._by_row(arrays["scale"], shape[-2])}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        values = torch.arange(256, dtype=torch.uint8).view(self.dtype).float()
        return self._lookup(arrays["weight"], shape, values, self._by_row(arrays["scale"], shape[-2]))

    def _blocks(self, x: Tensor) -> Tensor:
        """The grouped view [..., N, G, g] by blocks, [..., ⌈N / rows⌉, G, rows · g], filled up with zeros."""
        filled = pad(x, (0, 0, 0, 0, 0, -x.shape[-3] % self.rows))
        blocks: Tensor = filled.unflatten(-3, (-1, self.rows)).transpose(-3, -2).flatten(-2)
        return blocks

    def _by_row(self, scale: Tensor, rows: int) -> Tensor:
        """Scales of blocks as those of each row."""
        return scale if self.rows == 1 else scale.index_select(-2, torch.arange(rows, device=scale.device) // self.rows)

    def _cast(self, t: Tensor) -> Tensor:
        peak = torch.finfo(self.dtype).max
        return t.clamp(-peak, peak).to(self.dtype)

    def _nearest(self, t: Tensor) -> Tensor:
        return self._cast(t).float()


@dataclass(frozen=True)
class Fp4Floats(Grouped):
    """What MXFP4 and NVFP4 share: E2M1 codes (uint8, sign in bit 3) and one effective scale per group."""

    @property
    def cells(self) -> str:
        return "SEEM"

    @property
    def levels(self) -> Tensor:
        return torch.tensor([-v for v in E2M1[:0:-1]] + list(E2M1))

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return _e2m1_codes(x * inverse(self.scale_at(params)))

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return _e2m1_values(codes).mul_(self.scale_at(params))


@dataclass(frozen=True)
class MxFp4(Fp4Floats):
    """E2M1 with one power-of-two scale (E8M0) per group of 32. Param: exponent (uint8, biased by 127)."""

    group: int = 32

    summary: ClassVar[str] = "4-bit floating point, power-of-two scale per 32 (OCP MX)"
    purpose: ClassVar[str] = "GPUs with microscaling units, and models that were trained in it"

    @property
    def name(self) -> str:
        return "mxfp4"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        codes = ArraySpec(torch.uint8, (*shape[:-1], -(-shape[-1] // 2)))
        return {"packed": codes, "scale": ArraySpec(torch.uint8, self.groups(shape))}

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        peak = x.abs().amax(-1)
        # OCP's rule: the exponent of the largest weight, less that of the largest level (6 = 1.5 · 2²).
        exponent = torch.where(peak > 0, peak.clamp_min(2.0**-126).log2().floor_(), -127).sub_(2)
        candidates = [
            {"exponent": (exponent + (127 + step)).clamp_(0, 254)} for step in ((0, 1, -1) if search else (0,))
        ]
        best = self.least_error(x, candidates, importance) if search else candidates[0]
        # A NaN or infinite peak must survive the cast to an integer, so that it is found and counted.
        return {"exponent": torch.where(peak.isfinite(), best["exponent"], peak)}

    def scale_at(self, params: Params) -> Tensor:
        return torch.exp2(params["exponent"] - 127)

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        exponent = torch.where(scale > 0, scale, 1.0).log2().round_()
        other = (torch.exp2(exponent) != scale) & (scale != 0)
        if bool(other.any()):
            raise FormatError(f"{self.name}: a scale is {float(scale[other][0]):.9g}, must be a power of two")
        return {"exponent": exponent + 127}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"packed": _pack_nibbles(codes), "scale": params["exponent"].to(torch.uint8)}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return _unpack_nibbles(arrays["packed"], shape[-1]), {"exponent": arrays["scale"].float()}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        scale = self.scale_at({"exponent": arrays["scale"].float()})
        return self._lookup(arrays["packed"], shape, torch.tensor(E2M1_BY_CODE), scale)


@dataclass(frozen=True)
class NvFp4(Fp4Floats):
    """E2M1 with an E4M3 scale per group of 16 under one FP32 scale per matrix. Params: scale, global_scale."""

    group: int = 16

    summary: ClassVar[str] = "4-bit floating point, FP8 scale per 16 under one FP32 scale"
    purpose: ClassVar[str] = "NVIDIA GPUs from Blackwell on; finer scales than MXFP4, so a smaller loss"

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def rowwise(self) -> bool:
        return False

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "packed": ArraySpec(torch.uint8, (*shape[:-1], -(-shape[-1] // 2))),
            "scale": ArraySpec(torch.float8_e4m3fn, self.groups(shape)),
            "global_scale": ArraySpec(torch.float32, (*shape[:-2], 1, 1)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        peak = x.abs().amax(-1)
        whole = peak.amax((-2, -1), keepdim=True)
        global_scale = torch.where(whole > 0, E4M3_MAX * E2M1[-1] / whole, torch.ones_like(whole))
        scales = [peak / E2M1[-1]]
        if search:
            scales.append(best_scale(x, scales[0], SEARCH, lambda t: _e2m1_values(_e2m1_codes(t)), importance))
        stored = [(s * global_scale).clamp_(0, E4M3_MAX).to(torch.float8_e4m3fn).float() for s in scales]
        candidates = [{"scale": s, "global_scale": global_scale} for s in stored]
        best = self.least_error(x, candidates, importance) if search else candidates[0]
        return {"scale": torch.where(peak.isfinite(), best["scale"], peak), "global_scale": global_scale}

    def scale_at(self, params: Params) -> Tensor:
        return params["scale"] / params["global_scale"]

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        scale = (params["scale"] * factor).clamp_(0, E4M3_MAX).to(torch.float8_e4m3fn).float()
        return {**params, "scale": scale}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {
            "packed": _pack_nibbles(codes),
            "scale": params["scale"].to(torch.float8_e4m3fn),
            "global_scale": params["global_scale"],
        }

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        params = {"scale": arrays["scale"].float(), "global_scale": arrays["global_scale"]}
        return _unpack_nibbles(arrays["packed"], shape[-1]), params

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        scale = self.scale_at({"scale": arrays["scale"].float(), "global_scale": arrays["global_scale"]})
        return self._lookup(arrays["packed"], shape, torch.tensor(E2M1_BY_CODE), scale)


def _e2m1_codes(t: Tensor) -> Tensor:
    """Nearest E2M1 code; a tie goes to the even mantissa, as in IEEE 754."""
    # The midpoints between neighbouring magnitudes. Those before an even code round up at the tie, the others down.
    magnitude = t.abs()
    code = torch.zeros_like(t, dtype=torch.uint8)
    for i, (a, b) in enumerate(pairwise(E2M1)):
        middle = (a + b) / 2
        code += magnitude >= middle if i % 2 else magnitude > middle
    return code | (t.signbit().to(torch.uint8) << 3)


def _e2m1_values(codes: Tensor) -> Tensor:
    table = torch.tensor(E2M1_BY_CODE, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low nibble: uint8 [..., ceil(K / 2)]."""
    return pack_bits(codes, 4).view(torch.uint8)[..., : -(-codes.shape[-1] // 2)].contiguous()


def _unpack_nibbles(data: Tensor, in_features: int) -> Tensor:
    return unpack_bits(data, 4, in_features)


MINIFLOATS = (
    *(Fp8(exponent=e, group=g) for e in (4, 5) for g in ("row", "tensor")),
    MxFp4(),
    NvFp4(),
    Fp8(group=128, rows=128),
)
