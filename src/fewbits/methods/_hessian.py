"""The Hessian of a layer's squared error, made ready for solving: damped, ordered, factored.

The squared error of a layer's output, averaged over its inputs x, is tr(E·H·Eᵀ) with E = W − Ŵ and H the mean of x·xᵀ.
With the columns in the order in which they are to be rounded, let

    H = A·D·Aᵀ,   A upper triangular with ones on its diagonal,   D = diag(d)

Then the error of a row e is Σ_j d_j·(e_j + Σ_{i<j} A_ij·e_i)²: the best target of a column is its weight and what the
errors of the columns before it call for, weighed by A, and d_j is what a squared distance from that target costs. This
is GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ, which gives the same codes (Chee et al. 2023, QuIP,
arXiv:2307.13304, theorem 6): one Cholesky factorization, and no inverse.

Positions count in *reversed* order of solving, so that H = L·Lᵀ is LAPACK's own factorization and the column to be
solved first stands last. Lᵀ overwrites the one copy of H that is made: K² floats for an input of K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

from fewbits.errors import UnsupportedError

RAISED = 10.0
"""Where H is too near to singular, its damping is raised by this factor until it can be factored."""


PROBES = 32
"""Random vectors that a trace is estimated with."""


@dataclass(frozen=True)
class Objective:
    """H with a damped diagonal, float32 [K, K], seen in reversed order of solving.

    columns: int64 [K], the column at each position. damping: what is added to the diagonal, in the unit of H.
    """

    hessian: Tensor
    columns: Tensor
    damping: float

    def diagonal(self) -> Tensor:
        """[K]."""
        damped: Tensor = self.hessian.diagonal()[self.columns] + self.damping
        return damped

    def rows(self, positions: slice) -> Tensor:
        """Some rows, [P, K]."""
        rows: Tensor = self.hessian[self.columns[positions, None], self.columns]
        rows[:, positions].diagonal().add_(self.damping)
        return rows


@dataclass(frozen=True)
class Factors:
    """A and D of an objective.

    feedback: Aᵀ reversed, upper triangular [K, K]: row j says how much of the error at each position i > j the target
    at j makes up for. cost: d, [K].
    """

    feedback: Tensor
    cost: Tensor

    def solve(self, x: Tensor) -> Tensor:
        """(H + damping·I)⁻¹·x for x [K, N] in the same order."""
        y = solve_triangular(self.feedback.mT, x, upper=False, unitriangular=True).div_(self.cost.unsqueeze(-1))
        solved: Tensor = solve_triangular(self.feedback, y, upper=True, unitriangular=True)
        return solved


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


def factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Objective, Factors]:
    """Damp H [K, K] by a share of its typical diagonal, or by more where that is too little, and factor it.

    Where all inputs were zero, H counts as a multiple of the identity. Raises UnsupportedError where H holds NaN or Inf
    or is far from positive semidefinite.
    """
    typical, mean = _typical(hessian.diagonal()), float(hessian.diagonal().mean())
    added = damping * typical
    while added <= max(mean, typical):  # rounding errors in a mean of x·xᵀ are smaller
        objective = Objective(hessian, order.flip(0), added)
        factors = _factors(objective)
        if factors is not None:
            return objective, factors
        added *= RAISED
    raise UnsupportedError("gptq: the Hessian is no mean of x·xᵀ: it holds NaN or has large negative eigenvalues")


def coefficients(objective: Objective, factors: Factors) -> float:
    """Free coefficients of a regression on these inputs, damped so: tr(H·(H + λI)⁻¹), by Hutchinson's estimate."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(factors.cost), PROBES), generator=generator).mul_(2).sub_(1)
    probes = signs.to(factors.cost)
    trace = float((probes * factors.solve(probes)).sum()) / PROBES  # of (H + λI)⁻¹
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


def _factors(objective: Objective) -> Factors | None:
    """None where the matrix is not positive definite in float32."""
    held = objective.rows(slice(0, len(objective.columns)))
    info = torch.empty((), dtype=torch.int32, device=held.device)
    cholesky_ex(held.mT, out=(held.mT, info))  # in place: held is now Lᵀ
    pivots = held.diagonal().clone()
    if int(info) or not bool(pivots.isfinite().all()):
        return None
    return Factors(held.div_(pivots.unsqueeze(-1)), pivots.square())
