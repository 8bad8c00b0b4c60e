"""Weights of GPTQ and AWQ folders as GPTQModel itself decodes them: the proof of what we wrote.

Nothing here uses our reader or our formats. Its own configuration says how a module is stored, its own layer unpacks.
Scales are widened to float32 first, because the layer computes in their type. A weight is decoded some rows at a time,
which are columns of the arrays, since the layer makes several copies on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.base import FOREIGN_PART, row_slabs
from fewbits.checkpoint.huggingface import array_by_the_library, files_by_array, rows_by_the_library

LOCALS = ("qweight", "qzeros", "scales", "g_idx")
BLOCK = 32  # rows whose zero-points fill whole words


def decoded_by_gptqmodel(path: Path) -> Iterator[tuple[str, int, Tensor]]:
    """(entry name, first row, rows in float32) of each tensor, quantized or not; see `Kind.foreign`."""
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig.from_pretrained(str(path))
    files = files_by_array(path)
    for name, file in files.items():
        module, _, local = name.rpartition(".")
        if f"{module}.qweight" not in files or local not in LOCALS:
            yield from rows_by_the_library(file, name)
        elif local == "qweight":
            arrays = {
                key: array_by_the_library(files, f"{module}.{key}") for key in LOCALS if f"{module}.{key}" in files
            }
            for first, rows in _decoded(module, arrays, config):
                yield f"{module}.weight", first, rows


def _decoded(module: str, arrays: dict[str, Tensor], config: Any) -> Iterator[tuple[int, Tensor]]:
    awq = config.quant_method == "awq"
    bits = config.dynamic_get(module, "bits", config.bits) if config.dynamic else config.bits
    outputs = arrays["scales"].shape[1]
    inputs = arrays["qweight"].shape[0] if awq else len(arrays["g_idx"])
    for slab in row_slabs((outputs, inputs), FOREIGN_PART, BLOCK):
        span = slice(slab.start * bits // 32, -(-slab.stop * bits // 32))
        part = {
            "qweight": arrays["qweight"][:, span if awq else slice(slab.start, slab.stop)],
            "qzeros": arrays["qzeros"][:, span],
            "scales": arrays["scales"][:, slab.start : slab.stop].float(),
        }
        weight = _awq(part, bits) if awq else _gptq(part | {"g_idx": arrays["g_idx"]}, bits, config.format)
        yield slab.start, weight.T.contiguous()


def _gptq(arrays: dict[str, Tensor], bits: int, layout: Any) -> Tensor:
    """[K, N] of a layer with these arrays; its own group size is used nowhere once `g_idx` is there."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    shape = {"in_features": len(arrays["g_idx"]), "out_features": arrays["scales"].shape[1]}
    layer = TorchLinear(bits=bits, group_size=-1, sym=False, desc_act=False, register_buffers=True, **shape)
    for name, array in arrays.items():
        setattr(layer, name, array.contiguous())
    if layout == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    weight: Tensor = layer.dequantize_weight()
    return weight


def _awq(arrays: dict[str, Tensor], bits: int) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    group = arrays["qweight"].shape[0] // arrays["scales"].shape[0]
    weight: Tensor = dequantize_gemm(**arrays, bits=bits, group_size=group)
    return weight
