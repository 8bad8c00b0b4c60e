"""The model block by block: run it, measure what its matrices read, choose codes, and go on behind the quantized block.

Two streams of hidden states go through the model. The *quantized* one comes out of blocks that are quantized already:
statistics are taken from it, so each block makes up for what those before it got wrong. The *original* one is kept
where a method asks for it: its outputs are what a block should have returned.

One block is in memory at a time, in float32, with the statistics of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from fewbits.checkpoint.activations import INPUT_SCALE, cache_scales
from fewbits.engine import LayeredModel
from fewbits.engine.cache import watched_caches
from fewbits.formats import ActivationFormat, Format, QTensor
from fewbits.methods.base import Solver
from fewbits.methods.block import Block
from fewbits.methods.recipe import Recipe
from fewbits.models import Slot, links
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._measure import in_order_of_use, measure, put_behind, watched
from fewbits.pipeline._memory import give_back_free_memory
from fewbits.pipeline._streams import Streams
from fewbits.stats import Collector, Site, observer_named


@dataclass(frozen=True)
class SolvedBlock:
    """What became of a block.

    matrices: by the output's names, rows in the output's order. changed: parameters that a transform rewrote and the
    plan keeps in floating point, by the running model's names, in their own dtype. errors: ‖w − ŵ‖ / ‖w‖ of each
    matrix, w as the transforms left it. scales: static scales of inputs and of the key-value cache, float32 [1], by
    their entries' names.
    """

    matrices: Mapping[str, QTensor]
    changed: Mapping[str, Tensor]
    errors: Mapping[str, float]
    scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounded:
    """What is rounded besides weights. inputs: matrix -> what its inputs become; cache: keys and values; observer: how
    static scales are found.
    """

    inputs: Mapping[str, ActivationFormat] = field(default_factory=dict)
    cache: ActivationFormat | None = None
    observer: str = "percentile"

    @property
    def observed(self) -> bool:
        """Whether any scale has to be found on text."""
        return self.cache is not None or any(format.static for format in self.inputs.values())


@dataclass(frozen=True)
class Work:
    """What the blocks are made from and of.

    formats: matrix of the output -> its format; shapes: the same matrices -> [out_features, in_features]; slots: those
    inside blocks -> where they lie in the running model; vocabulary: the same for embeddings and projection to the
    vocabulary. dtypes: parameter of the running model -> the type that it is written in.
    """

    model: LayeredModel
    recipe: Recipe
    formats: Mapping[str, Format]
    slots: Mapping[str, Slot]
    vocabulary: Mapping[str, Slot] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounded: Rounded = field(default_factory=Rounded)


@torch.no_grad()
def solve_block(work: Work, index: int, streams: Streams) -> SolvedBlock:
    """Quantize a block and move the streams behind it."""
    block = open_block(work, index, streams)
    kept = _kept(block)
    for transform in work.recipe.transforms:
        stats = measure(block, (*transform.needs, *transform.wants), streams, {})
        transform.transform(block, local_formats(work, block), stats)
    changed = _changed(work, block, kept)
    if streams.original is not None and "drift" not in stats_of(work.recipe.solver):
        # Before it is solved: what it should return are the solver's targets. A transformed block returns the same.
        advance(block, streams.original, streams.batch)
    matrices = _solved(work, block, streams)
    errors = {name: _insert(block, name, q) for name, q in matrices.items()}
    scales = _observed(work, index, block, streams)
    _advance_held(work, block, streams)
    work.model.drop(index)
    return SolvedBlock(matrices, changed, errors, scales)


@torch.no_grad()
def replay_block(work: Work, index: int, streams: Streams, solved: SolvedBlock) -> None:
    """Move the streams behind a block that was solved before."""
    block = open_block(work, index, streams)
    if streams.original is not None:
        advance(block, streams.original, streams.batch)
    restore(block, solved)
    advance(block, streams.quantized, streams.batch)
    _advance_held(work, block, streams)
    work.model.drop(index)


def _solved(work: Work, block: Block, streams: Streams) -> dict[str, QTensor]:
    """The block's matrices, solved all at once or, where the solver wants that, in the order in which they are used:
    then what each reads is measured behind those before it.
    """
    solver, formats = work.recipe.solver, local_formats(work, block)
    steps = in_order_of_use(block, streams) if solver.in_order else [tuple(block.slots)]
    solved, behind = dict[str, QTensor](), dict[str, Tensor]()
    for names in steps:
        last = names == steps[-1]
        part = replace(block, slots={name: block.slots[name] for name in names})
        stats = measure(part, stats_of(solver), streams, behind, last=last)
        give_back_free_memory()
        found = solver.quantize_block(part, {name: formats[name] for name in names}, stats)
        del stats
        solved |= found
        give_back_free_memory()
        if not last:
            put_behind(behind, part, found, work.model.products)
    return {name: solved[name] for name in block.slots}


def stats_of(solver: Solver) -> tuple[str, ...]:
    return (*solver.needs, *solver.wants)


def restore(block: Block, solved: SolvedBlock) -> None:
    """Put what was solved into a block as it came from the source."""
    for name, value in solved.changed.items():
        block.parameters[name.removeprefix(f"{block.name}.")].copy_(value)
    for name, q in solved.matrices.items():
        block.put(name, q.dequantize().to(block.device))


def open_block(work: Work, index: int, streams: Streams | None = None) -> Block:
    """A block as it is in the source, in memory."""
    return block_of(work, index, work.model.load(index), streams)


def block_of(work: Work, index: int, module: nn.Module, streams: Streams | None = None) -> Block:
    """A loaded layer as methods see it."""
    name = work.model.layers[index]
    prefix = f"{name}."
    slots = {
        matrix: Slot(slot.parameter.removeprefix(prefix), *_rest(slot))
        for matrix, slot in work.slots.items()
        if slot.parameter.startswith(prefix)
    }
    shapes = {local: tuple(p.shape) for local, p in module.named_parameters()}
    return Block.around(
        name,
        module,
        slots,
        partial(work.model.run, index),
        inputs=() if streams is None else streams.quantized,
        targets=() if streams is None or streams.original is None else streams.original,
        links=links(work.model.values, shapes),
    )


def _rest(slot: Slot) -> tuple[int | None, bool, tuple[int, int] | None, int | None]:
    return slot.expert, slot.transposed, slot.rows, slot.interleaved_heads


def local_formats(work: Work, block: Block) -> dict[str, Format]:
    return {name: work.formats[name] for name in block.slots}


def _advance_held(work: Work, block: Block, streams: Streams) -> None:
    if streams.held is not None:
        with work.model.exact():
            advance(block, streams.held, streams.batch)


def advance(block: Block, stream: Activations, batch: int) -> None:
    """Replace a stream by what the block makes of it."""
    for start, states in stream.batches(batch):
        stream.put(start, block.run(states.to(block.device)))


def _observed(work: Work, index: int, block: Block, streams: Streams) -> dict[str, Tensor]:
    """Move the stream of quantized blocks on, and find the static scales of what passes, by their entries' names."""
    rounded = work.rounded
    if not rounded.observed:
        advance(block, streams.quantized, streams.batch)
        return {}
    factory = observer_named(rounded.observer)
    collector = Collector(watched(block), (), tokens=streams.ids.numel(), observer=factory)
    caches = {module: (name, factory(), factory()) for name, module in work.model.attentions(index).items()}
    with collector, watched_caches({module: (k.add, v.add) for module, (_, k, v) in caches.items()}):
        advance(block, streams.quantized, streams.batch)
    sites, scales = collector.statistics(), dict[str, Tensor]()
    for matrix, slot in block.slots.items():
        format = rounded.inputs.get(matrix)
        observer = sites[Site(slot.parameter)].observer if format is not None and format.static else None
        if format is not None and observer is not None:
            scales[scale_name(matrix)] = observer.scale(format)
    for name, *observers in caches.values():
        if rounded.cache is not None:
            for entry, observer in zip(cache_scales(name, rounded.cache), observers, strict=True):
                scales[entry.name] = observer.scale(rounded.cache)
    return scales


def scale_name(matrix: str) -> str:
    """The entry of a matrix's static input scale."""
    return matrix.removesuffix(".weight") + INPUT_SCALE


def _kept(block: Block) -> dict[str, Tensor]:
    """Copies of the parameters that are not quantized."""
    quantized = {slot.parameter for slot in block.slots.values()}
    return {name: p.clone() for name, p in block.parameters.items() if name not in quantized}


def _changed(work: Work, block: Block, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that a transform changed, in the type that they are written in; the block goes on with these numbers."""
    changed: dict[str, Tensor] = {}
    for name, old in before.items():
        parameter = block.parameters[name]
        if not torch.equal(parameter, old):
            full = f"{block.name}.{name}"
            changed[full] = parameter.to(work.dtypes.get(full, torch.float32)).cpu()
            parameter.copy_(changed[full])
    return changed


def _insert(block: Block, name: str, q: QTensor) -> float:
    """Put a quantized matrix into its block; its relative error."""
    error = relative_error(block.matrix(name), q)
    block.put(name, q.dequantize())
    return error


def relative_error(w: Tensor, q: QTensor) -> float:
    """‖w − ŵ‖ / ‖w‖."""
    norm = float(torch.linalg.vector_norm(w))
    error = float(torch.linalg.vector_norm(q.dequantize().to(w.device) - w))
    return error / norm if norm else 0.0
