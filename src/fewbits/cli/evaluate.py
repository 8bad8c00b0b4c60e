"""`fewbits evaluate`: what a model lost."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fewbits.cli._print import progress_bar, table
from fewbits.errors import UnsupportedError
from fewbits.results import Evaluation, Figure


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="what a model lost: KL divergence, perplexity, agreement",
        description="Measure a model against its original, each figure with its standard error.",
    )
    parser.add_argument("out", metavar="OUT", help="any checkpoint that fewbits reads")
    parser.add_argument("--against", metavar="MODEL", required=True, help="the original")
    parser.add_argument("--text", type=Path, metavar="FILE", help=".txt or .jsonl; by default the original writes it")
    parser.add_argument("--windows", type=int, default=24, help="how many windows of text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda … (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic: float32, bfloat16, float16")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Evaluation:
    import torch

    from fewbits.evals import evaluate
    from fewbits.pipeline import local_folder

    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedError(f"dtype '{args.dtype}' is not a floating-point type of torch; use float32 or bfloat16")
    with progress_bar() as progress:
        return evaluate(
            args.out,
            local_folder(args.against),
            text=args.text,
            windows=args.windows,
            length=args.length,
            device=args.device,
            dtype=dtype,
            progress=progress,
        )


def show(result: Evaluation, console: Console) -> None:
    rows = [
        ("mean KL divergence", *_figure(result.mean_kld, ".3e"), "nats a token; 0 is the original"),
        ("median KL divergence", *_figure(result.median_kld, ".3e"), ""),
        ("99th percentile", *_figure(result.kld_99, ".3e"), "the worst token in a hundred"),
        ("top-1 agreement", *_figure(result.top1_agreement, ".4f"), "same most likely token"),
        ("perplexity", *_figure(result.perplexity, ".3f"), f"original {result.reference_perplexity:.3f}"),
        ("perplexity ratio", *_figure(result.perplexity_ratio, ".4f"), "to the original, on the same tokens"),
    ]
    console.print(f"{result.model} against {result.against}", markup=False)
    console.print(f"{result.text}: {result.tokens} predictions\n", style="dim", markup=False)
    console.print(table(("", ">value", ">± error", ""), rows))
    if result.warning:
        console.print(f"\nwarning: {result.warning}", style="yellow", markup=False)


def _figure(figure: Figure, spec: str) -> tuple[str, str]:
    """Value and error; an error needs only its first digits."""
    return f"{figure.value:{spec}}", f"{figure.error:{spec.replace('3e', '1e')}}"
