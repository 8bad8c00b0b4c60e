"""Weights as onnxruntime's MatMulNBits reads them (com.microsoft, ContribOperators.md).

A row's columns lie in blocks, each with a scale. Codes are unsigned: two of 4 bits a byte, the first one low, or one of
8; a last block that the row does not fill goes on with zeros. Without zero-points the zero is 8 or 128, so signed codes
are stored that much higher. Zero-points of a row lie as codes do, side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.export.integers import Integers, Layout

CONTRIB = "com.microsoft"
SMALLEST_BLOCK = 16


def fits(plan: Layout) -> bool:
    """Whether MatMulNBits has blocks of this size: powers of two from 16 on."""
    group = plan.group
    return isinstance(group, int) and group >= SMALLEST_BLOCK and group & (group - 1) == 0


def packed_blocks(weight: Integers, plan: Layout) -> NDArray[Any]:
    """Codes, uint8 [N, blocks, bytes of a block]."""
    assert isinstance(plan.group, int)
    codes = weight.codes.numpy().view(np.uint8) - np.uint8(plan.range[0] & 255)  # bytes wrap around
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % plan.group)))
    return _packed(filled, plan.bits).reshape(len(codes), plan.groups(codes.shape[1]), -1)


def packed_zeros(weight: Integers, plan: Layout) -> NDArray[Any]:
    """Zero-points, uint8 [N, bytes of a row]."""
    assert weight.zero is not None
    zeros = weight.zero.numpy()
    return _packed(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))), plan.bits) if plan.bits == 4 else zeros


def _packed(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
