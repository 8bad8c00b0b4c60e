"""Statistics of inputs against numpy in double precision, over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from fewbits.stats import Collector, Recorder, Site

WIDE = 1100  # more columns than two stripes of a Hessian


def inputs(width: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, rows, width, generator=generator) for rows in (3, 50, 7)]


@pytest.mark.parametrize("width", [5, 512, WIDE])
def test_means_over_all_tokens(width: int) -> None:
    weight = torch.randn(4, width)
    wanted = ("importance", "magnitude", "absmax", "hessian")
    collector = Collector({"w": weight}, wanted, tokens=120)
    for x in inputs(width):
        with collector:
            linear(x, weight)
    found = collector.statistics()[Site("w")]
    x = np.concatenate([x.reshape(-1, width).double().numpy() for x in inputs(width)])
    expected = {
        "importance": (x**2).mean(0),
        "magnitude": np.abs(x).mean(0),
        "absmax": np.abs(x).max(0),
        "hessian": x.T @ x / len(x),
    }
    assert found.tokens == len(x) == 120
    for name, value in expected.items():
        # A float32 sum of n terms is off by n units in the last place of the sum of their sizes, at most.
        assert (
            np.abs(found.value(name).double().numpy() - value).max() <= len(x) * 2.0**-24 * (x**2).mean(0).max() * 4
        ), name
    assert torch.equal(found.value("hessian"), found.value("hessian").T)


def test_drift_is_between_the_same_tokens() -> None:
    weight = torch.randn(4, 6)
    collector = Collector({"w": weight}, ("drift",), tokens=120)
    for x, original in zip(inputs(6), inputs(6, seed=1), strict=True):
        with Recorder({"w": weight}) as recorder:
            linear(original, weight)
        collector.originals = recorder.outputs
        with collector:
            linear(x, weight)
    x, original = (torch.cat([x.reshape(-1, 6) for x in inputs(6, seed=seed)]).double() for seed in (0, 1))
    found, moved = collector.drifts()[Site("w")], (original - x) @ weight.double().T
    assert torch.allclose(found["drift"].double(), moved.T @ x / len(x), atol=1e-5)
    assert torch.allclose(found["scatter"].double(), moved.square().mean(0), atol=1e-5)


def test_outputs_that_the_model_overwrites_are_not_kept() -> None:
    weights = {name: torch.randn(4, 6) for name in "ab"}
    with Recorder(weights) as recorder:
        linear(torch.randn(5, 6), weights["a"]).add_(1.0)
        linear(torch.randn(5, 6), weights["b"])
    assert set(recorder.outputs) == {Site("b")}


def test_matrices_that_read_the_same_share_and_others_do_not() -> None:
    weights = {name: torch.randn(4, 6) for name in "qko"}
    collector = Collector(weights, ("hessian",), tokens=8)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    with collector:
        linear(x, weights["q"])
        linear(x, weights["k"])
        linear(y, weights["o"])
        linear(y, torch.randn(4, 6))
    found = collector.statistics()
    assert found[Site("q")] is found[Site("k")]
    assert found[Site("o")] is not found[Site("q")]
    assert len(found) == 3
    assert found[Site("q")].tokens == 8


def test_an_expert_counts_the_tokens_that_came_to_it() -> None:
    experts = torch.randn(3, 4, 6)
    collector = Collector({"e": experts}, ("importance",), tokens=8)
    with collector:
        linear(torch.ones(5, 6), experts[2])
        linear(torch.full((2, 6), 3.0), experts[torch.tensor(0)])
    found = collector.statistics()
    assert {site: s.tokens for site, s in found.items()} == {Site("e", 2): 5, Site("e", 0): 2}
    assert found[Site("e", 0)].value("importance").tolist() == [9.0] * 6
