"""What a run will need, said before it starts: memory, disk and time."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fewbits.checkpoint import Entry, Kind, Reader
from fewbits.checkpoint.base import FOREIGN_PART
from fewbits.errors import OutputError
from fewbits.formats import Float, Format
from fewbits.kernels.threads import workers
from fewbits.methods import TensorMethod
from fewbits.results import Estimate

TEMPORARIES = 18  # FP32 copies of a part that a thread has in memory, freed ones not yet given back included; measured
SAMPLE = 1 << 20  # weights that are quantized to learn how fast this machine is
PROOF_IMPORTS = {"compressed-tensors": 130_000_000, "gguf-py": 20_000_000, "transformers": 50_000_000}
"""Bytes in memory that the libraries take; measured."""
PROOF_BYTES = 88  # bytes in memory for each number that an independent decoder is asked for at a time; measured
PROOF_SECONDS = 12e-9  # a weight: hash, decode twice, compare, read the source again; measured on one machine


def estimate(
    entries: Sequence[Entry], method: TensorMethod, threads: int, part: int, *, kind: Kind, prove: bool
) -> Estimate:
    """Peak memory (bytes resident), disk (bytes written) and seconds of quantizing these entries.

    The time of quantizing is measured: a random part of a million weights goes through each format once. That of
    proving the output with the kind's decoder is a fixed one for each weight.
    """
    base = resident_memory()  # before the sample below adds to it
    weights = sum(entry.weights for entry in entries)
    at_once = max((_at_once(entry, method, part) for entry in entries), default=0)
    asked = min(max((entry.weights for entry in entries), default=0), FOREIGN_PART)
    with workers(1) as alone:  # as a part will be
        formats = {entry.format for entry in entries}
        per_weight = {format: alone.submit(_seconds_per_weight, method, format).result() for format in formats}
    work = sum(entry.weights * per_weight[entry.format] for entry in entries)
    quantizing = threads * at_once * TEMPORARIES * 4
    decoder = kind.decoder if prove else None
    proving = PROOF_IMPORTS.get(decoder, 0) + asked * PROOF_BYTES if decoder else 0
    return Estimate(
        peak_memory=base + max(quantizing, proving),
        disk=sum(kind.file_bytes(entry.format, entry.shape) for entry in entries),
        seconds=work / threads + (weights * PROOF_SECONDS if decoder else 0.0),
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
    return min(entry.weights, part) if entry.format.rowwise and method.rowwise else entry.weights


def _seconds_per_weight(method: TensorMethod, format: Format) -> float:
    """Of everything that is done to a part: quantize, pack, hash, decode, measure."""
    if isinstance(format, Float):
        return 1e-9  # a copy and its hash: far below anything that rounds
    w = torch.randn(SAMPLE // 1024, 1024, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    q = method.quantize(w, format, {})
    for array in q.pack().values():
        hashlib.sha256(array.contiguous().flatten().view(torch.uint8).numpy().data)
    torch.linalg.vector_norm(q.dequantize().sub_(w))
    return (time.perf_counter() - began) / SAMPLE
