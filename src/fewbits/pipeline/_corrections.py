"""Low-rank corrections of a model that is quantized already, block after block.

The model that it should be and the quantized one run side by side, each on its own hidden states. Matrices are
corrected in the order in which a block uses them, those that read the same input together, and what comes later is
measured behind the corrections before it: so a correction also makes up for what earlier layers still get wrong, and
does not undo what a solver did to that end. Two blocks are in memory at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Reader
from fewbits.checkpoint.adapter import Added
from fewbits.engine import LayeredModel
from fewbits.methods.low_rank import correction
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._stream import Progress
from fewbits.pipeline._streams import BATCH, embedded
from fewbits.stats import AllSeen, Collector, OrderOfUse, Recorder, Site

WEIGHT = ".weight"


class Side:
    """One of the two models: its loaded block, and the hidden states in front of it."""

    def __init__(self, reader: Reader, ids: Tensor, device: str, file: Path, memory: int) -> None:
        self.model = LayeredModel(reader, device)
        self.batch = max(1, BATCH // ids.shape[1])
        self.index = 0
        spills = 8 * ids.numel() * self.model.hidden_size > memory  # with the other's
        with self.model.outside():
            self.states: Activations = embedded(self.model, ids, self.batch, file if spills else None)

    def load(self, index: int) -> dict[str, nn.Parameter]:
        """The next block; its parameters by their names in the model."""
        self.index, prefix = index, self.model.layers[index]
        return {f"{prefix}.{name}": p for name, p in self.model.load(index).named_parameters()}

    def run(self, start: int, count: int) -> Tensor:
        states = self.states.span(start, start + count)
        return self.model.run(self.index, states.to(self.model.device))

    def move(self) -> None:
        """Bring the states behind the block, and drop that."""
        for start, states in self.states.batches(self.batch):
            self.states.put(start, self.run(start, len(states)))
        self.model.drop(self.index)


@torch.no_grad()
def corrections(
    wanted: Reader,
    quantized: Reader,
    layers: Collection[str],
    ids: Tensor,
    rank: int,
    *,
    folder: Path,
    memory: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Added]:
    """Layer -> the correction of its quantized weight, for those of `layers` that run on the windows ids [n, T].

    memory: bytes of hidden states; more of them are kept in `folder`.
    """
    original = Side(wanted, ids, device, folder / "wanted.states", memory)
    ours = Side(quantized, ids, device, folder / "quantized.states", memory)
    found: dict[str, Added] = {}
    count = len(original.model.layers)
    for index in range(count):
        targets, parameters = original.load(index), ours.load(index)
        for names in _in_order(ours, [name for name in parameters if name.removesuffix(WEIGHT) in layers], parameters):
            if progress:
                progress(index, count, f"correct {names[0].removesuffix(WEIGHT)}")
            for name, added in _measured(original, ours, names, targets, parameters, rank):
                parameters[name].add_(added.rows(None).to(parameters[name].device))
                found[name.removesuffix(WEIGHT)] = added
        original.move()
        ours.move()
    for side in (original, ours):
        side.states.close()
    return found


def _in_order(side: Side, names: list[str], parameters: dict[str, nn.Parameter]) -> list[tuple[str, ...]]:
    order = OrderOfUse({name: parameters[name] for name in names})
    with order:
        side.run(0, 1)
    return order.steps


def _measured(
    original: Side,
    ours: Side,
    names: tuple[str, ...],
    targets: dict[str, nn.Parameter],
    parameters: dict[str, nn.Parameter],
    rank: int,
) -> Iterator[tuple[str, Added]]:
    """The corrections of matrices that read the same input."""
    windows, length, _ = ours.states.shape
    watched = {name: parameters[name] for name in names}
    collector = Collector(watched, ("hessian", "drift"), tokens=windows * length, stop=True)
    for start, states in ours.states.batches(ours.batch):
        recorder = Recorder({name: targets[name] for name in names}, stop=True)
        with suppress(AllSeen), recorder:
            original.run(start, len(states))
        collector.originals = recorder.outputs
        with suppress(AllSeen), collector:
            ours.run(start, len(states))
    seen, drifts = collector.statistics(), collector.drifts()
    for name in names:
        hessian, drift = seen[Site(name)].value("hessian"), drifts[Site(name)]["drift"]
        yield name, Added(*(factor.cpu() for factor in correction(drift, hessian, rank)))
