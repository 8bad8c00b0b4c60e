"""Do fewbits' GGUF blocks mean to gguf-py what they mean to fewbits, and are the plain ones gguf-py's own bytes?

Every matrix of a real model goes through each block format, plain and searched. Counts bytes and numbers that differ;
all counts must be zero.

    python bench/gguf_bytes.py MODEL
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from fewbits import format_named, quantize_tensor

BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def compare(model: Path, name: str) -> dict[str, int | str]:
    """Bytes and decoded numbers of one format over all matrices it can hold."""
    format, kind = format_named(name), gguf.GGMLQuantizationType[name.upper()]
    weights = encoded = decoded = 0
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                w = tensors.get_tensor(key).float()
                if w.ndim != 2 or w.shape[1] % 32:
                    continue
                weights += w.numel()
                plain = quantize_tensor(w, format, method="rtn-plain").pack()["blocks"].numpy()
                encoded += int(np.sum(plain != gguf.quants.quantize(w.numpy(), kind)))
                for method in ("rtn-plain", "rtn"):
                    q = quantize_tensor(w, format, method=method)
                    theirs = gguf.quants.dequantize(q.pack()["blocks"].numpy(), kind)
                    decoded += int(np.sum(theirs != q.dequantize().numpy()))
    return {"format": name, "weights": weights, "bytes_unlike_gguf_py": encoded, "numbers_unlike_gguf_py": decoded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    rows = [compare(args.model, name) for name in BLOCKS]
    print(f"{'format':<8}{'weights':>12}{'bytes unlike gguf-py':>23}{'numbers unlike gguf-py':>25}")
    for r in rows:
        print(f"{r['format']:<8}{r['weights']:>12}{r['bytes_unlike_gguf_py']:>23}{r['numbers_unlike_gguf_py']:>25}")
    print(json.dumps({"bench": "gguf_bytes", "rows": rows}))
    raise SystemExit(any(r["bytes_unlike_gguf_py"] or r["numbers_unlike_gguf_py"] for r in rows))


if __name__ == "__main__":
    main()
