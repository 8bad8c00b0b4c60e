"""The original model once forth and once back: how its predictions depend on each of its matrices.

Forth, what every block reads is kept, in memory or in files. Back, each block is loaded again, runs once more, and
passes the gradient on; meanwhile its matrices are watched. Labels are drawn from the model's own predictions, so the
squares of gradients add up to Fisher's information (see `stats.curvature`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewbits.engine import LayeredModel
from fewbits.kernels.gram import add_gram, mirror
from fewbits.methods.block import Block
from fewbits.methods.products import products_in
from fewbits.models import Slot
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._blocks import Work, open_block
from fewbits.pipeline._measure import measured, of_slots, watched
from fewbits.pipeline._streams import BATCH, embedded
from fewbits.stats import Curvature, CurvatureCollector, CurvatureSums, Site
from fewbits.stats.watch import Watcher

Statistics = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Passed:
    """A block on the way back: open, with the curvature of its matrices and statistics of what they read."""

    index: int
    block: Block
    curvatures: Mapping[str, Curvature]
    statistics: Statistics


class WayBack:
    """Windows ids [n, T] through the model and back. Used as a context, which frees what is kept."""

    def __init__(self, model: LayeredModel, ids: Tensor, *, folder: Path, limit: int, seed: int = 0) -> None:
        self._model, self._ids = model, ids
        self._batch = max(1, BATCH // ids.shape[1])
        spills = 4 * (len(model.layers) + 1) * ids.numel() * model.hidden_size > limit
        self._folder = folder if spills else None
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._kept = list[Activations]()

    def __enter__(self) -> WayBack:
        with self._model.outside():
            self._kept.append(embedded(self._model, self._ids, self._batch, self._file(0)))
        for index in range(len(self._model.layers)):
            self._kept.append(self._behind(index))
        return self

    def __exit__(self, *_: object) -> None:
        for states in self._kept:
            states.close()

    def output(self) -> Curvature:
        """The curvature of the projection to the vocabulary; what the last block returned becomes its gradient."""
        last, sums = self._kept[-1], None
        with self._model.outside():
            matrix = self._model.output_matrix
            for start, states in last.batches(1):
                x = states.to(self._model.device).requires_grad_()
                reading = _Inputs(matrix)
                with torch.enable_grad(), reading, products_in(self._model.products, self._model.device):
                    log_p = self._model.logits(x).float().log_softmax(-1).squeeze(0)
                    p = log_p.detach().exp()
                    drawn = torch.multinomial(p, 1, generator=self._generator)
                    (slope,) = torch.autograd.grad(log_p.gather(-1, drawn).sum(), x)
                last.put(start, slope)
                spread = p.mul_(1 - p)
                sums = sums or CurvatureSums.of(matrix.shape[0], matrix.shape[1], x.device)
                sums.add(reading.x, spread.sum(1), spread.sum(0))
        assert sums is not None
        return sums.curvature(self._ids.numel())

    def blocks(self, work: Work, needs: tuple[str, ...] = ()) -> Iterator[Passed]:
        """The blocks from the last to the first, after `output`. needs: statistics of their inputs to measure too."""
        for index in reversed(range(len(self._model.layers))):
            block = open_block(work, index)
            slopes, collector = self._kept[index + 1], CurvatureCollector(watched(block))
            inputs = measured(block, needs, self._ids.numel(), stop=False) if needs else None
            for start, states in self._kept[index].batches(self._batch):
                with torch.enable_grad(), ExitStack() as watching:
                    for watcher in (collector, inputs):
                        if watcher is not None:
                            watching.enter_context(watcher)
                    x = states.to(block.device).requires_grad_()
                    y = block.run(x)
                slope = slopes.span(start, start + len(x)).to(block.device)
                self._kept[index].put(start, torch.autograd.grad(y, x, slope)[0])
            found = collector.curvatures(self._ids.numel())
            curvatures = {name: _of_slot(slot, block, found) for name, slot in block.slots.items()}
            statistics = {name: {} for name in block.slots} if inputs is None else of_slots(block, inputs.statistics())
            yield Passed(index, block, curvatures, statistics)
            self._model.drop(index)

    def embeddings(self) -> Curvature:
        """The curvature of the embeddings, after `blocks`: a row counts as often as its token is read."""
        with self._model.outside():
            matrix = self._model.input_matrix
            rows = torch.bincount(self._ids.flatten(), minlength=len(matrix)).float().to(matrix.device)
            scale = self._scale(matrix)
        inner = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
        for _, slope in self._kept[0].batches(self._batch):
            add_gram(inner, slope.flatten(0, 1).to(matrix.device))
        mirror(inner)
        tokens = self._ids.numel()
        return Curvature(rows / tokens, inner.mul_(scale**2 / tokens))

    def _scale(self, matrix: Tensor) -> float:
        """What the model multiplies embeddings by before its first block reads them (Gemma does)."""
        ids = self._ids[:1]
        rows, read = matrix[ids.to(matrix.device)].detach(), self._model.embed(ids)
        return float((rows * read).sum() / rows.square().sum())

    @torch.no_grad()
    def _behind(self, index: int) -> Activations:
        before = self._kept[index]
        after = Activations(*before.shape, self._file(index + 1))
        self._model.load(index)
        for start, states in before.batches(self._batch):
            after.put(start, self._model.run(index, states.to(self._model.device)))
        self._model.drop(index)
        return after

    def _file(self, index: int) -> Path | None:
        return None if self._folder is None else self._folder / f"back-{index}.states"


class _Inputs(Watcher):
    """Within it, what the one matrix reads is kept, [T, K]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__({"output": matrix}, outputs=False)
        self.x = torch.empty(0)

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        self.x = x.detach().reshape(-1, x.shape[-1])


def _of_slot(slot: Slot, block: Block, found: Mapping[Site, Curvature]) -> Curvature:
    """The curvature of a matrix, its rows in the matrix's order; none for experts that no token came to."""
    parameter = block.parameters[slot.parameter]
    inside = replace(slot, expert=None, transposed=False)
    if parameter.dim() == 2 or slot.expert is not None:
        site = Site(slot.parameter, slot.expert)
        return _narrowed(inside, found[site]) if site in found else _flat(block, slot)
    experts = (found.get(Site(slot.parameter, i)) for i in range(len(parameter)))
    each = [_flat(block, slot, expert=0) if one is None else one for one in experts]
    return Curvature(torch.stack([one.rows for one in each]), torch.stack([one.inner for one in each]))


def _narrowed(slot: Slot, whole: Curvature) -> Curvature:
    return Curvature(slot.take(whole.rows), whole.inner)


def _flat(block: Block, slot: Slot, expert: int | None = None) -> Curvature:
    """That of a matrix that nothing depends on."""
    w = slot.take(block.parameters[slot.parameter])
    w = w if expert is None else w[expert]
    return Curvature(torch.zeros(len(w)), torch.zeros(w.shape[1], w.shape[1]))
