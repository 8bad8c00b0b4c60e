"""A quantized matrix as ONNX's DequantizeLinear reads it: w = (code − zero) · scale, in float32.

Every format whose levels are evenly spaced integers within a byte is that already: its codes are taken over, or moved
by a constant, and no weight is rounded again. Codes of up to 4 bits become INT4 or UINT4 (ONNX has no widths between),
others INT8 or UINT8. Scales become float32: DequantizeLinear computes in the type of its scale, and a product rounded
to 16 bits is another weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.engine.tiling import levels_by_code
from fewbits.engine.weights import Weight
from fewbits.errors import UnsupportedError
from fewbits.formats import Affine, Format, Grouped

ADVICE = "quantize the original to int8 or int4-g32 instead"


@dataclass(frozen=True)
class Layout:
    """What a format's matrices are in ONNX: integer type, and which weights share a scale.

    A code c of the format is the integer step · (c − first) + lowest. group: columns that share a scale; "row" and
    "tensor" as in formats.
    """

    bits: int
    signed: bool
    zero: bool
    group: int | str
    first: int
    step: int
    lowest: int

    @property
    def dtype(self) -> str:
        """ONNX's name of the type of codes and zero-points."""
        return f"{'' if self.signed else 'U'}INT{self.bits}"

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest integer of that type."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        return low, low + (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group) if isinstance(self.group, int) else 1


@dataclass(frozen=True, eq=False)
class Integers:
    """codes int8 or uint8 [N, K] (one byte each, also those of 4 bits); scale float32 [N, G], or [1, 1] for all;
    zero of the type of codes and the shape of scale, or None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def layout(name: str, format: Format) -> Layout:
    """Raises UnsupportedError, with the reason, for a format that DequantizeLinear cannot express."""
    if not isinstance(format, Grouped):
        raise UnsupportedError(f"{name}: {format} has scales that no block of ONNX's shares; {ADVICE}")
    listed, zero = levels_by_code(format), isinstance(format, Affine) and not format.symmetric
    if listed is None or not _evenly_spaced(listed[1]):
        raise UnsupportedError(
            f"{name}: the levels of {format} are not evenly spaced integers of 8 bits, which is all that ONNX's "
            f"DequantizeLinear decodes; {ADVICE}"
        )
    if type(format).offset_at not in (Grouped.offset_at, Affine.offset_at):
        raise UnsupportedError(
            f"{name}: {format} adds a floating-point offset to each group, and ONNX's zero-points are integers; "
            f"{ADVICE}"
        )
    if not _is_a_product(format):
        raise UnsupportedError(
            f"{name}: {format} decodes by two products one after the other, which round to other numbers than ONNX's "
            f"one; {ADVICE}"
        )
    first, levels = listed
    lowest, highest = int(levels[0]), int(levels[-1])
    signed = lowest < 0
    narrow = (lowest >= -8 and highest <= 7) if signed else highest <= 15
    return Layout(4 if narrow else 8, signed, zero, format.group, first, int(levels[1] - levels[0]), lowest)


def _evenly_spaced(levels: Tensor) -> bool:
    steps = levels.diff()
    whole = torch.equal(levels, levels.round()) and bool((steps == steps[0]).all())
    return whole and float(levels[0]) >= -128 and float(levels[-1] - levels[0]) <= 255


@lru_cache
def _is_a_product(format: Grouped) -> bool:
    """Whether its numbers are level times scale to the last bit: asked of a matrix of random ones."""
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    params = format.fit(w)
    codes = format.round(w, params)
    listed = levels_by_code(format)
    assert listed is not None
    first, levels = listed
    centred = format.grouped(levels[codes.int() - first])
    if "zero" in params:
        centred = centred - params["zero"].unsqueeze(-1)
    product = centred * format.scale_at(params).unsqueeze(-1)
    return torch.equal(format.ungrouped(product, tuple(w.shape)), format.decode(codes, params))


def integers(weight: Weight) -> Integers:
    """The codes, scales and zero-points of a matrix, read now.

    Takes its packed bytes and three bytes a weight. Raises UnsupportedError where `layout` does, or where a zero-point
    is no integer of the codes' type.
    """
    name, format = weight.entry.name, weight.entry.format
    plan, read = layout(name, format), weight.packed(torch.float32, torch.device("cpu")).view().unpack()
    assert isinstance(format, Grouped)
    dtype = torch.int8 if plan.signed else torch.uint8
    codes = read.codes
    if (plan.first, plan.step) != (plan.lowest, 1):
        codes = codes.to(torch.int16).sub_(plan.first).mul_(plan.step).add_(plan.lowest)
    zero = read.params["zero"] if plan.zero else None
    if zero is not None and float(zero.max()) > plan.range[1]:
        raise UnsupportedError(
            f"{name}: a zero-point is {float(zero.max()):g}, and {plan.dtype} ends at {plan.range[1]}; {ADVICE}"
        )
    return Integers(codes.to(dtype), format.scale_at(read.params).float(), None if zero is None else zero.to(dtype))
