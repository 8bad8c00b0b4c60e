"""Folders as fewbits reads them against what another program made of them: FOLDER beside FOLDER.safetensors.

    python bench/interop/compare.py FOLDER ...

Weights must be equal bit for bit, and all that fewbits calls quantized must be there. `logits`, if they are, are of the
tokens 2, 3, … and are compared with those of `fewbits.load` by the norm of their difference. Prints a line and a JSON
object for each folder; the exit status is 1 if a weight differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.formats import Float


def main() -> None:
    results = [compare(Path(argument)) for argument in sys.argv[1:]]
    sys.exit(any(result["difference"] != 0 or result["missing"] for result in results))


def compare(folder: Path) -> dict[str, object]:
    theirs = load_file(f"{folder}.safetensors")
    expected = theirs.pop("logits", None)
    kind, reader = open_checkpoint(folder)
    quantized = {name for name, entry in reader.entries.items() if not isinstance(entry.format, Float)}
    difference = max(
        (float((reader.read(name).dequantize() - weight).abs().max()) for name, weight in theirs.items()), default=0.0
    )
    result = {
        "folder": folder.name,
        "kind": kind.name,
        "formats": sorted({str(reader.entries[name].format) for name in quantized}),
        "matrices": len(theirs),
        "missing": sorted(quantized ^ theirs.keys()),
        "difference": difference,
        "logits": None if expected is None else relative(folder, expected),
    }
    print(f"{folder.name}: {len(theirs)} matrices of {kind.name}, largest difference {difference:g}")
    print(json.dumps(result), flush=True)
    return result


def relative(folder: Path, expected: Tensor) -> float:
    """Norm of the difference of logits over the norm of theirs."""
    model = fewbits.load(folder)
    with torch.inference_mode():
        ours = model(torch.arange(2, 2 + len(expected))[None]).logits[0].float()
    return float((ours - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
