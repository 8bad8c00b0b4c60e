"""linear: x · Wᵀ + bias with W packed.

    linear(x [..., K], weight [N, K] packed, bias [N] or None) -> [..., N], in the dtype and on the device of x

The reference decodes a block of rows to float32, casts it to x's dtype and multiplies; at no time does the float weight
exist whole. Cost per weight and call: its bits read, about 20 bytes of scratch written and read in cache, one
multiply-add per row of x. Decoding dominates for a few rows of x and vanishes for hundreds. A compiled kernel for a
device and a format takes over in this function, on the same arguments.

It is differentiable by x and the bias, not by W: the way back decodes W again instead of keeping what was decoded, so
training beside a frozen W needs no more memory for it than its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels.packed import Packed


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by the transpose of a packed weight [N, K]; add bias [N]."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return found if bias is None else found + bias.to(found.dtype)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    parts = [
        functional.linear(x, block.to(x.dtype), None if bias is None else bias[rows]) for rows, block in weight.blocks()
    ]
    return torch.cat(parts, dim=-1)


class _Product(torch.autograd.Function):
    """x · Wᵀ; its slope by x is that by the product, times W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return _product(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        found = slope.new_zeros((*slope.shape[:-1], ctx.weight.shape[1]))
        flat, into = slope.reshape(-1, slope.shape[-1]), found.view(-1, found.shape[-1])
        for rows, block in ctx.weight.blocks():
            into.addmm_(flat[:, rows], block.to(slope.dtype))
        return found.to(ctx.dtype), None
