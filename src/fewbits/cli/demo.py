"""`fewbits demo`: the whole story on the model that comes with fewbits, offline."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fewbits.cli._print import progress_bar, size, table
from fewbits.errors import VerificationError
from fewbits.results import Evaluation

FORMATS = ("int8", "int4-g32", "int3-g32", "int2-g32")
PROMPT = "It was a dark night, and the"
TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One model of the demo. nbytes is of its weights on disk; evaluation is None for the original."""

    format: str
    nbytes: int
    bits_per_weight: float
    decoder: str | None
    logit_kld: float | None
    evaluation: Evaluation | None
    sentence: str


@dataclass(frozen=True)
class Demo:
    """What `fewbits demo` prints."""

    model: str
    rows: tuple[Row, ...]


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="quantize, verify, evaluate and run the model that comes with fewbits",
        description="Take the bundled model (or another one) to 8, 4, 3 and 2 bits, prove each output, measure what "
        "it lost on text that the original writes, and let each continue a sentence.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face folder; by default the bundled one")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the outputs in this new folder")
    parser.add_argument("--prompt", default=PROMPT, help="a sentence to continue (default: %(default)r)")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Demo:
    if args.model is not None:
        return _demo(Path(args.model), args.keep, args.prompt)
    with as_file(files("fewbits") / "bundled" / "tiny") as folder:
        return _demo(folder, args.keep, args.prompt)


def show(result: Demo, console: Console) -> None:
    first = next(row.evaluation for row in result.rows if row.evaluation)
    rows = [_cells(row, first) for row in result.rows]
    console.print(table(("format", ">bytes", ">bits/weight", ">perplexity", ">KL divergence", ">top-1"), rows))
    console.print(f"\ntext: {first.text}, {first.tokens} predictions", style="dim", markup=False)
    decoders = sorted({row.decoder for row in result.rows if row.decoder})
    console.print(f"every tensor read back bit for bit by {' and '.join(decoders)}\n", style="dim", markup=False)
    console.print(table(("format", "continues"), [(row.format, Text(row.sentence)) for row in result.rows]))


def _cells(row: Row, first: Evaluation) -> tuple[str, ...]:
    bits, seen = f"{row.bits_per_weight:.2f}", row.evaluation
    if seen is None:
        return (row.format, size(row.nbytes), bits, f"{first.reference_perplexity.value:.2f}", "", "")
    return (
        row.format,
        size(row.nbytes),
        bits,
        f"{seen.perplexity.value:.2f}",
        f"{seen.mean_kld.value:.1e} ± {seen.mean_kld.error:.0e}",
        f"{100 * seen.top1_agreement.value:.1f} %",
    )


def _demo(model: Path, keep: Path | None, prompt: str) -> Demo:
    with tempfile.TemporaryDirectory() as scratch:
        if keep is not None:
            keep.mkdir(parents=True)
        folder = keep or Path(scratch)
        rows = [_original(model, prompt), *(_row(model, folder, format, prompt) for format in FORMATS)]
    return Demo(str(model), tuple(rows))


def _original(model: Path, prompt: str) -> Row:
    from fewbits.checkpoint import open_checkpoint

    _, reader = open_checkpoint(model)
    nbytes = sum(entry.nbytes for entry in reader.entries.values())
    bits = 8 * nbytes / sum(entry.weights for entry in reader.entries.values())
    return Row("original", nbytes, bits, None, None, None, _continued(model, model, prompt))


def _row(model: Path, folder: Path, format: str, prompt: str) -> Row:
    from fewbits.evals import evaluate
    from fewbits.pipeline import quantize, verify

    print(f"{format}: quantize, verify, evaluate", file=sys.stderr)
    out = folder / format
    with progress_bar() as progress:
        made = quantize(model, out, format=format, prove=False, progress=progress)
        proof = verify(out, model, progress=progress)
        if not proof.passed:
            raise VerificationError(f"{out}: {proof.mismatches[0]}; please report it")
        seen = evaluate(out, model, progress=progress)
    sentence = _continued(out, model, prompt)
    return Row(format, made.output_bytes, made.bits_per_weight, proof.decoder, proof.logit_kld, seen, sentence)


def _continued(model: Path, tokenizer: Path, prompt: str) -> str:
    """The prompt and the most likely words after it."""
    from transformers import AutoTokenizer

    from fewbits.engine import load

    words: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    inputs = words(prompt, return_tensors="pt", return_token_type_ids=False)
    loaded: Any = load(model)
    made = loaded.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.2)
    return " ".join(words.decode(made[0], skip_special_tokens=True).split())  # on one line
