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
    sums = AffineSums(x, importance)
    reach = high - low
    best_s, best_o = (high - low) / top, low.clone()
    best_score = torch.full_like(low, -torch.inf)
    shrunk = [(anchor, factor) for anchor, factor in product(anchors, factors) if factor != 1 or anchor == anchors[0]]
    for anchor, factor in shrunk:
        scale, offset = reach * factor / top, low + reach * (anchor * (1 - factor))
        scale, offset, score = sums.solved(scale, offset, top)
        better = score > best_score
        best_s, best_o = torch.where(better, scale, best_s), torch.where(better, offset, best_o)
        best_score = torch.where(better, score, best_score)
    return best_s, best_o


class AffineSums:
    """Sums over each group of x [..., g] with the codes of scale·q + offset, which the least squares are made of.

    Its rooms are used again at every call: new memory for each product would take longer than the product. The sums of
    a call are in q, qq, xq (importance counted); those that no code changes in h and x.
    """

    def __init__(self, x: Tensor, importance: Tensor | None) -> None:
        self._x, self._h = x, None if importance is None else importance.expand_as(x)
        self._codes, self._room = torch.empty_like(x), torch.empty_like(x)
        self.h = torch.full_like(x[..., 0], x.shape[-1]) if self._h is None else self._h.sum(-1)
        self.x = x.sum(-1) if self._h is None else (self._h * x).sum(-1)
        self.q = self.qq = self.xq = self.x

    def count(self, scale: Tensor, offset: Tensor, top: int) -> None:
        """Sum over the codes nearest to x at this scale and offset, [...]."""
        q = torch.sub(self._x, offset.unsqueeze(-1), out=self._codes)
        q.mul_(inverse(scale).unsqueeze(-1)).round_().clamp_(0, top)
        weighted = q if self._h is None else torch.mul(q, self._h, out=self._room)
        self.q = weighted.sum(-1)
        if self._h is None:
            self.xq, self.qq = torch.mul(q, self._x, out=self._room).sum(-1), q.square_().sum(-1)
            return
        self.qq = q.mul_(weighted).sum(-1)
        self.xq = weighted.mul_(self._x).sum(-1)

    def solved(self, scale: Tensor, offset: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best scale and offset for the codes found at these, and how much of Σ h·x² they explain."""
        self.count(scale, offset, top)
        det = self.h * self.qq - self.q * self.q
        solvable = det > 1e-7 * self.h * self.qq
        scale = torch.where(solvable, (self.h * self.xq - self.q * self.x) / det, scale)
        offset = (self.x - scale * self.q) / self.h.clamp_min(torch.finfo(self.h.dtype).tiny)
        unexplained = scale * (scale * self.qq - 2 * self.xq) + offset * (offset * self.h - 2 * self.x)
        return scale, offset, -(unexplained + 2 * scale * offset * self.q)
