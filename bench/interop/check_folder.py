"""fewbits' side of the comparison: does it read a folder to the very numbers of the tool that wrote or loaded it?

    python bench/interop/check_folder.py FOLDER NUMBERS.safetensors [--logits LOGITS.safetensors]

NUMBERS holds tensors as the tool dequantizes them, FP32, by transformers' names; `write_….py` make them. Every one that
the folder has must be equal, to the last bit but the sign of zero. Logits, of the tokens 2 … 65, must be within 1e-3 of
the tool's, relative to their norm. Exits with 1 if anything is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fewbits
from fewbits.checkpoint import open_checkpoint

CLOSE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("numbers", type=Path)
    parser.add_argument("--logits", type=Path)
    args = parser.parse_args()
    kind, reader = open_checkpoint(args.folder)
    theirs = load_file(args.numbers)
    missing = sorted(reader.entries.keys() - theirs.keys())
    differences = {
        name: float((reader.read(name).dequantize() - theirs[name]).abs().max())
        for name in reader.entries
        if name in theirs
    }
    found: dict[str, Any] = {
        "kind": kind.name,
        "formats": sorted({entry.format.name for entry in reader.entries.values()}),
        "tensors": len(differences),
        "missing": missing,
        "largest_difference": max(differences.values()),
    }
    if args.logits is not None:
        expected = load_file(args.logits)["logits"]
        with torch.inference_mode():
            ours = fewbits.load(args.folder)(torch.arange(2, 66).view(1, 64)).logits.float()
        found["logits"] = float((ours - expected).norm() / expected.norm())
    print(json.dumps(found))
    sys.exit(bool(missing or found["largest_difference"] or found.get("logits", 0.0) > CLOSE))


if __name__ == "__main__":
    main()
