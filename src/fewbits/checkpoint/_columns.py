"""What GPTQ's and AWQ's files have in common: a linear layer as three arrays that lie by input, not by output.

A module M with weight [N, K] has no `M.weight` but `M.qweight`, `M.qzeros` and `M.scales` (and `M.g_idx`), whose rows
are inputs or groups of them and whose columns are outputs. Rows of the weight are columns of the file, so reading some
of them goes over the whole array, of which only the pages with those columns are touched. And the arrays can only be
written when the last row is known: until then a writer holds the rows packed.

A `Layout` is one weight in such arrays. Its kind makes it, from the configuration where it reads and from the format
where it writes; reader and writer are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import EMBEDDING, WEIGHT, activation_trouble
from fewbits.checkpoint.base import Entry, Reader
from fewbits.checkpoint.huggingface import float_trouble
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Affine, Arrays, ArraySpec, Float, Format, QTensor
from fewbits.formats._bits import words

Read: TypeAlias = Callable[[str], Tensor]
PACKED = ".qweight"
SCALES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 32  # codes that fill whole words at any width


@dataclass(frozen=True)
class Layout(ABC):
    """One weight [N, K]; names of arrays are local to its module. scales: their type. where: what errors call it."""

    name: str
    format: Format
    shape: tuple[int, int]
    scales: torch.dtype
    where: str

    @abstractmethod
    def arrays(self) -> dict[str, ArraySpec]:
        """dtype and shape of every array."""

    @abstractmethod
    def decode(self, read: Read, rows: range) -> QTensor:
        """Rows of the weight; `read` gives an array. Raises CheckpointError for what the format cannot hold."""

    @abstractmethod
    def encode(self, whole: Arrays) -> dict[str, Tensor]:
        """The arrays, from those that the format packs. Raises UnsupportedError for numbers that they cannot hold."""


class ColumnReader(Reader):
    """`M.weight` for each module with packed columns, everything else as it is.

    layout: what a module is stored as, from its name and the folder. Raises CheckpointError where the two disagree.
    """

    def __init__(self, path: Path, config: dict[str, Any], layout: Callable[[str, ArrayFolder], Layout]) -> None:
        self.path = path
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self._folder = ArrayFolder(path)
        self._layouts: dict[str, Layout] = {}
        self.entries = {}
        modules = {name.removesuffix(PACKED) for name in self._folder.arrays if name.endswith(PACKED)}
        if not modules:
            raise CheckpointError(
                f"{path}: {CONFIG} says that it is quantized, but no tensor is named '….qweight'; remove "
                "quantization_config if it is in floating point, else download it again"
            )
        of_layouts: set[str] = set()
        for module in sorted(modules):
            found = self._checked(layout(module, self._folder))
            self._layouts[found.name] = found
            self.entries[found.name] = Entry(found.name, found.shape, found.format)
            of_layouts |= named(found.name, found.arrays()).keys()
        for name, array in self._folder.arrays.items():
            if name in self.entries:
                raise CheckpointError(f"{array.file}: '{name}' is there beside its quantized form; remove one of them")
            if name not in of_layouts:
                self.entries[name] = Entry(name, array.shape, Float(array.dtype))

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        layout = self._layouts.get(name)
        if layout is None:
            array = self._folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        if rows is not None and not layout.format.rowwise:
            raise CheckpointError(f"{self.path}: '{name}' is {layout.format}, whose rows share params; read it whole")
        span = range(layout.shape[0])[rows] if rows is not None else range(layout.shape[0])
        if span.step != 1:
            raise CheckpointError(f"{self.path}: rows {rows} of '{name}' are not a run; read slice(start, stop)")
        return layout.decode(lambda array: self._folder.read(local(name, array)), span)

    def digests(self, name: str) -> dict[str, str]:
        layout = self._layouts.get(name)
        names = [name] if layout is None else list(named(name, layout.arrays()))
        return {array: self._folder.located(array).sha256() for array in names}

    def _checked(self, layout: Layout) -> Layout:
        for name, spec in named(layout.name, layout.arrays()).items():
            found = self._folder.located(name)
            if (found.dtype, found.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(
                    f"{found.file}: '{name}' is {found.dtype} {list(found.shape)}, but {layout.format} "
                    f"{list(layout.shape)}, as {CONFIG} describes it, needs {spec.dtype} {list(spec.shape)}; the file "
                    "is damaged or belongs to another configuration"
                )
        return layout


class ColumnWriter(FolderWriter):
    """Packs rows as they come and turns them into a layout's arrays with the last.

    quantization: what config.json gets as its `quantization_config`; None where nothing is quantized.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[Entry],
        source: Path,
        config: Mapping[str, Any],
        layouts: Mapping[str, Layout],
        quantization: dict[str, Any] | None,
    ) -> None:
        self._layouts = layouts
        self._quantization = quantization
        self._parts: dict[str, list[Arrays]] = defaultdict(list)
        super().__init__(path, entries, source, config)

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        layout = self._layouts.get(entry.name)
        if layout is None:
            return {entry.name: entry.format.arrays(entry.shape)["weight"]}
        return named(entry.name, layout.arrays())

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        layout = self._layouts.get(entry.name)
        if layout is None:
            return {entry.name: part.codes}
        self._parts[entry.name].append(part.pack())
        if not last:
            return {}
        parts = self._parts.pop(entry.name)
        return named(entry.name, layout.encode({key: torch.cat([part[key] for part in parts]) for key in parts[0]}))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        plain = super().config(config)
        return plain if self._quantization is None else plain | {"quantization_config": self._quantization}


def matrices(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Module -> entry, of all linear layers as far as names and shapes tell."""
    linear = (e for e in entries if len(e.shape) == 2 and e.name.endswith(WEIGHT) and not EMBEDDING.search(e.name))
    return {entry.name.removesuffix(WEIGHT): entry for entry in linear}


def common_trouble(kind: str, entry: Entry) -> str | None:
    """Why none of these kinds holds an entry, whatever its format; for a Float entry, all there is to say."""
    if entry.inputs is not None:
        trouble = activation_trouble(entry) or (
            f"a {kind} folder cannot say that inputs are rounded to {entry.inputs}; write compressed-tensors or fewbits"
        )
        return f"{entry.name}: {trouble}"
    if isinstance(entry.format, Float):
        return float_trouble(entry)
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT) or EMBEDDING.search(entry.name):
        return (
            f"{entry.name}: {kind} quantizes linear layers, whose weight is a matrix named '….weight', not "
            f"{list(entry.shape)} of this name; keep it in floating point, or write gguf or fewbits instead"
        )
    return None


def words_trouble(kind: str, entry: Entry, bits: int) -> str | None:
    """Why the codes do not fill whole words of 32 bits both ways, which engines take for granted, if they do not."""
    for what, size in zip(("out_features", "in_features"), entry.shape, strict=True):
        if size * bits % 32:
            return (
                f"{entry.name}: {what} {size} times {bits} bits is no multiple of 32, and {kind} fills whole words; "
                "keep it in floating point, or write compressed-tensors or fewbits instead"
            )
    return None


def group_trouble(kind: str, entry: Entry, format: Affine) -> str | None:
    """Why a weight's groups cannot be written, if they cannot."""
    if format.group == "tensor":
        return f"{entry.name}: {kind} has a scale for each row and group, not one a matrix; choose a format with groups"
    if isinstance(format.group, int) and entry.shape[1] % format.group:
        return (
            f"{entry.name}: in_features {entry.shape[1]} is no multiple of {format}'s group of {format.group}, which "
            f"{kind} engines require; choose a group size that divides it"
        )
    return None


def finite(where: str, scale: Tensor) -> Tensor:
    """The scale; raises CheckpointError unless all of it is finite."""
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"'{where}' holds scales that are not finite; the file is damaged, so download it again")
    return scale


def narrowed(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as its bytes; raises UnsupportedError where it is that of rows, in float32, and does not fit."""
    trouble = narrow_trouble(name, scale, dtype)
    if trouble is not None:
        raise UnsupportedError(trouble)
    return scale.to(dtype)


def narrow_trouble(name: str, scale: Tensor, dtype: torch.dtype) -> str | None:
    """Why a scale does not fit its bytes, if it does not."""
    if torch.equal(scale.to(dtype).float(), scale.float()):
        return None
    return (
        f"{name}: its scales, one a row, are no {str(dtype).removeprefix('torch.')} numbers, which these files "
        "hold; choose a format with groups (such as -g128), or write compressed-tensors or fewbits instead"
    )


def zeros_span(rows: range, bits: int) -> tuple[slice, int]:
    """The words, along the outputs, that hold the codes of these rows, and how many codes to skip at their start."""
    first = rows.start // BLOCK
    return slice(first * bits, words(rows.stop, bits)), rows.start - first * BLOCK


def turned(matrix: Tensor) -> Tensor:
    """The transpose in memory order, a copy. (`contiguous` leaves a single row's strides as they are, and then it
    cannot be viewed as words.)
    """
    return matrix.T.clone(memory_format=torch.contiguous_format)


def matrix_shape(folder: ArrayFolder, name: str) -> tuple[int, int]:
    """Shape of an array that must be a matrix."""
    found = folder.located(name)
    if len(found.shape) != 2 or 0 in found.shape:
        raise CheckpointError(f"{found.file}: '{name}' is {list(found.shape)}, must be a matrix; the file is damaged")
    return found.shape[0], found.shape[1]


def integers(bits: int, group: int, shape: tuple[int, int], scales: torch.dtype, *, symmetric: bool) -> Affine:
    """The format of codes in groups of so many columns; −1, or more than there are, makes a format per row."""
    if not 0 < group <= shape[1]:
        return Affine(bits=bits, symmetric=symmetric)
    return Affine(bits=bits, symmetric=symmetric, group=group, group_scale=scales)


def scale_dtype(folder: ArrayFolder, name: str) -> torch.dtype:
    found = folder.located(name)
    if found.dtype not in SCALES:
        raise CheckpointError(f"{found.file}: '{name}' is {found.dtype}, must be floating point; the file is damaged")
    return found.dtype


def read_quantization(path: Path, beside: str, method: str) -> dict[str, Any]:
    """`quantization_config` of config.json, or the file of this method that had its place before; else empty."""
    found = read_json(path / CONFIG).get("quantization_config")
    if found is None and (path / beside).is_file():
        return {"quant_method": method, **read_json(path / beside)}
    return found if isinstance(found, dict) else {}


def require_linear(path: Path, module: str) -> None:
    """Raise CheckpointError for a quantized embedding, which is laid out the other way round."""
    if EMBEDDING.search(module + WEIGHT):
        raise CheckpointError(
            f"{path}: '{module}' is a quantized embedding, which fewbits does not read from this kind of file; start "
            "from the floating-point original"
        )


def named(entry: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {local(entry, array): value for array, value in arrays.items()}


def local(entry: str, array: str) -> str:
    """`M.weight` and `qzeros` make `M.qzeros`."""
    return entry.removesuffix("weight") + array
