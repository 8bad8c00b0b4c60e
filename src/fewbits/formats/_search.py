"""Scales that minimise the squared error, for every format of the kind value = scale · level(code).

For fixed codes with levels v the best scale is Σ h·x·v / Σ h·v² (h the importance), and the error it leaves is
Σ h·x² − (Σ h·x·v)² / Σ h·v². So a candidate scale costs one rounding and two sums: round at the candidate, then score
the codes by how much of Σ h·x² their best scale explains. The best candidate's best scale is then stored in the
format's own type, which can cost more than the search gained where that type is coarse: the format compares what it
stored with the range's scale in the end (`Grouped.least_error`).
(The objective that llama.cpp's make_qx_quants maximises; here for any grid.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

POLISH = 2  # rounds of solving for the scale and rounding again, after the best candidate is known


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0: a group of zeros stays zero.

    A subnormal scale counts as 0, because its inverse may be infinite.
    """
    return torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, torch.zeros_like(scale), scale.reciprocal())


def weighted_sum(x: Tensor, y: Tensor, importance: Tensor | None, room: Tensor | None = None) -> Tensor:
    """Σ h·x·y over the last dimension; room, in the shape of x, is written to."""
    xy = torch.mul(x, y, out=room)
    return (xy if importance is None else xy.mul_(importance)).sum(-1)


def best_scale(
    x: Tensor, start: Tensor, factors: Sequence[float], nearest: Callable[[Tensor], Tensor], importance: Tensor | None
) -> Tensor:
    """The least-squares scale of every group of x [..., g] among those reached from start·factor, [...].

    nearest maps numbers in units of the scale to the nearest levels; it may write over them.
    """
    room = torch.empty_like(x), torch.empty_like(x)  # new memory for each product would take longer than the product
    best, best_score = start.clone(), torch.full_like(start, -torch.inf)
    candidates = (start * factor for factor in factors)
    for candidate in candidates:
        solved, score = _solved(x, candidate, nearest, importance, room)
        better = score > best_score
        best, best_score = torch.where(better, solved, best), torch.where(better, score, best_score)
    for _ in range(POLISH):  # Lloyd's iteration: each round can only explain more
        best, _ = _solved(x, best, nearest, importance, room)
    return best


def _solved(
    x: Tensor,
    scale: Tensor,
    nearest: Callable[[Tensor], Tensor],
    importance: Tensor | None,
    room: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The least-squares scale for the levels nearest at `scale`, and the share of Σ h·x² that it explains."""
    v = nearest(torch.mul(x, inverse(scale).unsqueeze(-1), out=room[0]))
    xv, vv = (weighted_sum(y, v, importance, room[1]) for y in (x, v))
    empty = vv == 0
    solved = torch.where(empty, scale, xv / vv)
    return solved, torch.where(empty, torch.zeros_like(xv), xv * solved)


def best_affine(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    top: int,
    factors: Sequence[float],
    importance: Tensor | None,
    anchors: Sequence[float] = (0.5,),
) -> tuple[Tensor, Tensor]:
    """Least-squares (scale, offset) of every group of x [..., g] for values scale·q + offset, q in 0..top.

    Starts from the range [low, high] of each group, shrunk by each factor about each anchor (0 is its low end, 0.5 its
    centre, 1 its high end), and solves the 2x2 normal equations for the codes found there.
    """
    h = torch.ones_like(x) if importance is None else importance.expand_as(x)
    sh, sx = h.sum(-1), (h * x).sum(-1)
    reach = high - low
    best_s, best_o = (high - low) / top, low.clone()
    best_error = torch.full_like(low, torch.inf)
    for anchor, factor in product(anchors, factors):
        scale, offset = reach * factor / top, low + reach * (anchor * (1 - factor))
        q = ((x - offset.unsqueeze(-1)) * inverse(scale).unsqueeze(-1)).round_().clamp_(0, top)
        sq, sqq, sxq = (h * q).sum(-1), (h * q * q).sum(-1), (h * x * q).sum(-1)
        det = sh * sqq - sq * sq
        solvable = det > 1e-7 * sh * sqq
        scale = torch.where(solvable, (sh * sxq - sq * sx) / det, scale)
        offset = torch.where(solvable, (sx - scale * sq) / sh.clamp_min(torch.finfo(sh.dtype).tiny), offset)
        residual = x - scale.unsqueeze(-1) * q - offset.unsqueeze(-1)
        error = (h * residual.square_()).sum(-1)
        better = error < best_error
        best_s, best_o = torch.where(better, scale, best_s), torch.where(better, offset, best_o)
        best_error = torch.where(better, error, best_error)
    return best_s, best_o
