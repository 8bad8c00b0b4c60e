"""Observers against the same question asked of all the data at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewbits.errors import FormatError
from fewbits.formats import ACTIVATIONS
from fewbits.formats.activations import UNSEEN
from fewbits.stats import OBSERVERS, Collector, Site, observer_named
from fewbits.stats.observers import BINS, CANDIDATES, CLIPPED, LeastSquares, MinMax, Percentile

INT8, FP8 = ACTIVATIONS["int8-static"], ACTIVATIONS["fp8-static"]


def heavy_tails(n=40_000):
    """Student-t numbers with three degrees of freedom, the small ones first, so that ranges grow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) / torch.randn(3, n, generator=generator).square().mean(0).sqrt()
    return x[x.abs().argsort()]


def seen(observer, batches):
    for x in batches:
        observer.add(x)
    return observer


@pytest.mark.parametrize("format", [INT8, FP8])
def test_minmax_is_the_scale_of_the_dynamic_format_on_all_data(format):
    x = heavy_tails()
    dynamic = ACTIVATIONS[f"{format.element}-tensor"]
    scale = seen(MinMax(), x.split(999)).scale(format)
    assert torch.equal(scale, dynamic.dynamic_scale(x))
    assert (scale.shape, scale.dtype) == ((1,), torch.float32)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
    cut=st.integers(1, 40),
    order=st.randoms(use_true_random=False),
)
def test_the_histogram_does_not_depend_on_the_batches(sizes, cut, order):
    x = torch.tensor(sizes)
    order.shuffle(sizes)
    whole, parts = seen(Percentile(), [x]), seen(Percentile(), torch.tensor(sizes).split(cut))
    assert whole.limit == parts.limit
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == len(sizes)


def test_the_histogram_is_torchs():
    x = heavy_tails()
    observer = seen(Percentile(), x.split(777))
    expected = torch.histogram(x.abs(), BINS, range=(0, observer.limit)).hist
    # torch finds its bin by a division that rounds, so a number on an edge may be in the next one
    assert (observer.counts.cumsum(0) - expected.cumsum(0)).abs().max() <= 1
    assert observer.limit / 2 <= x.abs().max() < observer.limit


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999, 1.0])
def test_percentile_is_the_quantile_to_within_a_bin(p):
    x = heavy_tails()
    observer = seen(Percentile(p), x.split(999))
    exact = x.abs().sort().values[math.ceil(p * len(x)) - 1]
    highest = float(observer.scale(INT8)) * INT8.highest
    assert abs(highest - exact) <= observer.width * (1 + 1e-6)


def squared_error(format, x, highest):
    codes, scale = format.quantize(x, format.scale_of(torch.as_tensor(highest).reshape(1)))
    return float((format.dequantize(codes, scale) - x).double().square().sum())


@pytest.mark.parametrize("format", [INT8, FP8])
@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_least_squares_finds_the_best_clipping_of_the_data(format, outlier):
    """Outliers of 30 among normal numbers are worth clipping in INT8, and not in FP8, whose steps grow with them."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    x[0] = outlier or x[0]
    observer = seen(LeastSquares(), x.split(70_000))
    found = squared_error(format, x, float(observer.scale(format)) * format.highest)
    candidates = observer.peak * CLIPPED ** -torch.linspace(0, 1, CANDIDATES)
    best = min(squared_error(format, x, highest) for highest in candidates)
    assert found <= 1.02 * best  # a bin's middle stands for its numbers
    minmax = squared_error(format, x, observer.peak)
    if outlier and format is INT8:
        assert found < 0.6 * minmax
    else:
        assert found <= 1.02 * minmax


@pytest.mark.parametrize("name", OBSERVERS)
def test_constant_and_dead_inputs_are_survived(name):
    dead = seen(observer_named(name)(), [torch.zeros(5, 3), torch.zeros(0, 3), torch.zeros(1, 3)])
    assert dead.scale(INT8).item() == pytest.approx(UNSEEN)
    constant = seen(observer_named(name)(), [torch.full((5, 3), -1.5)] * 2)
    codes, scale = INT8.quantize(torch.full((4,), -1.5), constant.scale(INT8))
    assert INT8.dequantize(codes, scale).tolist() == pytest.approx([-1.5] * 4, rel=1 / 127)
    alone = seen(observer_named(name)(), [torch.tensor([0.0, 1e-38, 0.0])])
    assert alone.scale(FP8).isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(FormatError, match="NaN or Inf"):
        MinMax().add(torch.tensor([1.0, float("nan")]))
    with pytest.raises(FormatError, match=r"percentile 99\.9 must be a fraction"):
        Percentile(99.9)
    with pytest.raises(FormatError, match="'entropy' is not known; choose one of minmax, percentile, mse"):
        observer_named("entropy")


def test_the_collector_feeds_one_observer_per_input():
    torch.manual_seed(0)
    first, twin, second = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)
    layers = {"first": first.weight, "twin": twin.weight, "second": second.weight}
    x = [torch.randn(2, 5, 4) for _ in range(3)]
    hidden = []
    with torch.no_grad(), Collector(layers, (), tokens=30, observer=MinMax) as collector:
        for batch in x:
            hidden.append(first(batch))
            twin(batch)
            second(hidden[-1])
    found = {site.parameter: statistics.observer for site, statistics in collector.statistics().items()}
    assert found["first"] is found["twin"]
    assert found["first"].peak == torch.cat(x).abs().max()
    assert found["second"].peak == torch.cat(hidden).abs().max()
    assert found["first"].count == 3 * 2 * 5 * 4
    with torch.no_grad(), Collector(layers, (), tokens=30) as collector:
        first(x[0])
    assert collector.statistics()[Site("first")].observer is None
