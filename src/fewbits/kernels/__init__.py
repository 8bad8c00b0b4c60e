"""Arithmetic on packed weights: one op a file, its contract and its plain reference in Python.

An op takes a `Packed` weight, the bytes as a checkpoint holds them, because that is what a fast kernel reads. The
references here decode a few rows at a time and leave the product to torch, so they serve every format on every device.
"""

from __future__ import annotations

from fewbits.kernels.embedding import embedding
from fewbits.kernels.linear import linear
from fewbits.kernels.packed import Packed

__all__ = ["Packed", "embedding", "linear"]
