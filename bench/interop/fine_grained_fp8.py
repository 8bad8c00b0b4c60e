"""transformers' own FP8, in blocks or with one scale a matrix. See `harness` for how this is run.

transformers quantizes to it on GPUs only, but the operation that does it runs anywhere: it is called here for each
linear layer. Without a GPU it loads such folders decoded (`dequantize`) and rounds no inputs, so weights are the
parameters of that model and logits are what it computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from interop.harness import LOGITS, TOKENS, Numbers, Tool

SETTINGS: dict[str, dict[str, Any]] = {
    "fp8-b128": {"block": (128, 128)},
    "fp8-b4": {"block": (4, 4)},  # which divides 172
    "fp8-b4-powers": {"block": (4, 4), "scale_fmt": "ue8m0"},
    "fp8-matrix": {"block": None},
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    block, scales = setting["block"], setting.get("scale_fmt", "float")
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scales, modules_to_not_convert=["lm_head"])
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    linear = [name for name, m in loaded.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    arrays = {name: p.detach() for name, p in loaded.named_parameters()}
    for name in linear:
        arrays |= quantize._quantize_one(f"{name}.weight", arrays[f"{name}.weight"].float())
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file({name: array.contiguous() for name, array in arrays.items()}, out / "model.safetensors", {"format": "pt"})
    plain = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(plain | {"quantization_config": config.to_dict()}))


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = FineGrainedFP8Config.from_dict(stored | {"dequantize": True})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    found: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    found[LOGITS] = model(torch.tensor([list(TOKENS)])).logits[0]
    return {name: tensor.float().numpy() for name, tensor in found.items()}


if __name__ == "__main__":
    Tool(("transformers", "torch"), SETTINGS, write, run).main()
