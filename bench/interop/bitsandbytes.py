"""bitsandbytes, by way of transformers: NF4, FP4 and LLM.int8. See `harness` for how this is run.

It multiplies 8-bit weights by inputs rounded to 8 bits; its logits here are those of the decoded model, so that weights
are compared with weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from interop.harness import LOGITS, TOKENS, Numbers, Tool

BLOCK = 64  # transformers has no setting for another
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"type": "nf4"},
    "nf4-double": {"type": "nf4", "double": True},
    "nf4-g32": {"type": "nf4", "block": 32},
    "fp4": {"type": "fp4"},
    "int8": {"type": "int8"},
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    kind, double, block = setting["type"], setting.get("double", False), setting.get("block", BLOCK)
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind != "int8",
        bnb_4bit_quant_type=kind if kind != "int8" else "nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    if block != BLOCK:
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        reblock(loaded, block, kind, dict(original.named_parameters()), double=double)
    loaded.save_pretrained(out)


def reblock(model: torch.nn.Module, block: int, kind: str, originals: dict[str, Tensor], *, double: bool) -> None:
    """Quantize again in blocks of another size."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.data, module.weight.quant_state = quantize_4bit(
                originals[f"{name}.weight"], blocksize=block, quant_type=kind, compress_statistics=double
            )


@torch.inference_mode()
def run(folder: Path) -> Numbers:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = numbers(model)
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules()):
        model = model.dequantize().float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True  # whatever the configuration says
            module.support_avx512bf16_for_cpu = False  # products in bfloat16
    found[LOGITS] = model(torch.tensor([list(TOKENS)])).logits[0]
    return {name: tensor.numpy() for name, tensor in found.items()}


def numbers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter in float32, quantized ones as the library decodes them."""
    found = {name: p.detach().float() for name, p in model.named_parameters() if p.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = decoded(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[f"{name}.weight"] = int8_vectorwise_dequant(module.weight.data, absmax)
    return {name: weight.clone() for name, weight in found.items()}


def decoded(codes: Tensor, state: QuantState) -> Tensor:
    """A 4-bit matrix as the library decodes it, one block in each row.

    Where blocks cross from row to row the AVX-512 kernel of 0.50.2 takes wrong scales: what it returns is nowhere near
    the weights that were quantized, and the library's own portable kernel says otherwise.
    """
    shape, block, state = state.shape, state.blocksize, copy.copy(state)
    blocks = -(-math.prod(shape) // block)
    state.shape, state.dtype = torch.Size((blocks, block)), torch.float32
    whole = torch.nn.functional.pad(codes.view(-1), (0, blocks * block // 2 - codes.numel()))
    weights: Tensor = dequantize_4bit(whole.view(-1, 1), state).flatten()[: math.prod(shape)]
    return weights.view(shape)


if __name__ == "__main__":
    Tool(("bitsandbytes", "transformers", "torch"), SETTINGS, write, run).main()
