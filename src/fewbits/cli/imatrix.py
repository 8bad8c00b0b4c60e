"""`fewbits imatrix`: what each matrix reads, as an importance matrix for llama.cpp."""

from __future__ import annotations

import argparse

from rich.console import Console

from fewbits.cli._print import count, number, progress_bar
from fewbits.results import ImportanceReport


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "imatrix",
        help="an importance matrix, for llama-quantize and `quantize --imatrix`",
        description="Run a model on a text and write the mean x² of what its matrices read, as llama.cpp keeps it.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or a hub name when online")
    parser.add_argument("out", metavar="OUT", help="GGUF file to make")
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="self",
        help="a .txt or .jsonl file, FILE.parquet:COLUMN, hub:NAME:SPLIT:COLUMN, or self: text that the model writes "
        "(the default)",
    )
    parser.add_argument("--windows", type=int, default=128, help="of text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where blocks run: cpu, cuda (default %(default)s)")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> ImportanceReport:
    from fewbits.pipeline import Calibration, imatrix

    calibration = Calibration(args.calibration, args.windows, args.length, device=args.device)
    with progress_bar() as progress:
        return imatrix(args.model, args.out, calibration=calibration, progress=progress)


def show(result: ImportanceReport, console: Console) -> None:
    text = result.calibration
    console.print(
        f"{result.output}: importance of the columns of {len(result.tensors)} matrices, {number(result.seconds, 3)} s",
        markup=False,
    )
    console.print(f"{text.text} ({count(text.tokens)} tokens, {text.digest[:12]})", style="dim", markup=False)
