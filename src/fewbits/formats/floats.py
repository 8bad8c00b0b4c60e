"""Floating point as it is: FP32, FP16, BF16. A number is a cast, a code is the number itself.

Also the format of every tensor that is not quantized (norms, biases, integer buffers), so that checkpoints hold one
kind of thing. Any shape is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.base import Arrays, ArraySpec, Format, Params, require_finite

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CELLS = {
    torch.float32: "S" + 8 * "E" + 23 * "M",
    torch.float16: "S" + 5 * "E" + 10 * "M",
    torch.bfloat16: "S" + 8 * "E" + 7 * "M",
}


@dataclass(frozen=True)
class Float(Format):
    """A tensor in a torch dtype. Codes are the tensor itself; there are no params."""

    dtype: torch.dtype

    summary = "floating point, one number at a time"
    purpose = "what models are trained and shipped in; norms and biases stay in it"

    @property
    def name(self) -> str:
        # "raw-", because int8 alone is the name of an affine format
        return _NAMES.get(self.dtype, str(self.dtype).replace("torch.", "raw-"))

    @property
    def cells(self) -> str:
        return _CELLS.get(self.dtype, 8 * self.dtype.itemsize * "I")

    def check(self, shape: tuple[int, ...]) -> None:
        """Every shape will do."""

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"weight": ArraySpec(self.dtype, shape)}

    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        if self.dtype.is_floating_point:
            require_finite(w, {"peak": w.float().abs().amax() if w.numel() else w.float().sum()}, self.name)
        return {}

    def round(self, w: Tensor, params: Params) -> Tensor:
        codes = w.to(self.dtype)
        if self.dtype == torch.float16 and not bool(codes.isfinite().all()):
            raise FormatError(
                f"fp16: largest weight {float(w.abs().max()):g} is above 65504, the largest FP16 number; "
                "use bf16 or fp32"
            )
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float()

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return {"weight": codes}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        return arrays["weight"], {}

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self.round(x, params)

    def at_columns(self, params: Params, columns: Tensor) -> Params:
        return params


FLOATS = (Float(torch.float32), Float(torch.float16), Float(torch.bfloat16))
