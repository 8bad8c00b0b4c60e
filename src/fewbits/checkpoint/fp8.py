"""fp8: fine-grained FP8 as transformers and DeepSeek-V3 have it (integrations/finegrained_fp8.py there).

A linear layer `M` with weight [N, K] becomes

    M.weight            float8_e4m3fn [N, K]
    M.weight_scale_inv  float32 [⌈N/128⌉, ⌈K/128⌉]     one number, [], where weight_block_size is null
                                                        E8M0 (scale_fmt ue8m0) is a power of two in one byte

    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                            "modules_to_not_convert": [...]}

Despite its name the scale multiplies: w = weight · weight_scale_inv. On GPUs the inputs are rounded to FP8 as well, 128
at a time with scales as they come (or by a static activation_scale); elsewhere transformers decodes the weights and
rounds no inputs, and so does fewbits.

Written: `fp8-e4m3-b128`, whose N and K must be multiples of 128, because transformers takes a ragged grid for one of
smaller blocks, or `fp8-e4m3-tensor`, of any shape; one of them, since the configuration has one size for all layers.
Read: any size of block, ragged ones by the sizes that the configuration says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._quantized_folder import QuantizedFolder
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import EMBEDDING, EXPERT, WEIGHT
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Reader, Writer, row_slabs
from fewbits.checkpoint.bitnet import OUTPUTS, patterns
from fewbits.checkpoint.huggingface import quantization_of, require_admitted, rows_by_the_library
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ArraySpec, Float, Format, QTensor
from fewbits.formats.minifloat import Fp8

METHOD = "fp8"
SCALE = "_scale_inv"  # M.weight_scale_inv
INPUT_SCALE = ".activation_scale"
BLOCK = 128
WHOLE, BLOCKS = Fp8(group="tensor"), Fp8(group=BLOCK, rows=BLOCK)
STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)

log = logging.getLogger(__name__)


class FineGrainedFp8(QuantizedFolder):
    """Holds FP8 E4M3 with a scale per block of 128×128."""

    name = method = METHOD
    summary = "safetensors folder of FP8 matrices in blocks: transformers, vLLM, SGLang"
    decoder = "transformers"

    def open(self, path: Path) -> Reader:
        return Fp8Reader(path)

    def trouble(self, entry: Entry) -> str | None:
        return _format_trouble(entry) or _name_trouble(entry)

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        _require_one_size(entries)
        return Fp8Writer(path, entries, source, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        """Numbers as transformers decodes them where there is no GPU, to float32."""
        reader = Fp8Reader(path)
        for name, entry in reader.entries.items():
            if isinstance(entry.format, Fp8):
                yield from _decoded_by_the_library(reader, entry)
            else:
                yield from rows_by_the_library(reader.folder.located(name).file, name)


class Fp8Reader(Reader):
    """Entries named as before, in FP8 where there is a scale."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        quantization = quantization_of(self.config)
        self.config.pop("quantization_config", None)
        self._block = _block(path, quantization)
        self.folder = ArrayFolder(path)
        self.entries = {
            name: self._quantized(name) if name + SCALE in self.folder.arrays else self._plain(name)
            for name in self.folder.arrays
            if not name.endswith((WEIGHT + SCALE, INPUT_SCALE))
        }
        for name in self.folder.arrays:
            if name.endswith(WEIGHT + SCALE):
                self.folder.located(name.removesuffix(SCALE))  # raises if it is missing
        if quantization.get("activation_scheme", "dynamic") != "dynamic":
            log.warning("%s: inputs are rounded to FP8 by static scales, which fewbits does not do here", path)

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self.folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        if rows is not None and not entry.format.rowwise:
            raise CheckpointError(f"{self.path}: '{name}' is {entry.format}, whose rows share params; read it whole")
        codes, scale = self.folder.read(name, rows), self.folder.read(name + SCALE, rows).float()
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"{self.path}: '{name}{SCALE}' holds NaN or Inf; the file is damaged")
        shape = tuple(codes.shape)
        scale = scale.reshape(entry.format.arrays(shape)["scale"].shape)
        return QTensor.from_arrays(entry.format, {"weight": codes, "scale": scale}, shape)

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries.get(name)
        names = [name] if entry is None or isinstance(entry.format, Float) else [name, name + SCALE]
        return {array: self.folder.located(array).sha256() for array in names}

    def _quantized(self, name: str) -> Entry:
        codes, scale = self.folder.located(name), self.folder.located(name + SCALE)
        if codes.dtype != torch.float8_e4m3fn or len(codes.shape) != 2 or 0 in codes.shape:
            raise CheckpointError(
                f"{codes.file}: '{name}' is {codes.dtype} {list(codes.shape)}, but with '{name}{SCALE}' beside it it "
                "must be a matrix of float8_e4m3fn (fewbits reads no experts in FP4 or fused into one tensor here)"
            )
        format = WHOLE if self._block is None else Fp8(group=self._block[1], rows=self._block[0])
        needed = () if self._block is None else format.arrays(codes.shape)["scale"].shape
        shapes = ((), (1,), (1, 1)) if self._block is None else (needed,)
        if scale.shape not in shapes or scale.dtype not in STORED:
            raise CheckpointError(
                f"{scale.file}: '{name}{SCALE}' is {scale.dtype} {list(scale.shape)}, but weight_block_size "
                f"{self._block and list(self._block)} in config.json makes {list(needed)} floating-point numbers of "
                f"{list(codes.shape)}; the file is damaged or of another version"
            )
        return Entry(name, codes.shape, format)

    def _plain(self, name: str) -> Entry:
        array = self.folder.located(name)
        if name.endswith(WEIGHT) and array.dtype == torch.float8_e4m3fn:
            raise CheckpointError(
                f"{array.file}: '{name}' is {array.dtype}, but '{name}{SCALE}' is missing; download all shards again"
            )
        if name.endswith(SCALE):
            raise CheckpointError(
                f"{array.file}: '{name}' is the scale of experts fused into one tensor, which fewbits does not read; "
                "start from the floating-point original"
            )
        return Entry(name, array.shape, Float(array.dtype))


class Fp8Writer(FolderWriter):
    """Writes FP8 entries in blocks, everything else as it is."""

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        if isinstance(entry.format, Float):
            return {entry.name: entry.format.arrays(entry.shape)["weight"]}
        ours = entry.format.arrays(entry.shape)
        scale = ArraySpec(torch.float32, ()) if entry.format == WHOLE else ours["scale"]
        return {entry.name: ours["weight"], entry.name + SCALE: scale}

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        if isinstance(entry.format, Float):
            return {entry.name: part.codes}
        ours = part.pack()
        scale = ours["scale"].reshape(()) if entry.format == WHOLE else ours["scale"]
        return {entry.name: ours["weight"], entry.name + SCALE: scale}

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        matrices = [e for e in self._entries if len(e.shape) == 2 and e.name.endswith(WEIGHT)]
        modules = {e.name.removesuffix(WEIGHT): isinstance(e.format, Float) for e in matrices}
        converted = [name for name, floating in modules.items() if not floating]
        kept = [name for name, floating in modules.items() if floating and not EXPERT.search(f"{name}.")]
        plain = super().config(config)
        if not converted:
            return plain
        skipped = [name for name in dict.fromkeys((*kept, *OUTPUTS)) if name not in converted]
        return plain | {
            "quantization_config": {
                "quant_method": METHOD,
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK] if _formats(self._entries) == {BLOCKS} else None,
                "modules_to_not_convert": patterns(skipped, converted),
            }
        }


def _block(path: Path, quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None for one scale a matrix. Raises CheckpointError for anything else."""
    found = quantization.get("weight_block_size", [BLOCK, BLOCK])
    if found is None:
        return None
    sizes = isinstance(found, list) and len(found) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in found)
    if not sizes:
        raise CheckpointError(f"{path / CONFIG}: weight_block_size is {found!r}, must be [rows, columns] or null")
    return found[0], found[1]


def _formats(entries: Sequence[Entry]) -> set[Format]:
    return {entry.format for entry in entries if not isinstance(entry.format, Float)}


def _require_one_size(entries: Sequence[Entry]) -> None:
    """Raise UnsupportedError for scales of blocks beside scales of matrices."""
    if len(_formats(entries)) > 1:
        raise UnsupportedError(
            f"an fp8 folder has one weight_block_size for all layers, but some are {WHOLE} and some {BLOCKS}; choose "
            "one of them for all, or write compressed-tensors or fewbits instead"
        )


def _format_trouble(entry: Entry) -> str | None:
    if entry.inputs is not None:
        return f"an fp8 folder cannot say that inputs are rounded to {entry.inputs}; leave --inputs out"
    if entry.format not in (WHOLE, BLOCKS):
        return (
            f"an fp8 folder holds {BLOCKS} and {WHOLE}, not {entry.format}; choose one of them, or write "
            "compressed-tensors or fewbits instead"
        )
    return None


def _name_trouble(entry: Entry) -> str | None:
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT) or EMBEDDING.search(entry.name):
        return (
            f"fp8 folders quantize linear layers, whose weight is a matrix named '….weight', not {list(entry.shape)}; "
            "keep it in floating point, or write fewbits instead"
        )
    if entry.format == BLOCKS and any(size % BLOCK for size in entry.shape):
        return (
            f"{list(entry.shape)} is not made of whole blocks of {BLOCK}×{BLOCK}, as transformers needs; keep it in "
            f"floating point, or choose {WHOLE}, or write compressed-tensors or fewbits instead"
        )
    return None


def _decoded_by_the_library(reader: Fp8Reader, entry: Entry) -> Iterator[tuple[str, int, Tensor]]:
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    except ImportError as error:
        raise UnsupportedError(f"transformers cannot decode FP8 weights here: {error}") from error
    assert isinstance(entry.format, Fp8)
    scale = reader.folder.read(entry.name + SCALE)
    blocks = entry.shape[0] if entry.format == WHOLE else entry.format.rows
    for slab in row_slabs(entry.shape, FOREIGN_PART, entry.format.rows):
        codes = reader.folder.read(entry.name, slice(slab.start, slab.stop))
        part = scale if not scale.dim() else scale[slab.start // blocks : -(-slab.stop // blocks)]
        try:
            decoded = Fp8Dequantize(None)._dequantize_one(codes, part, output_dtype=torch.float32)
        except ValueError as error:
            raise UnsupportedError(f"transformers cannot decode '{entry.name}': {error}") from error
        yield entry.name, slab.start, decoded
