"""`fewbits export`: a checkpoint as an ONNX file, proven."""

from __future__ import annotations

import argparse

from rich.console import Console

from fewbits.cli._print import number, progress_bar, size
from fewbits.results import OnnxExport, OnnxRun


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="an ONNX file for onnxruntime and edge devices",
        description="Write an encoder or a decoder (a whole text to its logits; no key-value cache) as an ONNX file "
        "whose linear layers are the checkpoint's own integers with their scales. Every weight is decoded from the "
        "file and compared bit for bit, and what onnxruntime computes is compared with what fewbits does. Needs "
        "fewbits[onnx].",
    )
    parser.add_argument("model", metavar="MODEL", help="any checkpoint that fewbits reads, quantized or not")
    parser.add_argument("out", metavar="OUT.onnx", help="a path that does not exist")
    parser.add_argument("--format", help="quantize a floating-point MODEL first, to nearest: int8, int4-g32, …")
    parser.add_argument("--inputs", metavar="FORMAT", help="beside --format: int8-token or int8-tensor inputs")
    parser.add_argument("--sequence", type=int, metavar="N", help="one text of N tokens, a fixed shape (default: any)")
    parser.add_argument(
        "--for",
        dest="way",
        choices=("portable", "onnxruntime"),
        default="portable",
        help="operators of the standard alone (default), or onnxruntime's MatMulNBits for weights in groups",
    )
    parser.add_argument("--no-run", action="store_true", help="leave out onnxruntime, and the comparison of outputs")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> OnnxExport:
    from fewbits.pipeline._onnx import export_onnx

    with progress_bar() as progress:
        return export_onnx(
            args.model,
            args.out,
            format=args.format,
            inputs=args.inputs,
            sequence=args.sequence,
            way=args.way,
            run=not args.no_run,
            progress=progress,
        )


def show(result: OnnxExport, console: Console) -> None:
    formats = [f"{count} weights in {name}" for name, count in result.formats.items()]
    console.print(
        f"{result.output}: {size(result.output_bytes)} (from {size(result.source_bytes)}), opset {result.opset}, "
        f"{', '.join([*formats, f'{result.kept} tensors in floating point'])}",
        markup=False,
    )
    console.print(
        "[bold green]proven[/] onnx.checker takes the file; every weight decodes bit for bit as the checkpoint's"
    )
    for each in result.runs:
        console.print(_said(each), markup=False)
    if not result.runs:
        console.print("onnxruntime was left out: the outputs were not compared", style="dim")


def _said(run: OnnxRun) -> str:
    how = "each operator by its definition" if run.exact else "as by default"
    parts = [f"relative difference {number(run.difference, 2)}"]
    if run.limit is not None:
        parts[0] += f" (rounding explains {number(run.limit, 2)})"
    parts.append(f"largest {number(run.largest, 2)}")
    if run.top1_agreement is not None:
        parts.append(f"top-1 agreement {100 * run.top1_agreement:.1f} % of {run.rows}")
    return f"onnxruntime, {how}: {', '.join(parts)}"
