"""round_columns: columns rounded one by one, each at a target that depends on what rounding did to those before it.

    round_columns(format, targets [C, N], feedback [C, C], params, base [C, N]) -> codes [C, N], moved [C, N]

    t[j]     = targets[j] + Σ_{i > j} feedback[j, i] · moved[i]          from the last column j to the first
    codes[j] = nearest code to t[j];   moved[j] = base[j] − what codes[j] stands for

This is what error feedback (GPTQ) and coordinate descent have in common. The matrix lies transposed, a column of N
weights is contiguous, and its rows do not depend on each other. params are as `at_positions` gives them.

The compiled kernel (csrc/round_columns.cpp) knows a format by its levels alone: a number is level · scale + offset, and
these two are read off the smallest and the largest number of each group. It returns numbers, which the format itself
turns into codes and back, so the last bit is always the format's own. The reference walks over the columns in Python:
some twenty operations on a vector each, seven times slower on 768 rows; targets are caught up in strips, by one matrix
product each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewbits.formats import Format, Grouped, Params
from fewbits.kernels._compiled import compiled

STRIP = 16
FAR = 1e30
"""Beyond the outermost level at any scale."""


def round_columns(
    format: Grouped, targets: Tensor, feedback: Tensor, params: Params, base: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, moved), both [C, N], for float32 operands; targets is overwritten."""
    core = compiled() if targets.device.type == "cpu" and format.levels is not None else None
    if core is None:
        return reference(format, targets, feedback, params, base)
    scale, offset = (x.expand(-1, targets.shape[1]) for x in _line(format, params))
    levels, midpoints = _table(format)
    values = torch.empty_like(targets)
    operands = (x.contiguous() for x in (targets, feedback, scale, offset, levels, midpoints, base))
    core.round_columns(*operands, values, torch.get_num_threads())
    codes = format.round_at(values, params)
    return codes, base - format.decode_at(codes, params)


def reference(
    format: Grouped, targets: Tensor, feedback: Tensor, params: Params, base: Tensor
) -> tuple[Tensor, Tensor]:
    codes: list[Tensor] = []
    moved = torch.empty_like(base)
    for stop in range(len(targets), 0, -STRIP):
        start = max(0, stop - STRIP)
        targets[start:stop].addmm_(feedback[start:stop, stop:], moved[stop:])
        for j in range(stop - 1, start - 1, -1):
            target = targets[j].addmv_(moved[j + 1 : stop].T, feedback[j, j + 1 : stop])
            at = {key: p[min(j, len(p) - 1)] for key, p in params.items()}
            codes.append(format.round_at(target, at))
            torch.sub(base[j], format.decode_at(codes[-1], at), out=moved[j])
    return torch.stack(codes[::-1]), moved


def at_positions(format: Format, params: Params, columns: Tensor) -> Params:
    """Params of some columns (int64 [C]) as `round_columns` takes them: [C, N], or one row where they do not differ."""
    return {key: p.mT.contiguous() for key, p in format.at_columns(params, columns).items()}


def _line(format: Grouped, params: Params) -> tuple[Tensor, Tensor]:
    """(scale, offset) such that a number is level · scale + offset, in the shape of the params."""
    levels = _table(format)[0]
    like = max((p for p in params.values() if p.is_floating_point()), key=Tensor.numel, default=torch.ones(1, 1))
    like = like.expand(torch.broadcast_shapes(*(p.shape for p in params.values())))
    low, high = (format.decode_at(format.round_at(torch.full_like(like, far), params), params) for far in (-FAR, FAR))
    scale = (high - low) / (levels[-1] - levels[0])
    if not _even(levels):  # in a table, unlike on an even grid, the direction matters
        direction = format.scale_at(params)
        scale, low = scale.copysign(direction), torch.where(direction < 0, high, low)
    return scale, low - levels[0] * scale


@lru_cache
def _table(format: Grouped) -> tuple[Tensor, Tensor]:
    """(levels, midpoints filled up with infinity to a power of two less one, or none where the levels are even)."""
    levels = format.levels
    assert levels is not None
    if _even(levels):
        return levels, levels.new_empty(0)
    midpoints = (levels[1:] + levels[:-1]) / 2
    room = (1 << len(midpoints).bit_length()) - 1
    return levels, torch.cat([midpoints, levels.new_full((room - len(midpoints),), torch.inf)])


def _even(levels: Tensor) -> bool:
    gaps = levels.diff()
    return bool((gaps == gaps[0]).all())
