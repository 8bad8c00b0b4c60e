"""llm-compressor and compressed-tensors: integers, FP8, NVFP4 and MXFP4. See `harness` for how this is run.

Weights are the parameters of the model as transformers loads it with `dequantize`, which is compressed-tensors' own
decompression, in float32, and logits are of that model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils import getattr_chain
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from interop.harness import Numbers, Tool
from interop.layers import watched

WINDOWS, LENGTH = 8, 128
FP4 = {16: "nvfp4-pack-quantized", 32: "mxfp4-pack-quantized"}  # by group size


def integers(bits: int, group: int | None, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True} | strategy | more
    return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "group": group or 1}


SETTINGS: dict[str, dict[str, Any]] = {
    "int4-g128": integers(4, 128),
    "int4-g32": integers(4, 32),
    "int4-g4": integers(4, 4),  # which divides 172
    "int4-asym-g32": integers(4, 32, symmetric=False),
    "int4-actorder": {**integers(4, 32, actorder="weight"), "gptq": True},
    "int4-rows": integers(4, None),
    "int8-rows": integers(8, None),
    "w8a8": {"scheme": "W8A8"},
    "fp8": {"scheme": "FP8"},
    "fp8-dynamic": {"scheme": "FP8_DYNAMIC"},
    "nvfp4a16": {"scheme": "NVFP4A16", "group": 16},
    "mxfp4a16": {"scheme": "MXFP4A16", "group": 32},
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = torch.randint(loaded.config.vocab_size, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    given = {key: value for key, value in setting.items() if key not in ("gptq", "group")}
    if "scheme" in given:
        given["targets"] = "Linear"
    modifier = GPTQModifier if setting.get("gptq") else QuantizationModifier
    oneshot(
        model=loaded,
        dataset=data,
        recipe=[modifier(ignore=["lm_head", *indivisible(loaded, setting.get("group", 1))], **given)],
        num_calibration_samples=WINDOWS,
        max_seq_length=LENGTH,
    )
    loaded.save_pretrained(out, save_compressed=True)


def indivisible(model: torch.nn.Module, group: int) -> list[str]:
    """Layers that the tool refuses in groups of this size, and so keeps: stories260K has 172 columns."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return [name for name, layer in layers.items() if layer.in_features % group]


def rounds_inputs(module: torch.nn.Module) -> bool:
    return getattr_chain(module, "quantization_scheme.input_activations", None) is not None


def widen(model: torch.nn.Module, folder: Path) -> None:
    """Weights in NVFP4 and MXFP4, which are decoded to bfloat16, by the library's own functions in float32."""
    arrays: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        arrays |= load_file(file)
    for name, packed in arrays.items():
        module = name.removesuffix(".weight_packed")
        if module == name or packed.dtype != torch.uint8:
            continue
        layer: Any = model.get_submodule(module)
        args = layer.quantization_scheme.weights
        compressor = BaseCompressor.get_value_from_registry(FP4[args.group_size])
        layer.weight.data = dequantize(
            x_q=unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32),
            scale=compressor._decompress_scale(arrays[f"{module}.weight_scale"], torch.float32),
            args=args,
            global_scale=arrays.get(f"{module}.weight_global_scale"),
            dtype=torch.float32,
        )


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    widen(model, folder)
    found = {name: p.detach() for name, p in model.named_parameters() if name.endswith(".weight")}
    found |= watched(model, [name for name, m in model.named_modules() if rounds_inputs(m)])
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    Tool(("compressed-tensors", "transformers", "torch"), SETTINGS, write, run).main()
