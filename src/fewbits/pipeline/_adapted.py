"""An adapted checkpoint as floating-point weights: a reader in front of a reader.

The base is decoded and the adapter added wherever a parameter is read, some rows at a time, so whatever takes a
floating-point checkpoint takes this one, and merges the two by reading it. The merged model is written nowhere.

Entries are of the type that the configuration names; `read` gives float32, which quantized ones start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from fewbits.checkpoint import Entry, Reader, is_scale
from fewbits.checkpoint.adapter import Added
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Float, QTensor

FP32 = Float(torch.float32)


class AdaptedReader(Reader):
    """The base behind `reader` with an adapter's layers.

    Raises CheckpointError for an adapter of another model, UnsupportedError where the base rounds inputs.
    """

    def __init__(self, reader: Reader, layers: Mapping[str, Added]) -> None:
        self.path, self.config = reader.path, reader.config
        self._base = reader
        self._added = {f"{layer}.weight": added for layer, added in layers.items()}
        for name, added in self._added.items():
            _require_fits(reader, name, (len(added.b), added.a.shape[1]))
        if any(is_scale(entry) or entry.inputs is not None for entry in reader.entries.values()):
            raise UnsupportedError(
                f"{reader.path}: its layers round their inputs, and an adapter reads them as they are"
            )
        self._dtype = _dtype(reader)
        self.entries = {name: self._entry(entry) for name, entry in reader.entries.items()}
        self._whole: dict[str, Tensor] = {}  # one decoded matrix at a time whose rows depend on each other
        self._lock = Lock()

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self._base.entries[name]
        if isinstance(entry.format, Float) and name not in self._added:
            return self._base.read(name, rows)
        w = self._decoded(entry, rows)
        if name in self._added:
            w = w + self._added[name].rows(rows)
        return QTensor(FP32, w, {})

    def _entry(self, entry: Entry) -> Entry:
        kept = isinstance(entry.format, Float)
        return entry if kept else Entry(entry.name, entry.shape, Float(self._dtype))

    def _decoded(self, entry: Entry, rows: slice | None) -> Tensor:
        if rows is None or entry.format.rowwise:
            return self._base.read(entry.name, rows).dequantize().float()
        with self._lock:
            if entry.name not in self._whole:
                self._whole = {entry.name: self._base.read(entry.name).dequantize()}
            return self._whole[entry.name][rows]


def _require_fits(reader: Reader, name: str, shape: tuple[int, ...]) -> None:
    entry = reader.entries.get(name)
    if entry is None or entry.shape != shape:
        found = "the model has no such tensor" if entry is None else f"in the model that is {list(entry.shape)}"
        raise CheckpointError(f"the adapter changes {name} by a matrix of {list(shape)}; {found}: give its own model")


def _dtype(reader: Reader) -> torch.dtype:
    """The type of what is merged: the configuration's, else that of the parameters that are not quantized."""
    named = reader.config.get("dtype") or reader.config.get("torch_dtype")
    found = getattr(torch, str(named), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    kept = [entry.format.dtype for entry in reader.entries.values() if isinstance(entry.format, Float)]
    return next((dtype for dtype in kept if dtype.is_floating_point), torch.bfloat16)


def links(source: Path, folder: Path) -> None:
    """A folder that looks like `source` and holds none of its bytes."""
    folder.mkdir(parents=True)
    for each in source.iterdir():
        (folder / each.name).symlink_to(each.resolve())
