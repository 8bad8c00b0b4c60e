"""Looking on while layers work: in which order they are used, and stopping once all has been seen."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch.nn.functional import linear

from fewbits.stats import AllSeen, Collector, OrderOfUse, Recorder, Site


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(6, 6) for name in names}


def test_order_is_that_of_use_and_one_input_is_one_step() -> None:
    w = weights("down", "fc1", "q", "o", "fc2", "k")
    x = torch.randn(3, 6)
    with OrderOfUse(w) as order:
        y = linear(x, w["q"]) + linear(x, w["k"])
        y = linear(y, w["o"])
        y = linear(linear(y, w["fc1"]), w["fc2"])  # alike but for a number, which is no expert's
        linear(x, w["q"])
    assert order.steps == [("q", "k"), ("o",), ("fc1",), ("fc2",)]


def test_experts_of_a_layer_are_one_step() -> None:
    w = weights(*(f"experts.{e}.{part}.weight" for e in range(3) for part in ("up", "down")))
    with OrderOfUse(w) as order:
        for e in (2, 0):
            x = torch.randn(2, 6)
            linear(linear(x, w[f"experts.{e}.up.weight"]), w[f"experts.{e}.down.weight"])
    assert order.steps == [tuple(f"experts.{e}.{part}.weight" for e in (2, 0)) for part in ("up", "down")]


@pytest.mark.parametrize("watcher", [Recorder, lambda w, stop: Collector(w, ("importance",), tokens=4, stop=stop)])
def test_a_run_ends_when_all_is_seen(watcher) -> None:
    w = weights("a", "b", "c")
    watched, reached = watcher({"a": w["a"], "b": w["b"]}, stop=True), []
    for _ in range(2):  # each run anew
        with suppress(AllSeen), watched:
            y = linear(torch.randn(4, 6), w["a"])
            reached.append("a")
            linear(y, w["b"])
            reached.append("b")
    assert reached == ["a", "a"]


def test_fused_experts_are_all_waited_for() -> None:
    fused, reached = torch.randn(3, 6, 6), []
    with Collector({"e": fused}, ("importance",), tokens=4, stop=True) as collector:
        for e in (0, 2):
            linear(torch.randn(2, 6), fused[e])
            reached.append(e)
    assert reached == [0, 2]
    assert set(collector.statistics()) == {Site("e", 0), Site("e", 2)}
