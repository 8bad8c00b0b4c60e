"""Low-rank corrections: the best there are, by what no other correction of that rank can beat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.methods.low_rank import correction, low_rank


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_factors_are_equally_large() -> None:
    a, b = low_rank(draw(20, 12, seed=1), 3)
    assert a.shape == (3, 12)
    assert b.shape == (20, 3)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-5)


def test_more_rank_than_there_is() -> None:
    w = draw(20, 12, seed=1)
    a, b = low_rank(w, 16)
    assert a.shape == (16, 12)
    assert float((b @ a - w).abs().max()) < 1e-5


def left(error: Tensor, x: Tensor, a: Tensor, b: Tensor) -> float:
    """Mean squared error of outputs that a correction leaves."""
    return float((x @ (error - b @ a).T).square().sum(1).mean())


def test_what_is_left_is_what_no_correction_reaches() -> None:
    """By Eckart and Young the rest is the sum of the squared singular values beyond the rank, of E·X ᵀ/ √n."""
    error, x = draw(24, 16, seed=2), draw(400, 16, seed=3) @ draw(16, 16, seed=4)
    hessian, drift = x.T @ x / len(x), error @ (x.T @ x) / len(x)
    values = torch.linalg.svdvals(error.double() @ x.T.double() / len(x) ** 0.5)
    found = left(error, x, *correction(drift, hessian, 4))
    best = float(values[4:].square().sum())
    assert best <= found * (1 + 1e-6)
    assert found < 1.001 * best  # damping of 1e-4
    assert left(error, x, *low_rank(error, 4)) > 1.2 * best  # which knows nothing of the inputs


def test_inputs_that_never_varied() -> None:
    """H is singular then; the correction stays finite and makes up for the channels that did."""
    error, x = draw(8, 6, seed=5), draw(100, 6, seed=6)
    x[:, 2] = 0
    x[:, 4] = x[:, 3]
    hessian, drift = x.T @ x / len(x), error @ (x.T @ x) / len(x)
    a, b = correction(drift, hessian, 6)
    assert left(error, x, a, b) < 1e-3 * left(error, x, 0 * a, b)


def test_inputs_that_are_not_finite() -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = float("nan")
    with pytest.raises(UnsupportedError, match="not finite"):
        correction(draw(3, 4, seed=7), hessian, 2)
