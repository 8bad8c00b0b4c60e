"""`fewbits memory`: what a model needs at every format, and which machines hold it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fewbits.cli._print import count, number, size, table

if TYPE_CHECKING:
    from fewbits.plan.memory import Memory, Row


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="what fits where: bytes at every format, KV cache included",
        description="Bytes of a model's weights at every format, its KV cache, and the machines that hold both.",
    )
    parser.add_argument("model", metavar="SIZE|MODEL", help="a count of parameters (7B, 350M) or a checkpoint's path")
    parser.add_argument(
        "--context", type=_positive, default=8192, metavar="TOKENS", help="tokens cached (default 8192)"
    )
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at once (default 1)")
    parser.add_argument("--all", action="store_true", help="every format rather than one of each family")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Memory:
    from fewbits.formats import FORMATS
    from fewbits.plan.memory import memory

    parameters, cached, architecture = _model(args.model, args.context)
    return memory(
        parameters,
        cached,
        model=args.model,
        architecture=architecture,
        context=args.context,
        batch=args.batch,
        formats=FORMATS.values() if args.all else None,
    )


def show(result: Memory, console: Console) -> None:
    from fewbits.plan.memory import MACHINES, USABLE

    unit, name = (1e9, "GB") if result.rows[0].total >= 1e9 else (1e6, "MB")
    console.print(_title(result), "")
    columns = ("format", ">bits", ">weights", ">scales", ">with fp16 KV", ">int8 KV", "^fits")
    console.print(table(columns, [_cells(row, unit, MACHINES) for row in result.rows]))
    console.print(
        f"\nAll in {name}. fits: machines (GB) that hold weights, scales and an FP16 cache in {USABLE:.0%} of their "
        "memory. Every weight is counted at the format's bits, though norms and some embeddings stay in 16."
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _model(text: str, context: int) -> tuple[int, int, str]:
    """Parameters, numbers in the cache, and whose shape that is: of a size such as 7B, or of a checkpoint's headers."""
    from fewbits.plan.memory import nearest_published, parameter_count

    parameters = parameter_count(text) if not Path(text).exists() else None
    if parameters is not None:
        shape = nearest_published(parameters)
        return parameters, shape.numbers(context), shape.name

    from fewbits.checkpoint import open_checkpoint
    from fewbits.models import cache_shape

    _, reader = open_checkpoint(Path(text))
    weights = sum(entry.weights for entry in reader.entries.values())
    return weights, cache_shape(reader.config).numbers(context), Path(text).name


def _title(m: Memory) -> Text:
    sequences = "" if m.batch == 1 else f" × {m.batch} sequences"
    return Text.assemble(
        (m.model, "bold"),
        f"   {count(m.parameters)} weights\nKV cache of {m.context} tokens{sequences}: {size(m.kv_fp16)} in FP16, "
        f"{size(m.kv_int8)} in INT8 (the shape of {m.architecture})",
    )


def _cells(row: Row, unit: float, machines: tuple[int, ...]) -> tuple[str, ...]:
    return (
        row.format,
        number(row.bits_per_weight),
        *(_amount(x / unit) for x in (row.weights, row.scales, row.total, row.total_int8_kv)),
        " ".join(f"{m if m in row.fits else '·':>{len(str(m))}}" for m in machines),
    )


def _amount(x: float) -> str:
    return "0" if x == 0 else f"{x:.1f}" if x >= 100 else f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"
