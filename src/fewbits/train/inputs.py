"""Inputs of linear layers as they are rounded when the model runs on 8 bits, differentiable.

A dynamic scale follows from the input, and rounding is taken as the identity. A static one is learned like a weight's
(LSQ, see `fake_quant`): what it clips gets no gradient, and pulls the scale up instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.formats import ActivationFormat

BEYOND = 1e30
"""Past the range of any scale."""


class FakeInputs(nn.Module):
    """x -> the numbers that its codes stand for, in x's dtype. scale: float32 [1], to begin with, if it is static."""

    def __init__(self, format: ActivationFormat, scale: Tensor | None = None) -> None:
        super().__init__()
        self.format = format
        self.change = nn.Parameter(torch.zeros(1)) if format.static else None
        self.register_buffer("start", None if scale is None else scale.float().reshape(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.change is None:
            codes, scale = self.format.quantize(x.detach())
            return x + (self.format.dequantize(codes, scale).to(x.dtype) - x).detach()
        found: Tensor = _RoundInputs.apply(x, self.change, self)  # type: ignore[no-untyped-call]
        return found

    def scale(self) -> Tensor:
        """The static scale at present, float32 [1]."""
        assert self.change is not None
        return self.get_buffer("start") * torch.exp(self.change.detach())


class _RoundInputs(torch.autograd.Function):
    """x, change -> rounded x; the scale is start · exp(change)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, inputs: FakeInputs) -> Tensor:
        codes, scale = inputs.format.quantize(x, inputs.scale())
        y = inputs.format.dequantize(codes, scale)
        ctx.save_for_backward(x, y)
        ctx.ends = inputs.format.dequantize(
            *inputs.format.quantize(torch.tensor([-BEYOND, BEYOND]).to(x.device), scale)
        )
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,), (x, y) = slopes, ctx.saved_tensors
        inside = (x >= ctx.ends[0]) & (x <= ctx.ends[1])
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        of_change = (slope * (y - x.where(inside, nothing))).sum().float().reshape(1)
        return slope.where(inside, nothing), of_change, None
