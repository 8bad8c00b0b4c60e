"""transformers' BitNet layers. See `harness` for how this is run.

Codes and scale are those of its `WeightQuant`, packed by its `pack_weights`; both of its classes of layers are written.
Its layers round their inputs to 8 bits, as fewbits does for such folders.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling a layer takes longer than a small model's run

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, WeightQuant, pack_weights, unpack_weights

from interop.harness import Numbers, Tool
from interop.layers import watched

SETTINGS: dict[str, dict[str, Any]] = {
    "bitnet-autobitlinear": {"linear_class": "autobitlinear"},
    "bitnet-bitlinear": {"linear_class": "bitlinear"},
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    arrays = {name: p.detach() for name, p in loaded.named_parameters()}
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = arrays[f"{name}.weight"]
            scale = weight.abs().mean().clamp(min=1e-5).reshape(1)
            arrays[f"{name}.weight"] = pack_weights((WeightQuant.apply(weight) / scale).round())
            arrays[f"{name}.weight_scale"] = scale if setting["linear_class"] == "autobitlinear" else 1 / scale
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(arrays, out / "model.safetensors", {"format": "pt"})
    config = {
        "quant_method": "bitnet",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
        **setting,
    }
    plain = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(plain | {"dtype": "float32", "quantization_config": config}))


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    layers = [name for name, module in model.named_modules() if isinstance(module, AutoBitLinear | BitLinear)]
    for name in layers:
        module = model.get_submodule(name)
        if isinstance(module, AutoBitLinear):
            found[f"{name}.weight"] = module.weight * module.weight_scale
        else:
            found[f"{name}.weight"] = unpack_weights(module.weight, torch.float32) * (1 / module.weight_scale)
    found |= watched(model, layers)
    return {name: tensor.numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    Tool(("transformers", "torch"), SETTINGS, write, run).main()
