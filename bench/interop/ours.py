"""What fewbits writes for other tools to load: folders by `quantize`, and the same by `convert` from one another.

    cd bench; python -m interop.ours MODEL OUT [--only NAME …]
    cd bench; PEER/bin/python -m interop.gptqmodel run OUT/gptq-*          # then each tool on what is its own
    cd bench; python -m interop.compare OUT/*/ …

Names begin with the kind; `…-from-…` were converted, with no number changed. A matrix that a kind or a group does not
fit, as 172 columns fit hardly any, stays in floating point, which fewbits says and the tool must understand too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fewbits
from fewbits.errors import FewbitsError

QUANTIZED = {  # kind, format
    "gptq-int4-g32": ("gptq", "int4-g32"),
    "gptq-int4-g128": ("gptq", "int4-g128"),
    "gptq-int8-g64": ("gptq", "int8-g64"),
    "gptq-v2-int4-asym-g32": ("gptq-v2", "int4-asym-g32"),
    "gptq-v2-int3-g64": ("gptq-v2", "int3-g64"),
    "awq-int4-asym-g32": ("awq", "int4-asym-g32"),
    "awq-int4-asym-g128": ("awq", "int4-asym-g128"),
    "compressed-tensors-int4-g32": ("compressed-tensors", "int4-g32"),
    "compressed-tensors-int4-asym-g64": ("compressed-tensors", "int4-asym-g64"),
    "compressed-tensors-int8": ("compressed-tensors", "int8"),
    "compressed-tensors-fp8-e4m3": ("compressed-tensors", "fp8-e4m3"),
    "compressed-tensors-nvfp4": ("compressed-tensors", "nvfp4"),
    "compressed-tensors-mxfp4": ("compressed-tensors", "mxfp4"),
    "compressed-tensors-fp8-e4m3-tensor": ("compressed-tensors", "fp8-e4m3-tensor"),
    "bitsandbytes-nf4": ("bitsandbytes", "nf4"),
    "bitsandbytes-nf4-dq": ("bitsandbytes", "nf4-dq"),
    "bitsandbytes-fp4": ("bitsandbytes", "fp4"),
    "bitsandbytes-llm-int8": ("bitsandbytes", "llm-int8"),
    "mlx-mlx4-g64": ("mlx", "mlx4-g64"),
    "mlx-mlx8-g32": ("mlx", "mlx8-g32"),
    "fp8-b128": ("fp8", "fp8-e4m3-b128"),
    "fp8-tensor": ("fp8", "fp8-e4m3-tensor"),
    "bitnet-ternary": ("bitnet", "ternary-tensor"),
    "gguf-q4_0.gguf": ("gguf", "q4_0"),
    "gguf-q5_1.gguf": ("gguf", "q5_1"),
    "gguf-q8_0.gguf": ("gguf", "q8_0"),
    "gguf-q4_k.gguf": ("gguf", "q4_k"),
    "gguf-q6_k.gguf": ("gguf", "q6_k"),
    "gguf-q2_k.gguf": ("gguf", "q2_k"),
    "gguf-iq4_xs.gguf": ("gguf", "iq4_xs"),
    "gguf-tq2_0.gguf": ("gguf", "tq2_0"),
}
CONVERTED = {  # to, from
    "gptq-v2-from-q4_0": ("gptq-v2", "gguf-q4_0.gguf"),
    "gptq-from-q4_0": ("gptq", "gguf-q4_0.gguf"),
    "gptq-from-q8_0": ("gptq", "gguf-q8_0.gguf"),
    "gptq-from-compressed-tensors": ("gptq", "compressed-tensors-int4-g32"),
    "gptq-v2-from-compressed-tensors": ("gptq-v2", "compressed-tensors-int4-asym-g64"),
    "gptq-from-mxfp4": ("gptq", "compressed-tensors-mxfp4"),
    "awq-from-q4_0": ("awq", "gguf-q4_0.gguf"),
    "awq-from-compressed-tensors": ("awq", "compressed-tensors-int4-asym-g64"),
    "compressed-tensors-from-q4_0": ("compressed-tensors", "gguf-q4_0.gguf"),
    "compressed-tensors-from-q6_k": ("compressed-tensors", "gguf-q6_k.gguf"),
    "compressed-tensors-from-gptq": ("compressed-tensors", "gptq-int4-g32"),
    "compressed-tensors-from-fp8": ("compressed-tensors", "fp8-tensor"),
    "mlx-from-q4_0": ("mlx", "gguf-q4_0.gguf"),
    "mlx-from-q4_k": ("mlx", "gguf-q4_k.gguf"),
    "mlx-from-awq": ("mlx", "awq-int4-asym-g32"),
    "bitsandbytes-from-ternary": ("bitsandbytes", "gguf-tq2_0.gguf"),
    "fp8-from-compressed-tensors": ("fp8", "compressed-tensors-fp8-e4m3-tensor"),
    "gguf-from-gptq.gguf": ("gguf", "gptq-int4-g32"),
    "gguf-from-awq.gguf": ("gguf", "awq-int4-asym-g32"),
    "gguf-from-mlx.gguf": ("gguf", "mlx-mlx4-g64"),
    "hf-from-q4_k": ("hf", "gguf-q4_k.gguf"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[*QUANTIZED, *CONVERTED], choices=[*QUANTIZED, *CONVERTED])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        try:
            print(f"{name}: {made(args.model, args.out, name)}", flush=True)
        except FewbitsError as error:  # a refusal is an answer, and which ones there are is part of the table
            print(f"{name}: refused: {error}", file=sys.stderr, flush=True)


def made(model: Path, out: Path, name: str) -> str:
    if name in QUANTIZED:
        kind, format = QUANTIZED[name]
        return f"verified with {fewbits.quantize(model, out / name, kind=kind, format=format).verified_with}"
    to, source = CONVERTED[name]
    return f"verified with {fewbits.convert(out / source, out / name, to=to).verified_with}"


if __name__ == "__main__":
    main()
