"""Tiles: a matrix of any format as the kernels read it, in one layout for every processor.

Every format that multiplies as integers is `w[n, k] = scale[n, g] · (u[n, k] − zero) + offset[n, g]` with unsigned
codes u of 1 to 8 bits, a zero that the whole matrix shares, and params that 16 columns or more share. A codebook of up
to 16 entries puts a table in front, u = table[code], and is the same from there on. What is none of this (FP8, BF16 …)
is `Floats`: numbers in a floating-point type, with or without a scale.

Rows lie in *panels* of 16, columns in *blocks* of 32, both filled up (with code 0 and scale 0). A block of a panel is
a set of *planes*, from the highest bits to the lowest: 8 bits in one plane, or a sum of 4, 2 and 1 (3 = 2 + 1,
6 = 4 + 2; the wider plane holds the lower bits). Its columns are taken four at a time, as the instructions do which
multiply four bytes by four bytes and add: a *step* is 16 rows × 4 columns = 64 bytes once decoded, byte
4·row + column, and a block has 8 of them. A plane of b bits packs the block's 8 steps into b vectors of 64 bytes: bits
b·i … b·i + b − 1 of each byte of vector j belong to step j + i·b, so that decoding is a load, a shift and a mask, for
registers of any width.

Params lie by panel, then by group, then by row: 16 numbers next to one another for the 16 lanes of an accumulator.
There are as many groups as whole blocks take, `groups(columns, group)`. Scales are stored in the narrowest type that
holds all of them exactly; K-quants keep their two levels (`Stepped`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PANEL = 16
"""Rows that lie interleaved."""
BLOCK = 32
"""Columns of one set of planes."""
STEP = 4
"""Columns that one instruction adds up."""
INPUT_GROUP = 128
"""Columns of the inputs that are rounded to INT8 under one scale."""
PLANES = {1: (1,), 2: (2,), 3: (1, 2), 4: (4,), 5: (1, 4), 6: (2, 4), 7: (1, 2, 4), 8: (8,)}
"""Bits of a code -> bits of each plane, in the order in which they lie: the highest bits first."""

Array: TypeAlias = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Direct:
    """Params as numbers: float32, float16, or bfloat16 as uint16. values: [panels, groups, 16]."""

    values: Array


@dataclass(frozen=True, eq=False)
class Stepped:
    """Params as an integer times a factor that `per` groups share: steps int8 [panels, groups, 16], factor float16
    [panels, ceil(groups / per), 16].
    """

    factor: Array
    steps: Array
    per: int


@dataclass(frozen=True, eq=False)
class Zeros:
    """An offset of −zero · scale: values uint8 [panels, groups, 16]."""

    values: Array


Scale: TypeAlias = Direct | Stepped
Offset: TypeAlias = Direct | Stepped | Zeros


@dataclass(frozen=True, eq=False)
class Tiles:
    """A matrix [rows, columns] of integer codes.

    codes: uint8 [panels, blocks, bits · 64]. group: columns that share params, a multiple of 16; one group over all
    blocks' columns where a row shares them. table: uint8 [16], or None.
    """

    rows: int
    columns: int
    bits: int
    group: int
    zero: int
    codes: NDArray[np.uint8]
    scale: Scale
    offset: Offset | None = None
    table: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(array.nbytes for array in arrays(self).values())


@dataclass(frozen=True, eq=False)
class Floats:
    """A matrix [rows, columns] of floating-point numbers, [panels, columns in whole blocks, 16].

    values: float32, float16, bfloat16 as uint16. scale: Direct, [panels, groups, 16], or None for one.
    """

    rows: int
    columns: int
    kind: str  # "f32", "f16", "bf16"
    values: Array
    group: int = 0
    scale: Direct | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(array.nbytes for array in arrays(self).values())


Weight: TypeAlias = Tiles | Floats


def panels(rows: int) -> int:
    return -(-rows // PANEL)


def blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def groups(columns: int, group: int) -> int:
    """Groups of a row, those of filled-up columns included."""
    return -(-blocks(columns) * BLOCK // group)


def arrays(weight: Weight) -> dict[str, Array]:
    """The arrays of a weight by name: what is written to the cache, and counted."""
    if isinstance(weight, Floats):
        found = {"values": weight.values}
        return found if weight.scale is None else found | {"scale": weight.scale.values}
    found = {"codes": weight.codes} | _params("scale", weight.scale)
    return found if weight.offset is None else found | _params("offset", weight.offset)


def _params(name: str, params: Scale | Offset) -> dict[str, Array]:
    match params:
        case Stepped(factor, steps):
            return {f"{name}.factor": factor, f"{name}.steps": steps}
        case _:
            return {name: params.values}


def decode(weight: Weight) -> NDArray[np.float32]:
    """The numbers, float32 [rows, columns], that a weight stands for: the layout read as it is written above."""
    if isinstance(weight, Floats):
        w = _by_rows(numbers(weight.values), weight)
        return w if weight.scale is None else w * _spread(numbers(weight.scale.values), weight)
    u = codes(weight) if weight.table is None else weight.table[codes(weight)]
    centred = u.astype(np.float32) - np.float32(weight.zero)
    scale = _params_of(weight.scale)
    match weight.offset:
        case None:
            return centred * _spread(scale, weight)
        case Zeros(values):
            return (centred - _spread(values.astype(np.float32), weight)) * _spread(scale, weight)
        case offset:
            return centred * _spread(scale, weight) + _spread(_params_of(offset), weight)


def codes(weight: Tiles) -> NDArray[np.uint8]:
    """The codes, uint8 [rows, columns], before any table."""
    count, across = panels(weight.rows), blocks(weight.columns)
    found = np.zeros((count, across, BLOCK // STEP, PANEL * STEP), np.uint8)
    left, end = weight.bits, 0
    for bits in PLANES[weight.bits]:
        start, end = end, end + bits * PANEL * STEP
        left -= bits
        vectors: NDArray[np.uint8] = weight.codes[..., start:end].reshape(count, across, bits, PANEL * STEP)
        for i in range(8 // bits):
            part = np.right_shift(vectors, np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
            found[:, :, bits * i : bits * (i + 1)] |= part << np.uint8(left)
    steps = found.reshape(count, across * BLOCK // STEP, PANEL, STEP).transpose(0, 2, 1, 3)
    return steps.reshape(count * PANEL, across * BLOCK)[: weight.rows, : weight.columns]


def numbers(values: Array) -> NDArray[np.float32]:
    """float32 of any of the three floating-point types; uint16 is bfloat16, the upper half of a float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _params_of(params: Direct | Stepped) -> NDArray[np.float32]:
    """float32 [panels, groups, 16]."""
    if isinstance(params, Stepped):
        factor = np.repeat(numbers(params.factor), params.per, axis=1)[:, : params.steps.shape[1]]
        return factor * params.steps.astype(np.float32)
    return numbers(params.values)


def _by_rows(values: NDArray[np.float32], weight: Weight) -> NDArray[np.float32]:
    """[panels, n, 16] -> [rows, n] (n cut to the columns where it is theirs)."""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[: weight.rows, : weight.columns]


def _spread(values: NDArray[np.float32], weight: Weight) -> NDArray[np.float32]:
    """Params [panels, groups, 16] -> [rows, columns]."""
    by_rows = values.transpose(0, 2, 1).reshape(-1, values.shape[1])[: weight.rows]
    return np.repeat(by_rows, weight.group, axis=1)[:, : weight.columns]
