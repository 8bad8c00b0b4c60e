"""Columns of a matrix rounded one by one, each at a target that depends on the errors of those before it.

What error feedback (GPTQ) and coordinate descent have in common: both walk over neighbouring positions from the last
to the first, round a target, and move later targets by a triangular factor times what rounding did. The inner loop is
some twenty operations on a vector of N weights, so the matrix lies transposed, and a column is contiguous. Positions
are taken in strips: what a strip does to the others is one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.formats import Format, Grouped, Params

STRIP = 16


def round_columns(
    format: Grouped, targets: Tensor, feedback: Tensor, params: Params, base: Tensor, moved: Tensor
) -> Tensor:
    """Codes [C, N] of `targets` float32 [C, N], from the last position to the first.

    feedback: [C, C]; row j's entries i > j say how much of moved[i] is added to the target at j. params: as
    `transposed` gives them. base: [C, N]. moved: [C, N], overwritten with base − what the codes stand for. targets is
    overwritten, too.
    """
    codes: list[Tensor] = []
    for stop in range(len(targets), 0, -STRIP):
        start = max(0, stop - STRIP)
        targets[start:stop].addmm_(feedback[start:stop, stop:], moved[stop:])
        for j in range(stop - 1, start - 1, -1):
            target = targets[j].addmv_(moved[j + 1 : stop].T, feedback[j, j + 1 : stop])
            at = {key: p[min(j, len(p) - 1)] for key, p in params.items()}
            codes.append(format.round_at(target, at))
            torch.sub(base[j], format.decode_at(codes[-1], at), out=moved[j])
    return torch.stack(codes[::-1])


def transposed(format: Format, params: Params, columns: Tensor) -> Params:
    """Params of some columns (int64 [C]) as `round_columns` takes them: [C, N], or one row where they do not differ."""
    return {key: p.mT.contiguous() for key, p in format.at_columns(params, columns).items()}
