"""bitnet: ternary matrices as the BitNet layers of transformers load them (integrations/bitnet.py there).

A linear layer `M` with weight [N, K], ternary with one scale s for all of it, becomes

    M.weight        uint8 [N/4, K]    code + 1 of rows r, r + N/4, r + 2N/4, r + 3N/4 at bits 0, 2, 4, 6 of row r
    M.weight_scale  float32 [1]       s

and config.json names the layer and what stays in floating point:

    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                            "quantization_mode": "offline", "modules_to_not_convert": [...]}

Both of transformers' layers round what they read to INT8, one scale a token (`int8-token`), and nothing can switch that
off. So every quantized entry says so, and fewbits measures and trains the same. With q = round(127 · x / max|x|), which
is clamped to −128 … 127, and the codes T:

    autobitlinear    y = (q / (127 / max|x|) · Tᵀ + bias) · weight_scale      weight_scale = s
    bitlinear        y = q · Tᵀ / (127 / max|x| · weight_scale) + bias        weight_scale = 1 / s

The first rounds in float32, keeps T in the model's type once it is loaded, and is what we write: its scale is ours to
the bit, while few float32 numbers are the inverse of another. It multiplies the bias by the scale as well, so a layer
with a bias stays in floating point. The second keeps T packed and rounds in the model's type; files with it are read.
Both hold the scale in the model's type: only a float32 model computes with exactly these weights. Both take max|x| as
at least 1e-5, and divide where we multiply, so an input within 1e-7 of a tie may have the neighbouring code.

Refused besides: N that 4 does not divide (the layer has N // 4 rows), embeddings and the projection to the vocabulary
(which transformers' own BitNet models keep), and experts (which transformers fuses, and no BitNet layer holds).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, Located, read_json
from fewbits.checkpoint._quantized_folder import QuantizedFolder
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import EMBEDDING, EXPERT, WEIGHT, activation_trouble
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Reader, Writer, row_slabs
from fewbits.checkpoint.huggingface import quantization_of, require_admitted, rows_by_the_library
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, ArraySpec, Float, QTensor, Ternary, format_named

METHOD = "bitnet"
PER_BYTE = 4  # codes of a byte, from rows a quarter of the matrix apart
SCALE = "_scale"  # M.weight_scale
FORMAT = format_named("ternary-tensor")
INPUTS = ACTIVATIONS["int8-token"]
MULTIPLIES, DIVIDES = "autobitlinear", "bitlinear"  # by its scale; what a configuration without a class means
OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder")
"""Names of output projections: a tied one has no entry, yet is a Linear that must not be converted."""
STORED = (torch.float32, torch.float16, torch.bfloat16)


class BitNet(QuantizedFolder):
    """Holds ternary matrices with one scale each, whose layers round their inputs to INT8."""

    name = method = METHOD
    summary = "safetensors folder of ternary matrices: transformers' BitNet layers"
    decoder = "transformers"
    inputs = INPUTS

    def open(self, path: Path) -> Reader:
        return BitNetReader(path)

    def trouble(self, entry: Entry) -> str | None:
        return _format_trouble(entry) or _name_trouble(entry) or activation_trouble(entry)

    def admits_beside(self, entry: Entry, names: Collection[str]) -> str | None:
        bias = entry.name.removesuffix(WEIGHT) + ".bias"
        if isinstance(entry.format, Float) or bias not in names:
            return self.admits(entry)
        return self.admits(entry) or (
            f"{entry.name}: transformers' BitNet layer multiplies its bias by the weight's scale, so a layer with a "
            "bias stays in floating point; write fewbits instead to quantize it"
        )

    def file_bytes(self, format: Any, shape: tuple[int, ...]) -> int:
        if isinstance(format, Float):
            return super().file_bytes(format, shape)
        return sum(spec.nbytes for spec in _arrays("", shape).values())

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        return BitNetWriter(path, entries, source, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        """Codes as transformers unpacks them, times the scale."""
        divides = _linear_class(path, quantization_of(read_json(path / CONFIG))) == DIVIDES
        folder = ArrayFolder(path)
        for name, array in folder.arrays.items():
            if _is_packed(folder, name):
                scale = next(rows_by_the_library(folder.located(name + SCALE).file, name + SCALE))[2]
                yield from _unpacked_by_the_library(array.file, name, 1 / scale if divides else scale)
            elif not _is_scale(folder, name):
                yield from rows_by_the_library(array.file, name)


class BitNetReader(Reader):
    """Entries named as before, ternary ones with their inputs rounded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        quantization = quantization_of(self.config)
        self.config.pop("quantization_config", None)
        self._divides = _linear_class(path, quantization) == DIVIDES
        self._folder = ArrayFolder(path)
        self.entries = {
            name: self._packed(name) if _is_packed(self._folder, name) else Entry(name, array.shape, Float(array.dtype))
            for name, array in self._folder.arrays.items()
            if not _is_scale(self._folder, name)
        }

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self._folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        if rows is not None:
            raise CheckpointError(f"{self.path}: '{name}' is {entry.format}, whose rows share a scale; read it whole")
        packed = self._folder.read(name)
        if bool((packed & packed >> 1 & 0x55).any()):
            raise CheckpointError(
                f"{self.path}: '{name}' holds the code 3, and ternary has 0, 1 and 2; the file is damaged"
            )
        return QTensor(entry.format, unpack(packed), {"scale": self._scale(name).reshape(1, 1)})

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries.get(name)
        names = [name] if entry is None or isinstance(entry.format, Float) else [name, name + SCALE]
        return {array: self._folder.located(array).sha256() for array in names}

    def _packed(self, name: str) -> Entry:
        stored, scale = self._folder.located(name), self._folder.located(name + SCALE)
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise CheckpointError(f"{stored.file}: '{name}' is uint8 {list(stored.shape)}, must be a matrix [N/4, K]")
        _require_scale(scale, name + SCALE)
        bias = name.removesuffix(WEIGHT) + ".bias"
        if not self._divides and bias in self._folder.arrays:
            raise CheckpointError(
                f"{self.path}: '{bias}' is multiplied by the weight's scale in transformers' autobitlinear, which "
                "fewbits does not do; start from the floating-point original"
            )
        entry = Entry(name, (PER_BYTE * stored.shape[0], stored.shape[1]), FORMAT, INPUTS)
        trouble = activation_trouble(entry)
        if trouble is not None:
            raise CheckpointError(f"{self.path}: '{name}' is packed, but {trouble}")
        return entry

    def _scale(self, name: str) -> Tensor:
        scale = self._folder.read(name + SCALE).float()
        scale = 1 / scale if self._divides else scale
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"{self.path}: '{name}{SCALE}' makes weights that are not finite; it is damaged")
        return scale


class BitNetWriter(FolderWriter):
    """Packs ternary entries, writes everything else as it is."""

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        if isinstance(entry.format, Float):
            return {entry.name: entry.format.arrays(entry.shape)["weight"]}
        return _arrays(entry.name, entry.shape)

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        if isinstance(entry.format, Float):
            return {entry.name: part.codes}
        return {entry.name: pack(part.codes), entry.name + SCALE: part.params["scale"].float().reshape(1)}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        matrices = [e for e in self._entries if len(e.shape) == 2 and e.name.endswith(WEIGHT)]
        modules = {e.name.removesuffix(WEIGHT): isinstance(e.format, Float) for e in matrices}
        kept = [name for name, floating in modules.items() if floating and not EXPERT.search(f"{name}.")]
        ternary = [name for name, floating in modules.items() if not floating]
        plain = super().config(config)
        if not ternary:
            return plain
        return plain | {
            "quantization_config": {
                "quant_method": METHOD,
                "linear_class": MULTIPLIES,
                "quantization_mode": "offline",
                "modules_to_not_convert": patterns(dict.fromkeys((*kept, *OUTPUTS)), ternary),
            }
        }


def pack(codes: Tensor) -> Tensor:
    """Codes −1, 0, 1 (int8 [N, K]) as uint8 [N/4, K]."""
    quarters = (codes + 1).to(torch.uint8).unflatten(0, (PER_BYTE, -1)).unbind()
    packed: Tensor = quarters[0].clone()
    for number, quarter in enumerate(quarters[1:], 1):
        packed |= quarter << 2 * number
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([(packed >> 2 * number & 3).to(torch.int8) - 1 for number in range(PER_BYTE)])


def patterns(kept: Collection[str], converted: Collection[str]) -> list[str]:
    """What modules_to_not_convert has for the modules `kept`: the shortest ends of names that mean none `converted`.

    transformers takes each for the end of a name or for a regular expression of its beginning, and tries all of them on
    every module, so a few short ones load faster than one for each module.
    """
    return list(dict.fromkeys(_pattern(name, converted) for name in kept))


def _pattern(name: str, converted: Collection[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[first:]) for first in reversed(range(len(parts))))
    alone = (end for end in ends if not any(other.endswith(end) or re.match(end, other) for other in converted))
    return next(alone, f"{re.escape(name)}$")


def _arrays(name: str, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
    rows, columns = shape
    return {
        name: ArraySpec(torch.uint8, (rows // PER_BYTE, columns)),
        name + SCALE: ArraySpec(torch.float32, (1,)),
    }


def _format_trouble(entry: Entry) -> str | None:
    if entry.format != FORMAT:
        wanted = f"{FORMAT}, with one scale a matrix"
        other = "has more scales" if isinstance(entry.format, Ternary) else "is another format"
        return f"a bitnet folder holds {wanted}; {entry.format} {other}, so choose {FORMAT}, or write fewbits instead"
    if entry.inputs != INPUTS:
        found = "left as they are" if entry.inputs is None else f"rounded to {entry.inputs}"
        return (
            f"transformers' BitNet layers round their inputs to {INPUTS}, so they cannot be {found}; leave --inputs "
            "out, or write fewbits instead"
        )
    return None


def _name_trouble(entry: Entry) -> str | None:
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT):
        return f"BitNet layers have matrices named '….weight', not {list(entry.shape)}; keep it in floating point"
    module = entry.name.removesuffix(WEIGHT)
    if EMBEDDING.search(entry.name) or module in OUTPUTS:
        return (
            "BitNet models keep embeddings and the projection to the vocabulary in floating point; keep it, or write "
            "fewbits instead"
        )
    if EXPERT.search(entry.name):
        return "transformers fuses experts, which no BitNet layer holds; keep them in floating point, or write fewbits"
    if entry.shape[0] % PER_BYTE:
        return (
            f"{entry.shape[0]} rows are no multiple of {PER_BYTE}, and a byte holds one of each quarter; keep it in "
            "floating point, or write fewbits instead"
        )
    return None


def _linear_class(path: Path, quantization: Mapping[str, Any]) -> str:
    """Which of the two layers; raises CheckpointError for what is computed otherwise than either."""
    found = quantization.get("linear_class", DIVIDES)
    if found not in (MULTIPLIES, DIVIDES):
        raise CheckpointError(f"{path / CONFIG}: linear_class is {found!r}, must be {MULTIPLIES} or {DIVIDES}")
    if quantization.get("quantization_mode", "offline") != "offline":
        raise CheckpointError(
            f"{path}: its weights are in floating point and rounded at every use (quantization_mode "
            f"{quantization['quantization_mode']!r}); remove quantization_config from config.json to quantize them"
        )
    if quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{path}: each of its layers has a norm of its own in front (use_rms_norm), which fewbits does not run; "
            "start from the floating-point original"
        )
    return str(found)


def _is_packed(folder: ArrayFolder, name: str) -> bool:
    found = folder.arrays[name]
    return name.endswith(WEIGHT) and found.dtype == torch.uint8 and name + SCALE in folder.arrays


def _is_scale(folder: ArrayFolder, name: str) -> bool:
    weight = name.removesuffix(SCALE)
    return name.endswith(WEIGHT + SCALE) and weight in folder.arrays and _is_packed(folder, weight)


def _require_scale(found: Located, name: str) -> None:
    if found.shape not in ((), (1,)) or found.dtype not in STORED:
        raise CheckpointError(
            f"{found.file}: '{name}' is {found.dtype} {list(found.shape)}, must be one floating-point number; the file "
            "is damaged or of another version"
        )


def _unpacked_by_the_library(file: Path, name: str, scale: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """A matrix from the first row to the last. A byte holds four rows far apart, so each is unpacked four times."""
    try:
        from transformers.integrations.bitnet import unpack_weights
    except ImportError as error:
        raise UnsupportedError(f"transformers cannot unpack BitNet weights here: {error}") from error
    with safe_open(file, "pt") as opened:
        rows, columns = opened.get_slice(name).get_shape()
    for quarter in range(PER_BYTE):
        for slab in row_slabs((rows, columns), FOREIGN_PART // PER_BYTE):
            with safe_open(file, "pt") as opened:  # anew for each, as its mapping keeps every page it has shown
                packed = opened.get_slice(name)[slab.start : slab.stop]
            with torch.compiler.set_stance("force_eager"):  # it is compiled otherwise, for each shape
                numbers = unpack_weights(packed, torch.float32)
            part = numbers[quarter * len(slab) : (quarter + 1) * len(slab)] * scale
            yield name, quarter * rows + slab.start, part
