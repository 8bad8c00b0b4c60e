"""Float32 matrix products by the faster of torch's two libraries.

On x86 torch multiplies float32 matrices with MKL, which on processors of other makers than its own uses half the width
of their registers: 220 GFLOP/s on two cores of an AMD EPYC where oneDNN, which comes with torch too, reaches 470.
torch gives float32 products to oneDNN only where it may compute them in BF16 inside (`set_float32_matmul_precision`
"medium"). But oneDNN takes BF16 for them on AMX alone; on a processor that has none they stay float32. Whether they do
is not assumed: products of numbers that BF16 cannot hold are compared with float64, once a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

KEPT, GIVEN_AWAY = "highest", "medium"
SHAPES = ((1, 512, 64), (17, 512, 33), (256, 512, 256), (1024, 512, 64))  # rows, columns summed over, outputs
UNIT = 2.0**-24
"""Half the distance from 1 to the next float32."""


@contextmanager
def fast_float32(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it, float32 products on this device are still float32, and as fast as torch can make them."""
    decided = torch.get_float32_matmul_precision() != KEPT  # by somebody else, who may have reasons
    if torch.device(device).type != "cpu" or decided or not _stays_exact():
        yield
        return
    torch.set_float32_matmul_precision(GIVEN_AWAY)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(KEPT)


@lru_cache
def _stays_exact() -> bool:
    """Whether this processor gains anything, and loses no bit of its operands."""
    found = torch.cpu.get_capabilities()
    if not found.get("avx512_f") or found.get("amx_tile"):
        return False
    torch.set_float32_matmul_precision(GIVEN_AWAY)
    try:
        return all(exact(torch.mm, *shape) for shape in SHAPES)
    finally:
        torch.set_float32_matmul_precision(KEPT)


def exact(multiply: Callable[[Tensor, Tensor], Tensor], rows: int, columns: int, outputs: int) -> bool:
    """Whether x · w of such a shape is off by no more than float32 sums, in any order, may be; BF16 is, by 70 times."""
    x = torch.full((rows, columns), 1 + 2.0**-10)  # BF16 has 1 and 1 + 2^-7
    x[::2, ::3] += 2.0**-9
    w = torch.full((columns, outputs), 1 + 2.0**-11)
    sums = x.double() @ w.double()
    return bool((multiply(x, w).double() - sums).abs().amax() <= columns * UNIT * sums.amax())
