"""Statistics of what a block's matrices read: the block runs over the calibration windows while it is watched.

A run ends as soon as all that is measured has been seen, so measuring the queries of a block costs no feed-forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewbits.formats import QTensor
from fewbits.methods.block import Block
from fewbits.models import Slot
from fewbits.pipeline._streams import Streams
from fewbits.stats import AllSeen, Collector, InputStatistics, OrderOfUse, Recorder, Site


def measure(
    block: Block, needs: Sequence[str], streams: Streams, behind: Mapping[str, Tensor], *, last: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Statistics of what each matrix of the block reads, with `behind` in place of parameters where it is quantized.

    Where `drift` is among them the original's stream has to pass the block for it, and if this is the last measurement
    of this block it is moved on.
    """
    if not needs:
        return {}
    collector = measured(block, needs, streams.ids.numel())
    for start, states in streams.quantized.batches(streams.batch):
        if "drift" in needs and streams.original is not None:
            collector.originals = _originals(block, streams, start, len(states), move=last)
        with suppress(AllSeen), collector:
            _call(block, states, behind)
    found, drifts = of_slots(block, collector.statistics()), collector.drifts()
    for name, slot in block.slots.items():
        for key, value in drifts.get(Site(slot.parameter), {}).items():
            found[name][key] = slot.take(value)
    return found


def in_order_of_use(block: Block, streams: Streams) -> list[tuple[str, ...]]:
    """The block's matrices, those that read the same input together; what one window did not use comes last."""
    order = OrderOfUse(watched(block))
    with order:
        _call(block, streams.quantized.span(0, 1), {})
    steps = [tuple(name for name, slot in block.slots.items() if slot.parameter in step) for step in order.steps]
    used = {name for names in steps for name in names}
    rest = tuple(name for name in block.slots if name not in used)
    return [*steps, rest] if rest else steps


def put_behind(behind: dict[str, Tensor], block: Block, solved: Mapping[str, QTensor], dtype: torch.dtype) -> None:
    """Add whole parameters with these matrices quantized, in the type in which they are multiplied."""
    for name, q in solved.items():
        slot = block.slots[name]
        if slot.parameter not in behind:
            behind[slot.parameter] = block.parameters[slot.parameter].to(dtype, copy=True)
        slot.put(behind[slot.parameter], q.dequantize().to(block.device))


def _originals(block: Block, streams: Streams, start: int, count: int, *, move: bool) -> dict[Site, Tensor]:
    """What the original's matrices return for some windows, whose hidden states are moved on if wanted."""
    assert streams.original is not None
    if not move and all(parameter.dim() > 2 for parameter in watched(block).values()):
        return {}  # of experts nothing is recorded
    recorder = Recorder(watched(block), stop=not move)
    with suppress(AllSeen), recorder:
        returned = _call(block, streams.original.span(start, start + count), {})
        if move:
            streams.original.put(start, returned)
    return recorder.outputs


def _call(block: Block, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    assert block.call is not None
    return block.call(x.to(block.device), parameters)


def measured(block: Block, needs: Sequence[str], tokens: int, *, stop: bool = True) -> Collector:
    """What collects statistics of the inputs of the block's matrices, of about so many tokens; stop: and ends a run
    once it has.
    """
    return Collector(watched(block), needs, tokens=tokens, stop=stop)


def watched(block: Block) -> dict[str, Tensor]:
    """The parameters that its matrices lie in."""
    return {slot.parameter: block.parameters[slot.parameter] for slot in block.slots.values()}


def of_slots(block: Block, sites: Mapping[Site, InputStatistics]) -> dict[str, dict[str, Tensor]]:
    """Statistics of what each matrix of the block reads."""
    pooled = _pooled(sites)
    return {name: _of_slot(slot, block, sites, pooled) for name, slot in block.slots.items()}


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
