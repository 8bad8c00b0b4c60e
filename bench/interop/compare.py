"""Folders and files as fewbits reads and runs them against `FOLDER.safetensors`, what a tool made of them (`harness`).

    cd bench; python -m interop.compare FOLDER …

Weights must be equal to the last bit but the sign of zero, and all that fewbits calls quantized must be there. Logits
must be within 1e-3 of the tool's, by the norm of the difference over the norm of theirs; where layers round their
inputs (`layers.watched`), each layer's outputs must be, given the same input. Prints a row of a table and a JSON object
for each; exits with 1 if anything is not so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import fewbits
from fewbits.checkpoint import Reader, open_checkpoint
from fewbits.formats import Float
from interop.harness import INPUT, LOGITS, OUTPUT, TOKENS

CLOSE = 1e-3


def main() -> None:
    found = [compare(Path(argument)) for argument in sys.argv[1:]]
    sys.exit(any(not result["same"] for result in found))


def compare(folder: Path) -> dict[str, Any]:
    with safe_open(f"{folder}.safetensors", "pt") as opened:
        theirs = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tool = opened.metadata()["tool"]
    expected = {name: theirs.pop(name) for name in list(theirs) if name.endswith((LOGITS, INPUT, OUTPUT))}
    kind, reader = open_checkpoint(folder)
    quantized = {name for name, entry in reader.entries.items() if not isinstance(entry.format, Float)}
    missing = sorted(quantized - theirs.keys())
    difference = max(largest_difference(reader, name, weight) for name, weight in theirs.items())
    logits, layers = run(folder, expected) if expected else (None, None)
    result = {
        "folder": folder.name,
        "kind": kind.name,
        "formats": sorted({reader.entries[name].format.name for name in quantized}),
        "tool": tool,
        "weights": len(quantized),
        "missing": missing,
        "difference": difference,
        "logits": logits,
        "layers": layers,
        "same": not missing and difference == 0 and (layers or logits or 0.0) < CLOSE,
    }
    print(row(result))
    print(json.dumps(result), flush=True)
    return result


def row(result: dict[str, Any]) -> str:
    logits, layers = ("–" if result[key] is None else f"{result[key]:.1e}" for key in ("logits", "layers"))
    formats = ", ".join(result["formats"])
    cells = (result["folder"], result["kind"], formats, result["tool"], result["weights"], result["difference"])
    return f"| {' | '.join(str(cell) for cell in (*cells, logits, layers))} |"


def largest_difference(reader: Reader, name: str, weight: Tensor) -> float:
    """Between fewbits' numbers and the tool's; infinite where fewbits has none, or of another shape."""
    if name not in reader.entries or reader.entries[name].shape != weight.shape:
        return float("inf")
    return float((reader.read(name).dequantize() - weight).abs().max())


@torch.inference_mode()
def run(folder: Path, expected: dict[str, Tensor]) -> tuple[float, float | None]:
    """How far logits are from theirs, and the farthest of the layers that round their inputs, given their inputs."""
    model = fewbits.load(folder)
    logits = relative(model(torch.tensor([list(TOKENS)])).logits[0].float(), expected[LOGITS])
    names = [name.removesuffix(INPUT) for name in expected if name.endswith(INPUT)]
    layers = [relative(model.get_submodule(n)(expected[n + INPUT]), expected[n + OUTPUT]) for n in names]
    return logits, max(layers, default=None)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of theirs."""
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    main()
