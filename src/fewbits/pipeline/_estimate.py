"""What a run will need, said before it starts: memory, disk and time."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fewbits.checkpoint import Entry, Reader
from fewbits.errors import OutputError
from fewbits.formats import Float
from fewbits.methods import TensorMethod
from fewbits.results import Estimate

TEMPORARIES = 6  # FP32 copies of a part that rounding, decoding and packing keep at once, measured
SAMPLE = 1 << 20  # weights that are quantized to learn how fast this machine is


def estimate(entries: Sequence[Entry], method: TensorMethod, threads: int, part: int) -> Estimate:
    """Peak memory (bytes resident), disk (bytes written) and seconds of quantizing these entries.

    Time is measured, not guessed: a random part of a million weights goes through each format once.
    """
    disk = sum(entry.nbytes for entry in entries)
    largest = max((_at_once(entry, method, part) for entry in entries), default=0)
    per_weight = {format: _seconds_per_weight(method, format) for format in {entry.format for entry in entries}}
    work = sum(torch.Size(entry.shape).numel() * per_weight[entry.format] for entry in entries)
    return Estimate(
        peak_memory=resident_memory() + threads * largest * TEMPORARIES * 4,
        disk=disk,
        seconds=work / threads,
    )


def check_room(out: Path, disk: int) -> None:
    """Raise OutputError if the disk that will hold `out` has less room than that."""
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < disk:
        raise OutputError(
            f"{out}: needs {disk / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; "
            "free some space or choose another disk"
        )


def resident_memory() -> int:
    """Peak bytes that this process has had in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def source_bytes(reader: Reader) -> int:
    return sum(entry.nbytes for entry in reader.entries.values())


def _at_once(entry: Entry, method: TensorMethod, part: int) -> int:
    """Weights of an entry that are in memory at once: a part, or everything where rows cannot be split off."""
    whole = torch.Size(entry.shape).numel()
    return min(whole, part) if entry.format.rowwise and method.rowwise else whole


def _seconds_per_weight(method: TensorMethod, format: object) -> float:
    if isinstance(format, Float):
        return 5e-10  # a copy: bound by memory, far below anything that rounds
    w = torch.randn(SAMPLE // 1024, 1024, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    method.quantize(w, format).pack()  # type: ignore[arg-type]
    return (time.perf_counter() - began) / SAMPLE
