"""LLM.int8(): signed bytes and the largest magnitude of each row, as bitsandbytes stores them.

    w = code · absmax / 127     rounded as bitsandbytes does it: (code · absmax) · 0.007874016, each product to float32

So the row's largest weight is code ±127. It holds what `int8` does; only the order of two roundings differs, and a
checkpoint that bitsandbytes wrote is decoded to its own numbers and no others. In the paper (Dettmers et al. 2022,
arXiv:2208.07339) the inputs are rounded to 8 bits as well, but for outliers: that is a matter of running, not of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats._search import best_scale, inverse
from fewbits.formats.base import Arrays, ArraySpec, Grouped, Params

LOWEST, HIGHEST = -128, 127
STEP = 7.874015718698502e-3  # bitsandbytes' 1 / 127: the float32 nearest to it


@dataclass(frozen=True)
class LlmInt8(Grouped):
    """Codes int8; param: absmax, float32 per row."""

    summary: ClassVar[str] = "signed bytes and the largest magnitude of each row (LLM.int8)"
    purpose: ClassVar[str] = "models that bitsandbytes runs in 8 bits; elsewhere int8 is the same thing"

    @property
    def name(self) -> str:
        return "llm-int8"

    @property
    def cells(self) -> str:
        return "S" + 7 * "I"

    @property
    def levels(self) -> Tensor:
        return torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float32)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"weight": ArraySpec(torch.int8, shape), "absmax": ArraySpec(torch.float32, self.groups(shape))}

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        absmax = x.abs().amax(-1)
        absmax = torch.where((absmax * -LOWEST).isfinite(), absmax, absmax * torch.inf)  # decoding passes through it
        if not search:
            return {"absmax": absmax}
        factors = [1.0 - 0.01 * i for i in range(8)]
        best = best_scale(x, absmax / HIGHEST, factors, self._nearest, importance)
        return self.least_error(x, [{"absmax": absmax}, {"absmax": best.abs() * HIGHEST}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self._nearest(x * inverse(self.scale_at(params))).to(torch.int8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(params["absmax"]).mul_(STEP)

    def scale_at(self, params: Params) -> Tensor:
        return params["absmax"] * STEP

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"absmax": scale / STEP}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return {"absmax": params["absmax"] * factor}

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"weight": codes, "absmax": params["absmax"]}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return arrays["weight"], {"absmax": arrays["absmax"]}

    def _nearest(self, t: Tensor) -> Tensor:
        return t.round_().clamp_(LOWEST, HIGHEST)


LLM_INT8 = (LlmInt8(),)
