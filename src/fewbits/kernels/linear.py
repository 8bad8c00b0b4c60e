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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels.packed import BLOCK, Packed

TOGETHER = 1 << 22
"""Weights multiplied at a time in training: with many rows of x it is worth some memory to sum over fewer parts."""


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by the transpose of a packed weight [N, K]; add bias [N]."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return found if bias is None else found + bias.to(found.dtype)
    parts = [functional.linear(x, w.to(x.dtype), None if bias is None else bias[rows]) for rows, w in weight.blocks()]
    return torch.cat(parts, dim=-1)


class _Product(torch.autograd.Function):
    """x · Wᵀ; its slope by x is that by the product, times W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        lower = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if lower else x
        parts = [functional.linear(x, w) for _, w in _decoded(weight, x.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        flat, found = slope.reshape(-1, slope.shape[-1]), None
        for rows, w in _decoded(ctx.weight, slope.dtype):
            part = flat[:, rows] @ w
            found = part if found is None else found.add_(part)
        assert found is not None
        return found.view(*slope.shape[:-1], -1).to(ctx.dtype), None


def _decoded(weight: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their numbers in `dtype`), TOGETHER of them at a time."""
    count, columns = weight.shape
    height = max(1, BLOCK // columns)
    step, start, whole = max(1, TOGETHER // columns // height) * height, 0, torch.empty(0)
    for rows, block in weight.blocks():
        if rows.start >= start + len(whole):
            if len(whole):
                yield slice(start, start + len(whole)), whole
            start = rows.start
            whole = torch.empty((min(step, count - start), columns), dtype=dtype, device=block.device)
        whole[rows.start - start : rows.stop - start] = block
    yield slice(start, start + len(whole)), whole
