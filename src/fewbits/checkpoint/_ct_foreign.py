"""Weights of a compressed-tensors folder as that library itself decodes them: the proof of what we wrote.

Nothing here uses our reader or our formats. Scales are widened to FP32 first, because the library computes in their
type. Its FP4 decompressors compute in BF16, so there its own unpacking and its own dequantization are called in FP32.
A weight is decoded some rows at a time, since the library makes several 32-bit copies on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.base import FOREIGN_PART, row_slabs
from fewbits.checkpoint.huggingface import array_by_the_library, files_by_array, rows_by_the_library
from fewbits.errors import UnsupportedError

LOCALS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
BLOCK = 32  # rows whose packed zero-points fill whole words


def decoded_by_the_library(path: Path) -> Iterator[tuple[str, int, Tensor]]:
    """(entry name, first row, rows in float32) of each tensor, quantized or not; see `Kind.foreign`."""
    config = json.loads((path / "config.json").read_text())
    from compressed_tensors.quantization import QuantizationConfig

    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    files = files_by_array(path)
    for name in files:
        module, _, local = name.rpartition(".")
        quantized = f"{module}.weight_scale" in files
        if quantized and local in ("weight_packed", "weight"):
            state = {
                key: array_by_the_library(files, f"{module}.{key}") for key in LOCALS if f"{module}.{key}" in files
            }
            for first, rows in _decoded(module, state, _scheme(quantization, module)):
                yield f"{module}.weight", first, rows
        elif not (quantized and local in LOCALS):
            yield from rows_by_the_library(files[name], name)


def _scheme(quantization: Any, module: str) -> Any:
    """The scheme of a module, by the library's own matching; its arrays show that it is a linear layer."""
    from compressed_tensors.utils.match import is_match

    layer = torch.nn.Linear(1, 1, device="meta")
    schemes = quantization.config_groups.values()
    return next(s for s in schemes if is_match(module, layer, s.targets, quantization.ignore))


def _decoded(module: str, state: dict[str, Tensor], scheme: Any) -> Iterator[tuple[int, Tensor]]:
    stored = state["weight_packed"] if "weight_packed" in state else state["weight"]
    rows, columns = stored.shape[0], 8 * stored.shape[1] * stored.itemsize // scheme.weights.num_bits
    try:
        for slab in row_slabs((rows, columns), FOREIGN_PART, BLOCK):
            yield slab.start, _decompressed(_slab(state, slab, rows, scheme), scheme)
    except RuntimeError as error:  # 0.20 does not unpack the zero-points of a matrix of 8 rows or fewer
        raise UnsupportedError(
            f"{module}.weight: compressed-tensors {version('compressed-tensors')} cannot decode its own layout "
            f"({error}); choose a symmetric format, or another version of that library"
        ) from error


def _slab(state: dict[str, Tensor], rows: range, total: int, scheme: Any) -> dict[str, Tensor]:
    """The state of some rows. Zero-points may be packed along them, so rows start at a multiple of BLOCK."""
    bits = scheme.weights.num_bits
    slab = {}
    for name, array in state.items():
        if name == "weight_shape":
            slab[name] = torch.tensor([len(rows), int(array[1])])
        elif name == "weight_zero_point" and array.dtype == torch.int32:
            slab[name] = array[rows.start * bits // 32 : -(-rows.stop * bits // 32)]
        else:
            slab[name] = array[rows.start : rows.stop] if array.shape[0] == total and array.dim() == 2 else array
    return slab


def _decompressed(state: dict[str, Tensor], scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    if scheme.format.startswith(("nvfp4", "mxfp4")):
        return _fp4(state, scheme, compressor)
    weight: Tensor = compressor.decompress(state | {"weight_scale": state["weight_scale"].float()}, scheme)["weight"]
    return weight


def _fp4(state: dict[str, Tensor], scheme: Any, compressor: Any) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, pairs = state["weight_packed"].shape
    weight: Tensor = dequantize(
        x_q=unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * pairs, dtype=torch.float32),
        scale=compressor._decompress_scale(state["weight_scale"], torch.float32),
        args=scheme.weights,
        global_scale=state.get("weight_global_scale"),
        dtype=torch.float32,
    )
    return weight
