"""NF4 and FP4: sixteen levels from a table, times the group's largest magnitude.

NF4's levels are the quantiles of a normal distribution. Trained weights are close to normal within a group, so levels
of equal probability waste no code. The table is that of Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, appendix E),
level −1 to 1 with an exact zero.

FP4 is bitsandbytes' own 4-bit float: a sign, and magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1 in an order that
its kernels like. No hardware has it, and NF4 is more accurate; it is there because checkpoints are.

The scale of a group of 64 is FP32 (0.5 bits per weight); other groups have their size in the name. `nf4-dq` quantizes
the scales again (double quantization, section 3 of the paper): they become signed bytes around the matrix's mean, with
one FP32 step for every 256, 0.127 bits per weight instead of 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.formats._bits import pack_bits, unpack_bits
from fewbits.formats._search import best_scale, inverse
from fewbits.formats.base import Arrays, ArraySpec, Grouped, Lookup, Params

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in _TWELFTHS)
USUAL = 64  # the group that a name need not say
NESTED = 256  # scales that share a second-level scale


@dataclass(frozen=True)
class Codebook(Grouped):
    """Codes into a table of sixteen levels, and an FP32 scale per group. Param: scale."""

    group: int = USUAL

    table: ClassVar[tuple[float, ...]]
    """The level of each code."""
    called: ClassVar[str]

    @property
    def name(self) -> str:
        return self.called + self.suffix

    @property
    def suffix(self) -> str:
        return "" if self.group == USUAL else super().suffix

    @property
    def cells(self) -> str:
        return "IIII"

    @property
    def levels(self) -> Tensor:
        distinct: Tensor = torch.tensor(self.table).unique()
        return distinct

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {
            "packed": ArraySpec(torch.int32, pack_shape(shape)),
            "scale": ArraySpec(torch.float32, self.groups(shape)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        scale = x.abs().amax(-1)
        if not search:
            return {"scale": scale}
        factors = [1.0 - 0.04 * i for i in range(10)]
        best = best_scale(x, scale, factors, lambda t: self._values(self._codes(t)), importance)
        return self.least_error(x, [{"scale": scale}, {"scale": best}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self._codes(x * inverse(params["scale"]))

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return self._values(codes).mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": scale}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return {"scale": params["scale"] * factor}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"packed": pack_bits(codes, 4), "scale": params["scale"]}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return unpack_bits(arrays["packed"], 4, shape[-1]), {"scale": arrays["scale"]}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        return self._lookup(arrays["packed"], shape, torch.tensor(self.table), arrays["scale"])

    def _codes(self, t: Tensor) -> Tensor:
        """How many midpoints lie below each number: fifteen comparisons in the cache beat one binary search."""
        ascending = sorted(set(self.table))
        ranks = torch.zeros_like(t, dtype=torch.uint8)
        for low, high in pairwise(ascending):
            ranks += (t > torch.tensor((low + high) / 2)).view(torch.uint8)
        if self.table == tuple(ascending):
            return ranks
        by_rank = torch.tensor([self.table.index(level) for level in ascending], dtype=torch.uint8, device=t.device)
        return by_rank.index_select(0, ranks.flatten().int()).view(t.shape)

    def _values(self, codes: Tensor) -> Tensor:
        levels = torch.tensor(self.table, device=codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)


@dataclass(frozen=True)
class Fp4(Codebook):
    """bitsandbytes' FP4."""

    table = FP4
    called = "fp4"
    summary: ClassVar[str] = "4-bit codes into bitsandbytes' table of floats"
    purpose: ClassVar[str] = "checkpoints that bitsandbytes wrote with its default type; NF4 is the better choice"


@dataclass(frozen=True)
class NormalFloat(Codebook):
    """NF4. double: the scales are quantized too, and params carry their stored parts."""

    double: bool = False

    table = NF4
    called = "nf4"
    summary: ClassVar[str] = "4-bit codes into the quantiles of a normal distribution"
    purpose: ClassVar[str] = "frozen weights under a fine-tune (QLoRA): good at 4 bits without any calibration"

    @property
    def suffix(self) -> str:
        return ("-dq" if self.double else "") + super().suffix

    @property
    def rowwise(self) -> bool:
        return not self.double

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        if not self.double:
            return super().arrays(shape)
        groups = self.groups(shape)
        nested = -(-groups[-1] * groups[-2] // NESTED)
        return {
            "packed": ArraySpec(torch.int32, pack_shape(shape)),
            "scale_code": ArraySpec(torch.int8, groups),
            "scale_step": ArraySpec(torch.float32, (*shape[:-2], nested)),
            "scale_mean": ArraySpec(torch.float32, (*shape[:-2], 1)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        params = super().fit_groups(x, importance, search=search)
        return self._nested(params["scale"]) if self.double else params

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return Grouped.placed(self, scale, lowest) if self.double else super().placed(scale, lowest)

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return params if self.double else super().rescaled(params, factor)

    def at_columns(self, params: Params, columns: Tensor) -> Params:
        return super().at_columns({"scale": params["scale"]}, columns)

    def round(self, w: Tensor, params: Params) -> Tensor:
        return super().round(w, {"scale": params["scale"]})

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return super().decode(codes, {"scale": params["scale"]})

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        packed = {"packed": pack_bits(codes, 4)}
        return packed | {key: params[key] for key in self.arrays(tuple(codes.shape)) if key != "packed"}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        params = {key: array for key, array in arrays.items() if key != "packed"}
        if self.double:
            params["scale"] = _nested_scale(params)
        return unpack_bits(arrays["packed"], 4, shape[-1]), params

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        scale = _nested_scale(arrays) if self.double else arrays["scale"]
        return self._lookup(arrays["packed"], shape, torch.tensor(self.table), scale)

    def _nested(self, scale: Tensor) -> Params:
        """Scales [..., N, G] as a mean and signed 8-bit codes with one step per NESTED of them, in row-major order."""
        flat = scale.flatten(-2)
        mean = flat.mean(-1, keepdim=True)
        blocks = pad(flat - mean, (0, -flat.shape[-1] % NESTED)).unflatten(-1, (-1, NESTED))
        step = blocks.abs().amax(-1) / 127
        codes = (blocks * inverse(step).unsqueeze(-1)).round_().clamp_(-127, 127)
        codes = torch.where(codes.isfinite(), codes, 0).flatten(-2)[..., : flat.shape[-1]]
        parts = {
            "scale_code": codes.to(torch.int8).reshape(scale.shape),
            "scale_step": step,
            "scale_mean": mean,
        }
        return parts | {"scale": _nested_scale(parts)}


def _nested_scale(parts: Params) -> Tensor:
    code, step = parts["scale_code"], parts["scale_step"]
    spread = step.repeat_interleave(NESTED, -1)[..., : code.shape[-1] * code.shape[-2]].reshape(code.shape)
    return code * spread + parts["scale_mean"].unsqueeze(-1)


def pack_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of 4-bit codes packed in 32-bit words along each row."""
    return (*shape[:-1], -(-shape[-1] // 8))


CODEBOOKS = (
    *(NormalFloat(group=group) for group in (64, 32, 128, 256)),
    NormalFloat(double=True),
    *(Fp4(group=group) for group in (64, 32, 128, 256)),
)
