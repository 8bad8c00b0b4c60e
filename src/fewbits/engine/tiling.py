"""Weights of every format into tiles (`runtime/tiles.py`), by what a format says of itself and not by its name.

A format whose numbers are `level · scale + offset` becomes `Tiles` where its levels are integers on a line: evenly
spaced ones as they are, up to sixteen others through a table. So are all integers of affine formats and GGUF's blocks,
ternary, FP4 (whose levels are halves, −12 … 12 of them) and IQ4. Binary's two levels, −1 and 1, lie around a zero that
is no code: they are a table of 0 and 2 around 1. NF4's levels lie on no grid; they are rounded to the one within a
byte that fits them best in the mean square, which moves no level by more than 0.39 % of the group's scale (0.17 % in
the root mean square; the nearest two levels are 8 % apart).

Levels with an exponent (FP8) stay floating-point numbers, in FP16, which holds all of them, times the scale; and so
stay weights that were never quantized, in their own type. Groups that are no multiple of 16 columns are decoded, to
float32, because no narrower type would hold a level times a scale.

All of it goes by slabs of rows on every core: nothing holds a matrix in float32 but for that last case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from fewbits.formats import Float, Format, Grouped, QTensor
from fewbits.kernels import Packed
from fewbits.kernels.threads import workers
from fewbits.runtime.tiles import (
    BLOCK,
    PANEL,
    PLANES,
    STEP,
    Array,
    Direct,
    Floats,
    Offset,
    Scale,
    Stepped,
    Tiles,
    Weight,
    Zeros,
    blocks,
    groups,
    numbers,
    panels,
)
from fewbits.runtime.tiles import (
    codes as codes_of,
)

T = TypeVar("T")
Read: TypeAlias = Callable[[slice], QTensor]
Params: TypeAlias = tuple[Tensor, ...]
"""Of a slab: (numbers,), or (factor, steps) where there are two levels."""

SLAB = 1 << 20
"""Weights of a slab: 4 MB where they pass through float32."""
GRANULE = 16
"""Columns that the kernels let share params, or a multiple of them."""
SPAN = 256
"""Columns that share a factor in formats of two levels."""
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
"""What `Floats` calls its types."""
NEUTRAL = {"scale": 1, "zero": 0, "offset": 0, "exponent": 127, "global_scale": 1, "absmax": 127} | {
    "factor": 1,
    "steps": 1,
    "minimum_factor": 0,
    "minimum_steps": 0,
}
"""Params of every format under which a code stands for its level."""


def tiled(weight: QTensor) -> Weight:
    """A matrix [rows, columns] of any format in tiles."""
    return tile(weight.format, (weight.shape[0], weight.shape[1]), lambda rows: taken(weight, rows))


def tile(format: Format, shape: tuple[int, int], read: Read) -> Weight:
    """A matrix of this format and shape in tiles; `read` returns its rows, called from several threads."""
    make = _floats if isinstance(format, Float) or _grid(format) is None else _tiles
    return make(format, shape, read)


def tiled_packed(packed: Packed) -> Weight:
    """A packed matrix in tiles; the whole of it is unpacked only where its rows depend on one another."""
    if not packed.format.rowwise:
        return tiled(packed.unpack())
    return tile(packed.format, (packed.shape[0], packed.shape[1]), packed.take)


def multiplies_codes(format: Format) -> bool:
    """Whether its tiles hold its codes, from which they can be had back (`codes_from`)."""
    return _grid(format) is not None


def codes_from(format: Format, weight: Tiles) -> Tensor:
    """The codes of a format that tiles were made of, [rows, columns]."""
    grid = _grid(format)
    assert grid is not None
    assert isinstance(format, Grouped)
    unsigned = torch.from_numpy(codes_of(weight))
    return (unsigned + grid.first % 256).view(_codes_dtype(format))


def scales_from(weight: Tiles) -> Tensor | None:
    """What the integers of tiles are multiplied by, float32 [rows, groups]; None where it lies in two levels."""
    if not isinstance(weight.scale, Direct):
        return None
    by_row = numbers(weight.scale.values).transpose(0, 2, 1).reshape(-1, weight.scale.values.shape[1])
    group = min(weight.group, weight.columns)
    return torch.from_numpy(by_row[: weight.rows, : ceil(weight.columns / group)])


def taken(weight: QTensor, rows: slice | Tensor) -> QTensor:
    """Some rows of a matrix: a param has a row for each of them, or is shared by all."""
    n = weight.shape[0]
    params = {key: p[rows] if p.dim() > 1 and p.shape[0] == n else p for key, p in weight.params.items()}
    return QTensor(weight.format, weight.codes[rows], params)


@dataclass(frozen=True)
class Grid:
    """Levels as integers: level of a code = (u − zero) · unit, with u = code − first or table[code − first]."""

    bits: int
    first: int
    zero: int
    unit: float
    table: tuple[int, ...] | None = None


def levels_by_code(format: Grouped) -> tuple[int, Tensor] | None:
    """The first code and the level of each code from there on; None where they cannot be listed."""
    levels = format.levels
    if levels is None:
        return None
    signed = levels[0] < 0 and _codes_dtype(format) == torch.int8
    first, last = (int(levels[0]), int(levels[-1])) if signed else (0, (1 << len(format.cells)) - 1)
    codes = torch.arange(first, last + 1).to(torch.int8 if signed else torch.uint8)
    return first, format.decode_at(codes, {key: torch.tensor(float(value)) for key, value in NEUTRAL.items()})


def _codes_dtype(format: Grouped) -> torch.dtype:
    w = torch.ones(1, SPAN)
    return format.round(w, format.fit(w)).dtype


@lru_cache
def _grid(format: Format) -> Grid | None:
    if not isinstance(format, Grouped) or (isinstance(format.group, int) and format.group % GRANULE):
        return None
    listed = levels_by_code(format)
    if listed is None:
        return None
    first, levels = listed
    bits = max(1, ceil(log2(len(levels))))
    unit = float(levels[1] - levels[0])
    zero = -float(levels[0]) / unit
    if zero in range(256) and torch.equal(levels, (torch.arange(len(levels)) - zero) * unit):
        return Grid(bits, first, int(zero), unit)
    return None if len(levels) > 16 else _table(bits, first, levels)


def _table(bits: int, first: int, levels: Tensor) -> Grid:
    """The finest grid under one byte that levels lie on, or the one that they are nearest to."""
    reach = float(levels.max() - levels.min())
    exact = [2.0**i for i in range(8) if 2**i * reach <= 255]
    candidates = [*exact, *np.linspace(64, 254, 8192) / reach]
    error = [float((levels.double() * c - (levels.double() * c).round()).square().sum() / c**2) for c in candidates]
    steps = candidates[int(np.argmin(error))]
    whole = (levels.double() * steps).round().long()
    zero = -int(whole.min())
    return Grid(bits, first, zero, 1 / steps, tuple((whole + zero).tolist()))


def _tiles(format: Format, shape: tuple[int, int], read: Read) -> Tiles:
    grid = _grid(format)
    assert grid is not None
    (rows, columns), group = shape, _group(format, shape[1])
    codes = np.empty((panels(rows), blocks(columns), grid.bits * PANEL * STEP), np.uint8)

    def slab(part: slice) -> tuple[Params, Params | None]:
        weight = read(part)
        unsigned = weight.codes - grid.first if grid.first else weight.codes  # bytes wrap around
        pack_codes(unsigned.view(torch.uint8), grid.bits, torch.from_numpy(_panels_of(codes, part)))
        scale, offset = _scales(weight, grid)
        return _params(scale, shape, group, part), None if offset is None else _params(offset, shape, group, part)

    scales, offsets = zip(*_by_slabs(shape, slab), strict=True)
    scale, offset = _joined(scales), _joined(offsets)
    assert scale is not None
    return Tiles(
        *(rows, columns, grid.bits, group, grid.zero, codes),
        scale=_scale(scale, group),
        offset=_offset(scale, offset, group),
        table=None if grid.table is None else np.array(grid.table + (16 - len(grid.table)) * (0,), np.uint8),
    )


def _group(format: Format, columns: int) -> int:
    """Columns that share params: of the format, or all."""
    group = getattr(format, "group", None)
    return group if isinstance(group, int) else blocks(columns) * BLOCK


def _panels_of(array: Array, part: slice) -> Array:
    """The panels in which a slab of rows lies."""
    return array[part.start // PANEL : panels(part.stop)]


def pack_codes(codes: Tensor, bits: int, into: Tensor) -> None:
    """Unsigned codes, uint8 [rows, columns], into planes, uint8 [panels, blocks, bits · 64]."""
    count, across = into.shape[:2]
    filled = pad(codes, (0, across * BLOCK - codes.shape[1], 0, count * PANEL - codes.shape[0])).contiguous()
    fours = filled.view(torch.int32).view(count, PANEL, across * BLOCK // STEP)  # four columns of a row
    steps = fours.transpose(1, 2).contiguous().view(torch.uint8).view(count, across, BLOCK // STEP, PANEL * STEP)
    left, end = bits, 0
    for width in PLANES[bits]:
        start, end = end, end + width * PANEL * STEP
        left -= width
        plane = steps if width == bits else steps >> left & (1 << width) - 1
        by_shift = plane.view(count, across, 8 // width, width, PANEL * STEP)
        packed = into[..., start:end].view(count, across, width, PANEL * STEP)
        packed.copy_(by_shift[:, :, 0])
        for i in range(1, 8 // width):
            packed |= by_shift[:, :, i] << (width * i)


def _scales(weight: QTensor, grid: Grid) -> tuple[Params, Params | None]:
    """Scale and offset of a slab, [rows, groups] or what broadcasts to it."""
    format, params = weight.format, weight.params
    assert isinstance(format, Grouped)
    if "steps" in params and grid.unit == 1:
        minima = (-params["minimum_factor"], params["minimum_steps"]) if "minimum_steps" in params else None
        return (params["factor"], params["steps"]), minima
    return (format.scale_at(params) * grid.unit,), (format.offset_at(params),)


def _params(params: Params, shape: tuple[int, int], group: int, part: slice) -> Params:
    """Of a slab, each [panels, groups, 16], filled up with zeros."""
    rows = part.stop - part.start
    return tuple(_param(p.expand(rows, p.shape[-1]), shape[1], group) for p in params)


def _param(p: Tensor, columns: int, group: int) -> Tensor:
    filled = pad(p.float(), (0, groups(columns, group) - p.shape[1], 0, -p.shape[0] % PANEL))
    return filled.view(-1, PANEL, filled.shape[1]).transpose(1, 2).contiguous()


def _by_slabs(shape: tuple[int, int], make: Callable[[slice], T]) -> list[T]:
    """What `make` returns of each slab of whole panels, in order."""
    step = max(1, SLAB // shape[1] // PANEL) * PANEL
    parts = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    if len(parts) == 1:
        return [make(parts[0])]
    with workers(torch.get_num_threads()) as pool:
        return list(pool.map(make, parts))


def _joined(parts: Iterable[Params | None]) -> list[NDArray[np.float32]] | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return [torch.cat(pieces).numpy() for pieces in zip(*present, strict=True)]


def _scale(found: list[NDArray[np.float32]], group: int) -> Scale:
    if len(found) == 1:
        return Direct(narrowest(found[0]))
    factor, steps = found
    per = SPAN // group
    return Stepped(np.ascontiguousarray(factor[:, ::per]).astype(np.float16), steps.astype(np.int8), per)


def _offset(scale: list[NDArray[np.float32]], found: list[NDArray[np.float32]] | None, group: int) -> Offset | None:
    if found is None or (len(found) == 1 and not found[0].any()):
        return None
    if len(found) == 2:
        return _scale(found, group)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.nan_to_num(np.rint(-found[0] / scale[0]))
    if np.array_equal(-zeros * scale[0], found[0]) and zeros.min() >= 0 and zeros.max() <= 255:
        return Zeros(zeros.astype(np.uint8))
    return Direct(narrowest(found[0]))


def narrowest(numbers: NDArray[np.float32]) -> Array:
    """Numbers in the narrowest type that holds all of them: float16, bfloat16 (as uint16) or float32."""
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if np.array_equal(half.astype(np.float32), numbers):
        return half
    words = numbers.view(np.uint32)
    return numbers if (words & 0xFFFF).any() else (words >> 16).astype(np.uint16)


def _floats(format: Format, shape: tuple[int, int], read: Read) -> Floats:
    (rows, columns), scaled = shape, isinstance(format, Grouped) and _levels_fit_float16(format)
    dtype = torch.float16 if scaled else _own_dtype(format)
    values = torch.empty(panels(rows), blocks(columns) * BLOCK, PANEL, dtype=dtype)
    group = _group(format, columns) if scaled else 0

    def slab(part: slice) -> Params | None:
        weight = read(part)
        numbers, scale = _levels(weight) if scaled else (_plain(weight), None)
        filled = pad(numbers.to(dtype), (0, values.shape[1] - columns, 0, -len(numbers) % PANEL))
        by_panel = filled.view(-1, PANEL, values.shape[1]).transpose(1, 2)
        values[part.start // PANEL : panels(part.stop)] = by_panel
        return None if scale is None else _params((scale,), shape, group, part)

    found = _joined(_by_slabs(shape, slab))
    array: Array = values.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else values.numpy()
    return Floats(rows, columns, KINDS[dtype], array, group, None if found is None else Direct(narrowest(found[0])))


def _plain(weight: QTensor) -> Tensor:
    """The numbers of a weight that has no scales to be kept."""
    return weight.codes if _kept(weight.format) else weight.dequantize()


def _own_dtype(format: Format) -> torch.dtype:
    return format.dtype if _kept(format) and isinstance(format, Float) else torch.float32


def _kept(format: Format) -> bool:
    """Whether codes are the numbers themselves, in a type that kernels read."""
    return isinstance(format, Float) and format.dtype in KINDS


@lru_cache
def _levels_fit_float16(format: Grouped) -> bool:
    levels = format.levels
    whole = not isinstance(format.group, int) or format.group % GRANULE == 0
    return whole and levels is not None and torch.equal(levels.half().float(), levels)


def _levels(weight: QTensor) -> tuple[Tensor, Tensor]:
    """The level of each code, float32 [rows, columns], and what it is multiplied by."""
    format = weight.format
    assert isinstance(format, Grouped)
    neutral = {key: torch.tensor(float(value)) for key, value in NEUTRAL.items()}
    return format.decode_at(weight.codes, neutral), format.scale_at(weight.params)
