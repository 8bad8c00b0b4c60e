"""What do the kernels' roundings cost: inputs in INT8, keys and values in FP16 or fewer bits?

The model is rounded to each format, and runs on text twice: by the compiled kernels, and by the reference with products
of floating-point numbers and keys and values in float32, on the same quantized weights. So the divergence is what
arithmetic loses, without what the format does; the last column has that, for comparison, with the same arithmetic.

    python bench/engine_accuracy.py MODEL --text FILE [--formats q4_0 q8_0 …] [--windows 24] [--length 256] [--kv f16]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fewbits
from fewbits.engine.opening import repacked
from fewbits.evals import kl_divergence, read_windows
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.runtime.compiled import CompiledRunner
from fewbits.runtime.ops import Program
from fewbits.runtime.reference import Kv, ReferenceRunner
from fewbits.runtime.runner import Runner

FORMATS = ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "int4-g32", "int4-g128", "int8", "nf4")


def quantized(model: Path, format: str, folder: Path) -> Program:
    """The program of a model in a format."""
    out = folder / (f"{format}.gguf" if format.startswith("q") else format)
    fewbits.quantize(model, out, format=format, method="rtn-plain", prove=False)
    return repacked(out, cache=False).program


def logits(runner: Runner, window: NDArray[np.int32]) -> Tensor:
    """Of every token of a window, float32 [tokens, vocabulary]."""
    found = []
    for start in range(0, len(window), runner.most_rows):
        rows = np.arange(len(window[start : start + runner.most_rows]), dtype=np.int32)
        found.append(runner.forward(window[start + rows], np.zeros_like(rows), start + rows, rows))
    return torch.from_numpy(np.concatenate(found))


def divergences(exact: Runner, other: Runner, windows: NDArray[np.int32]) -> NDArray[np.float64]:
    """KL(exact ‖ other) in nats, of every token of all windows."""
    parts = [kl_divergence(logits(exact, window), logits(other, window)) for window in windows]
    return torch.cat(parts).numpy()


def measure(program: Program, original: Program, windows: NDArray[np.int32], kv: Kv) -> dict[str, Any]:
    length = windows.shape[1]
    exact = ReferenceRunner(program, 1, length, "f32", exact=True)
    arithmetic = divergences(exact, CompiledRunner(program, 1, length, kv), windows)
    format = divergences(ReferenceRunner(original, 1, length, "f32", exact=True), exact, windows)
    return {
        "mean_kld": float(arithmetic.mean()),
        "kld_99": float(np.quantile(arithmetic, 0.99)),
        "format_mean_kld": float(format.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kv", choices=("f16", "int8", "int4"), default="f16")
    args = parser.parse_args()
    text = read_windows(args.text, tokenizer_of(args.model), args.windows, args.length)
    windows, original = text.ids.numpy().astype(np.int32), repacked(args.model, cache=False).program
    print(f"{text.description}; keys and values in {args.kv}; mean KL divergence in nats a token\n")
    print(f"{'format':<12}{'arithmetic':>12}{'99 %':>12}{'the format':>12}")
    rows = []
    for format in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(quantized(args.model, format, Path(folder)), original, windows, args.kv)
        rows.append({"format": format, **row})
        print(f"{format:<12}{row['mean_kld']:>12.2e}{row['kld_99']:>12.2e}{row['format_mean_kld']:>12.2e}", flush=True)
    facts = {"model": args.model.name, "text": text.description, "kv": args.kv}
    print(json.dumps({"bench": "engine_accuracy", **facts, "rows": rows}))


if __name__ == "__main__":
    main()
