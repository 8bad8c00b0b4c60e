"""Layers × parts: the matrices of a model in rows and columns, with a number for each place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fewbits.findings import TensorFacts
from fewbits.report.numbers import number
from fewbits.report.plots.heat import Cell


@dataclass(frozen=True)
class Places:
    """Names of rows (layers) and columns (parts), and the tensors at each place: an expert's matrices share one."""

    layers: tuple[int, ...]
    parts: tuple[str, ...]
    tensors: dict[tuple[int, int], list[TensorFacts]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Short names of the parts, where they tell them apart."""
        short = [part.rpartition(".")[2] for part in self.parts]
        times = Counter(short)
        return tuple(name if times[name] == 1 else part for name, part in zip(short, self.parts, strict=True))


ORDER = ("qkv", "q", "k", "v", "o", "output", "gate", "up", "down")
"""Words of parts' names, in the order in which a layer uses them."""


def places(tensors: Sequence[TensorFacts]) -> Places:
    """The matrices of layers, parts in the order of their use, others behind them in the order of the file."""
    found = [(t, t.layer) for t in tensors if t.layer is not None and len(t.shape) >= 2]
    layers = sorted({layer for _, layer in found})
    parts = sorted(dict.fromkeys(t.part for t, _ in found), key=_turn)
    at: dict[tuple[int, int], list[TensorFacts]] = {}
    for tensor, layer in found:
        at.setdefault((layers.index(layer), parts.index(tensor.part)), []).append(tensor)
    return Places(tuple(layers), tuple(parts), at)


def _turn(part: str) -> tuple[int, int]:
    words = part.rpartition(".")[2].split("_")
    return next(((part.count("*"), i) for i, word in enumerate(ORDER) if word in words), (2, 0))


def bits(found: Places) -> dict[tuple[int, int], Cell]:
    """Bits a weight, scales included."""
    return {place: _bits(tensors) for place, tensors in found.tensors.items()}


def errors(found: Places) -> dict[tuple[int, int], Cell]:
    """Relative errors in per cent; of several matrices the root of their mean square, by weights."""
    known = {place: [t for t in tensors if t.error is not None] for place, tensors in found.tensors.items()}
    return {place: _error(tensors) for place, tensors in known.items() if tensors}


def _bits(tensors: Sequence[TensorFacts]) -> Cell:
    value = 8 * sum(t.nbytes for t in tensors) / max(1, sum(t.weights for t in tensors))
    formats = ", ".join(dict.fromkeys(t.format for t in tensors))
    return Cell(value, f"{_named(tensors)}: {formats}, {number(value)} bits a weight")


def _error(tensors: Sequence[TensorFacts]) -> Cell:
    weights = sum(t.weights for t in tensors)
    value = 100 * math.sqrt(sum(t.weights * (t.error or 0.0) ** 2 for t in tensors) / max(1, weights))
    return Cell(value, f"{_named(tensors)}: {number(value, 3)} % in {tensors[0].format}")


def _named(tensors: Sequence[TensorFacts]) -> str:
    first = tensors[0].name
    return first if len(tensors) == 1 else f"{first} and {len(tensors) - 1} more"
