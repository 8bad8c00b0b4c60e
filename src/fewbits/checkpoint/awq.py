"""awq: 4-bit integers with zero-points as AutoAWQ's GEMM kernels read them (casper-hansen/AutoAWQ, modules/linear).

A linear layer `M` with weight [N, K] in groups of g columns becomes

    M.qweight  int32 [K, N/8]     codes; a word's nibbles, the lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
    M.qzeros   int32 [K/g, N/8]   zero-points as they are, in the same order
    M.scales   float16 [K/g, N]

with W[n, k] = scales[k // g, n] · (q[k, n] − z[k // g, n]). bfloat16 models have bfloat16 scales, since loaders take
them in the model's type. config.json has one group size for all layers and names those that stay in floating point:

    "quantization_config": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": true,
                            "modules_to_not_convert": [...]}

What AWQ is famous for, scaling columns before rounding, is in the weights in front by then and leaves no trace here.
Its other layouts (gemv, gemv_fast, exllama, marlin) order words in other ways and are refused, as are other widths.
Symmetric integers have a zero-point of 8 and no files of their own, so they are written as gptq or compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import _columns as columns
from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._columns import ColumnReader, ColumnWriter, Layout, Read
from fewbits.checkpoint._gptqmodel import decoded_by_gptqmodel
from fewbits.checkpoint.activations import WEIGHT
from fewbits.checkpoint.base import Entry, Kind, Reader, Writer
from fewbits.checkpoint.huggingface import require_admitted
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Affine, Arrays, ArraySpec, Float, QTensor
from fewbits.formats._bits import pack_bits, unpack_bits

METHOD, LAYOUT = "awq", "gemm"
BESIDE = "quant_config.json"
OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}  # in that file
BITS, PER_WORD = 4, 8
SCALES = (torch.float16, torch.bfloat16)  # of rows what is one of the former
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each nibble
OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder")
"""Names of output projections: a tied one has no entry, yet is a Linear that must not be converted."""


class Awq(Kind):
    """Holds 4-bit integers with zero-points, all with one group size."""

    name = "awq"
    summary = "safetensors folder of 4-bit integers with zero-points: vLLM, AutoAWQ and GPTQModel"
    decoder = "gptqmodel" if find_spec("gptqmodel") else None
    fine_rows = False  # theirs are in 16 bits

    def detect(self, path: Path) -> bool:
        try:
            return _quantization(path).get("quant_method") == METHOD
        except CheckpointError:
            return False

    def open(self, path: Path) -> Reader:
        quantization = _quantization(path)
        group = _group(path, quantization)
        return ColumnReader(path, read_json(path / CONFIG), lambda module, folder: _found(module, folder, group))

    def admits(self, entry: Entry) -> str | None:
        trouble = columns.common_trouble(self.name, entry)
        if trouble or isinstance(entry.format, Float):
            return trouble
        format = entry.format
        held = isinstance(format, Affine) and format.bits == BITS and format.group_scale in SCALES
        if not isinstance(format, Affine) or not held or format.symmetric:
            return (
                f"{entry.name}: an awq folder holds 4-bit integers with zero-points, not {format}; choose "
                "int4-asym-g128 (scales in 16 bits), or write compressed-tensors or fewbits instead"
            )
        if entry.name.removesuffix(WEIGHT) in OUTPUTS:
            return (
                f"{entry.name}: AWQ keeps the projection to the vocabulary in floating point; keep it, or write gptq "
                "or fewbits instead"
            )
        return columns.group_trouble("AWQ", entry, format) or columns.words_trouble("AWQ", entry, BITS)

    def number_trouble(self, entry: Entry, part: QTensor) -> str | None:
        if not isinstance(entry.format, Affine):
            return None
        return columns.narrow_trouble(entry.name, part.params["scale"], entry.format.group_scale)

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        layouts = {e.name: _layout(e) for e in entries if not isinstance(e.format, Float)}
        quantization = quantization_config(layouts, entries) if layouts else None
        return ColumnWriter(path, entries, source, config, layouts, quantization)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        return decoded_by_gptqmodel(path)


@dataclass(frozen=True)
class Words(Layout):
    """One weight."""

    format: Affine

    def arrays(self) -> dict[str, ArraySpec]:
        (rows, inputs), groups = self.shape, self.format.groups(self.shape)[-1]
        return {
            "qweight": ArraySpec(torch.int32, (inputs, rows // PER_WORD)),
            "qzeros": ArraySpec(torch.int32, (groups, rows // PER_WORD)),
            "scales": ArraySpec(self.scales, (groups, rows)),
        }

    def decode(self, read: Read, rows: range) -> QTensor:
        scale = columns.finite(self.where, columns.turned(read("scales")[:, rows.start : rows.stop]).float())
        zero = columns.turned(unpack(read("qzeros"), rows)).float()
        return QTensor(self.format, columns.turned(unpack(read("qweight"), rows)), {"scale": scale, "zero": zero})

    def encode(self, whole: Arrays) -> dict[str, Tensor]:
        scale = columns.narrowed(self.name, whole["scale"], self.scales)
        codes = unpack_bits(whole["packed"], BITS, self.shape[1])
        return {
            "qweight": pack(columns.turned(codes)),
            "qzeros": pack(columns.turned(whole["zero"])),
            "scales": columns.turned(scale),
        }


def pack(codes: Tensor) -> Tensor:
    """Unsigned codes, uint8 [rows, N], as int32 [rows, N/8]."""
    return pack_bits(codes.unflatten(-1, (-1, PER_WORD))[..., torch.tensor(ORDER)].flatten(-2), BITS)


def unpack(stored: Tensor, outputs: range) -> Tensor:
    """Codes, uint8 [rows, outputs], of some columns of the matrix that `pack` packed."""
    first, last = outputs.start // PER_WORD, -(-outputs.stop // PER_WORD)
    nibbles = unpack_bits(stored[:, first:last], BITS, PER_WORD * (last - first))
    natural: Tensor = nibbles.unflatten(-1, (-1, PER_WORD))[..., torch.tensor(ORDER).argsort()].flatten(-2)
    return natural[:, outputs.start - PER_WORD * first :][:, : len(outputs)]


def quantization_config(layouts: Mapping[str, Words], entries: Sequence[Entry]) -> dict[str, Any]:
    """The `quantization_config` of these weights. Raises UnsupportedError where their groups differ."""
    groups = {layout.format.group: name for name, layout in layouts.items()}
    if len(groups) > 1:
        (first, a), (second, b), *_ = groups.items()
        raise UnsupportedError(
            f"an awq folder has one group size, but {a} has {first} and {b} has {second}; choose one that divides "
            "in_features everywhere, or write gptq, compressed-tensors or fewbits instead"
        )
    (group,) = groups
    kept = [module for module, entry in columns.matrices(entries).items() if isinstance(entry.format, Float)]
    return {
        "quant_method": METHOD,
        "version": LAYOUT,
        "bits": BITS,
        "group_size": group if isinstance(group, int) else -1,
        "zero_point": True,
        "modules_to_not_convert": list(dict.fromkeys((*kept, *OUTPUTS))),
    }


def _layout(entry: Entry) -> Words:
    format = entry.format
    assert isinstance(format, Affine)
    return Words(entry.name, format, (entry.shape[0], entry.shape[1]), format.group_scale, entry.name)


def _quantization(path: Path) -> Mapping[str, Any]:
    found = columns.read_quantization(path, BESIDE, METHOD)
    renamed = {OLD_NAMES.get(key, key): value for key, value in found.items()}
    return renamed if renamed == found else {"quant_method": METHOD, **renamed}


def _group(path: Path, quantization: Mapping[str, Any]) -> int:
    """The group size, −1 for all columns; raises CheckpointError for what has another layout."""
    bits, group = quantization.get("bits", BITS), quantization.get("group_size", 128)
    layout = quantization.get("version", quantization.get("checkpoint_format", LAYOUT))
    if not isinstance(layout, str) or layout.lower() != LAYOUT or bits != BITS or quantization.get("dynamic"):
        dynamic = ", with a size of its own for some layers (dynamic)" if quantization.get("dynamic") else ""
        raise CheckpointError(
            f"{path / CONFIG}: AWQ in the layout {layout!r} with {bits!r} bits{dynamic}; fewbits reads {LAYOUT} with "
            f"{BITS} bits and one group size; save it that way with AutoAWQ, or start from the floating-point original"
        )
    if type(group) is not int or (group != -1 and group < 1):
        raise CheckpointError(f"{path / CONFIG}: group_size is {group!r}, must be above 0, or −1; download it again")
    return group


def _found(module: str, folder: ArrayFolder, group: int) -> Words:
    columns.require_linear(folder.folder, module)
    inputs, packed = columns.matrix_shape(folder, f"{module}.qweight")
    shape, scales = (PER_WORD * packed, inputs), columns.scale_dtype(folder, f"{module}.scales")
    format = columns.integers(BITS, group, shape, scales, symmetric=False)
    return Words(module + WEIGHT, format, shape, scales, f"{folder.folder}: '{module}'")
