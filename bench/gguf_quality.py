"""At the same size, how far is a GGUF file of ours from the original, and how far llama-quantize's? llama.cpp judges.

Stock llama-perplexity writes down the FP16 model's predictions on a test text, then measures every file against them
(`--kl-divergence`): mean KL divergence in nats a token, median, 99th percentile, how often the most likely token is the
same, ratio of perplexities. Its ± is a standard error that takes tokens as independent. The second half of each window
is counted. `floor` is the FP16 file against its own predictions: they are kept in 16 bits, and less cannot be measured.

Everybody is calibrated on the same windows. llama-quantize gets them as an importance matrix (`fewbits.imatrix`) that,
unlike one of llama.cpp's own, has an entry for tied embeddings: that is worth 5 % of divergence to it where they are
quantized to 4 bits. `ratio` is ours over theirs, for the same preset.

The pure file of `IQ2_S` is one of IQ2_XS to llama-quantize, and that of `IQ2_M` one of IQ2_S.

    python bench/gguf_quality.py MODEL --calibration CALIBRATION --text TEST --llama BIN_DIR
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

import fewbits
from fewbits.evals.text import beginning
from fewbits.pipeline import make_plan
from fewbits.plan.planned import Budget

PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
PURE = ("Q4_K", "Q3_K")
STANDS_FOR = {"IQ3_S": "q3_k", "IQ2_M": "q2_k", "IQ2_S": "q2_k"}
"""Formats of ours that are compared with types that fewbits does not write."""
WINDOWS, LENGTH = 128, 256
ATTEMPTS, LAST_LABEL = 8, "Same top p:"

Make = Callable[[Path, Path, Path, int, str], None]
"""Writes a file: (model, out, calibration text, largest size in bytes, llama.cpp's preset or type)."""


@dataclass(frozen=True)
class Ours:
    """A way to make files. pure: whether its rivals are files of one type, or llama.cpp's presets."""

    name: str
    pure: bool
    make: Make


@dataclass(frozen=True)
class Row:
    """A file's figures, as llama-perplexity prints them."""

    preset: str
    tool: str
    nbytes: int
    bits_per_weight: float
    mean_kld: float
    mean_kld_error: float
    median_kld: float
    kld_99: float
    top1: float
    perplexity_ratio: float


def calibrated(method: str) -> Make:
    """Every matrix in the format that a pure file of llama.cpp's has, by a method that runs the model on the text."""

    def make(model: Path, out: Path, calibration: Path, limit: int, preset: str) -> None:
        text = fewbits.Calibration(calibration, WINDOWS, LENGTH)
        format = format_for(preset)
        fewbits.quantize(
            model, out, format=format, vocabulary=format, method=method, calibration=text, weigh=True, prove=False
        )

    return make


def weighed(model: Path, out: Path, calibration: Path, limit: int, preset: str) -> None:
    """The same by rounding with errors weighed by an importance matrix, the vocabulary's too."""
    format = format_for(preset)
    with tempfile.TemporaryDirectory() as scratch:
        matrix = Path(scratch) / "imatrix.gguf"
        fewbits.imatrix(model, matrix, calibration=fewbits.Calibration(calibration, WINDOWS, LENGTH))
        fewbits.quantize(model, out, format=format, vocabulary=format, imatrix=matrix, prove=False)


def format_for(preset: str) -> str:
    """Our name for a type of llama.cpp's."""
    return STANDS_FOR.get(preset, preset.lower())


def planned(method: str) -> Make:
    """A plan for a file no larger than the rival's, quantized with it."""

    def make(model: Path, out: Path, calibration: Path, size: int, _: str) -> None:
        text = fewbits.Calibration(calibration, windows=WINDOWS, length=LENGTH, limit=float("inf"))
        made = make_plan(model, Budget(size=size), method=method, calibration=text, trial=False)
        fewbits.quantize(model, out, plan=made, method=method, calibration=text)

    return make


OURS = (
    Ours("rtn", True, calibrated("rtn")),
    Ours("rtn, imatrix", True, weighed),
    Ours("gptq", True, calibrated("gptq")),
    Ours("plan, gptq", False, planned("gptq")),
)


@dataclass(frozen=True)
class Judge:
    """llama.cpp's tools, and the predictions of the FP16 model."""

    binaries: Path
    base: Path
    context: int
    weights: int

    def run(self, tool: str, *args: str | Path) -> str:
        """A tool's output. Ends the program with the tool's last words if it fails."""
        command = [str(self.binaries / tool), *map(str, args)]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.binaries)}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
        return done.stdout + done.stderr

    def write_base(self, model: Path, text: Path, chunks: int) -> None:
        """Keep the model's predictions of the text."""
        size = (*self._size(), "--chunks", str(chunks))
        self.run("llama-perplexity", "-m", model, "-f", text, "--kl-divergence-base", self.base, *size)

    def measured(self, file: Path, preset: str, tool: str) -> Row:
        """How far a file is from the FP16 model."""
        said = self._statistics(file)
        mean, error = _numbers(said, "Mean    KLD")
        return Row(
            preset=preset,
            tool=tool,
            nbytes=file.stat().st_size,
            bits_per_weight=8 * file.stat().st_size / self.weights,
            mean_kld=mean,
            mean_kld_error=error,
            median_kld=_numbers(said, "Median  KLD")[0],
            kld_99=_numbers(said, "99.0%   KLD")[0],
            top1=_numbers(said, "Same top p")[0] / 100,
            perplexity_ratio=_numbers(said, "Mean PPL(Q)/PPL(base)")[0],
        )

    def _statistics(self, file: Path) -> str:
        """What llama-perplexity says of a file. On a busy machine it may end before its last lines are printed (a
        thread of its own prints them, and is not waited for: llama.cpp issue 22142): then it is asked again.
        """
        compared = ("--kl-divergence", *self._size())
        for _ in range(ATTEMPTS):
            said = self.run("llama-perplexity", "-m", file, "--kl-divergence-base", self.base, *compared)
            if LAST_LABEL in said:
                return said
        raise SystemExit(
            f"llama-perplexity did not print '{LAST_LABEL}' in {ATTEMPTS} runs; its last words:\n{said[-2000:]}"
        )

    def _size(self) -> list[str]:
        """Tokens in a window, and threads."""
        return ["-c", str(self.context), "-t", str(os.cpu_count() or 1)]


def _numbers(said: str, label: str) -> list[float]:
    """The numbers behind a label of llama-perplexity's statistics."""
    line = re.search(rf"^{re.escape(label)}\s*:(.*)$", said, flags=re.M)
    if line is None:
        raise SystemExit(f"llama-perplexity said nothing of '{label}'; is this another version of it?\n{said[-2000:]}")
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line[1])]


def check_tokens(base: Path, model: Path, text: Path) -> None:
    """llama.cpp must have read the text as fewbits does: the same tokens, and a beginning token or none."""
    with base.open("rb") as file:
        length, _, chunks = struct.unpack("<8xIii", file.read(20))
        theirs = np.fromfile(file, "<i4", length * chunks)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if beginning(tokenizer) is not None:
        raise SystemExit(f"{model}: begins texts with a token, which llama-perplexity puts over the window's first one")
    encoded = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if not np.array_equal(theirs, encoded[: len(theirs)]):
        raise SystemExit(f"{text}: llama.cpp's tokens are not those of the model's own tokenizer")


def rows(args: argparse.Namespace, work: Path) -> Iterator[Row]:
    """One row a file, theirs first of each preset; before all of them the floor."""
    full, matrix = work / "fp16.gguf", work / "imatrix.gguf"
    made = fewbits.quantize(args.model, full, format="fp16", prove=False)
    fewbits.imatrix(args.model, matrix, calibration=fewbits.Calibration(args.calibration, WINDOWS, LENGTH))
    judge = Judge(args.llama, work / "base.kld", args.context, made.weights)
    judge.write_base(full, args.text, args.chunks)
    check_tokens(judge.base, args.model, args.text)
    yield judge.measured(full, "F16", "floor")
    for preset, pure in [*((p, False) for p in args.presets), *((p, True) for p in args.pure)]:
        theirs = work / f"llama-{preset}{'-pure' * pure}.gguf"
        judge.run("llama-quantize", *["--pure"] * pure, "--imatrix", matrix, full, theirs, preset)
        name = f"{preset}{' pure' * pure}"
        yield judge.measured(theirs, name, "llama-quantize")
        for ours in (ours for ours in OURS if ours.pure == pure):
            out = work / f"{ours.name}-{preset}{'-pure' * pure}.gguf"
            ours.make(args.model, out, args.calibration, theirs.stat().st_size, preset)
            yield judge.measured(out, name, f"fewbits {ours.name}")


HEAD = (
    f"{'file':<14}{'made by':<22}{'bytes':>11}{'bits/w':>8}{'mean KLD':>22}{'median':>10}{'99 %':>10}{'top-1':>8}"
    f"{'ppl ratio':>11}{'ratio':>7}"
)


def line(row: Row, theirs: Row) -> str:
    ratio = "" if row is theirs else f"{row.mean_kld / theirs.mean_kld:>7.3f}"
    return (
        f"{row.preset:<14}{row.tool:<22}{row.nbytes:>11}{row.bits_per_weight:>8.3f}"
        f"{row.mean_kld:>12.6f} ± {row.mean_kld_error:.5f}{row.median_kld:>10.6f}{row.kld_99:>10.6f}{row.top1:>8.4f}"
        f"{row.perplexity_ratio:>11.5f}{ratio}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text that everybody is calibrated on")
    parser.add_argument("--text", type=Path, required=True, help="to judge on, which nobody is calibrated on")
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama-quantize and llama-perplexity")
    parser.add_argument("--presets", type=_names, default=PRESETS, help="of llama-quantize, joined by commas")
    parser.add_argument("--pure", type=_names, default=PURE, help="its types, for files of one type")
    parser.add_argument("--work", type=Path, help="empty folder for the files (default: one that is removed)")
    parser.add_argument("--context", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=160, help="windows to judge on (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the JSON line to, too")
    args = parser.parse_args()
    if args.text.resolve() == args.calibration.resolve():
        parser.error("--text must not be what everybody is calibrated on")
    return args


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def main() -> None:
    args, found, theirs = arguments(), list[Row](), dict[str, Row]()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(args, args.work or Path(scratch)):
            found.append(row)
            print(line(row, theirs.setdefault(row.preset, row)), flush=True)
    settings = {"model": args.model.name, "text": args.text.name, "calibration": args.calibration.name}
    settings |= {"context": args.context, "chunks": args.chunks}
    report = json.dumps({"bench": "gguf_quality", **settings, "rows": [asdict(row) for row in found]})
    print(report)
    if args.json:
        args.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
