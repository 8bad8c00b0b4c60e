"""AWQ: channels with large activations get finer steps, by a factor that the layer before takes back.

A weight's error is multiplied by the activation that it meets, so a few channels with large activations make most of a
layer's output error. Multiplying a channel's weights by s > 1 before rounding and its activations by 1/s shrinks that
channel's error by s, as long as the step of its group, which the group's largest weights set, stays the same; the other
channels of the group pay if it does not. So channels with large activations should grow and those with large weights
should shrink:

    s = magnitude^α / weight^β        magnitude the mean |x|, weight the mean |w| of the channel

Lin et al. 2023 (arXiv:2306.00978, section 3.2, equations 4 and 5) search α alone; their program also tries β = 1 − α.
Both are lines in the grid here.

The objective is the squared error of the consumers' outputs on sampled inputs, ‖(Q(W·s)·s⁻¹ − W)·Xᵀ‖² / ‖W·Xᵀ‖², summed
over all matrices that read the same. It needs no run of the model. Rows of a matrix are rounded independently of each
other, so the grid is compared on some of them; the winner has to beat s = 1 on all.

The objective knows nothing of error feedback: before `gptq`, which moves the same errors to where they cost least, AWQ
gains little and can lose. Its place is before solvers that round each weight by itself.

The paper's second part, clipping ranges by output error, is what `rtn` and `gptq` do anyway, per group and weighted by
the importance of each column: scales are searched here in the same way, with the importance that the moved factors
leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.methods._folding import Consumer, fold_all, mean_over, normalised, shared, some_rows, spread
from fewbits.methods.base import Transform
from fewbits.methods.block import Block, Stats
from fewbits.methods.rtn import column_weights
from fewbits.models import Link


@dataclass(frozen=True)
class Awq(Transform):
    """grid: exponents, both α and β; finer: a last step around the best; rows: of a link's matrices, to try them on."""

    grid: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    finer: float = 0.1
    rows: int = 768

    summary: ClassVar[str] = "channels with large activations scaled up before rounding, and down in the layer before"
    needs: ClassVar[tuple[str, ...]] = ("importance", "magnitude", "samples")

    @property
    def name(self) -> str:
        return "awq"

    @torch.no_grad()
    def transform(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> None:
        fold_all(self.name, block, plan, stats, self.factors)

    def factors(self, link: Link, consumers: Sequence[Consumer]) -> Tensor:
        """The factors [C] with the least output error, of a grid and of a finer one around its best; or ones."""
        magnitude = shared(link, mean_over([c.stats["magnitude"] for c in consumers]))
        weight = shared(link, mean_over([c.w.abs() for c in consumers]))
        few, errors = some_rows(consumers, self.rows), dict[tuple[float, float], float]()

        def at(alpha: float, beta: float) -> Tensor:
            return normalised(magnitude**alpha / weight**beta)

        def best_of(alphas: Sequence[float], betas: Sequence[float]) -> tuple[float, float]:
            errors.update({ab: output_error(link, few, at(*ab)) for ab in product(alphas, betas) if ab not in errors})
            return min(errors, key=lambda ab: errors[ab])

        alpha, beta = best_of(self.grid, self.grid)
        fine = (-self.finer, 0.0, self.finer)
        best = best_of([alpha + step for step in fine], [beta + step for step in fine])
        return min((torch.ones_like(magnitude), at(*best)), key=lambda s: output_error(link, consumers, s))


def output_error(link: Link, consumers: Sequence[Consumer], s: Tensor) -> float:
    """Relative squared error of the consumers' outputs, summed over them, once factors s [C] have moved."""
    wide = spread(link, s)
    return sum(relative_error(_scaled(c, wide), c) for c in consumers)


def relative_error(w: Tensor, consumer: Consumer) -> float:
    """‖(ŵ − w)·Xᵀ‖² / ‖w·Xᵀ‖² on sampled inputs X; 0 of a matrix that puts out nothing."""
    x = consumer.stats["samples"].mT
    whole = float(torch.linalg.vector_norm(consumer.w @ x)) ** 2
    return float(torch.linalg.vector_norm((w - consumer.w) @ x)) ** 2 / whole if whole else 0.0


def _scaled(consumer: Consumer, s: Tensor) -> Tensor:
    """The consumer's weights as they come back from being quantized with factors s [K]."""
    w, importance = consumer.w * s, consumer.stats["importance"] / s.square()
    params = consumer.format.fit(w, column_weights(w, importance), search=True)
    return consumer.format.decode(consumer.format.round(w, params), params) / s


AWQ = (Awq(),)
