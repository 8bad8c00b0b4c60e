"""Curvature: the sums by hand, and what it predicts against divergences that are measured."""

from __future__ import annotations

import pytest
import torch

from fewbits.stats import Curvature, CurvatureCollector, Site


def test_sums_are_those_of_single_tokens() -> None:
    """Two matrices, one after the other; gradients from autograd, token by token."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 4, generator=generator), torch.randn(3, 5, generator=generator)
    x = torch.randn(2, 7, 4, generator=generator)
    slope = torch.randn(2, 7, 3, generator=generator)
    collector = CurvatureCollector({"first": first, "second": second})
    leaf = x.clone().requires_grad_()
    with collector:
        hidden = torch.nn.functional.linear(leaf, first)
        y = torch.nn.functional.linear(torch.tanh(hidden), second)
    y.backward(slope)
    found = collector.curvatures(14)
    after = slope @ second * (1 - torch.tanh(x @ first.T) ** 2)
    for name, read, g in (("first", x, after), ("second", torch.tanh(x @ first.T), slope)):
        tokens, slopes = read.flatten(0, 1), g.flatten(0, 1)
        weight = slopes.square().sum(1)
        inner = sum(w * torch.outer(t, t) for w, t in zip(weight, tokens, strict=True)) / weight.sum()
        torch.testing.assert_close(found[Site(name)].rows, slopes.square().mean(0))
        torch.testing.assert_close(found[Site(name)].inner, inner)


def test_without_gradients_nothing_is_counted() -> None:
    w = torch.ones(2, 2)
    collector = CurvatureCollector({"w": w})
    with collector:
        torch.nn.functional.linear(torch.ones(3, 2), w)
    assert collector.curvatures(3) == {}


def test_of_a_softmax_regression_it_is_the_divergence() -> None:
    """Logits W·x: half the second derivative of the divergence is Fisher's information, which for one row of W is
    p·(1 − p)·x·xᵀ; with one token there is nothing that is left out, so a small change costs what it predicts.
    """
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(6, 4, generator=generator).double(), torch.randn(1, 4, generator=generator).double()
    p = (x @ w.T).softmax(-1)
    curvature = Curvature((p * (1 - p)).squeeze(0), x.T @ x)
    error = torch.zeros_like(w)
    error[2] = 1e-3 * torch.randn(4, generator=generator).double()
    q = (x @ (w + error).T).log_softmax(-1)
    divergence = float((p * (p.log() - q)).sum())
    predicted = float(curvature.of_rows(error, torch.arange(6)).sum())
    assert predicted == pytest.approx(divergence, rel=1e-2)  # the third order is |error·x| of it


def test_experts_have_curvatures_of_their_own() -> None:
    stacked = Curvature(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.stack([torch.eye(3), 2 * torch.eye(3)]))
    error = torch.ones(2, 1, 3)
    torch.testing.assert_close(stacked.of_rows(error, torch.tensor([1])), torch.tensor([[0.5 * 2 * 3], [0.5 * 4 * 6]]))
