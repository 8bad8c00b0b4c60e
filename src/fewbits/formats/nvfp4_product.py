"""NVFP4 as NVIDIA's ModelOpt stores it: the matrix's factor multiplies, w = v · (scale · factor).

`nvfp4` (compressed-tensors) has the reciprocal, 448 · 6 / max|w|, and divides by it. Numbers of one are numbers of the
other but for a rounding in the last bit, so a checkpoint of ModelOpt's is decoded in this order and no other. Its own
order is NVFP4QTensor.dequantize (modelopt/torch/quantization/qtensor): scales times the factor in FP32, then codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats.base import Arrays, ArraySpec, Lookup, Params
from fewbits.formats.minifloat import E2M1_BY_CODE, Fp4Floats, NvFp4


@dataclass(frozen=True)
class NvFp4Product(Fp4Floats):
    """E2M1 with an E4M3 scale per group of 16 times one FP32 factor per matrix. Params: scale, factor."""

    group: int = 16

    summary: ClassVar[str] = "4-bit floating point, FP8 scale per 16 times one FP32 factor (ModelOpt)"
    purpose: ClassVar[str] = "checkpoints that ModelOpt wrote; nvfp4 is the same thing"

    @property
    def name(self) -> str:
        return "nvfp4-product"

    @property
    def rowwise(self) -> bool:
        return False

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        ours = NvFp4().arrays(shape)
        return {"packed": ours["packed"], "scale": ours["scale"], "factor": ours["global_scale"]}

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        found = NvFp4().fit_groups(x, importance, search=search)
        return {"scale": found["scale"], "factor": found["global_scale"].reciprocal()}

    def scale_at(self, params: Params) -> Tensor:
        return params["scale"] * params["factor"]

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return NvFp4().rescaled(params, factor)

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        ours = NvFp4().pack(codes, {"scale": params["scale"], "global_scale": params["factor"]})
        return {"packed": ours["packed"], "scale": ours["scale"], "factor": ours["global_scale"]}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        ours = {"packed": arrays["packed"], "scale": arrays["scale"], "global_scale": arrays["factor"]}
        codes, params = NvFp4().unpack(ours, shape)
        return codes, {"scale": params["scale"], "factor": params["global_scale"]}

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup:
        scale = arrays["scale"].float() * arrays["factor"]
        return self._lookup(arrays["packed"], shape, torch.tensor(E2M1_BY_CODE), scale)
