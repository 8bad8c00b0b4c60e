"""The ledger of an output: a line for every parameter of the source, and what it was calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.checkpoint._arrays import read_json
from fewbits.errors import CheckpointError


def ledger_path(out: Path) -> Path:
    """Where the ledger of an output lies: in its folder, or beside a GGUF file."""
    return out / "fewbits.json" if out.is_dir() else out.with_suffix(".fewbits.json")


def read_ledger(out: Path) -> dict[str, Any]:
    """The ledger of an output. Raises CheckpointError if it has none or it is damaged."""
    path = ledger_path(out)
    if not path.exists():
        raise CheckpointError(f"{path}: not found; only outputs of fewbits carry the ledger that verify needs")
    try:
        ledger = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not a ledger ({error}); the output is damaged, quantize again") from error
    lines = ledger.get("tensors")
    if not isinstance(lines, list) or not all(_is_line(line) for line in lines):
        raise CheckpointError(
            f"{path}: not a ledger (tensors must be a list of objects, each with a name and no error but a number); "
            "the output is damaged, quantize again"
        )
    return {**ledger, "tensors": {line["name"]: line for line in lines}}


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("name"), str) and isinstance(line.get("error", 0.0), float)
