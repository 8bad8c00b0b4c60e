"""MLX's side of the comparison: run in an environment with mlx[cpu] and mlx-lm, not fewbits.

    python write_mlx.py write MODEL OUT [--bits 4 --group 64]
        OUT/model      the folder as mlx_lm.convert writes it
        OUT/numbers.safetensors   every tensor as MLX dequantizes it with its scales in FP32
    python write_mlx.py run FOLDER OUT
        OUT/logits.safetensors    of a folder that anyone wrote, for the tokens 2 … 65, computed in FP32

`check_folder.py` compares both with what fewbits reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.utils import load_model

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def numbers(model: Any) -> dict[str, Any]:
    """Every parameter in float32."""
    found = {name: array.astype(mx.float32) for name, array in tree_flatten(model.parameters())}
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED):
            found[f"{name}.weight"] = mx.dequantize(
                module.weight,
                module.scales.astype(mx.float32),
                module.biases.astype(mx.float32),
                group_size=module.group_size,
                bits=module.bits,
            )
    return found


def write(args: argparse.Namespace) -> None:
    convert(
        str(args.model),
        str(args.out / "model"),
        quantize=True,
        q_bits=args.bits,
        q_group_size=args.group,
        dtype=args.dtype,
    )
    mx.save_safetensors(str(args.out / "numbers.safetensors"), numbers(load_model(args.out / "model")[0]))


def run(args: argparse.Namespace) -> None:
    model = load_model(args.model)[0]
    model.set_dtype(mx.float32)
    mx.save_safetensors(str(args.out / "numbers.safetensors"), numbers(model))
    logits = model(mx.arange(2, 66).reshape(1, 64)).astype(mx.float32)
    mx.save_safetensors(str(args.out / "logits.safetensors"), {"logits": logits})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "run"))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    {"write": write, "run": run}[args.verb](args)


if __name__ == "__main__":
    main()
