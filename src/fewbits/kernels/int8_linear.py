"""int8_linear: x · Wᵀ + bias with both sides rounded to integers, multiplied as integers.

    int8_linear(x_q int8 [..., K], x_scale, w_q int8 [N, K], w_scale, w_zero, bias) -> float32 [..., N]

x_scale is [..., 1] (per token) or [1]; w_scale and w_zero are [N] (per row) or [1]:

    y[m, n] = x_scale[m] · w_scale[n] · (Σ_k x_q[m, k] · w_q[n, k] − w_zero[n] · Σ_k x_q[m, k]) + bias[n]

`int_matmul` multiplies int8 × int8 into int32 and is exact: torch's `_int_mm` (oneDNN with VNNI or AMX on CPUs,
cuBLASLt on CUDA), whose limits were found by trying it (torch 2.13) and in its source:

    CPU   K = 1 returns wrong sums without a word, so a column of zeros is appended;
          without VNNI, partial sums may saturate at 16 bits
    CUDA  more than 16 rows of x, K and N multiples of 8: zeros are appended
    else  not implemented

So each device is asked once for products of extreme codes (`_exact_on`), and where it fails, the product is made of
float32 sums over 1024 columns: 1024 · 128² = 2^24, up to which float32 counts exactly, in whatever order. Codes of 255
steps (asymmetric weights) times 128 stay inside int32 up to K = 65536, beyond which a FormatError is raised.

Cost: one 8-bit multiply-add per weight and row of x, a seventh of float32's time where VNNI is; beside it eight bytes
of scratch per output.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fewbits.errors import FormatError
from fewbits.kernels._scaling import scaled

MOST_COLUMNS = 1 << 16
EXACT_COLUMNS = 1 << 10


def int8_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, w_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply int8 codes [..., K] and [N, K]; w_zero, integers, as w_q counts them. See the module for shapes."""
    rows = x_q.reshape(-1, x_q.shape[-1])
    total = int_matmul(rows, w_q)
    if w_zero is not None:
        total = total - rows.sum(-1, keepdim=True, dtype=torch.int32) * w_zero.to(torch.int32)
    return scaled(total.float().view(*x_q.shape[:-1], -1), x_scale, w_scale, bias)


def int_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x · wᵀ of int8 [M, K] and [N, K], exact int32 [M, N]. Raises FormatError if K is above 65536."""
    if x.shape[1] > MOST_COLUMNS:
        raise FormatError(
            f"an int8 product over {x.shape[1]} columns may exceed int32, which is safe up to {MOST_COLUMNS}; "
            "keep the inputs of this layer in floating point"
        )
    return _int_mm(x, w) if _exact_on(x.device) else _summed_in_float(x, w)


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    """torch's product, its operands padded with zeros to what the device takes."""
    rows, columns = x.shape
    outputs = w.shape[0]
    if x.device.type == "cuda":
        x, w = pad(x, (0, -columns % 8, 0, max(0, 17 - rows))), pad(w, (0, -columns % 8, 0, -outputs % 8))
    elif columns == 1:
        x, w = pad(x, (0, 1)), pad(w, (0, 1))
    return torch._int_mm(x.contiguous(), w.contiguous().t())[:rows, :outputs]


def _summed_in_float(x: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        total += linear(x[:, columns].float(), w[:, columns].float()).to(torch.int32)
    return total


@lru_cache
def _exact_on(device: torch.device) -> bool:
    """Whether the device's int8 product is right where saturating instructions go wrong: at the largest codes."""
    extremes = torch.tensor([-128, 127, -128, -128, 127, 127, 127, -128], dtype=torch.int8)
    x, w = extremes.repeat(17, 64), extremes.roll(1).repeat(16, 64)
    x[1::2], w[1::2] = -128, -128
    try:
        found = _int_mm(x.to(device), w.to(device))
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(found.cpu().long(), x.long() @ w.long().T)
