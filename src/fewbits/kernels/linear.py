"""linear: x · Wᵀ + s · (x · Aᵀ) · Bᵀ + bias with W packed, and A and B, where there are any, of low rank.

    linear(x [..., K], weight [N, K] packed, bias [N] or None, low_rank A [r, K], B [N, r], s or None) -> [..., N]

in the dtype and on the device of x, or in autocast's dtype. A block of rows of W is decoded into that dtype (`decode`)
and multiplied; at no time does a large float weight exist whole. Cost per weight and call: its decoding, and one
multiply-add per row of x. Decoding dominates for a few rows of x and vanishes for hundreds.

It is differentiable by x, A, B and the bias, not by W: the way back decodes W again instead of keeping what was
decoded, so training beside a frozen W needs no more memory for it than its bytes. The low rank is added where the
product lies, and x is cast once for both: in layers of their own, as PEFT has A and B, scaling and adding take longer
than multiplying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels.decode import BLOCK
from fewbits.kernels.packed import Packed

TOGETHER = 1 << 22
"""Weights multiplied at a time in training: with many rows of x it is worth some memory to sum over fewer parts."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """s · B·A beside a weight [N, K]: a [r, K], b [N, r]."""

    a: Tensor
    b: Tensor
    scale: float


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
    """Multiply x [..., K] by the transpose of a packed weight [N, K] and what lies beside it; add bias [N]."""
    a, b, scale = (None, None, 0.0) if low_rank is None else (low_rank.a, low_rank.b, low_rank.scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, a, b)):
        found: Tensor = _Product.apply(x, weight, a, b, scale)  # type: ignore[no-untyped-call]
        return found if bias is None else found + bias.to(found.dtype)
    x = x.to(product_dtype(x))
    parts = [functional.linear(x, w, None if bias is None else bias[rows]) for rows, w in weight.blocks(x.dtype, BLOCK)]
    y = _joined(parts)
    if low_rank is not None:
        _add(y, _inner(x, low_rank.a.to(x.dtype), scale), low_rank.b.to(x.dtype))
    return y


Slopes: TypeAlias = tuple[Tensor | None, None, Tensor | None, Tensor | None, None]


class _Product(torch.autograd.Function):
    """x · Wᵀ + s · (x · Aᵀ) · Bᵀ. With g the slope by it and h = s · g · B, the slopes by x, A and B are g · W + h · A,
    hᵀ · x and gᵀ · (s · x · Aᵀ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, x.dtype
        x = x.to(product_dtype(x))
        y = _joined([functional.linear(x, w) for _, w in weight.blocks(x.dtype, TOGETHER)])
        if a is not None and b is not None:
            ctx.dtypes = a.dtype, b.dtype
            a, b = a.to(x.dtype), b.to(x.dtype)
            inner = _inner(x, a, scale)
            _add(y, inner, b)
            ctx.save_for_backward(x, a, b, inner)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Slopes:
        by_x = by_a = by_b = within = None
        shape, slope = slopes[0].shape, _rows(slopes[0])
        saved = ctx.saved_tensors  # once: checkpointing computes them when they are asked for
        if saved:
            x, a, b, inner = saved
            within = (slope @ b).mul_(ctx.scale)
            by_a, by_b = within.T @ _rows(x), slope.T @ inner
            by_a, by_b = (each.to(dtype) for each, dtype in zip((by_a, by_b), ctx.dtypes, strict=True))
        if ctx.needs_input_grad[0]:
            for rows, w in ctx.weight.blocks(slope.dtype, TOGETHER):
                by_x = slope[:, rows] @ w if by_x is None else by_x.addmm_(slope[:, rows], w)
            assert by_x is not None
            by_x = by_x if within is None else by_x.addmm_(within, a)
            by_x = by_x.view(*shape[:-1], -1).to(ctx.dtype)
        return by_x, None, by_a, by_b, None


def product_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: its own type, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _inner(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """s · x · Aᵀ, [rows of x, r]."""
    return functional.linear(_rows(x), a).mul_(scale)


def _add(y: Tensor, inner: Tensor, b: Tensor) -> None:
    """Add inner · Bᵀ to y [..., N]."""
    y.view(-1, y.shape[-1]).addmm_(inner, b.T)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
