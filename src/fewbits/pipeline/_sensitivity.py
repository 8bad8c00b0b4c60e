"""The planner's table, measured: what each format of each matrix would cost in divergence.

The original runs over calibration text and back once (`_way_back`). While a block is open, rows of each of its matrices
are quantized in every candidate format by the solver itself, under the Hessian of the block's inputs, and the curvature
says what their errors cost. Rows are drawn by how much they may matter (probability ∝ curvature · |w|²) and weighed by
its inverse, so that a few hundred of a large matrix tell for all of them (Horvitz and Thompson 1952). They are too few
for several cores at once, so each core has a matrix of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewbits.formats import Format, QTensor
from fewbits.methods import TensorMethod
from fewbits.methods._parallel import in_parallel
from fewbits.pipeline._blocks import Work
from fewbits.pipeline._vocabulary import statistics_of
from fewbits.pipeline._way_back import Passed, WayBack
from fewbits.stats import Curvature

ROWS = 256
"""Rows of a matrix that are quantized in each format."""

Progress = Callable[[int, int, str], None]
Costs = dict[str, dict[str, float]]
"""Matrix -> format -> nats a token."""


Keep = Callable[[int, Mapping[str, QTensor]], None]
"""Takes what was quantized whole of block `index`, or, after the last one, of what lies outside of the blocks."""


@dataclass(frozen=True)
class Trying:
    """What is tried. candidates: matrix -> its formats; probes: matrix -> the format that all of it is quantized in."""

    solver: TensorMethod
    candidates: Mapping[str, Sequence[Format]]
    probes: Mapping[str, Format] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics of inputs that it takes."""
        return tuple(name for name in (*self.solver.needs, *self.solver.wants) if name != "drift")

    @torch.no_grad()
    def costs(
        self, name: str, w: Tensor, uses: Sequence[Curvature], statistics: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Format -> nats a token that matrix w [..., N, K], which is used in these ways, costs in it."""
        rows, weight = drawn(w, uses)
        part = w.index_select(-2, rows)
        found = {}
        for format in self.candidates[name]:
            error = self.solver.quantize(part, format, statistics).dequantize() - part
            costs = torch.stack([use.of_rows(error, rows) for use in uses]).sum(0)
            found[format.name] = float((costs * weight).sum())
        return found

    @torch.no_grad()
    def probe(self, name: str, w: Tensor, statistics: Mapping[str, Tensor]) -> QTensor:
        """All of a matrix in the format that it is probed in."""
        return self.solver.quantize(w, self.probes[name], statistics)


def measure_costs(
    work: Work, ids: Tensor, trying: Trying, keep: Keep, *, folder: Path, limit: int, progress: Progress | None
) -> Costs:
    """Costs of all matrices of the work, measured on windows ids [n, T].

    keep: takes the matrices that are quantized to be probed. folder: where hidden states go that are more than `limit`
    bytes.
    """
    costs: Costs = {}
    count = len(work.model.layers)
    with WayBack(work.model, ids, folder=folder, limit=limit) as way:
        output = way.output()
        for passed in way.blocks(work, trying.needs):
            if progress:
                progress(count - passed.index, count + 1, passed.block.name)
            found = in_parallel([partial(_of_block, trying, passed, names) for names in _by_input(passed)])
            costs |= {name: cost for each in found for name, (cost, _) in each.items()}
            keep(passed.index, {name: probe for each in found for name, (_, probe) in each.items()})
        outside = (way.embeddings(), output)
    probed = dict[str, QTensor]()
    for name, slot in work.vocabulary.items():
        uses = [use for use, used in zip(outside, work.model.uses(slot.parameter), strict=True) if used]
        measured = statistics_of(uses, ids.numel())
        statistics = {key: measured[key] for key in (*trying.needs, "tokens") if key in measured}
        w = slot.take(work.model.outer(slot.parameter))
        costs[name] = trying.costs(name, w, uses, statistics)
        probed[name] = trying.probe(name, w, statistics)
    keep(count, probed)
    return costs


def _by_input(passed: Passed) -> list[list[str]]:
    """The block's matrices, those that share their statistics together: a solver may write on them as it works."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, found in passed.statistics.items():
        groups[id(next(iter(found.values()))) if found else name].append(name)
    return list(groups.values())


def _of_block(trying: Trying, passed: Passed, names: Sequence[str]) -> dict[str, tuple[dict[str, float], QTensor]]:
    """Costs and probe of each of some matrices, one after the other."""
    found = {}
    for name in names:
        w, statistics = passed.block.matrix(name), passed.statistics[name]
        costs = trying.costs(name, w, [passed.curvatures[name]], statistics)
        found[name] = costs, trying.probe(name, w, statistics)
    return found


def drawn(w: Tensor, uses: Sequence[Curvature], rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(rows of w [..., N, K] to try, int64 [n]; what each of them counts, [n]).

    Systematic sampling: as many as asked for, the same at every call.
    """
    energy = w.float().square().sum(-1)
    size = torch.stack([use.rows * energy for use in uses]).sum(0)
    size = size.reshape(-1, w.shape[-2]).sum(0).double()
    if len(size) <= rows:
        return torch.arange(len(size), device=w.device), torch.ones(len(size), device=w.device)
    size += size.mean() / 100 + torch.finfo(torch.float64).tiny  # so that every row may be drawn
    share = _shares(size, rows)
    passed = share.cumsum(0)
    chosen = (passed.floor() > (passed - share).floor()).nonzero().flatten()  # a whole number lies in its stretch
    return chosen, share[chosen].reciprocal().float()


def _shares(size: Tensor, rows: int) -> Tensor:
    """Probabilities ∝ size [N] that add up to `rows`; what would be past 1 is certain."""
    share = size * (rows / size.sum())
    while bool((share > 1).any()):
        certain = share >= 1
        left = rows - int(certain.sum())
        share = torch.where(certain, 1.0, size * (left / size[~certain].sum()))
    return share
