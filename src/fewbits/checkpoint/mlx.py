"""mlx: folders as mlx-lm writes and loads them, with MLX's affine quantization (mlx.core.quantize).

A linear layer or embedding `M` with weight [N, K] in b bits, groups of g, becomes

    M.weight            uint32 [N, K·b/32]  codes, a dense stream of bits along each row, LSB first
    M.scales, M.biases  [N, K/g]            of the model's type; w = scale · q + bias

(`M.bias` is the layer's own). A header says {"format": "mlx"}, and config.json has the sizes, those of single modules
by their names, the whole of it twice:

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine",
                     "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 6}, …}, "quantization_config": the same

Which modules are quantized is seen from their scales. Read: 2, 3, 4, 5, 6 and 8 bits, groups of 32, 64 and 128. MLX's
floating-point modes (mxfp4, nvfp4, mxfp8) are refused. Numbers are fewbits' own in float32: MLX multiplies in the type
of the scales, and rounds as that does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._quantized_folder import QuantizedFolder
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import EXPERT, WEIGHT
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Reader, Writer, row_slabs
from fewbits.checkpoint.huggingface import require_admitted, rows_by_the_library
from fewbits.errors import CheckpointError, FormatError
from fewbits.formats import ArraySpec, Float, Format, QTensor
from fewbits.formats.offset import GROUPS, Offset

KEY, COPY = "quantization", "quantization_config"
BITS = (2, 3, 4, 5, 6, 8)
AFFINE = "affine"
SCALES, BIASES = ".scales", ".biases"
STORED = (torch.float32, torch.float16, torch.bfloat16)


class Mlx(QuantizedFolder):
    """Holds integers with a scale and an offset per group."""

    name = "mlx"
    summary = "quantized safetensors folder: mlx-lm, LM Studio on Apple's machines"
    decoder = "mlx" if find_spec("mlx") else None

    def recognises(self, path: Path) -> bool:
        return _sizes(read_json(path / CONFIG)) is not None

    def open(self, path: Path) -> Reader:
        return MlxReader(path)

    def trouble(self, entry: Entry) -> str | None:
        return _format_trouble(entry) or _name_trouble(entry)

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        return MlxWriter(path, entries, source, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]] | None:
        """Numbers as MLX dequantizes them, with scales in float32."""
        return _decoded_by_the_library(MlxReader(path)) if find_spec("mlx") else None


class MlxReader(Reader):
    """Entries named as in the folder, quantized where there are scales."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        sizes = _sizes(self.config)
        self.config = {key: value for key, value in self.config.items() if key not in (KEY, COPY)}
        self.folder = ArrayFolder(path)
        quantized = {
            name.removesuffix(SCALES) + WEIGHT: self._quantized(name.removesuffix(SCALES), sizes or {})
            for name in self.folder.arrays
            if name.endswith(SCALES)
        }
        parts = {part for name in quantized for part in _parts(name)}
        self.entries = quantized | {name: self._plain(name) for name in self.folder.arrays if name not in parts}

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self.folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        packed, scale, offset = (self.folder.read(part, rows) for part in _parts(name))
        for part, found in ((SCALES, scale), (BIASES, offset)):
            if not bool(found.isfinite().all()):
                raise CheckpointError(f"{self.path}: '{part[1:]}' of '{name}' are NaN or Inf; the file is damaged")
        arrays = {"packed": packed.view(torch.int32), "scale": scale, "offset": offset}
        return QTensor.from_arrays(entry.format, arrays, (packed.shape[0], *entry.shape[1:]))

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries.get(name)
        parts = [name] if entry is None or isinstance(entry.format, Float) else _parts(name)
        return {array: self.folder.located(array).sha256() for array in parts}

    def _quantized(self, module: str, sizes: Mapping[str, Any]) -> Entry:
        weight, scales, biases = (self.folder.located(part) for part in _parts(module + WEIGHT))
        format = _format(f"{self.path / CONFIG}: '{module}'", sizes, module, scales.dtype)
        where = f"{scales.file}: '{module}{SCALES}' is {scales.dtype} {list(scales.shape)}"
        if scales.dtype not in STORED or len(scales.shape) < 2 or 0 in scales.shape:
            raise CheckpointError(f"{where}, must be floating point, [out_features, groups]; the file is damaged")
        shape = (*scales.shape[:-1], scales.shape[-1] * format.group)
        expected = format.arrays(shape)
        stored = (
            (module + WEIGHT, weight, torch.uint32, expected["packed"].shape),
            (module + BIASES, biases, scales.dtype, expected["offset"].shape),
        )
        for name, found, dtype, needed in stored:
            if (found.dtype, found.shape) != (dtype, needed):
                raise CheckpointError(
                    f"{found.file}: '{name}' is {found.dtype} {list(found.shape)}, but {format.bits} bits in groups of "
                    f"{format.group}, as config.json says, with scales {list(scales.shape)} make {dtype} "
                    f"{list(needed)}; the file is damaged or of another version"
                )
        return Entry(module + WEIGHT, shape, format)

    def _plain(self, name: str) -> Entry:
        array = self.folder.located(name)
        if name.endswith(WEIGHT) and array.dtype == torch.uint32:
            raise CheckpointError(
                f"{array.file}: '{name}' is packed, but '{name.removesuffix(WEIGHT)}{SCALES}' is missing; download all "
                "shards again"
            )
        return Entry(name, array.shape, Float(array.dtype))


class MlxWriter(FolderWriter):
    """Packs quantized entries, writes everything else as it is."""

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        ours = entry.format.arrays(entry.shape)
        if isinstance(entry.format, Float):
            return {entry.name: ours["weight"]}
        packed = ArraySpec(torch.uint32, ours["packed"].shape)
        return dict(zip(_parts(entry.name), (packed, ours["scale"], ours["offset"]), strict=True))

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        if isinstance(entry.format, Float):
            return {entry.name: part.codes}
        ours = part.pack()
        arrays = ours["packed"].view(torch.uint32), ours["scale"], ours["offset"]
        return dict(zip(_parts(entry.name), arrays, strict=True))

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        formats = {e.name.removesuffix(WEIGHT): e.format for e in self._entries if isinstance(e.format, Offset)}
        plain = {key: value for key, value in super().config(config).items() if key != KEY}
        if not formats:
            return plain
        sizes = {module: {"group_size": f.group, "bits": f.bits} for module, f in formats.items()}
        usual = Counter((f.group, f.bits) for f in formats.values()).most_common(1)[0][0]
        whole = {"group_size": usual[0], "bits": usual[1]}
        found = whole | {"mode": AFFINE} | {module: size for module, size in sizes.items() if size != whole}
        return plain | {KEY: found, COPY: found}

    def metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {"format": "mlx"}


def _parts(weight: str) -> tuple[str, str, str]:
    """The arrays of a quantized weight: codes, scales, biases."""
    module = weight.removesuffix(WEIGHT)
    return weight, module + SCALES, module + BIASES


def _sizes(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the configuration says of sizes, if it is MLX's."""
    for key in (KEY, COPY):
        found = config.get(key)
        if isinstance(found, dict) and "quant_method" not in found and {"bits", "group_size"} <= found.keys():
            return found
    return None


def _format(where: str, sizes: Mapping[str, Any], module: str, scale: torch.dtype) -> Offset:
    """The format of a module. Raises CheckpointError for sizes and modes that fewbits does not read."""
    own = sizes.get(module)
    found = {**sizes, **own} if isinstance(own, dict) else sizes
    bits, group, mode = found.get("bits"), found.get("group_size"), found.get("mode", AFFINE)
    if mode != AFFINE:
        raise CheckpointError(
            f"{where} is in MLX's mode {mode!r}, and fewbits reads {AFFINE} only; convert it again with mlx_lm.convert "
            "--q-mode affine"
        )
    if not _is_one_of(bits, BITS) or not _is_one_of(group, GROUPS):
        raise CheckpointError(
            f"{where} has bits {bits!r} and group_size {group!r}, must be one of {', '.join(map(str, BITS))} and one "
            f"of {', '.join(map(str, GROUPS))}"
        )
    return Offset(bits=bits, group=group, group_scale=scale)


def _is_one_of(value: Any, choices: Sequence[int]) -> TypeGuard[int]:
    return type(value) is int and value in choices


def _format_trouble(entry: Entry) -> str | None:
    format: Format = entry.format
    if entry.inputs is not None:
        return f"an mlx folder cannot say that inputs are rounded to {entry.inputs}; leave --inputs out"
    if not isinstance(format, Offset) or format.group not in GROUPS or format.bits not in BITS:
        return (
            f"mlx holds integers with a scale and an offset per group, such as mlx4-g64, not {format}; choose "
            "one of them, or write fewbits instead"
        )
    try:
        format.check(entry.shape)
    except FormatError as error:
        return str(error)
    return None


def _name_trouble(entry: Entry) -> str | None:
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT):
        return f"mlx quantizes matrices named '….weight', not {list(entry.shape)}; keep it in floating point"
    if EXPERT.search(entry.name):
        return "mlx-lm stacks experts under names of its own; keep them in floating point, or write fewbits instead"
    return None


def _decoded_by_the_library(reader: MlxReader) -> Iterator[tuple[str, int, Tensor]]:
    import mlx.core as mx
    import numpy as np

    for name, entry in reader.entries.items():
        if not isinstance(entry.format, Offset):
            yield from rows_by_the_library(reader.folder.located(name).file, name)
            continue
        for slab in row_slabs(entry.shape, FOREIGN_PART):
            packed, scale, offset = (reader.folder.read(part, slice(slab.start, slab.stop)) for part in _parts(name))
            found = mx.dequantize(
                mx.array(packed.numpy()),
                mx.array(scale.float().numpy()),
                mx.array(offset.float().numpy()),
                group_size=entry.format.group,
                bits=entry.format.bits,
            )
            yield name, slab.start, torch.from_numpy(np.array(found))
