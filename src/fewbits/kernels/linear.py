"""linear: x · Wᵀ + bias with W packed.

    linear(x [..., K], weight [N, K] packed, bias [N] or None) -> [..., N], in the dtype and on the device of x

The reference decodes a block of rows to float32, casts it to x's dtype and multiplies; at no time does the float weight
exist whole. Cost per weight and call: its bits read, about 20 bytes of scratch written and read in cache, one
multiply-add per row of x. Decoding dominates for a few rows of x and vanishes for hundreds. A compiled kernel for a
device and a format takes over in this function, on the same arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels.packed import Packed


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by the transpose of a packed weight [N, K]; add bias [N]."""
    parts = [
        functional.linear(x, block.to(x.dtype), None if bias is None else bias[rows]) for rows, block in weight.blocks()
    ]
    return torch.cat(parts, dim=-1)
