"""mxfp4: gpt-oss as OpenAI published it and transformers loads it (integrations/mxfp4.py there).

The experts of a layer are in two parameters, and each such parameter `P` [E, K, N] becomes

    P_blocks  uint8 [E, N, K/32, 16]   two codes of E2M1 a byte, the first in the low nibble
    P_scales  uint8 [E, N, K/32]       E8M0: w = v · 2^(scale − 127)

    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", …]}

All else is in BF16. The file has every expert [out_features, in_features] while the model has it the other way round,
so entries are `mxfp4-turned`, in the model's shape. The scale 255 is E8M0's NaN and refused. Read only: what writes
such folders is a training run in MXFP4; fewbits writes MXFP4 as compressed-tensors and GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._quantized_folder import ReadFolder
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Reader, row_slabs
from fewbits.checkpoint.huggingface import rows_by_the_library
from fewbits.errors import CheckpointError
from fewbits.formats import Float, QTensor
from fewbits.formats.minifloat import MxFp4
from fewbits.formats.turned import Turned

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP, BYTES = 32, 16
NAN = 255
FORMAT = Turned(MxFp4())


class Mxfp4(ReadFolder):
    """Experts in MXFP4; not written."""

    name = method = METHOD
    summary = "safetensors folder of gpt-oss with experts in MXFP4 (read only): transformers and vLLM"
    decoder = "transformers"

    def open(self, path: Path) -> Reader:
        return Mxfp4Reader(path)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        """Numbers as transformers decodes them, in float32."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        reader = Mxfp4Reader(path)
        for name, entry in reader.entries.items():
            if isinstance(entry.format, Float):
                yield from rows_by_the_library(reader.folder.located(name).file, name)
                continue
            for slab in row_slabs(entry.shape, FOREIGN_PART):
                blocks, scales = (reader.folder.read(name + part, slice(slab.start, slab.stop)) for part in _PARTS)
                yield name, slab.start, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


class Mxfp4Reader(Reader):
    """Entries named as transformers names the parameters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.config.pop("quantization_config", None)
        self.folder = ArrayFolder(path)
        self.entries = dict(self._entry(name) for name in self.folder.arrays if not name.endswith(SCALES))
        if all(isinstance(entry.format, Float) for entry in self.entries.values()):
            raise CheckpointError(
                f"{path}: {CONFIG} says {METHOD}, but no tensor is named '…{BLOCKS}'; download all shards, or remove "
                "quantization_config if it is in floating point"
            )
        for name in self.folder.arrays:
            if name.endswith(SCALES):
                self.folder.located(name.removesuffix(SCALES) + BLOCKS)  # raises if it is missing

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self.folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        blocks, scales = (self.folder.read(name + part, rows) for part in _PARTS)
        if bool((scales == NAN).any()):
            raise CheckpointError(f"{self.path}: '{name}{SCALES}' holds {NAN}, which is NaN; the file is damaged")
        arrays = {"packed": blocks.flatten(-2), "scale": scales}
        return QTensor.from_arrays(FORMAT, arrays, (len(blocks), *entry.shape[1:]))

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries.get(name)
        plain = entry is None or isinstance(entry.format, Float)
        return {
            array: self.folder.located(array).sha256() for array in ([name] if plain else [name + p for p in _PARTS])
        }

    def _entry(self, array: str) -> tuple[str, Entry]:
        found = self.folder.located(array)
        if not array.endswith(BLOCKS):
            return array, Entry(array, found.shape, Float(found.dtype))
        name = array.removesuffix(BLOCKS)
        scales = self.folder.located(name + SCALES)
        sound = len(found.shape) == 4 and found.shape[-1] == BYTES and 0 not in found.shape
        if not sound or found.shape[:-1] != scales.shape or {found.dtype, scales.dtype} != {torch.uint8}:
            raise CheckpointError(
                f"{found.file}: '{array}' is {found.dtype} {list(found.shape)} and '{name}{SCALES}' {scales.dtype} "
                f"{list(scales.shape)}, but {METHOD}, as {CONFIG} says, needs uint8 [experts, out_features, groups, "
                f"{BYTES}] and the same without the last; the file is damaged or of another version"
            )
        if name in self.folder.arrays:
            raise CheckpointError(f"{found.file}: '{name}' is there beside '{array}'; remove one of them")
        experts, rows, groups = scales.shape
        return name, Entry(name, (experts, groups * GROUP, rows), FORMAT)


_PARTS = (BLOCKS, SCALES)
