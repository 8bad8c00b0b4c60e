"""How good, how fast and how large in memory is each method at 4, 3 and 2 bits, beside its peers?

Everybody gets the same calibration windows, as token ids, and is measured by the same code on text that nobody
calibrated on. A peer's numbers are written down decoded, in float32 (`peers.harness`), so its file type costs it
nothing. `bits` is what a number of a quantized matrix takes with its share of scales and zero-points. Rows of one width
are sorted by mean KL divergence; ± is its standard error. Peers run in environments of their own, one after the other;
a peer that is not given is listed as skipped.

    python bench/methods.py MODEL --text TEST --calibration CALIBRATION \\
        --peer llm-compressor=PYTHON --peer gptqmodel=PYTHON --peer auto-round=PYTHON --peer hqq=PYTHON …
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import fewbits
from fewbits.evals import Windows, calibration_windows
from peers import Order, RunError, pythons, run

WIDTHS = ((4, 128), (4, 32), (3, 128), (2, 64))
METHODS = (
    "rtn-plain",
    "rtn",
    "hqq",
    "awq+rtn",
    "gptq-fast",
    "gptq",
    "awq+gptq",
    "rotate+gptq",
    "signround",
    "auto",
)
MINUTES = "4"  # of auto
HELD_OUT = 8  # windows that our guard looks at, beside those that everybody calibrates on
SCALE = 16  # bits a group
NF4_SCALE, NF4_DOUBLE = 32, 8 + 32 / 256


def ours(methods: list[str], widths: list[tuple[int, int]]) -> Iterator[Order]:
    for bits, group in widths:
        for method in methods:
            limit = {"minutes": MINUTES} if method == "auto" else {}
            yield Order("fewbits", bits, group, {"method": method, "held_out": str(HELD_OUT)} | limit)


def peers(widths: list[tuple[int, int]]) -> Iterator[Order]:
    """Each peer with the settings that it recommends, and those of its own that turned out better."""
    for bits, group in widths:
        for observer in ("memoryless_minmax", "memoryless_mse"):
            yield Order("llm-compressor", bits, group, {"method": "gptq", "observer": observer})
        yield Order("gptqmodel", bits, group, {"mse": "2.4"})
        yield Order("auto-round", bits, group, {"iters": "200"})
        yield Order("torchao", bits, group)
    yield Order("llm-compressor", 4, 128, {"method": "awq"})
    for bits in (4, 3, 2):
        yield Order("hqq", bits, 64)
    for double in ("false", "true"):
        yield Order("bitsandbytes", 4, 64, {"double": double})


def bits_per_number(order: Order) -> float:
    """Codes, scales and, where they are stored, zero-points."""
    overhead = {
        "gptqmodel": SCALE + order.bits,
        "auto-round": SCALE + order.bits,
        "hqq": 2 * SCALE,
        "bitsandbytes": NF4_DOUBLE if order.options.get("double") == "true" else NF4_SCALE,
    }
    return order.bits + overhead.get(order.who, SCALE) / order.group


def measure(order: Order, python: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Quantize and evaluate; a row of figures, or of the error."""
    row = {"who": order.who, "bits": order.bits, "group": order.group, "options": dict(order.options)}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out, ids = Path(folder) / "out", scratch / ("ours.npy" if order.who == "fewbits" else "peers.npy")
        try:
            made = run(order, python, args.model, out, ids)
        except RunError as error:
            return row | {"error": str(error)}
        seen = fewbits.evaluate(out, against=args.model, text=args.text)
    return row | {
        "bits_per_number": bits_per_number(order),
        "mean_kld": seen.mean_kld.value,
        "mean_kld_error": seen.mean_kld.error,
        "top1": seen.top1_agreement.value,
        "perplexity": seen.perplexity.value,
        "perplexity_ratio": seen.perplexity_ratio.value,
        **asdict(made),
    }


def write_windows(args: argparse.Namespace, scratch: Path) -> Windows:
    """The windows that everybody calibrates on; ours are followed by those that the guard looks at."""
    found = calibration_windows(args.calibration, args.model, args.windows + HELD_OUT, args.length)
    if len(found.ids) < args.windows + HELD_OUT:
        raise SystemExit(f"{found.description}: {args.windows + HELD_OUT} are needed; give a longer text or --windows")
    np.save(scratch / "ours.npy", found.ids.numpy())
    np.save(scratch / "peers.npy", found.ids[: args.windows].numpy())
    return Windows(found.ids[: args.windows], f"the first {args.windows} of {found.description}")


def name(row: dict[str, Any]) -> str:
    """Who, the method of those who have several, and settings that are not the default."""
    options = {key: value for key, value in row["options"].items() if key not in ("method", "held_out")}
    settings = " ".join(f"{key}={value}" for key, value in options.items())
    return " ".join(filter(None, (row["who"], row["options"].get("method"), settings)))


def line(row: dict[str, Any]) -> str:
    start = f"| {row['bits']} | {row['group']} | {name(row)} |"
    if "error" in row:
        return f"{start} failed: {row['error'].splitlines()[-1][:80] if row['error'] else 'no output'} |||||||"
    return (
        f"{start} {row['bits_per_number']:.2f} | {row['mean_kld']:.5f} ± {row['mean_kld_error']:.5f} "
        f"| {row['top1']:.3f} | {row['perplexity']:.2f} | {row['perplexity_ratio']:.4f} "
        f"| {row['seconds']:.1f} | {row['peak_mb']:.0f} |"
    )


HEAD = (
    "| width | group | who and how | bits | mean KL divergence | top-1 | perplexity | ratio | seconds | peak MB |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, widest first, best first."""
    ordered = sorted(rows, key=lambda r: (-r["bits"], r.get("mean_kld", float("inf"))))
    return "\n".join((HEAD, *map(line, ordered)))


def width(text: str) -> tuple[int, int]:
    bits, group = text.split("-")
    return int(bits), int(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to evaluate on")
    parser.add_argument("--calibration", required=True, help="as `fewbits quantize --calibration`")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="our own (default: %(default)s)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's interpreter")
    parser.add_argument("--widths", nargs="*", type=width, default=list(WIDTHS), metavar="BITS-GROUP")
    args = parser.parse_args()
    known, rows = pythons(args.peer), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        windows = write_windows(args, scratch)
        for order in (*ours(args.methods, args.widths), *peers(args.widths)):
            if order.who in known:
                rows.append(measure(order, known[order.who], args, scratch))
                print(line(rows[-1]), flush=True)
    skipped = sorted({order.who for order in peers(args.widths)} - known.keys())
    print(f"\n{table(rows)}\n")
    print(f"calibrated on {windows.description} ({windows.digest[:12]}); skipped: {', '.join(skipped) or 'nobody'}")
    print(json.dumps({"bench": "methods", "model": args.model.name, "calibration": windows.digest, "rows": rows}))


if __name__ == "__main__":
    main()
