"""Small checkpoints for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import Entry, Kind
from fewbits.formats import ActivationFormat, Float, Format, QTensor

CONFIG = {"model_type": "llama", "hidden_size": 8}


def quantized(format: Format, w: Tensor) -> QTensor:
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


def floating(w: Tensor) -> QTensor:
    return QTensor(Float(w.dtype), w, {})


def rows_of(q: QTensor, rows: slice) -> QTensor:
    """Rows of a tensor whose params all have its rows."""
    return QTensor(q.format, q.codes[rows], {key: p[rows] for key, p in q.params.items()})


def entries_of(tensors: Mapping[str, QTensor], inputs: Mapping[str, ActivationFormat] | None = None) -> list[Entry]:
    return [Entry(name, q.shape, q.format, (inputs or {}).get(name)) for name, q in tensors.items()]


def write(
    kind: Kind,
    path: Path,
    tensors: Mapping[str, QTensor],
    *,
    source: Path | None = None,
    config: Mapping[str, Any] = CONFIG,
    rows: int | None = None,
    inputs: Mapping[str, ActivationFormat] | None = None,
) -> dict[str, dict[str, str]]:
    """Write a checkpoint, `rows` rows at a time where the format allows it; the digests.

    inputs: entry -> what its inputs are rounded to.
    """
    with kind.create(path, entries_of(tensors, inputs), source or path.parent, config) as writer:
        for name, q in tensors.items():
            if rows is None or not q.format.rowwise or not q.shape:
                writer.write(name, q)
            else:
                for start in range(0, q.shape[0], rows):
                    writer.write(name, rows_of(q, slice(start, start + rows)))
        writer.commit({"kind": kind.name})
    return writer.digests


def foreign(kind: Kind, path: Path) -> dict[str, Tensor]:
    """All tensors as the kind's independent decoder reads them, their parts put together."""
    parts: dict[str, list[Tensor]] = {}
    for name, first, rows in kind.foreign(path):
        found = parts.setdefault(name, [])
        assert first == sum(len(part) for part in found), f"{name}: rows out of order"
        found.append(rows)
    return {name: torch.cat(found) if found[0].shape else found[0] for name, found in parts.items()}


def raw_file(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header: an object, or the text itself."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def same(a: QTensor, b: QTensor) -> bool:
    """Whether two tensors hold the same codes and numbers, bit for bit."""
    return torch.equal(bits(a.codes), bits(b.codes)) and torch.equal(bits(a.dequantize()), bits(b.dequantize()))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
