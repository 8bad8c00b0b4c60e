"""bitsandbytes' side of the comparison: run in an environment that has it, transformers and accelerate, not fewbits.

    python write_bitsandbytes.py write MODEL OUT [--type nf4|fp4|int8] [--double] [--block 64]
        OUT/model      the folder as transformers saves it
        OUT/numbers.safetensors   every tensor as bitsandbytes dequantizes it, FP32
    python write_bitsandbytes.py run FOLDER OUT
        OUT/logits.safetensors    of a folder that anyone wrote, for the tokens 2 … 65, in FP32

`check.py` compares both with what fewbits reads. bitsandbytes multiplies 8-bit weights by inputs rounded to 8 bits;
their logits are those of the dequantized model, so that weights are compared with weights.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def numbers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter in float32, quantized ones as the library decodes them."""
    found = {name: p.detach().float() for name, p in model.named_parameters() if p.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = decoded(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[f"{name}.weight"] = int8_vectorwise_dequant(module.weight.data, absmax)
    return {name: w.clone().contiguous() for name, w in found.items()}


def decoded(codes: Tensor, state: QuantState) -> Tensor:
    """A 4-bit matrix as the library decodes it, one block in each row.

    Where blocks cross from row to row the AVX-512 kernel of 0.50.2 takes wrong scales: what it returns is nowhere near
    the weights that were quantized, and the library's own portable kernel says otherwise.
    """
    shape, block, state = state.shape, state.blocksize, copy.copy(state)
    blocks = -(-math.prod(shape) // block)
    state.shape, state.dtype = torch.Size((blocks, block)), torch.float32
    whole = torch.nn.functional.pad(codes.view(-1), (0, blocks * block // 2 - codes.numel()))
    numbers: Tensor = dequantize_4bit(whole.view(-1, 1), state).flatten()[: math.prod(shape)]
    return numbers.view(shape)


def reblock(model: torch.nn.Module, block: int, kind: str, originals: dict[str, Tensor], *, double: bool) -> None:
    """Quantize again in blocks of another size, which transformers has no setting for."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            codes, state = quantize_4bit(
                originals[f"{name}.weight"], blocksize=block, quant_type=kind, compress_statistics=double
            )
            module.weight.data, module.weight.quant_state = codes, state


def write(args: argparse.Namespace) -> None:
    if args.type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=args.type, bnb_4bit_use_double_quant=args.double
        )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, quantization_config=config)
    if args.block != 64:
        original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        reblock(model, args.block, args.type, dict(original.named_parameters()), double=args.double)
    model.save_pretrained(args.out / "model")
    save_file(numbers(model), args.out / "numbers.safetensors")


def run(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules()):
        model = model.dequantize().float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True  # whatever the configuration says
            module.support_avx512bf16_for_cpu = False  # products in bfloat16
    save_file(numbers(model), args.out / "numbers.safetensors")
    with torch.inference_mode():
        save_file({"logits": model(torch.arange(2, 66).view(1, 64)).logits.float()}, args.out / "logits.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "run"))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--block", type=int, default=64)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    {"write": write, "run": run}[args.verb](args)


if __name__ == "__main__":
    main()
