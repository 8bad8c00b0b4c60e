"""`fewbits inspect`: every tensor of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fewbits.cli._print import count, number, size, table


@dataclass(frozen=True)
class Line:
    """One tensor. error is the relative one that the ledger holds, None where nothing was quantized or no one says."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    error: float | None


@dataclass(frozen=True)
class Inspection:
    """What `fewbits inspect` prints."""

    path: str
    kind: str
    weights: int
    nbytes: int
    bits_per_weight: float
    tensors: tuple[Line, ...]
    adapted: int = 0  # layers that an adapter inside changes


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="every tensor of a checkpoint: format, shape, bytes, error",
        description="List a checkpoint's tensors and add them up. Reads headers only, so size does not matter.",
    )
    parser.add_argument("path", metavar="OUT", type=Path, help="a folder or GGUF file")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Inspection:
    from fewbits.checkpoint import open_checkpoint
    from fewbits.checkpoint.adapter import adapter_inside, read_adapter
    from fewbits.pipeline import errors_of

    kind, reader = open_checkpoint(args.path)
    adapter = adapter_inside(args.path)
    errors = errors_of(args.path)
    lines = tuple(
        Line(
            name=entry.name,
            format=entry.format.name,
            shape=entry.shape,
            nbytes=kind.file_bytes(entry.format, entry.shape),
            bits_per_weight=8 * kind.file_bytes(entry.format, entry.shape) / max(1, entry.weights),
            error=errors.get(entry.name),
        )
        for entry in reader.entries.values()
    )
    weights, nbytes = sum(e.weights for e in reader.entries.values()), sum(line.nbytes for line in lines)
    adapted = 0 if adapter is None else len(read_adapter(adapter))
    return Inspection(str(args.path), kind.name, weights, nbytes, 8 * nbytes / max(1, weights), lines, adapted)


def show(result: Inspection, console: Console) -> None:
    rows = [
        (
            line.name,
            line.format,
            "×".join(str(length) for length in line.shape),
            size(line.nbytes),
            f"{line.bits_per_weight:.3f}",
            "" if line.error is None else f"{100 * line.error:.2f} %",
        )
        for line in result.tensors
    ]
    console.print(table(("tensor", "format", ">shape", ">bytes", ">bits/weight", ">error"), rows))
    console.print(
        f"\n{result.path} ({result.kind}): {len(result.tensors)} tensors, {count(result.weights)} weights, "
        f"{size(result.nbytes)}, {number(result.bits_per_weight)} bits a weight",
        markup=False,
    )
    if result.adapted:
        console.print(f"an adapter inside adds low-rank matrices to {result.adapted} of them", markup=False)
