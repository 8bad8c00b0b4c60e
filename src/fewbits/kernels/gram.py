"""xᵀ·x, half of it: the matrix is symmetric.

    total += xᵀ·x      on and above the diagonal; what lies below is scratch

x [T, K] is float32 or bfloat16, total float32 [K, K]; products of BF16 numbers are exact in float32, and summed in it.

The compiled kernel (csrc/gram.cpp) is for BF16 on processors that multiply it (AVX-512 BF16): 1.3 to 1.9 T operations/s
on two cores, counted as a whole product's, where float32 products of the same stripes reach 0.6 to 0.7. Everything
else, and every other device, goes through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels._compiled import compiled

STRIPE = 512
"""Rows of the result that are summed at a time: large enough for BLAS, small enough to skip half of a large one."""


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ·x to float32 [K, K], for x [T, K]."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        core = compiled()
        if core is not None and core.multiplies_bf16():
            core.add_gram(x.contiguous().view(torch.uint16), total, torch.get_num_threads())
            return
    reference(total, x)


def reference(total: Tensor, x: Tensor) -> None:
    x = x.float()
    for start in range(0, x.shape[1], STRIPE):
        total[start : start + STRIPE, start:].addmm_(x[:, start : start + STRIPE].T, x[:, start:])


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal below it."""
    for start in range(0, len(total), STRIPE):
        stop = start + STRIPE
        square = total[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
