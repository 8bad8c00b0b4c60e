"""The best low-rank correction of a layer: B·A of rank r that makes up for most of what its outputs lack.

With x the inputs of the layer, d what its output lacks for x, H the mean of x·xᵀ = L·Lᵀ and D that of d·xᵀ, the squared
error that a correction leaves is, but for a part that no correction reaches,

    mean ‖d − B·A·x‖² = ‖D·L⁻ᵀ − B·A·L‖²

so by Eckart and Young B·A·L is the truncated singular value decomposition of D·L⁻ᵀ, and A is its right side times L⁻¹.
Where d is E·x, the error of a rounded weight on its own inputs, D·L⁻ᵀ is E·L (Zhang et al. 2024, QERA,
arXiv:2410.06040, with a Cholesky factor in place of the square root: any factor will do). Without any inputs (H = 1) it
is the plain decomposition of E (Li et al. 2023, LoftQ, arXiv:2310.08659). A rounding error is nearly white and of full
rank, so that little of it fits into a few dimensions; the inputs of a layer are not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

from fewbits.errors import UnsupportedError

DAMPING = 1e-4
"""Added to H, of its mean diagonal: channels that never varied must not count for nothing."""
RAISED = 10.0
"""Where H is too near to singular, its damping is raised by this factor until it can be factored."""


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], equally large, whose product is the nearest of that rank to `error` [N, K].

    Filled up with zeros where the error has no more than fewer.
    """
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    pad = torch.nn.functional.pad
    return pad(root[:, None] * v[:rank], (0, 0, 0, missing)), pad(u[:, :rank] * root, (0, missing))


def correction(drift: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] that make up best for what outputs lack.

    drift: mean d·xᵀ [N, K]; hessian: mean x·xᵀ [K, K]. Raises UnsupportedError if either is not finite.
    """
    if not (drift.isfinite().all() and hessian.isfinite().all()):
        raise UnsupportedError("the inputs of a layer are not finite, so there is nothing to correct its outputs by")
    factor = _factor(hessian)
    reached = solve_triangular(factor.T, drift, upper=True, left=False)
    a, b = low_rank(reached, rank)
    return solve_triangular(factor, a, upper=False, left=False), b


def _factor(hessian: Tensor) -> Tensor:
    """L, lower triangular, of the damped H."""
    unit, damping = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny), DAMPING
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * unit)
        found: Tensor
        found, trouble = cholesky_ex(damped)
        if not trouble:
            return found
        damping *= RAISED
