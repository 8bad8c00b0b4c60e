"""`fewbits merge`: an adapter and its model made one."""

from __future__ import annotations

import argparse

from rich.console import Console

from fewbits.cli._print import number, progress_bar, size, table
from fewbits.results import Merge, MergeWay

NAMES = ("adapter", "full", "round", "calibrate", "residual")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="an adapter (LoRA) and its model made one, measured",
        description="Merge an adapter of `fewbits train qlora`, or of PEFT, into its model, and measure how far what "
        "comes out is from the two. Plain rounding of the sum loses much of what was learned; --choose goes every way "
        "there is and takes the best.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder that the adapter was trained for, quantized or not")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("out", metavar="OUT", help="folder to make; a name ending in .gguf makes a GGUF file")
    parser.add_argument(
        "--format", default="int4-g128", help="of the matrices (default %(default)s); f16, bf16 or f32 merge in full"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--choose", action="store_true", help="go every way, keep the one of the least divergence")
    which.add_argument(
        "--way",
        choices=NAMES,
        default="calibrate",
        help="keep the adapter beside its base, merge in full, round the sum, quantize it with calibration (default), "
        "or do so with a low-rank correction beside it",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--method", default="gptq", help="of what is calibrated (default %(default)s)")
    how.add_argument("--calibration", metavar="TEXT", default="self", help="as for `quantize` (default: self)")
    how.add_argument("--text", metavar="FILE", help="to measure on (default: what the adapted model writes)")
    how.add_argument("--rank", type=int, help="of the correction (default: the adapter's)")
    how.add_argument(
        "--larger", type=float, default=10, metavar="PERCENT", help="than the rounded file, at most (default 10)"
    )
    how.add_argument("--vocabulary", metavar="FORMAT", help="of embeddings and output projection")
    how.add_argument("--as", dest="kind", metavar="KIND", help="file type")
    how.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Merge:
    from fewbits.pipeline import Calibration, Merging, merge

    merging = Merging(
        method=args.method,
        calibration=Calibration(args.calibration, device=args.device),
        text=args.text,
        rank=args.rank,
        larger=args.larger / 100,
    )
    with progress_bar() as progress:
        return merge(
            args.model,
            args.adapter,
            args.out,
            format=args.format,
            way=args.way,
            choose=args.choose,
            merging=merging,
            kind=args.kind,
            vocabulary=args.vocabulary,
            progress=progress,
        )


def show(result: Merge, console: Console) -> None:
    rows = [_row(way, taken=way.name == result.chosen) for way in result.ways]
    console.print(table(("", "way", ">bytes", ">divergence", ">seconds", ""), rows))
    console.print(
        f"\ndivergence from the base ({result.base}) with its adapter, nats a token; {result.text}", markup=False
    )
    console.print(f"[bold]{result.chosen}[/]: {result.reason}")
    console.print(result.output, markup=False)


def _row(way: MergeWay, *, taken: bool) -> tuple[str, ...]:
    if way.nbytes is None or way.kld is None:
        return ("", way.name, "", "", number(way.seconds, 3), f"not possible: {way.note}")
    divergence = f"{way.kld.value:.5f} ± {way.kld.error:.5f}"
    return ("→" if taken else "", way.name, size(way.nbytes), divergence, number(way.seconds, 3), way.summary)
