"""The same numbers in another format, or why there are none: no weight is rounded on the way.

A code of most formats stands for  scale · level + offset,  with levels from a short list. Two formats hold the same
numbers where one's scale, times the ratio of the steps between levels, is a scale that the other's bytes can hold
(`Grouped.placed`), where its offset is too (a zero-point within the codes, −z·s in the type of offsets), and where the
levels that occur are among the other's. Groups need not be alike: what the other format lets share a scale must have
one. Nothing here knows formats by name; what each can hold is said by its own file.

So: the scale of every column, as the source has it, gathered into the other's groups; the codes nearest at those
params; all of it packed and unpacked again. What comes out either equals what went in, number by number, or is refused.
(Zeros count as equal whatever their sign.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.base import Format, Group, Grouped, QTensor
from fewbits.formats.floats import Float


def recode(q: QTensor, format: Format) -> QTensor:
    """q in `format`, with exactly its numbers. Raises FormatError with the first reason why that cannot be."""
    if q.format == format:
        return q
    format.check(q.shape)
    if isinstance(format, Float):
        return _in_floating_point(q, format)
    numbers, reason = q.dequantize(), None
    scale, lowest = _by_group(q, numbers, format)
    for ratio in _ratios(q.format, format):
        try:
            found = _at(numbers, scale * ratio, lowest, format)
        except FormatError as error:
            reason = reason or error
            continue
        other = found.dequantize() != numbers
        if not bool(other.any()):
            return found
        reason = reason or _changed(numbers, found.dequantize(), other, format)
    raise reason or FormatError(f"{format.name} has no levels that {q.format.name}'s could be")


def _in_floating_point(q: QTensor, format: Float) -> QTensor:
    numbers = q.codes if isinstance(q.format, Float) else q.dequantize()
    made = QTensor(format, format.round(numbers, {}), {})
    back = made.codes.to(numbers.dtype)
    other = back != numbers
    if bool(other.any()):
        raise _changed(numbers, back, other, format)
    return made


def _by_group(q: QTensor, numbers: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The scale of q, and the number of its lowest level, for each group of `format`; of a group of zeros, zeros."""
    source, levels = q.format, q.format.levels
    if not isinstance(source, Grouped) or levels is None:
        raise FormatError(f"{source.name} is not in groups of neighbours, which {format.name} is")
    if not isinstance(format, Grouped) or format.levels is None:
        raise FormatError(f"{format.name} has no groups of neighbours that share a scale")
    nested = _nested(source.group, format.group)
    step = format.group if nested and isinstance(format.group, int) else q.shape[-1] if nested else 1
    params = source.at_columns(q.params, torch.arange(0, q.shape[-1], step, device=q.codes.device))
    scale, offset = source.scale_at(params), source.offset_at(params)
    found = scale, levels[0].to(scale.device) * scale + offset
    found = _expanded(found, format.groups(q.shape)) if nested else _of_largest(_expanded(found, q.shape), format)
    empty = ~format.grouped(numbers).any(-1)
    return found[0].masked_fill(empty, 0.0), found[1].masked_fill(empty, 0.0)


def _nested(source: Group, target: Group) -> bool:
    """Whether every group of the target lies within one of the source, whose scale the first of its columns has."""
    if target == "tensor":
        return False
    return not isinstance(source, int) or (isinstance(target, int) and source % target == 0)


def _expanded(pair: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return pair[0].expand(shape), pair[1].expand(shape)


def _of_largest(pair: tuple[Tensor, Tensor], format: Grouped) -> tuple[Tensor, Tensor]:
    """Of what each column has, that of the largest scale in a group; whether all its numbers can have that one is seen
    later.
    """
    scale, lowest = (format.grouped(x) for x in pair)
    largest = scale.abs().argmax(-1, keepdim=True)
    return scale.gather(-1, largest).squeeze(-1), lowest.gather(-1, largest).squeeze(-1)


def _ratios(source: Format, target: Format) -> list[float]:
    """What the source's scale may be multiplied by: 1, and the ratio of the steps that the levels are multiples of."""
    ours, theirs = _step(source), _step(target)
    return [1.0] if ours is None or theirs is None or ours == theirs else [1.0, ours / theirs]


def _step(format: Format) -> float | None:
    """The number that all levels are multiples of; None where there is none among them."""
    levels = format.levels
    if levels is None:
        return None
    smallest = levels.abs()[levels != 0].min()
    multiples = levels / smallest
    return float(smallest) if bool((multiples == multiples.round()).all()) else None


def _at(numbers: Tensor, scale: Tensor, lowest: Tensor, format: Format) -> QTensor:
    """Numbers at these params, as the bytes hold them."""
    assert isinstance(format, Grouped)
    params = format.placed(scale, lowest)
    arrays = format.pack(format.round(numbers, params), params)
    return QTensor.from_arrays(format, arrays, tuple(numbers.shape))


def _changed(before: Tensor, after: Tensor, other: Tensor, format: Format) -> FormatError:
    count, first, found = int(other.sum()), float(before[other][0]), float(after[other][0])
    return FormatError(
        f"{format.name}: {count} of {other.numel()} numbers would change, the first from {first:.9g} to {found:.9g}"
    )
