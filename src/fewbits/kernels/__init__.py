"""Arithmetic on quantized weights: one op a file, its contract and its plain reference in Python.

`linear` and `embedding` take a `Packed` weight, the bytes as a checkpoint holds them, because that is what a fast
kernel reads; they decode a few rows at a time and leave the product to torch, so they serve every format on every
device. `int8_linear` and `fp8_linear` multiply codes by codes, where the input is rounded too.
"""

from __future__ import annotations

from fewbits.kernels.embedding import embedding
from fewbits.kernels.fp8_linear import fp8_linear
from fewbits.kernels.int8_linear import int8_linear
from fewbits.kernels.linear import LowRank, linear, product_dtype
from fewbits.kernels.packed import Packed

__all__ = ["LowRank", "Packed", "embedding", "fp8_linear", "int8_linear", "linear", "product_dtype"]
