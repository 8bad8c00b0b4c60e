"""The Hessian of a layer's squared error, made ready for solving: damped, ordered, factored.

The squared error of a layer's output, averaged over its inputs x, is tr(E·H·Eᵀ) with E = W − Ŵ and H the mean of x·xᵀ.
With the columns in the order in which they are to be rounded, let

    H = A·D·Aᵀ,   A upper triangular with ones on its diagonal,   D = diag(d)

Then the error of a row e is Σ_j d_j·(e_j + Σ_{i<j} A_ij·e_i)²: the best target of a column is its weight and what the
errors of the columns before it call for, weighed by A, and d_j is what a squared distance from that target costs. This
is GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ, which gives the same codes (Chee et al. 2023, QuIP,
arXiv:2307.13304, theorem 6): one Cholesky factorization, and no inverse.

Positions count in *reversed* order of solving, so that A is lower triangular and the column to be solved first stands
last. H is as large as anything here, K² floats for an input of K channels, so nothing of that size is put beside it:
its rows and columns are reordered where they lie, A is written below the diagonal, block by block, and what is above
stays H. Afterwards everything is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

from fewbits.errors import UnsupportedError
from fewbits.kernels.gram import mirror

BLOCK = 256
"""Columns that are factored at a time: wide enough for BLAS, narrow enough that nearly all the work is products."""

RAISED = 10.0
"""Where H is too near to singular, its damping is raised by this factor until it can be factored."""


PROBES = 32
"""Random vectors that a trace is estimated with."""


@dataclass(frozen=True)
class Objective:
    """H with a damped diagonal, [K, K], in reversed order of solving.

    held: float32 [K, K], H above its diagonal. damped: its diagonal, [K]. columns: int64 [K], the column at each
    position. damping: what was added to the diagonal, in the unit of H.
    """

    held: Tensor
    damped: Tensor
    columns: Tensor
    damping: float

    def rows(self, positions: slice) -> Tensor:
        """Some rows, [P, K]."""
        start, stop, _ = positions.indices(len(self.columns))
        square = self.held[start:stop, start:stop].triu(1)
        square = square + square.T
        square.diagonal().copy_(self.damped[start:stop])
        return torch.cat([self.held[:start, start:stop].T, square, self.held[start:stop, stop:]], dim=1)


@dataclass(frozen=True)
class Factors:
    """A and D of an objective.

    held: float32 [K, K], A below its diagonal, which is 1. cost: d, [K].
    """

    held: Tensor
    cost: Tensor

    def feedback(self, positions: slice, later: slice) -> Tensor:
        """[P, L]: how much of the error at each later position the target at each of these makes up for."""
        return self.held[later, positions].T

    def within(self, positions: slice) -> Tensor:
        """The same among these positions, [P, P]: above the diagonal, and zeros."""
        return self.held[positions, positions].tril(-1).T

    def solve_(self, x: Tensor) -> Tensor:
        """(H + damping·I)⁻¹·x for x [K, N] in the same order, in place of x."""
        blocks = _blocks(len(self.cost))
        for block in blocks:
            x[block] = solve_triangular(self.held[block, block], x[block], upper=False, unitriangular=True)
            x[block.stop :].addmm_(self.held[block.stop :, block], x[block], alpha=-1)
        x.div_(self.cost.unsqueeze(-1))
        for block in reversed(blocks):
            x[block].addmm_(self.held[block.stop :, block].T, x[block.stop :], alpha=-1)
            x[block] = solve_triangular(self.held[block, block].T, x[block], upper=True, unitriangular=True)
        return x


def solving_order(importance: Tensor, group: int | None) -> Tensor:
    """Columns by falling importance [K], int64 [K]; with `group`, whole groups by their sum, and columns within each.

    A group's columns stay together, so that its scale is one of neighbours in the file: no index of groups is needed.
    """
    columns = importance.argsort(descending=True, stable=True)
    if group is None:
        return columns
    groups = torch.arange(len(importance), device=importance.device) // group
    total = importance.new_zeros(math.ceil(len(importance) / group)).index_add_(0, groups, importance)
    rank = total.argsort(descending=True, stable=True).argsort()
    return columns[rank[groups[columns]].argsort(stable=True)]


@contextmanager
def factored(hessian: Tensor, order: Tensor, damping: float) -> Iterator[tuple[Objective, Factors]]:
    """Damp H [K, K] by a share of its typical diagonal, or by more where that is too little, and factor it.

    H, float32 and symmetric, is overwritten within, and as it was afterwards. Where all inputs were zero, it counts as
    a multiple of the identity. Raises UnsupportedError where it holds NaN or Inf or is far from positive semidefinite.
    """
    diagonal, columns = hessian.diagonal().clone(), order.flip(0)
    typical, mean = _typical(diagonal), float(diagonal.mean())
    _reorder(hessian, columns)
    try:
        added = damping * typical
        while added <= max(mean, typical):  # rounding errors in a mean of x·xᵀ are smaller
            damped = diagonal[columns] + added
            hessian.diagonal().copy_(damped)
            cost = _factor(hessian)
            if cost is not None:
                yield Objective(hessian, damped, columns, added), Factors(hessian, cost)
                return
            mirror(hessian)
            added *= RAISED
    finally:
        hessian.diagonal().copy_(diagonal[columns])
        mirror(hessian)
        _reorder(hessian, columns.argsort())
    raise UnsupportedError("gptq: the Hessian is no mean of x·xᵀ: it holds NaN or has large negative eigenvalues")


def coefficients(objective: Objective, factors: Factors) -> float:
    """Free coefficients of a regression on these inputs, damped so: tr(H·(H + λI)⁻¹), by Hutchinson's estimate."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(factors.cost), PROBES), generator=generator).mul_(2).sub_(1)
    probes = signs.to(factors.cost)
    trace = float((probes * factors.solve_(probes.clone())).sum()) / PROBES  # of (H + λI)⁻¹
    return max(0.0, len(factors.cost) - objective.damping * trace)


def _typical(diagonal: Tensor) -> float:
    """Median over the channels that were not always zero; 1 if all were.

    The mean, which is usual, follows a few large channels: one of a thousand times the others' size adds more damping
    to these than they have variance, and feedback stops.
    """
    if not bool(diagonal.isfinite().all()) or float(diagonal.amin()) < 0:
        raise UnsupportedError("gptq: the Hessian's diagonal holds NaN, Inf or negative numbers: the model overflows")
    seen = diagonal[diagonal > 0]
    return float(seen.median()) if len(seen) else 1.0


def _reorder(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns in another order, in place."""
    for block in _blocks(len(matrix)):
        matrix[block] = matrix[block][:, order]
    for block in _blocks(len(matrix)):
        matrix[:, block] = matrix[order, block]


def _factor(matrix: Tensor) -> Tensor | None:
    """Write A over the lower triangle of a symmetric matrix, diagonal included, and return d.

    None where the matrix is not positive definite in float32; its lower triangle and its diagonal are then spoiled.
    """
    cost = torch.empty_like(matrix.diagonal())
    for block in _blocks(len(matrix)):
        square, below = matrix[block, block], matrix[block.stop :, block]
        above = square.triu(1)  # still H; the products below run over it
        before = matrix[block, : block.start] * cost[: block.start]
        matrix[block.start :, block].addmm_(matrix[block.start :, : block.start], before.T, alpha=-1)
        lower, info = cholesky_ex(square)
        pivots = lower.diagonal().clone()
        if int(info) or not bool(pivots.isfinite().all()):
            square.copy_(above)
            return None
        below.copy_(solve_triangular(lower.T, below, upper=True, left=False)).div_(pivots)
        square.copy_(lower.div_(pivots).add_(above))
        cost[block] = pivots.square()
    return cost


def _blocks(count: int) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise([*range(0, count, BLOCK), count])]
