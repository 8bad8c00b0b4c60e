"""The ledger of an output: a line for every parameter of the source, and what it was calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError


def ledger_path(out: Path) -> Path:
    """Where the ledger of an output lies: in its folder, or beside a GGUF file."""
    return out / "fewbits.json" if out.is_dir() else out.with_suffix(".fewbits.json")


def read_ledger(out: Path) -> dict[str, Any]:
    """The ledger of an output. Raises CheckpointError if it has none or it is damaged."""
    path = ledger_path(out)
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        return {**ledger, "tensors": {line["name"]: line for line in ledger["tensors"]}}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: not found; only outputs of fewbits carry the ledger that verify needs"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a ledger ({error}); the output is damaged, quantize again") from error
