"""Floating-point checkpoints as transformers saves them: safetensors files and config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, NAMES, ArrayFolder, read_json, safetensors_in
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import require_scales
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Kind, Reader, Writer, row_slabs
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ArraySpec, Float, QTensor

OTHERS = "write compressed-tensors or fewbits instead"


class HuggingFace(Kind):
    """Safetensors folders without quantization; every tensor is an entry in the format that is its dtype."""

    name = "huggingface"
    summary = "floating-point safetensors folder: transformers, vLLM and everything else"
    decoder = "safetensors"

    def detect(self, path: Path) -> bool:
        return bool(safetensors_in(path))

    def open(self, path: Path) -> Reader:
        return FloatReader(path)

    def admits(self, entry: Entry) -> str | None:
        if entry.inputs is not None:
            return f"{entry.name}: a {self.name} folder cannot say that inputs are rounded to {entry.inputs}; {OTHERS}"
        if isinstance(entry.format, Float):
            return float_trouble(entry)
        return (
            f"{entry.name}: a {self.name} folder holds floating point only, not {entry.format}; "
            "write compressed-tensors, gguf or fewbits instead"
        )

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        return FloatWriter(path, entries, source, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        for name, array in ArrayFolder(path).arrays.items():
            yield from rows_by_the_library(array.file, name)


def rows_by_the_library(file: Path, name: str) -> Iterator[tuple[str, int, Tensor]]:
    """An array as the library `safetensors` reads it, in float32; see `Kind.foreign`."""
    with safe_open(file, "pt") as opened:
        shape = tuple(opened.get_slice(name).get_shape())
    for rows in row_slabs(shape, FOREIGN_PART):
        with safe_open(file, "pt") as opened:  # anew for each, as its mapping keeps every page it has shown
            part = opened.get_slice(name)[rows.start : rows.stop] if shape else opened.get_tensor(name)
            yield name, rows.start, part.float()


def files_by_array(path: Path) -> dict[str, Path]:
    """Array -> its file, as the library `safetensors` finds them."""
    files: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def array_by_the_library(files: Mapping[str, Path], name: str) -> Tensor:
    """An array whole, as the library reads it."""
    with safe_open(files[name], "pt") as opened:  # anew for each, because a mapping keeps every page it has shown
        found: Tensor = opened.get_tensor(name)
        return found


class FloatReader(Reader):
    """A folder whose arrays are the entries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        quantization = self.config.pop("quantization_config", None)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(
                f"{path}: quantized by {method}, which fewbits does not read; start from the floating-point original"
            )
        self._folder = ArrayFolder(path)
        self.entries = {
            name: Entry(name, array.shape, Float(array.dtype)) for name, array in self._folder.arrays.items()
        }

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        array = self._folder.read(name, rows)
        return QTensor(Float(array.dtype), array, {})

    def digests(self, name: str) -> dict[str, str]:
        return {name: self._folder.located(name).sha256()}


class FloatWriter(FolderWriter):
    """Each entry is one array of the same name."""

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        return {entry.name: entry.format.arrays(entry.shape)["weight"]}

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        return {entry.name: part.codes}


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of quantization; nothing, where that is no object."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def float_trouble(entry: Entry) -> str | None:
    """Why a safetensors file cannot hold this Float entry, if it cannot."""
    dtype = entry.format.arrays(entry.shape)["weight"].dtype
    return None if dtype in NAMES else f"{entry.name}: safetensors has no type for {dtype}; cast it first"


def require_admitted(kind: Kind, entries: Sequence[Entry]) -> None:
    """Raise UnsupportedError with the kind's sentence on the first entry it cannot hold, or if a scale is missing."""
    names = {entry.name for entry in entries}
    for entry in entries:
        trouble = kind.admits_beside(entry, names)
        if trouble is not None:
            raise UnsupportedError(trouble)
    require_scales(entries)
