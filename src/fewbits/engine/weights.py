"""The weights of a checkpoint by the names of the model's parameters, each read a slab of rows at a time.

A slab is what exists in float beside the result, so loading needs the model once and a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fewbits.checkpoint import Entry, Reader, input_scale, open_checkpoint
from fewbits.engine.skeleton import configuration
from fewbits.formats import Float, QTensor
from fewbits.models import Restored, from_gguf
from fewbits.nn import PackedWeight, W8A8Linear

SLAB = 1 << 20
"""Weights read at a time: 4 MB of float32, and what decoding takes beside it."""
ROPE_FACTORS = "rope_freqs.weight"
"""GGUF's tensor of rotary factors, which is a part of the configuration elsewhere."""


@dataclass(frozen=True)
class Weight:
    """An entry of a checkpoint, and how to restore the model's parameter where the file has it changed (GGUF)."""

    reader: Reader
    entry: Entry
    restored: Restored | None = None

    @property
    def quantized(self) -> bool:
        return not isinstance(self.entry.format, Float)

    def numbers(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The decoded weight in `dtype`; integers stay what they are."""
        format = self.entry.format
        if isinstance(format, Float) and not format.dtype.is_floating_point:
            return self.reader.read(self.entry.name).codes.to(device, copy=True)
        w = torch.empty(self.entry.shape, dtype=dtype, device=device)
        for rows in self._slabs():
            part = self.reader.read(self.entry.name, rows)
            numbers = part.codes if isinstance(format, Float) else part.dequantize()
            if self.restored is not None and self.restored.added:
                numbers = numbers.float() + self.restored.added
            w[rows or ...] = numbers.to(device)
        order = self.row_order()
        return w if order is None else w[order.to(device)]

    def packed(self, dtype: torch.dtype, device: torch.device) -> PackedWeight:
        """The quantized weight as it is, pretending to be of `dtype`."""
        format, shape = self.entry.format, self.entry.shape
        arrays = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in format.arrays(shape).items()}
        for rows in self._slabs():
            for name, part in self.reader.read(self.entry.name, rows).pack().items():
                arrays[name][rows or ...] = part
        order = self.row_order()
        if order is not None:
            arrays = {name: array[order] for name, array in arrays.items()}
        return PackedWeight(format, shape, arrays, dtype).to(device)

    def multiplied(self, dtype: torch.dtype, device: torch.device) -> W8A8Linear:
        """A linear layer, without bias, of a weight whose inputs are rounded too."""
        assert self.entry.inputs is not None
        parts = [self.reader.read(self.entry.name, rows) for rows in self._slabs()]
        codes = torch.cat([part.codes for part in parts])
        params = {key: torch.cat([part.params[key] for part in parts]) for key in parts[0].params}
        scale = input_scale(self.entry)
        static = None if scale is None else self.reader.read(scale.name).dequantize()
        layer = W8A8Linear(QTensor(self.entry.format, codes, params), self.entry.inputs, static, dtype=dtype)
        return layer.to(device)

    def _slabs(self) -> Iterator[slice | None]:
        """Slices of rows; None for all at once, where the format allows nothing else."""
        shape = self.entry.shape
        elements = torch.Size(shape).numel()
        if not shape or not self.entry.format.rowwise or elements <= SLAB:
            yield None
            return
        step = max(1, SLAB * shape[0] // elements)
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))

    def row_order(self) -> Tensor | None:
        """Which row of the file is each row of the parameter; None where they are the same."""
        return None if self.restored is None else self.restored.row_order(self.entry.shape[0])


def open_weights(path: Path) -> tuple[PretrainedConfig, dict[str, Weight]]:
    """The configuration of a checkpoint of any kind, and its weights by the names that transformers knows them by.

    Static scales of activations are among them.

    Raises CheckpointError or UnsupportedError for what cannot be opened.
    """
    kind, reader = open_checkpoint(path)
    if kind.name != "gguf":
        weights = {name: Weight(reader, entry) for name, entry in reader.entries.items()}
        return configuration(path, reader.config), weights
    values, restored = restored_model(reader)
    weights = {name: Weight(reader, reader.entries[place.source], place) for name, place in restored.items()}
    return configuration(path, values), weights


def restored_model(reader: Reader) -> tuple[dict[str, Any], dict[str, Restored]]:
    """config.json of the model in an open GGUF file, and where each of its parameters comes from (see `from_gguf`)."""
    factors = reader.read(ROPE_FACTORS).dequantize().tolist() if ROPE_FACTORS in reader.entries else None
    return from_gguf(reader.config, reader.entries, factors)
