"""Our own kind: a safetensors folder that holds any format as it packs itself.

An entry `x` in a format with arrays a and b becomes the arrays `x.a` and `x.b`. Which format and shape an entry has
stands in the metadata of the file that holds it, under the key `fewbits`, so a file explains itself:

    {"entries": {"model.layers.0.mlp.up_proj.weight": {"format": "int4-g128", "shape": [8192, 2048]},
                 "model.norm.weight": {"dtype": "BF16", "shape": [2048]}, …}}

and `"inputs": "int8-token"` where a layer's inputs are rounded too (`activations`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, DTYPES, NAMES, ArrayFolder, first_metadata, read_json
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import activation_trouble
from fewbits.checkpoint.base import Entry, Kind, Reader, Writer
from fewbits.checkpoint.huggingface import float_trouble, require_admitted
from fewbits.errors import CheckpointError, FormatError
from fewbits.formats import ActivationFormat, ArraySpec, Float, Format, QTensor, activation_named, format_named

KEY = "fewbits"
METHOD = "fewbits"  # quantization_config.quant_method, so that other programs say what they cannot load


class Fewbits(Kind):
    """Holds every registered format, bit for bit; loaded by fewbits."""

    name = "fewbits"
    summary = "safetensors folder of any format, as it is: fewbits"

    def detect(self, path: Path) -> bool:
        return KEY in first_metadata(path)

    def open(self, path: Path) -> Reader:
        return FewbitsReader(path)

    def admits(self, entry: Entry) -> str | None:
        trouble = activation_trouble(entry)
        if trouble is not None:
            return f"{entry.name}: {trouble}"
        if isinstance(entry.format, Float):
            return float_trouble(entry)
        try:
            entry.format.check(entry.shape)
            known = format_named(entry.format.name)
        except FormatError as error:
            return f"{entry.name}: {error}"
        if known.arrays(entry.shape) != entry.format.arrays(entry.shape):
            return f"{entry.name}: {entry.format!r} is not the format that the name {entry.format.name} stands for"
        return None

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        return FewbitsWriter(path, entries, source, config)


class FewbitsReader(Reader):
    """Entries as the files' metadata declare them, each checked against the arrays that are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.config.pop("quantization_config", None)
        self._folder = ArrayFolder(path)
        self.entries = {
            entry.name: entry
            for metadata in self._folder.metadata
            for entry in _declared(path, metadata.get(KEY, "{}"))
        }
        for entry in self.entries.values():
            self._require_arrays(entry)

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self._entry(name)
        if rows is not None and not entry.format.rowwise:
            raise CheckpointError(f"{self.path}: '{name}' is {entry.format}, whose rows share params; read it whole")
        arrays = {array: self._folder.read(f"{name}.{array}", rows) for array in entry.format.arrays(entry.shape)}
        shape = entry.shape if rows is None else (len(range(entry.shape[0])[rows]), *entry.shape[1:])
        return QTensor.from_arrays(entry.format, arrays, shape)

    def digests(self, name: str) -> dict[str, str]:
        entry = self._entry(name)
        names = [f"{name}.{array}" for array in entry.format.arrays(entry.shape)]
        return {array: self._folder.located(array).sha256() for array in names}

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: no entry '{name}' among the {len(self.entries)} of this checkpoint")
        return self.entries[name]

    def _require_arrays(self, entry: Entry) -> None:
        for array, spec in entry.format.arrays(entry.shape).items():
            found = self._folder.located(f"{entry.name}.{array}")
            if (found.dtype, found.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(
                    f"{found.file}: array '{entry.name}.{array}' is {found.dtype} {list(found.shape)}, but "
                    f"{entry.format} {list(entry.shape)} has {spec.dtype} {list(spec.shape)}; the file is damaged"
                )


class FewbitsWriter(FolderWriter):
    """Arrays as the format packs them."""

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        return {f"{entry.name}.{array}": spec for array, spec in entry.format.arrays(entry.shape).items()}

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        return {f"{entry.name}.{array}": data for array, data in part.pack().items()}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().config(config) | {"quantization_config": {"quant_method": METHOD}}

    def metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        declared = {entry.name: _declaration(entry) for entry in entries}
        return super().metadata(entries) | {KEY: json.dumps({"entries": declared}, ensure_ascii=False)}


def _declaration(entry: Entry) -> dict[str, Any]:
    """What a file says of an entry. Floats go by their type, because `int8` is also the name of a format."""
    known = entry.format
    format = {"dtype": NAMES[known.dtype]} if isinstance(known, Float) else {"format": known.name}
    inputs = {} if entry.inputs is None else {"inputs": entry.inputs.name}
    return {**format, "shape": list(entry.shape), **inputs}


def _declared(path: Path, manifest: str) -> list[Entry]:
    try:
        entries = json.loads(manifest)["entries"]
        return [Entry(name, tuple(facts["shape"]), _format(facts), _inputs(facts)) for name, facts in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
        raise CheckpointError(f"{path}: the list of entries in a file's metadata is damaged ({error!r})") from error


def _format(facts: Mapping[str, Any]) -> Format:
    return Float(DTYPES[facts["dtype"]]) if "dtype" in facts else format_named(facts["format"])


def _inputs(facts: Mapping[str, Any]) -> ActivationFormat | None:
    return activation_named(facts["inputs"]) if "inputs" in facts else None
