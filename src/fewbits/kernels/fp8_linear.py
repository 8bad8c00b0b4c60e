"""fp8_linear: x · Wᵀ + bias with both sides rounded to FP8 E4M3, multiplied as FP8.

    fp8_linear(x_q e4m3 [..., K], x_scale, w_q e4m3 [N, K], w_scale, bias) -> float32 [..., N]

x_scale is [..., 1] (per token) or [1], w_scale [N] (per row) or [1].

CUDA devices of compute capability 8.9 and above (Ada, Hopper) have units for it: `torch._scaled_mm` with scales of one,
K and N padded to multiples of 16, and float32 sums (`use_fast_accum=False`, as the tensor cores' own sums have fewer
bits). Elsewhere both sides are decoded: a product of two E4M3 numbers has 8 significant bits, exact in float32, and
only the sums are rounded. That costs the decoding of every weight at every call, and no memory is saved meanwhile.
(CPUs have `_scaled_mm` too; it is slower than decoding.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fewbits.kernels._scaling import scaled


def fp8_linear(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply E4M3 codes [..., K] and [N, K]. See the module for shapes."""
    rows = x_q.reshape(-1, x_q.shape[-1])
    product = _scaled_mm(rows, w_q) if _has_units(rows.device) else linear(rows.float(), w_q.float())
    return scaled(product.reshape(*x_q.shape[:-1], -1), x_scale, w_scale, bias)


@lru_cache
def _has_units(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _scaled_mm(x: Tensor, w: Tensor) -> Tensor:
    """x · wᵀ of E4M3 [M, K] and [N, K] by torch's FP8 product, float32 [M, N]."""
    outputs, columns = w.shape
    x, w = _padded(x, 0, -columns % 16), _padded(w, -outputs % 16, -columns % 16)
    one = torch.ones(1, device=x.device)
    product: Tensor = torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
    return product[:, :outputs]


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros appended to E4M3 codes; padding works on their bytes, of which 0 is the number 0."""
    return pad(codes.contiguous().view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)
