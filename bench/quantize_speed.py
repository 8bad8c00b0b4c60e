"""How fast and in how much memory does fewbits round to nearest, beside llama-quantize in the same run?

Both read the same weights (llama-quantize from an FP16 GGUF file that fewbits makes first) and write to the same disk;
the runs alternate, so that whatever else the machine does falls on both. Whole processes are timed, start-up and flush
to disk included, with the source in the page cache. int4-g128 has no namesake there and runs beside Q4_0. Scales are
those of the range, but for q4_k, where both search them.

    python bench/random_llama.py /tmp/llama-1b
    python bench/quantize_speed.py /tmp/llama-1b --llama-quantize PATH [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FORMATS = {"q8_0": "Q8_0", "q4_0": "Q4_0", "int4-g128": "Q4_0", "q4_k": "Q4_K"}
SEARCHED = ("q4_k",)  # by both


@dataclass(frozen=True)
class Run:
    """One process: wall time, and the most it had in memory."""

    seconds: float
    peak_mb: float


def timed(command: list[str], out: Path) -> Run:
    """Run a command to its end; its output is removed again."""
    os.sync()  # dirty pages of the run before must not slow this one
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)  # the only call that tells one child's peak memory
        seconds = time.perf_counter() - began
        if process_failed := os.waitstatus_to_exitcode(status):
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process_failed}:\n{log.read().decode()[-2000:]}")
    for made in (out, out.with_suffix(".fewbits.json"), out.with_suffix(".Modelfile")):
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    return Run(seconds, usage.ru_maxrss / 1e3)


def fewbits(model: Path, out: Path, format: str, *, verify: bool = False) -> list[str]:
    command = [sys.executable, "-m", "fewbits", "quantize", str(model), str(out), "--format", format]
    command += ["--vocabulary", format] if format in SEARCHED else []  # a pure file
    method = "rtn" if format in SEARCHED else "rtn-plain"
    return [*command, "--method", method, "--json", *([] if verify else ["--no-verify"])]


def compare(
    model: Path, llama_quantize: Path, formats: list[str], runs: int, threads: int
) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        folder = Path(scratch)
        f16 = folder / "f16.gguf"
        subprocess.run(fewbits(model, f16, "fp16"), check=True, stdout=subprocess.DEVNULL)
        for ours, theirs in ((ours, theirs) for ours, theirs in FORMATS.items() if ours in formats):
            out = folder / (f"ours-{ours}.gguf" if ours != "int4-g128" else "ours")
            other = folder / "theirs.gguf"
            pairs = [
                (
                    timed(fewbits(model, out, ours), out),
                    timed([str(llama_quantize), "--pure", str(f16), str(other), theirs, str(threads)], other),
                )
                for _ in range(runs)
            ]
            rows.append(row(ours, theirs, pairs))
    return rows


def row(ours: str, theirs: str, pairs: list[tuple[Run, Run]]) -> dict[str, float | str]:
    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "format": ours,
        "llama_quantize_type": theirs,
        "seconds": median([a.seconds for a, _ in pairs]),
        "llama_quantize_seconds": median([b.seconds for _, b in pairs]),
        "ratio": median([a.seconds / b.seconds for a, b in pairs]),
        "peak_mb": median([a.peak_mb for a, _ in pairs]),
        "llama_quantize_peak_mb": median([b.peak_mb for _, b in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-quantize", type=Path, default=Path(shutil.which("llama-quantize") or "llama-quantize"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    rows = compare(args.model, args.llama_quantize, args.formats, args.runs, args.threads)
    print(f"{'format':<12}{'fewbits s':>11}{'llama-quantize s':>18}{'ratio':>8}{'peak MB':>10}{'its peak MB':>13}")
    for r in rows:
        print(
            f"{r['format']:<12}{r['seconds']:>11.2f}{r['llama_quantize_seconds']:>18.2f}{r['ratio']:>8.2f}"
            f"{r['peak_mb']:>10.0f}{r['llama_quantize_peak_mb']:>13.0f}"
        )
    print(json.dumps({"bench": "quantize_speed", "runs": args.runs, "rows": rows}))


if __name__ == "__main__":
    main()
