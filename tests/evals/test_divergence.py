"""Divergence and its standard errors, against torch's losses, numpy's quantiles and the textbook's standard error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fewbits.errors import UnsupportedError, VerificationError
from fewbits.evals import divergence
from fewbits.evals.divergence import (
    RESAMPLES,
    Comparison,
    Quantile,
    bootstrap,
    kl_divergence,
    require_numbers,
    token_losses,
)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    p = 5 * torch.randn(13, 50, generator=generator)
    return p, p + torch.randn(13, 50, generator=generator)


@pytest.mark.parametrize("chunk", [1 << 21, 3 * 50])
def test_kl_divergence_is_torchs(logits, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    p, q = logits
    expected = functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected, rtol=1e-12, atol=0)


def test_kl_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert kl_divergence(p + 7, q - 3).item() == pytest.approx(kl_divergence(p, q).item(), rel=1e-5)


def test_a_distribution_does_not_differ_from_itself(logits):
    assert torch.equal(kl_divergence(logits[0], logits[0]), torch.zeros(13, dtype=torch.float64))


def test_masked_tokens_count_nothing():
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    q = torch.tensor([[0.0, 0.5, -torch.inf]])
    assert kl_divergence(p, q).item() == pytest.approx(kl_divergence(p[:, :2], q[:, :2]).item(), rel=1e-12)


def test_token_losses_are_torchs_cross_entropy(logits):
    tokens = torch.arange(13)
    expected = functional.cross_entropy(logits[0].double(), tokens, reduction="none")
    torch.testing.assert_close(token_losses(logits[0], tokens), expected, rtol=1e-12, atol=0)


def test_nan_is_refused_with_the_models_name():
    with pytest.raises(VerificationError, match="out: its logits hold NaN"):
        require_numbers(torch.tensor([0.0, math.nan]), "out")


@pytest.mark.parametrize("q", [0.5, 0.99, 1.0])
def test_quantiles_are_numpys(q):
    values = np.random.default_rng(0).normal(size=(6, 17))
    counts = np.array([2, 0, 1, 1, 0, 2])
    resampled = np.repeat(values, counts, axis=0)
    assert Quantile(values, q)(counts) == np.quantile(resampled, q, method="inverted_cdf")


def test_the_standard_error_of_a_mean_is_the_textbooks():
    """The bootstrap estimates sd/√n, with a relative error of 1/√(2R) over R resamples: 3.2 % at 500; 4 of them."""
    values = np.random.default_rng(1).normal(size=40)
    figure = bootstrap({"mean": lambda counts: float(counts @ values / counts.sum())}, 40)["mean"]
    assert figure.value == pytest.approx(values.mean())
    assert figure.error == pytest.approx(values.std(ddof=1) / math.sqrt(40), rel=4 / math.sqrt(2 * RESAMPLES))


def test_windows_are_resampled_whole():
    """Tokens of a window that all agree carry one window's information: the error is √T times that of T free tokens."""
    means = np.random.default_rng(2).normal(size=30)
    comparison = Comparison()
    for mean in means:
        comparison.kld.append(torch.full((50,), mean, dtype=torch.float64))
        for kept in (comparison.loss, comparison.reference_loss, comparison.top, comparison.reference_top):
            kept.append(torch.ones(50, dtype=torch.float64))
    figures = comparison.figures()
    expected = means.std(ddof=1) / math.sqrt(30)
    assert figures["mean_kld"].error == pytest.approx(expected, rel=4 / math.sqrt(2 * RESAMPLES))
    assert figures["perplexity"].value == pytest.approx(math.e)
    assert figures["perplexity"].error == pytest.approx(0, abs=1e-12)


def test_the_error_of_a_paired_ratio_is_smaller_than_that_of_its_parts():
    """Both models find the same windows hard, so their ratio is known better than either perplexity."""
    generator = torch.Generator().manual_seed(5)
    comparison = Comparison()
    for _ in range(20):
        hard = torch.rand(1, generator=generator, dtype=torch.float64) + 3
        comparison.reference_loss.append(hard.expand(10))
        comparison.loss.append(hard.expand(10) + 0.01)
        comparison.kld.append(torch.zeros(10, dtype=torch.float64))
        for kept in (comparison.top, comparison.reference_top):
            kept.append(torch.ones(10, dtype=torch.float64))
    figures = comparison.figures()
    assert figures["perplexity_ratio"].value == pytest.approx(math.exp(0.01))
    assert figures["perplexity_ratio"].error < 1e-9 < figures["perplexity"].error


def test_one_window_is_refused():
    with pytest.raises(UnsupportedError, match="1 window gives no standard error"):
        bootstrap({}, 1)
