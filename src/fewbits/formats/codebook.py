"""NF4: sixteen levels at the quantiles of a normal distribution, times the group's largest magnitude.

Trained weights are close to normal within a group, so levels of equal probability waste no code. The table is that of
Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, appendix E), level −1 to 1 with an exact zero.

The scale of a group of 64 is FP32 (0.5 bits per weight). `nf4-dq` quantizes the scales again (double quantization,
section 3 of the paper): they become signed bytes around the matrix's mean, with one FP32 step for every 256, 0.127 bits
per weight instead of 0.5.
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
NESTED = 256  # scales that share a second-level scale


@dataclass(frozen=True)
class NormalFloat(Grouped):
    """NF4 codes and an FP32 scale per group. Param: scale; double-quantized ones also carry its stored parts."""

    group: int = 64
    double: bool = False

    summary: ClassVar[str] = "4-bit codes into the quantiles of a normal distribution"
    purpose: ClassVar[str] = "frozen weights under a fine-tune (QLoRA): good at 4 bits without any calibration"

    @property
    def name(self) -> str:
        return "nf4-dq" if self.double else "nf4"

    @property
    def cells(self) -> str:
        return "IIII"

    @property
    def levels(self) -> Tensor:
        return torch.tensor(NF4)

    @property
    def rowwise(self) -> bool:
        return not self.double

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        groups = self.groups(shape)
        specs = {"packed": ArraySpec(torch.int32, pack_shape(shape))}
        if not self.double:
            return specs | {"scale": ArraySpec(torch.float32, groups)}
        nested = -(-groups[-1] * groups[-2] // NESTED)
        return specs | {
            "scale_code": ArraySpec(torch.int8, groups),
            "scale_step": ArraySpec(torch.float32, (*shape[:-2], nested)),
            "scale_mean": ArraySpec(torch.float32, (*shape[:-2], 1)),
        }

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        scale = x.abs().amax(-1)
        if search:
            factors = [1.0 - 0.04 * i for i in range(10)]
            best = best_scale(x, scale, factors, lambda t: self._values(self._codes(t)), importance)
            scale = self.least_error(x, [{"scale": scale}, {"scale": best}], importance)["scale"]
        return self._nested(scale) if self.double else {"scale": scale}

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self._codes(x * inverse(params["scale"]))

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return self._values(codes).mul_(params["scale"])

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return params if self.double else {"scale": params["scale"] * factor}

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
        return self._lookup(arrays["packed"], shape, self.levels, scale)

    def _codes(self, t: Tensor) -> Tensor:
        """How many midpoints lie below each number: fifteen comparisons in the cache beat one binary search."""
        codes = torch.zeros_like(t, dtype=torch.uint8)
        for low, high in pairwise(NF4):
            codes += (t > torch.tensor((low + high) / 2)).view(torch.uint8)
        return codes

    def _values(self, codes: Tensor) -> Tensor:
        levels = self.levels.to(codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)

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


CODEBOOKS = (NormalFloat(), NormalFloat(double=True))
