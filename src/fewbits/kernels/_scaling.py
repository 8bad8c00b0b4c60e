"""What products of codes share: one scale on either side of the sum over K can be taken out of it."""

from __future__ import annotations

from torch import Tensor


def scaled(product: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """product float32 [..., N], changed in place, times x_scale [..., 1] or [1] and w_scale [N] or [1], plus bias."""
    y = product.mul_(x_scale).mul_(w_scale)
    return y if bias is None else y.add_(bias)
