"""The experts of a quantized checkpoint, packed: one matrix an expert, whichever way they lie in the file.

All experts in one entry [experts, out_features, in_features], as our own kind has them, or an entry for every expert
and projection, of which transformers joins gate and up. Those are joined here by their rows, packed as they are, where
they have one format whose rows do not depend on one another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from fewbits.engine.loading import Placement
from fewbits.engine.tiled_weight import TiledWeight
from fewbits.engine.weights import Weight
from fewbits.formats import QTensor
from fewbits.integrations.experts import takes_experts
from fewbits.nn import PackedExperts

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def packs_experts(module: nn.Module, leaf: str, placement: Placement, shape: torch.Size) -> bool:
    """Whether a parameter [experts, out_features, in_features] can be packed as the checkpoint has it."""
    first = placement.sources[0][1].entry
    if not takes_experts(module, leaf) or getattr(module, "is_transposed", False) or first.inputs is not None:
        return False
    if placement.conversion is None:
        return first.shape == tuple(shape)
    entries = [weight.entry for _, weight in placement.sources]
    alike = all(e.format == first.format and EXPERT.search(e.name) for e in entries)
    found = _by_expert(placement)
    joined = all(sum(weight.entry.shape[0] for weight in each) == shape[1] for each in found.values())
    return alike and first.format.rowwise and joined and sorted(found) == list(range(shape[0]))


def packed_experts(placement: Placement, dtype: torch.dtype, device: torch.device) -> PackedExperts:
    """The experts of a parameter for which `packs_experts`."""
    return PackedExperts(_weights(placement, dtype, device))


def _weights(placement: Placement, dtype: torch.dtype, device: torch.device) -> Iterator[TiledWeight]:
    if placement.conversion is None:
        (_, weight), *_ = placement.sources
        for q in _slices(weight):
            yield _weight(q, dtype).to(device)
        return
    for _, parts in sorted(_by_expert(placement).items()):
        read = [weight.reader.read(weight.entry.name).pack() for weight in parts]
        arrays = {name: torch.cat([each[name] for each in read]) for name in read[0]}
        shape = (sum(weight.entry.shape[0] for weight in parts), parts[0].entry.shape[1])
        yield TiledWeight(parts[0].entry.format, shape, arrays, dtype).to(device)


def _by_expert(placement: Placement) -> dict[int, list[Weight]]:
    """The entries of each expert in the order in which transformers joins them."""
    order = list(dict.fromkeys(placement.conversion.source_patterns))
    found: dict[int, list[Weight]] = defaultdict(list)
    for _, weight in sorted(placement.sources, key=lambda source: order.index(source[0])):
        expert = EXPERT.search(weight.entry.name)
        if expert is not None:
            found[int(expert[1])].append(weight)
    return found


def _slices(weight: Weight) -> Iterator[QTensor]:
    """One expert after another of an entry that has them all; all are read at once where rows share params."""
    name, count = weight.entry.name, weight.entry.shape[0]
    whole = None if weight.entry.format.rowwise else weight.reader.read(name)
    for expert in range(count):
        q = weight.reader.read(name, slice(expert, expert + 1)) if whole is None else whole
        at = 0 if whole is None else expert
        params = {key: p[at] if p.dim() and len(p) == len(q.codes) else p for key, p in q.params.items()}
        yield QTensor(q.format, q.codes[at], params)


def _weight(q: QTensor, dtype: torch.dtype) -> TiledWeight:
    return TiledWeight(q.format, q.shape, q.pack(), dtype)
