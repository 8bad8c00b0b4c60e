"""The model block by block: run it, measure what its matrices read, choose codes, and go on behind the quantized block.

Two streams of hidden states go through the model. The *quantized* one comes out of blocks that are quantized already:
statistics are taken from it, so each block makes up for what those before it got wrong. The *original* one is kept
where a method asks for it: its outputs are what a block should have returned.

One block is in memory at a time, in float32, with the statistics of its inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fewbits.checkpoint.activations import INPUT_SCALE, cache_scales
from fewbits.engine import LayeredModel
from fewbits.engine.cache import watched_caches
from fewbits.formats import ActivationFormat, Format, QTensor
from fewbits.methods.base import Solver
from fewbits.methods.block import Block
from fewbits.methods.recipe import Recipe
from fewbits.models import Slot, links
from fewbits.pipeline._activations import Activations
from fewbits.stats import Collector, InputStatistics, Recorder, Site, observer_named

BATCH = 1024  # tokens that run through a block at a time: no slower than more, and its wide layers take less memory


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

    formats: matrix of the output -> its format, of those inside blocks; shapes: the same matrices -> [out_features,
    in_features]; slots: -> where they lie in the running model. dtypes: parameter of the running model -> the type that
    it is written in.
    """

    model: LayeredModel
    recipe: Recipe
    formats: Mapping[str, Format]
    slots: Mapping[str, Slot]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounded: Rounded = field(default_factory=Rounded)


class Streams:
    """The hidden states in front of the next block, of calibration windows ids [n, T].

    quantized: behind quantized blocks; original: behind original ones, None where nobody asks for it.
    """

    def __init__(
        self, work: Work, ids: Tensor, *, folder: Path, limit: int, original: bool, held: Tensor | None = None
    ) -> None:
        self.batch = max(1, BATCH // ids.shape[1])
        self.ids = ids
        spill = 4 * (1 + original) * ids.numel() * work.model.hidden_size > limit
        files = [folder / f"{name}.states" if spill else None for name in ("quantized", "original")]
        with work.model.outside():
            self.quantized = embedded(work.model, ids, self.batch, files[0])
            self.original = embedded(work.model, ids, self.batch, files[1]) if original else None
            self.held = None if held is None else embedded(work.model, held, self.batch)

    def close(self) -> None:
        """Free everything, on disk too."""
        for stream in (self.quantized, self.original, self.held):
            if stream is not None:
                stream.close()


def embedded(model: LayeredModel, ids: Tensor, batch: int, file: Path | None = None) -> Activations:
    """What the first block reads of windows ids [n, T]."""
    windows, length = ids.shape
    stream = Activations(windows, length, model.hidden_size, file)
    for start in range(0, len(ids), batch):
        stream.put(start, model.embed(ids[start : start + batch]))
    return stream


@torch.no_grad()
def solve_block(work: Work, index: int, streams: Streams) -> SolvedBlock:
    """Quantize a block and move the streams behind it."""
    block = open_block(work, index, streams)
    kept = _kept(block)
    for transform in work.recipe.transforms:
        stats = measure(block, (*transform.needs, *transform.wants), streams)
        transform.transform(block, local_formats(work, block), stats)
    changed = _changed(work, block, kept)
    solver = work.recipe.solver
    stats = measure(block, stats_of(solver), streams)
    if streams.original is not None and "drift" not in stats_of(solver):
        advance(block, streams.original, streams.batch)  # a transformed block returns what it returned before
    matrices = solver.quantize_block(block, local_formats(work, block), stats)
    del stats
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
    collector = Collector(_watched(block), (), tokens=streams.ids.numel(), observer=factory)
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


def measure(block: Block, needs: Sequence[str], streams: Streams) -> dict[str, dict[str, Tensor]]:
    """Statistics of what each matrix of the block reads, with the block as it is now.

    Where `drift` is among them the original's stream has to pass the block for it, and is moved on.
    """
    if not needs:
        return {}
    watched, collector = _watched(block), measured(block, needs, streams.ids.numel())
    for start, states in streams.quantized.batches(streams.batch):
        if "drift" in needs and streams.original is not None:
            with Recorder(watched) as recorder:
                original = block.run(streams.original.span(start, start + len(states)).to(block.device))
            collector.originals = recorder.outputs
            streams.original.put(start, original)
        with collector:
            block.run(states.to(block.device))
    sites, drifts = collector.statistics(), collector.drifts()
    pooled = _pooled(sites)
    found = {name: _of_slot(slot, block, sites, pooled) for name, slot in block.slots.items()}
    for name, slot in block.slots.items():
        if Site(slot.parameter) in drifts:
            found[name]["drift"] = slot.take(drifts[Site(slot.parameter)])
    return found


def measured(block: Block, needs: Sequence[str], tokens: int) -> Collector:
    """What collects statistics of the inputs of the block's matrices, of about so many tokens."""
    return Collector(_watched(block), needs, tokens=tokens)


def _watched(block: Block) -> dict[str, Tensor]:
    return {slot.parameter: block.parameters[slot.parameter] for slot in block.slots.values()}


def _of_slot(
    slot: Slot, block: Block, sites: Mapping[Site, InputStatistics], pooled: Callable[[str], dict[str, Tensor]]
) -> dict[str, Tensor]:
    parameter = block.parameters[slot.parameter]
    if parameter.dim() == 2:
        return sites[Site(slot.parameter)].values()
    if slot.expert is not None:
        found = sites.get(Site(slot.parameter, slot.expert))
        return found.values() if found is not None else pooled(slot.parameter)
    experts = [sites.get(Site(slot.parameter, e)) for e in range(parameter.shape[0])]
    values = [pooled(slot.parameter) if found is None else found.values() for found in experts]
    # Experts have different numbers of samples; rows of zeros, which add to no error, make them alike.
    return {key: pad_sequence([value[key] for value in values], batch_first=True) for key in values[0]}


def _pooled(sites: Mapping[Site, InputStatistics]) -> Callable[[str], dict[str, Tensor]]:
    """Statistics of an expert that no calibration token came to: the mean over the others, weighted by their tokens."""
    by_parameter: dict[str, list[InputStatistics]] = defaultdict(list)
    for site, found in sites.items():
        by_parameter[site.parameter].append(found)

    def pooled(parameter: str) -> dict[str, Tensor]:
        seen = by_parameter[parameter]
        total = sum(found.tokens for found in seen)
        first = seen[0].values()
        means = {}
        for key in first:
            values = [found.value(key) * (1 if key == "samples" else found.tokens / total) for found in seen]
            means[key] = torch.cat(values) if key == "samples" else torch.stack(values).sum(0)
        return means

    return pooled


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
