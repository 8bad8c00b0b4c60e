"""linear: x · Wᵀ + bias with W packed.

    linear(x [..., K], weight [N, K] packed, bias [N] or None) -> [..., N], in the dtype and on the device of x

A block of rows is decoded into x's dtype (`decode`) and multiplied; at no time does a large float weight exist whole.
Cost per weight and call: its decoding, and one multiply-add per row of x. Decoding dominates for a few rows of x and
vanishes for hundreds.

It is differentiable by x and the bias, not by W: the way back decodes W again instead of keeping what was decoded, so
training beside a frozen W needs no more memory for it than its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels.decode import BLOCK
from fewbits.kernels.packed import Packed

TOGETHER = 1 << 22
"""Weights multiplied at a time in training: with many rows of x it is worth some memory to sum over fewer parts."""


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by the transpose of a packed weight [N, K]; add bias [N]."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return found if bias is None else found + bias.to(found.dtype)
    return _joined(
        [functional.linear(x, w, None if bias is None else bias[r]) for r, w in weight.blocks(x.dtype, BLOCK)]
    )


class _Product(torch.autograd.Function):
    """x · Wᵀ; its slope by x is that by the product, times W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        lower = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if lower else x
        return _joined([functional.linear(x, w) for _, w in weight.blocks(x.dtype, TOGETHER)])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        flat, found = slope.reshape(-1, slope.shape[-1]), None
        for rows, w in ctx.weight.blocks(slope.dtype, TOGETHER):
            part = flat[:, rows] @ w
            found = part if found is None else found.add_(part)
        assert found is not None
        return found.view(*slope.shape[:-1], -1).to(ctx.dtype), None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
