"""`fewbits train`: quantization in the training loop."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from fewbits.cli._curve import curve
from fewbits.cli._print import count, number, progress_bar, size
from fewbits.cli.quantize import _override
from fewbits.results import Training


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model in few bits",
        description="Train with the quantization in the loop: a model to be what it was in far fewer bits.",
    )
    _add_qat(parser.add_subparsers(metavar="COMMAND", required=True))


def _add_qat(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "qat",
        help="quantization-aware training: from a post-training result on, by the original's predictions",
        description="Quantize a model, then train weights, scales and norms as the file will hold them until its "
        "predictions are the original's again. Ctrl-C keeps the state, and the same command goes on from it.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a GGUF file in floating point")
    parser.add_argument("out", metavar="OUT", help="folder to make; a name ending in .gguf makes a GGUF file")
    parser.add_argument("--format", required=True, help="of the matrices, such as int2-g64, ternary or tq2_0")
    parser.add_argument("--data", required=True, metavar="FILE", help="text to train on: .txt, .jsonl, .parquet, hub:…")
    parser.add_argument("--teacher", metavar="MODEL", help="learn from this model instead of MODEL; same vocabulary")
    length = parser.add_argument_group("how long")
    length.add_argument("--minutes", type=float, help="of training (default 30, without --steps)")
    length.add_argument("--steps", type=int, help="of the optimizer, at most")
    how = parser.add_argument_group("how")
    how.add_argument("--start", default="gptq", metavar="METHOD", help="what it begins with (default %(default)s)")
    how.add_argument("--loss", choices=("divergence", "text"), default="divergence", help="default %(default)s")
    how.add_argument("--hidden", type=float, default=0.0, metavar="WEIGHT", help="of hidden states' errors in the loss")
    how.add_argument("--rate", type=float, help="of weights, in levels a step")
    how.add_argument("--batch", type=int, default=8, help="windows a step (default %(default)s)")
    how.add_argument("--accumulate", type=int, default=1, help="parts of a step, one after the other, to save memory")
    how.add_argument("--window", type=int, default=256, help="tokens of a window (default %(default)s)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    what = parser.add_argument_group("what is written", "as in `fewbits quantize`")
    what.add_argument("--inputs", metavar="FORMAT", help="round inputs of linear layers too: int8-token, int8-static …")
    what.add_argument("--vocabulary", metavar="FORMAT", help="of embeddings and output projection")
    what.add_argument("--override", metavar="REGEX=FORMAT", type=_override, action="append", default=[])
    what.add_argument("--pretokenizer", metavar="NAME", help="llama.cpp's, for a tokenizer fewbits does not know")
    what.add_argument("--as", dest="kind", metavar="KIND", help="file type")
    what.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores (%(default)s here)")
    what.add_argument("--no-verify", action="store_true", help="do not read the files back with another decoder")
    parser.set_defaults(run=_run_qat, show=show)


def _run_qat(args: argparse.Namespace) -> Training:
    from fewbits.pipeline._qat import Qat, train_qat
    from fewbits.train import Length, Loss

    minutes = 30.0 if args.minutes is None and args.steps is None else args.minutes
    text = args.loss == "text"
    qat = Qat(
        length=Length(minutes, args.steps),
        window=args.window,
        batch=args.batch,
        accumulate=args.accumulate,
        loss=Loss(divergence=0.0 if text else 1.0, hidden=args.hidden, text=1.0 if text else 0.0),
        teacher=args.teacher,
        seed=args.seed,
        device=args.device,
        **({} if args.rate is None else {"rate": args.rate}),
    )
    with progress_bar() as progress:
        return train_qat(
            args.model,
            args.out,
            format=args.format,
            data=args.data,
            qat=qat,
            start=args.start,
            inputs=args.inputs,
            kind=args.kind,
            vocabulary=args.vocabulary,
            overrides=dict(args.override),
            pretokenizer=args.pretokenizer,
            threads=args.threads,
            prove=not args.no_verify,
            progress=progress,
        )


def show(result: Training, console: Console) -> None:
    drawn = curve(result.curve, min(console.width, 100))
    if drawn:
        console.print(drawn, markup=False)
    console.print(
        f"\n{count(result.tokens)} tokens in {result.steps} steps, {number(result.seconds / 60, 3)} minutes in all; "
        f"on held-out text {number(result.before, 3)} → [bold]{number(result.after, 3)}[/] nats a token"
    )
    console.print(
        f"{size(result.source_bytes)} → {size(result.output_bytes)}: {number(result.bits_per_weight)} bits a weight "
        f"over {count(result.weights)} weights"
    )
    proof = f"verified with {result.verified_with}" if result.verified_with else "not verified"
    console.print(f"{Path(result.output)} ({result.kind}), {proof}", markup=False)
