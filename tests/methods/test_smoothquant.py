"""SmoothQuant changes no prediction, and makes 8 bits on both sides enough where activations have outliers."""

from __future__ import annotations

import pytest
import torch
from blocks import FAMILIES, blocks, deviation, logits, random_model, statistics

from fewbits.formats import format_named
from fewbits.methods._folding import consumers_of
from fewbits.methods.smoothquant import SmoothQuant, output_error
from fewbits.models import Link

SMOOTHQUANT = SmoothQuant()
INT8 = format_named("int8")
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
FLOAT32 = 1e-4  # see test_links.py


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_prediction_changes(kind: str) -> None:
    model = random_model(kind)
    before = logits(model, IDS)
    for block in blocks(model):
        stats = statistics(model, block, IDS, SMOOTHQUANT.needs)
        SMOOTHQUANT.transform(block, dict.fromkeys(block.slots, INT8), stats)
    assert deviation(logits(model, IDS), before) < FLOAT32


def test_planted_outliers_are_smoothed_away() -> None:
    """Two channels of a norm grow by 50 and what reads them shrinks by 50: the same model, hard to quantize.

    A token's INT8 step grows with its largest number, by about 50, and the error of the other channels with its square,
    2500. Smoothing has to give nearly all of that back: a factor of 20 is far below it, and far above chance.
    """
    model = random_model("llama")
    block = blocks(model)[0]
    link = next(link for link in block.links if link.kind == "norm")
    with torch.no_grad():
        block.parameters[link.producer][[3, 17]] *= 50
        for name in link.consumers:
            block.parameters[name][:, [3, 17]] /= 50
    plan = dict.fromkeys(block.slots, INT8)

    def error(link: Link) -> float:
        consumers = list(consumers_of(block, link, plan, statistics(model, block, IDS, SMOOTHQUANT.needs)))
        return output_error(link, consumers, torch.ones(32))

    before = error(link)
    SMOOTHQUANT.transform(block, plan, statistics(model, block, IDS, SMOOTHQUANT.needs))
    assert error(link) < before / 20
