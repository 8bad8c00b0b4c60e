"""modelopt: NVFP4 folders of NVIDIA's ModelOpt (TensorRT Model Optimizer), which vLLM and TensorRT-LLM load.

A linear layer `M` with weight [N, K] becomes

    M.weight          uint8 [N, K/2]            two codes of E2M1 a byte, the first in the low nibble
    M.weight_scale    float8_e4m3fn [N, K/16]
    M.weight_scale_2  float32, one number       w = v · (weight_scale · weight_scale_2)
    M.input_scale     float32, one number       of inputs rounded to FP4

weight_scale_2 is the reciprocal of what compressed-tensors stores. What is said of it stands in hf_quant_config.json,
and since 2025 in config.json too:

    {"producer": {"name": "modelopt", …}, "quantization": {"quant_algo": "NVFP4", "group_size": 16,
     "exclude_modules": ["lm_head", "model.layers.0.self_attn*", …], "kv_cache_quant_algo": …}}
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [...], …}

Both must agree. Inputs and the key-value cache stay in floating point, with a warning: fewbits does not round to FP4,
nor knows the scales of caches by these names. Other algorithms are refused by name. Read only: no engine that could
read it back runs here; `nvfp4` as compressed-tensors is what the same engines load.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, Located, read_json
from fewbits.checkpoint._quantized_folder import ReadFolder
from fewbits.checkpoint.activations import WEIGHT
from fewbits.checkpoint.base import Entry, Reader
from fewbits.checkpoint.huggingface import quantization_of
from fewbits.errors import CheckpointError
from fewbits.formats import Float, QTensor
from fewbits.formats.nvfp4_product import NvFp4Product

METHODS = ("modelopt", "modelopt_fp4")
BESIDE = "hf_quant_config.json"
ALGORITHM = "NVFP4"
FORMAT = NvFp4Product()
SCALE, FACTOR = "_scale", "_scale_2"  # M.weight_scale, M.weight_scale_2
LEFT_OUT = (".input_scale", ".k_scale", ".v_scale")

log = logging.getLogger(__name__)


class ModelOpt(ReadFolder):
    """Linear layers in NVFP4; not written."""

    name = "modelopt"
    summary = "safetensors folder of NVFP4 by NVIDIA's ModelOpt (read only): vLLM, SGLang, TensorRT-LLM"

    def recognises(self, path: Path) -> bool:
        return bool(_statements(path))

    def open(self, path: Path) -> Reader:
        return ModelOptReader(path)


class ModelOptReader(Reader):
    """Entries named as before, in NVFP4 where there is a factor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.config.pop("quantization_config", None)
        excluded = _excluded(path)
        self.folder = ArrayFolder(path)
        quantized = {name.removesuffix(FACTOR) for name in self.folder.arrays if name.endswith(WEIGHT + FACTOR)}
        if not quantized:
            raise CheckpointError(
                f"{path}: {CONFIG} or {BESIDE} says {ALGORITHM}, but no tensor is named '….weight{FACTOR}'; download "
                "all shards again"
            )
        parts = {name + part for name in quantized for part in (SCALE, FACTOR)}
        left_out = [name for name in self.folder.arrays if name.endswith(LEFT_OUT)]
        if left_out:
            log.warning("%s: inputs and caches stay in floating point, %d scales of them aside", path, len(left_out))
        self.entries = {
            name: self._quantized(name, excluded) if name in quantized else self._plain(name)
            for name in sorted({*self.folder.arrays, *quantized} - parts - {*left_out})
        }

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self.folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        if rows is not None:
            raise CheckpointError(f"{self.path}: '{name}' is {entry.format}, whose rows share params; read it whole")
        packed, scale, factor = (self.folder.read(array) for array in _parts(name))
        if not bool(scale.float().isfinite().all() & factor.isfinite().all()):
            raise CheckpointError(f"{self.path}: scales of '{name}' are NaN or Inf; the file is damaged")
        return QTensor.from_arrays(FORMAT, {"packed": packed, "scale": scale, "factor": factor.view(1, 1)}, entry.shape)

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries.get(name)
        names = [name] if entry is None or isinstance(entry.format, Float) else _parts(name)
        return {array: self.folder.located(array).sha256() for array in names}

    def _quantized(self, name: str, excluded: Sequence[tuple[str, str]]) -> Entry:
        packed, scale, factor = (self.folder.located(array) for array in _parts(name))
        shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else ()
        needed = FORMAT.arrays(shape) if len(shape) == 2 and 0 not in shape and not shape[1] % FORMAT.group else {}
        stored = {"packed": packed, "scale": scale}
        sound = needed and all(_as(needed[key].dtype, needed[key].shape, found) for key, found in stored.items())
        if not sound or not any(_as(torch.float32, one, factor) for one in ((), (1,))):
            raise CheckpointError(
                f"{packed.file}: '{name}' is {packed.dtype} {list(packed.shape)} with scales {scale.dtype} "
                f"{list(scale.shape)} and a factor {factor.dtype} {list(factor.shape)}, but {ALGORITHM}, as {CONFIG} "
                f"or {BESIDE} says, needs uint8 [N, K/2], float8_e4m3fn [N, K/16] and one float32; the file is "
                "damaged, or its experts are fused"
            )
        for file, pattern in excluded:
            if fnmatchcase(name.removesuffix(WEIGHT), pattern):
                raise CheckpointError(
                    f"{self.path / file} says that '{pattern}' is not quantized, but '{name}{FACTOR}' is there; "
                    "download both again"
                )
        return Entry(name, shape, FORMAT)

    def _plain(self, name: str) -> Entry:
        array = self.folder.located(name)
        if name.endswith(WEIGHT) and array.dtype == torch.uint8:
            raise CheckpointError(
                f"{array.file}: '{name}' is packed, but '{name}{FACTOR}' is missing; download it again"
            )
        return Entry(name, array.shape, Float(array.dtype))


def _parts(name: str) -> list[str]:
    return [name, name + SCALE, name + FACTOR]


def _as(dtype: torch.dtype, shape: tuple[int, ...], found: Located) -> bool:
    return (found.dtype, found.shape) == (dtype, shape)


def _statements(path: Path) -> dict[str, Mapping[str, Any]]:
    """File -> what ModelOpt says there; only those files that it says something in."""
    found: dict[str, Mapping[str, Any]] = {}
    own = quantization_of(read_json(path / CONFIG))
    if own.get("quant_method") in METHODS:
        found[CONFIG] = own
    if (path / BESIDE).is_file():
        beside = read_json(path / BESIDE)
        producer, quantization = beside.get("producer"), beside.get("quantization")
        if isinstance(producer, dict) and producer.get("name") == METHODS[0] and isinstance(quantization, dict):
            found[BESIDE] = quantization
    return found


def _excluded(path: Path) -> list[tuple[str, str]]:
    """(file, pattern) of modules that are said to be in floating point. Raises CheckpointError for other algorithms."""
    excluded = []
    for file, said in _statements(path).items():
        algorithm, group = said.get("quant_algo"), said.get("group_size", FORMAT.group)
        if algorithm != ALGORITHM or group != FORMAT.group:
            raise CheckpointError(
                f"{path / file}: quant_algo is {algorithm!r} in groups of {group!r}, and fewbits reads {ALGORITHM} in "
                f"groups of {FORMAT.group}; start from the floating-point original"
            )
        patterns = said.get("exclude_modules" if file == BESIDE else "ignore") or []
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise CheckpointError(f"{path / file}: the modules that are not quantized must be a list of names")
        excluded += [(file, pattern) for pattern in patterns]
    return excluded
