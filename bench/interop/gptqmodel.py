"""GPTQModel: GPTQ in versions 1 and 2; AWQ, to load only, since it quantizes to that on GPUs. See `harness`.

Weights are those of its own layers by their own `dequantize_weight` (AWQ: `dequantize_gemm`), with scales widened to
float32, since the layers otherwise round each product to 16 bits. Logits are of the model as it loads it, which rounds
what is not quantized to float16, then computed in float32: its layers for GPTQ do that, those for AWQ do not, so plain
ones with the weights that they decode stand in for them. It calibrates on random tokens, since nothing here is about
quality; it writes a folder `logs` where it runs, and 3 bits only where all widths are multiples of 32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool asks for two even on machines with fewer cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling a layer takes longer than a small model's run

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, PreTrainedModel

from interop.harness import LOGITS, TOKENS, Numbers, Tool
from interop.layers import plain

WINDOWS, LENGTH = 8, 128
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq-4-g128": {"bits": 4, "group_size": 128},
    "gptq-4-g128-actorder": {"bits": 4, "group_size": 128, "desc_act": True, "act_group_aware": False},
    "gptq-4-g32": {"bits": 4, "group_size": 32},
    "gptq-4-g32-asym": {"bits": 4, "group_size": 32, "sym": False},
    "gptq-4-g32-actorder": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "gptq-4-g32-asym-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-4-rows": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "gptq-2-g64-v2": {"bits": 2, "group_size": 64, "format": "gptq_v2"},
    "gptq-3-g64": {"bits": 3, "group_size": 64},
    "gptq-3-g64-asym-v2": {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq-8-g64": {"bits": 8, "group_size": 64},
    "gptq-8-g64-asym": {"bits": 8, "group_size": 64, "sym": False},
    "gptq-dynamic": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r".*\.down_proj$": {"bits": 8, "group_size": 64}, r"-:.*layers\.0\..*up_proj": {}},
    },
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    loaded = GPTQModel.load(str(model), QuantizeConfig(**setting, offload_to_disk=False), device="cpu")
    vocabulary = loaded.model.config.vocab_size
    ids = torch.randint(vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    loaded.quantize(rows, batch_size=1)
    loaded.save(str(out))


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    model = torch.nn.Module.float(load(folder))  # which transformers forbids to call on the model
    numbers: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, TorchLinear):
            numbers[f"{name}.weight"] = module.dequantize_weight().T
        elif isinstance(module, AwqTorchLinear):
            model.set_submodule(name, plain(decoded(module), module.bias))
            numbers[f"{name}.weight"] = decoded(module)
    numbers[LOGITS] = model(input_ids=torch.tensor([list(TOKENS)])).logits[0]
    return {name: tensor.numpy() for name, tensor in numbers.items()}


def load(folder: Path) -> PreTrainedModel:
    """AWQ by way of transformers: GPTQModel's own loader overlooks `modules_to_not_convert`."""
    config = AutoConfig.from_pretrained(folder).quantization_config
    if config["quant_method"] != "awq":
        own: PreTrainedModel = GPTQModel.load(
            str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
        ).model
        return own
    awq = AwqConfig(**config | {"backend": "torch_awq"})
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=awq)
    return loaded


def decoded(layer: AwqTorchLinear) -> Tensor:
    """[out_features, in_features] in float32."""
    scales = layer.scales.float()
    weight: Tensor = dequantize_gemm(layer.qweight, layer.qzeros, scales, int(layer.bits), layer.group_size)
    return weight.T


if __name__ == "__main__":
    Tool(("gptqmodel", "torch"), SETTINGS, write, run).main()
