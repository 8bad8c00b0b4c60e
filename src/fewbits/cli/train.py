"""`fewbits train`: quantization in the training loop, and adapters on a quantized base."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fewbits.cli._curve import curve
from fewbits.cli._print import count, number, progress_bar, size
from fewbits.cli.quantize import _override, exceptions, rounded_inputs
from fewbits.results import AdapterTraining, Training

if TYPE_CHECKING:
    from fewbits.train import Length


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model in few bits",
        description="Train a model to be what it was in far fewer bits (qat), or to learn something new as an adapter "
        "on a frozen quantized base (qlora). Ctrl-C keeps the state, and the same command goes on from it.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_qat(verbs)
    _add_qlora(verbs)


def _add_qat(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "qat",
        help="quantization-aware training: from a post-training result on, by the original's predictions",
        description="Quantize a model, then train weights, scales and norms as the file will hold them until its "
        "predictions are the original's again.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a GGUF file in floating point")
    parser.add_argument("out", metavar="OUT", help="folder to make; a name ending in .gguf makes a GGUF file")
    parser.add_argument("--format", required=True, help="of the matrices, such as int2-g64, ternary or tq2_0")
    parser.add_argument("--data", required=True, metavar="FILE", help="text to train on: .txt, .jsonl, .parquet, hub:…")
    parser.add_argument("--teacher", metavar="MODEL", help="learn from this model instead of MODEL; same vocabulary")
    _add_length(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--start", default="gptq", metavar="METHOD", help="what it begins with (default %(default)s)")
    how.add_argument("--loss", choices=("divergence", "text"), default="divergence", help="default %(default)s")
    how.add_argument("--hidden", type=float, default=0.0, metavar="WEIGHT", help="of hidden states' errors in the loss")
    how.add_argument("--rate", type=float, help="of weights, in levels a step")
    how.add_argument("--free-rate", type=float, help="of norms and whatever else stays in floating point, relative")
    _add_steps(how, batch=8, window=256)
    what = parser.add_argument_group("what is written", "as in `fewbits quantize`")
    what.add_argument("--inputs", metavar="FORMAT", help="round inputs of linear layers too: int8-token, int8-static …")
    what.add_argument("--vocabulary", metavar="FORMAT", help="of embeddings and output projection")
    what.add_argument("--override", metavar="REGEX=FORMAT", type=_override, action="append", default=[])
    what.add_argument("--pretokenizer", metavar="NAME", help="llama.cpp's, for a tokenizer fewbits does not know")
    what.add_argument("--as", dest="kind", metavar="KIND", help="file type")
    what.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores (%(default)s here)")
    what.add_argument("--no-verify", action="store_true", help="do not read the files back with another decoder")
    parser.set_defaults(run=_run_qat, show=show)


def _add_length(parser: argparse.ArgumentParser) -> None:
    length = parser.add_argument_group("how long")
    length.add_argument("--minutes", type=float, help="of training (default 30, without --steps)")
    length.add_argument("--steps", type=int, help="of the optimizer, at most")


def _add_steps(how: argparse._ArgumentGroup, *, batch: int, window: int) -> None:
    how.add_argument("--batch", type=int, default=batch, help="windows at a time (default %(default)s)")
    how.add_argument("--accumulate", type=int, default=1, help="so many times that many windows a step (default 1)")
    how.add_argument("--window", type=int, default=window, help="tokens of a window (default %(default)s)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")


def _add_qlora(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "qlora",
        help="an adapter (LoRA) on a frozen base of 4 bits",
        description="Quantize a model, freeze it, and train an adapter beside it; PEFT loads what is written.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or a GGUF file, quantized already or not")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder to make")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="a .jsonl of messages, of prompt and completion, or of text"
    )
    parser.add_argument(
        "--base", default="nf4-dq", metavar="FORMAT", help="of the frozen matrices (default %(default)s)"
    )
    parser.add_argument("--vocabulary", metavar="FORMAT", help="of embeddings and output projection (default: kept)")
    _add_length(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--rank", type=int, default=16, help="of the adapter (default %(default)s)")
    how.add_argument("--alpha", type=int, default=32, help="the adapter times alpha / rank (default %(default)s)")
    how.add_argument("--dropout", type=float, default=0.0, help="on what adapters read (default %(default)s)")
    how.add_argument("--residual", action="store_true", help="begin at what the base's format lost (LoftQ)")
    how.add_argument("--rate", type=float, default=2e-4, help="learning rate (default %(default)s)")
    how.add_argument(
        "--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="its state: 8 bytes a number, or 2"
    )
    how.add_argument("--no-checkpointing", action="store_true", help="keep activations: faster, more memory")
    _add_steps(how, batch=4, window=512)
    parser.set_defaults(run=_run_qlora, show=show_adapter)


def _length(args: argparse.Namespace) -> Length:
    from fewbits.train import Length

    return Length(30.0 if args.minutes is None and args.steps is None else args.minutes, args.steps)


def _note(text: str) -> None:
    """To stderr, like all that is not a result."""
    print(f"note: {text}", file=sys.stderr)


def _run_qlora(args: argparse.Namespace) -> AdapterTraining:
    from fewbits.pipeline._qlora import Qlora, train_qlora

    qlora = Qlora(
        length=_length(args),
        window=args.window,
        batch=args.batch,
        accumulate=args.accumulate,
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        residual=args.residual,
        rate=args.rate,
        optimizer=args.optimizer,
        checkpointing=not args.no_checkpointing,
        seed=args.seed,
        device=args.device,
    )
    with progress_bar() as progress:
        return train_qlora(
            args.model,
            args.adapter,
            data=args.data,
            base=args.base,
            vocabulary=args.vocabulary,
            qlora=qlora,
            progress=progress,
            announce=_note,
        )


def _run_qat(args: argparse.Namespace) -> Training:
    from fewbits.pipeline._qat import Qat, train_qat
    from fewbits.train import Loss

    text = args.loss == "text"
    qat = Qat(
        length=_length(args),
        window=args.window,
        batch=args.batch,
        accumulate=args.accumulate,
        loss=Loss(divergence=0.0 if text else 1.0, hidden=args.hidden, text=1.0 if text else 0.0),
        teacher=args.teacher,
        seed=args.seed,
        device=args.device,
        **{key: rate for key in ("rate", "free_rate") if (rate := getattr(args, key)) is not None},
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
            announce=_note,
        )


def show(result: Training, console: Console) -> None:
    _show_course(result, console, "text", digits=3)
    console.print(
        f"{size(result.source_bytes)} → {size(result.output_bytes)}: {number(result.bits_per_weight)} bits a weight "
        f"over {count(result.weights)} weights"
    )
    for line in (*exceptions(result.tensors), *rounded_inputs(result.tensors)):
        console.print(line, markup=False)
    proof = f"verified with {result.verified_with}" if result.verified_with else "not verified"
    console.print(f"{Path(result.output)} ({result.kind}), {proof}", markup=False)


def show_adapter(result: AdapterTraining, console: Console) -> None:
    _show_course(result, console, "samples", digits=4)
    share = result.base_bytes / result.base_bytes_in_16_bits
    console.print(
        f"rank {result.rank}: {count(result.trained_weights)} weights trained on a base in {result.base}, "
        f"{size(result.base_bytes)}, {number(100 * share, 3)} % of what it would be in 16 bits",
        markup=False,
    )
    for note in result.notes:
        console.print(note, style="dim", markup=False)
    console.print(result.output, markup=False)


def _show_course(result: Training | AdapterTraining, console: Console, held_out: str, digits: int) -> None:
    """The loss curve, and what the training came to."""
    drawn = curve(result.curve, min(console.width, 100))
    if drawn:
        console.print(drawn, markup=False)
    console.print(
        f"\n{count(result.tokens)} tokens in {result.steps} steps, {number(result.seconds / 60, 3)} minutes in all; on "
        f"held-out {held_out} {number(result.before, digits)} → [bold]{number(result.after, digits)}[/] nats a token"
    )
