"""AutoAWQ: AWQ by its own authors' program. See `harness` for how this is run.

Its last release needs transformers 4.51, which reads config.json of version 5 as far as these models go (it misses
`rope_parameters`, whose theta must be 10000). Weights are those of its own `dequantize_gemm` with scales widened to
float32; its layers compute in float16, so plain ones with these weights stand in for them where logits are made.

It quantizes nothing where groups of 8 rows or the group size do not divide a width, such as stories260K's 172.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.models import base
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from interop.harness import LOGITS, TOKENS, Numbers, Tool
from interop.layers import plain

WINDOWS, LENGTH = 2, 64  # it multiplies in float16, which takes a processor long
SETTINGS: dict[str, dict[str, Any]] = {
    "awq-g128": {"q_group_size": 128},
    "awq-g64": {"q_group_size": 64},
    "awq-g32": {"q_group_size": 32},
    "awq-g32-unclipped": {"q_group_size": 32, "clip": False},  # clipping wants multiples of 64 rows
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    loaded = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu", torch_dtype=torch.float16)
    ids = torch.randint(loaded.model.config.vocab_size, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    loaded.quantize(
        tokenizer,
        {"zero_point": True, "q_group_size": setting["q_group_size"], "w_bit": 4, "version": "GEMM"},
        calib_data=ids.tolist(),
        max_calib_samples=WINDOWS,
        max_calib_seq_len=LENGTH,
        apply_clip=setting.get("clip", True),
    )
    loaded.save_quantized(str(out))
    tokenizer.save_pretrained(out)


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    base.get_best_device = lambda: "cuda:0"  # on a processor it insists on Intel's extension
    model = AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"}).model
    numbers: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, WQLinear_GEMM):
            numbers[f"{name}.weight"] = decoded(module)
            model.set_submodule(name, plain(decoded(module), module.bias))
    numbers[LOGITS] = model.float()(input_ids=torch.tensor([list(TOKENS)])).logits[0]
    return {name: tensor.numpy() for name, tensor in numbers.items()}


def decoded(layer: WQLinear_GEMM) -> Tensor:
    """[out_features, in_features] in float32."""
    scales = layer.scales.float()
    weight: Tensor = dequantize_gemm(layer.qweight, layer.qzeros, scales, layer.w_bit, layer.group_size)
    return weight.T


if __name__ == "__main__":
    Tool(("autoawq", "transformers", "torch"), SETTINGS, write, run).main()
