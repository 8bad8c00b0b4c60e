"""ModelOpt's side of the comparison: run in an environment with nvidia-modelopt and transformers, not fewbits.

    python write_modelopt.py MODEL OUT
        OUT                the folder as export_hf_checkpoint writes it, NVFP4 in all linear layers but the projection
        OUT.safetensors    every quantized weight as NVFP4QTensor.dequantize makes it, FP32

`compare.py OUT` compares it with what fewbits reads. Needs no GPU; ranges of inputs come from a few random tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write(args.model, args.out)
    save_file(numbers(args.out), f"{args.out}.safetensors")


def write(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(tokens))
        export_hf_checkpoint(model, export_dir=out)


def numbers(folder: Path) -> dict[str, Tensor]:
    """Quantized weights by name, from the files alone."""
    arrays: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(file)
    names = [name.removesuffix("_scale_2") for name in arrays if name.endswith(".weight_scale_2")]
    return {name: decoded(arrays, name) for name in names}


def decoded(arrays: dict[str, Tensor], name: str) -> Tensor:
    packed = arrays[name]
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    found: Tensor = NVFP4QTensor(shape, torch.float32, packed).dequantize(
        scale=arrays[f"{name}_scale"], double_scale=arrays[f"{name}_scale_2"], block_sizes={-1: GROUP}
    )
    return found


if __name__ == "__main__":
    main()
