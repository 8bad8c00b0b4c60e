"""How long do GPTQ and SignRound take, and in how much memory, beside llm-compressor and auto-round in the same run?

All quantize the same random Llama to 4 bits in groups of 128, on the same windows of random tokens, and alternate, so
that whatever else the machine does falls on both. Figures are medians; a ratio is the median of the runs' own ratios,
ours over theirs. Ours includes reading the model, eight more windows for the guard, and writing the files; theirs
neither loads nor saves.

    python bench/random_llama.py /tmp/llama-90m --hidden 768 --layers 12 --ffn 2048 --vocabulary 8192
    python bench/calibrated_speed.py /tmp/llama-90m --peer llm-compressor=PYTHON --peer auto-round=PYTHON [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peers import Order, Run, pythons, run

BITS, GROUP = 4, 128
HELD_OUT = 8


def pairs(steps: int) -> list[tuple[Order, Order]]:
    """Ours and theirs."""

    def ours(method: str, **options: str) -> Order:
        return Order("fewbits", BITS, GROUP, {"method": method, "held_out": str(HELD_OUT), **options})

    return [
        (ours("gptq"), Order("llm-compressor", BITS, GROUP, {"method": "gptq"})),
        (ours("gptq-fast"), Order("llm-compressor", BITS, GROUP, {"method": "gptq"})),
        (ours("signround", steps=str(steps)), Order("auto-round", BITS, GROUP, {"iters": str(steps)})),
    ]


def write_windows(args: argparse.Namespace, scratch: Path) -> None:
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (args.windows + HELD_OUT, args.length), generator=generator)
    np.save(scratch / "ours.npy", ids.numpy())
    np.save(scratch / "theirs.npy", ids[: args.windows].numpy())


def timed(order: Order, python: str, model: Path, scratch: Path) -> Run:
    out = scratch / "out"
    try:
        ids = scratch / ("ours.npy" if order.who == "fewbits" else "theirs.npy")
        return run(order, python, model, out, ids, save=False)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def compare(ours: Order, theirs: Order, args: argparse.Namespace, known: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        write_windows(args, Path(folder))
        runs = [
            (
                timed(ours, known[ours.who], args.model, Path(folder)),
                timed(theirs, known[theirs.who], args.model, Path(folder)),
            )
            for _ in range(args.runs)
        ]

    def median(value: Callable[[Run, Run], float]) -> float:
        return round(statistics.median(value(*each) for each in runs), 3)

    return {
        "method": ours.options["method"],
        "peer": runs[0][1].package,
        "seconds": median(lambda a, _: a.seconds),
        "peer_seconds": median(lambda _, b: b.seconds),
        "ratio": median(lambda a, b: a.seconds / b.seconds),
        "process_ratio": median(lambda a, b: a.process_seconds / b.process_seconds),
        "peak_mb": median(lambda a, _: a.peak_mb),
        "peer_peak_mb": median(lambda _, b: b.peak_mb),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["gptq", "gptq-fast", "signround"])
    parser.add_argument("--steps", type=int, default=50, help="of signround and auto-round")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    known, rows = pythons(args.peer), list[dict[str, Any]]()
    print(f"{'method':<12}{'peer':<26}{'s':>8}{'its s':>8}{'ratio':>8}{'process':>9}{'peak MB':>9}{'its peak':>10}")
    for ours, theirs in pairs(args.steps):
        if ours.options["method"] not in args.methods:
            continue
        if theirs.who not in known:
            print(f"{ours.options['method']:<12}{theirs.who}: skipped, no --peer {theirs.who}=PYTHON given")
            continue
        r = compare(ours, theirs, args, known)
        print(
            f"{r['method']:<12}{r['peer']:<26}{r['seconds']:>8.1f}{r['peer_seconds']:>8.1f}{r['ratio']:>8.2f}"
            f"{r['process_ratio']:>9.2f}{r['peak_mb']:>9.0f}{r['peer_peak_mb']:>10.0f}",
            flush=True,
        )
        rows.append(r)
    print(json.dumps({"bench": "calibrated_speed", "runs": args.runs, "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
