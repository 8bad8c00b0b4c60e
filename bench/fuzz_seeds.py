"""Sound checkpoints for `fuzz_readers.py`: each kind in one format of each sort that it holds, and what lies beside.

A checkpoint has two quantized matrices, one in floating point and a norm, a ledger, and in one of them an adapter; some
round their inputs. Kinds that fewbits does not write are made by hand here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits.checkpoint import Entry, Kind, input_scale
from fewbits.checkpoint.adapter import FOLDER, Added, write_adapter
from fewbits.formats import ACTIVATIONS, FORMATS, Affine, Float, Format, QTensor
from fewbits.formats.nvfp4_product import NvFp4Product

SHAPE = (128, 256)
LAYER = "model.layers.0.mlp.up_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "torch_dtype": "float16"}
METADATA = {"general.architecture": "llama", "llama.block_count": 1, "tokenizer.ggml.tokens": ["a", "b", "é"]}


def checkpoints(kind: Kind, folder: Path) -> list[Path]:
    """Small checkpoints of a kind, each in a folder of its own; their paths."""
    if kind.name in BY_HAND:
        return [_by_hand(kind.name, folder / str(i), i) for i in range(2)]
    sorts: dict[Any, Format] = {}
    for format in FORMATS.values():
        if kind.admits(kind.entry(f"{LAYER}.weight", SHAPE, format)) is None:
            sorts.setdefault((type(format), isinstance(format, Affine) and (format.symmetric, format.group)), format)
    chosen = [*sorts.values()][:12]
    paths = [_written(kind, folder / str(i), format) for i, format in enumerate(chosen)]
    if paths[0].is_dir():
        write_adapter(paths[0] / FOLDER, {LAYER: Added(_random(4, SHAPE[1]), _random(SHAPE[0], 4))})
    return paths


def _by_hand(kind: str, folder: Path, seed: int) -> Path:
    """A checkpoint of a kind that is only read. The second ModelOpt folder has its configuration beside config.json."""
    path = folder / "model"
    path.mkdir(parents=True)
    arrays, quantization = BY_HAND[kind]()
    config: dict[str, Any] = {**CONFIG, "quantization_config": quantization}
    if kind == "modelopt" and seed:
        beside = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": quantization["ignore"]}
        (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": kind}, "quantization": beside}))
        config = CONFIG
    save_file(arrays | {"model.norm.weight": torch.ones(256)}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "fewbits.json").write_text(json.dumps({"tensors": [{"name": "model.norm.weight"}]}))
    write_adapter(path / FOLDER, {LAYER: Added(_random(4, SHAPE[1]), _random(SHAPE[0], 4))})
    return path


def _mxfp4() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name, bytes_ = "model.layers.0.mlp.experts.down_proj", torch.arange(4 * 32 * 4 * 16) % 256
    arrays = {
        f"{name}_blocks": bytes_.to(torch.uint8).view(4, 32, 4, 16),
        f"{name}_scales": torch.full((4, 32, 4), 120, dtype=torch.uint8),
        f"{name}_bias": torch.zeros(4, 32),
    }
    return arrays, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def _modelopt() -> tuple[dict[str, Tensor], dict[str, Any]]:
    format = NvFp4Product()
    parts = _quantized(format, _random(*SHAPE)).pack()
    arrays = {
        f"{LAYER}.weight": parts["packed"],
        f"{LAYER}.weight_scale": parts["scale"],
        f"{LAYER}.weight_scale_2": parts["factor"].reshape(()),
        f"{LAYER}.input_scale": torch.ones(()),
    }
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.layers.1.*"], "group_size": 16}
    return arrays, said


BY_HAND = {"mxfp4": _mxfp4, "modelopt": _modelopt}


def _written(kind: Kind, folder: Path, format: Format) -> Path:
    tensors = _tensors(kind, format)
    entries = [_entry(kind, name, q) for name, q in tensors.items()]
    scales = [scale for entry in entries if (scale := input_scale(entry)) is not None]
    path = folder / ("model.gguf" if kind.name == "gguf" else "model")
    with kind.create(path, [*entries, *scales], folder, METADATA if kind.name == "gguf" else CONFIG) as writer:
        for name, q in tensors.items():
            writer.write(name, q)
        for scale in scales:
            writer.write(scale.name, QTensor(scale.format, torch.ones(scale.shape), {}))
        writer.commit({"kind": kind.name, "tensors": [{"name": name, "error": 0.1} for name in tensors]})
    return path


def _entry(kind: Kind, name: str, q: QTensor) -> Entry:
    """With rounded inputs, where the kind can say so."""
    plain = kind.entry(name, q.shape, q.format)
    for inputs in ACTIVATIONS.values():
        marked = Entry(name, q.shape, q.format, inputs)
        if plain.inputs is None and not isinstance(q.format, Float) and kind.admits(marked) is None:
            return marked
    return plain


def _tensors(kind: Kind, format: Format) -> Mapping[str, QTensor]:
    norm = torch.ones(256) if kind.name == "gguf" else torch.ones(256).half()
    return {
        f"{LAYER}.weight": _quantized(format, _random(*SHAPE)),
        f"{LAYER.replace('0', '1')}.weight": _quantized(format, _random(*SHAPE)),
        "model.layers.0.mlp.gate_proj.weight": QTensor(Float(torch.float16), _random(*SHAPE).half(), {}),
        "model.norm.weight": QTensor(Float(norm.dtype), norm, {}),
    }


def _quantized(format: Format, w: Tensor) -> QTensor:
    params = format.fit(w)
    if isinstance(format, Affine):  # GPTQ and AWQ have scales of rows in FP16 too
        params = {**params, "scale": params["scale"].half().float()}
    return QTensor(format, format.round(w, params), params)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
