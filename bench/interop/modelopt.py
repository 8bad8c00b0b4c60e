"""ModelOpt: NVFP4 in all linear layers but the projection, exported without a GPU. See `harness` for how this is run.

Weights are those of `NVFP4QTensor.dequantize`, from the files alone. ModelOpt loads no such folder itself (TensorRT-LLM
and vLLM do), so logits are of transformers with these weights. Ranges of inputs come from a few random tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from interop.harness import LOGITS, TOKENS, Numbers, Tool

GROUP = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "nvfp4": {"but": []},
    "nvfp4-but-down_proj": {"but": ["*down_proj*"]},  # where 16 does not divide in_features
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokens = torch.randint(loaded.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in setting["but"]]
    with torch.inference_mode():
        mtq.quantize(loaded, config, lambda m: m(tokens))
        export_hf_checkpoint(loaded, export_dir=out)


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    arrays: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(file)
    packed = [name.removesuffix("_scale_2") for name in arrays if name.endswith(".weight_scale_2")]
    found = {name: decoded(arrays, name) for name in packed}
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, _ = model.load_state_dict({**arrays, **found}, strict=False)
    if set(missing) - {"lm_head.weight"}:  # tied, where it is missing
        raise SystemExit(f"{folder}: no {', '.join(missing)}")
    found[LOGITS] = model.eval()(torch.tensor([list(TOKENS)])).logits[0]
    return {name: tensor.numpy() for name, tensor in found.items()}


def decoded(arrays: Mapping[str, Tensor], name: str) -> Tensor:
    packed = arrays[name]
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    weight: Tensor = NVFP4QTensor(shape, torch.float32, packed).dequantize(
        scale=arrays[f"{name}_scale"], double_scale=arrays[f"{name}_scale_2"], block_sizes={-1: GROUP}
    )
    return weight


if __name__ == "__main__":
    Tool(("nvidia-modelopt", "transformers", "torch"), SETTINGS, write, run).main()
