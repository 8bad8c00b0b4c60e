"""A checkpoint seen in a rotated basis: a reader in front of a reader.

The rotated model is written nowhere. Whoever reads a parameter gets it rotated, a slab of rows at a time where a row
depends on that row alone; what writes the hidden states needs all of its rows for each one, so such a matrix is rotated
whole and kept until its last row has been read.

Entries keep the source's type, in which parameters that stay in floating point are written; `read` gives float32,
which quantized ones start from.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from fewbits.checkpoint import Entry, Reader
from fewbits.errors import CheckpointError
from fewbits.formats import Float, QTensor
from fewbits.methods.rotate import Rotate, changes
from fewbits.models import EMBEDDING, OUTPUT, describe, head_size, residual

FP32 = Float(torch.float32)


class RotatedReader(Reader):
    """The checkpoint behind `reader`, rotated. Raises UnsupportedError where the architecture has no rotated twin."""

    def __init__(self, reader: Reader, rotate: Rotate) -> None:
        self.path = reader.path
        self._source = reader
        shapes = {name: entry.shape for name, entry in reader.entries.items()}
        embedding = _embedding(reader)
        tied = describe(reader.config, shapes).tied
        self._copies = {OUTPUT: embedding} if OUTPUT in tied else {}
        self.config = reader.config | {"tie_word_embeddings": False}
        self.entries = dict(reader.entries) | {
            copy: Entry(copy, shapes[original], reader.entries[original].format)
            for copy, original in self._copies.items()
        }
        self._flows = residual(reader.config, {name: entry.shape for name, entry in self.entries.items()})
        hidden = shapes[embedding][1]
        self._rotations = rotate.rotations(hidden, head_size(reader.config, hidden))
        self._whole: dict[str, Tensor] = {}
        self._lock = Lock()

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        flow = self._flows[name]
        if not changes(flow):
            return self._source.read(name, rows)
        experts = len(self.entries[name].shape) == 3  # each is a matrix of its own
        if rows is None or experts or not self._rotations.whole(flow):
            return QTensor(FP32, self._rotated(name, rows), {})
        return QTensor(FP32, self._from_whole(name, rows), {})

    def rewritten(self, name: str) -> bool:
        """Whether a parameter is another one than in the source."""
        return changes(self._flows[name])

    def digests(self, name: str) -> dict[str, str]:
        return self._source.digests(self._copies.get(name, name))

    def _rotated(self, name: str, rows: slice | None) -> Tensor:
        flow = self._flows[name]
        w = self._source.read(self._copies.get(name, name), rows).codes
        gamma = None if flow.norm is None else self._source.read(flow.norm).codes
        return self._rotations.rotated(w, flow, gamma)

    def _from_whole(self, name: str, rows: slice) -> Tensor:
        """Rows of a parameter that has to be rotated whole; it is dropped once its last row is read."""
        start, stop, _ = rows.indices(self.entries[name].shape[0])
        with self._lock:
            whole = self._whole.pop(name, None)
        whole = self._rotated(name, None) if whole is None else whole
        if stop < len(whole):
            with self._lock:
                self._whole[name] = whole
        return whole[start:stop]


def _embedding(reader: Reader) -> str:
    for name in reader.entries:
        if name.endswith(EMBEDDING):
            return name
    raise CheckpointError(f"{reader.path}: no {EMBEDDING} in its files, so hidden states cannot be rotated")
