"""SmoothQuant: outliers of activations are shared with the weights, so that both fit into 8 bits.

Where activations are quantized too, token by token with one scale each, a channel a hundred times larger than the rest
takes all levels for itself. Weights have no such outliers; dividing the channel's activations by s and multiplying its
weights by s makes both hard in moderation:

    s = max|x|^α / max|w|^(1 − α)

(Xiao et al. 2022, arXiv:2211.10438, section 4, equation 4). α, the migration strength, is 0.5 in the paper for most
models. Here it is searched for every place where a factor can move, by the squared error of the outputs on sampled
inputs, with inputs in INT8 per token and weights in their planned format: ‖Q(X/s)·Q(W·s)ᵀ − X·Wᵀ‖² / ‖X·Wᵀ‖², summed
over all matrices that read the same. Leaving everything as it is, s = 1, is the first candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats import Format, format_named
from fewbits.methods._folding import Consumer, fold_all, normalised, shared, some_rows, spread
from fewbits.methods.base import Transform
from fewbits.methods.block import Block, Stats
from fewbits.models import Link

INPUTS = format_named("int8")
"""What inputs are rounded to: one scale for each row, which is one token."""


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """The migration strengths that are tried, and how many rows of a link's matrices they are compared on."""

    alphas: tuple[float, ...] = tuple(i / 20 for i in range(21))
    rows: int = 768

    summary: ClassVar[str] = "outliers of activations moved into the weights, for 8 bits on both sides"
    needs: ClassVar[tuple[str, ...]] = ("absmax", "samples")

    @property
    def name(self) -> str:
        return "smoothquant"

    @torch.no_grad()
    def transform(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> None:
        fold_all(self.name, block, plan, stats, self.factors)

    def factors(self, link: Link, consumers: Sequence[Consumer]) -> Tensor:
        """The factors [C] with the least output error; ones, if none beats those."""
        inputs = shared(link, _largest([c.stats["absmax"] for c in consumers]))
        weights = shared(link, _largest([c.w.abs() for c in consumers]))
        tried = [normalised(inputs**alpha / weights ** (1 - alpha)) for alpha in self.alphas]
        few = some_rows(consumers, self.rows)
        errors = [output_error(link, few, s) for s in tried]
        best, ones = tried[errors.index(min(errors))], torch.ones_like(inputs)
        return min((ones, best), key=lambda s: output_error(link, consumers, s))


def output_error(link: Link, consumers: Sequence[Consumer], s: Tensor) -> float:
    """Relative squared error of the consumers' outputs, summed, with inputs and weights rounded behind s [C]."""
    wide = spread(link, s)
    return sum(_relative_error(c, wide) for c in consumers)


def _relative_error(consumer: Consumer, s: Tensor) -> float:
    x, w = consumer.stats["samples"], consumer.w
    exact = x @ w.mT
    error = _rounded(x / s, INPUTS) @ _rounded(w * s, consumer.format).mT - exact
    whole = float(torch.linalg.vector_norm(exact)) ** 2
    return float(torch.linalg.vector_norm(error)) ** 2 / whole if whole else 0.0


def _rounded(x: Tensor, format: Format) -> Tensor:
    params = format.fit(x)
    return format.decode(format.round(x, params), params)


def _largest(values: Sequence[Tensor]) -> Tensor:
    """The largest [K] of several matrices' values [..., K] for each channel."""
    return torch.stack([value.reshape(-1, value.shape[-1]).amax(0) for value in values]).amax(0)


SMOOTHQUANT = (SmoothQuant(),)
