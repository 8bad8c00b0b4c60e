"""How fast does the engine run models, beside llama.cpp and beside the machine's limits, in the same rounds?

A pair is a checkpoint that fewbits reads and the GGUF file that llama-bench runs, `OURS=THEIRS.gguf`, or one GGUF file
for both. Ours and theirs alternate, so that whatever else the machine does falls on both; figures are medians, ratios
medians of each round's own. `fewbits bench` measures the same for one model and says what each figure is.

    python bench/random_llama.py /tmp/llama-1b
    fewbits quantize /tmp/llama-1b /tmp/q4_0.gguf --format q4_0 --method rtn-plain
    python bench/engine_speed.py /tmp/q4_0.gguf [/tmp/int4-g128=/tmp/q4_0.gguf …] --llama-bench PATH [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fewbits.evals.llama_bench import found
from fewbits.evals.speed import Load, benchmark
from fewbits.results import Benchmark, as_json

Pair = tuple[Path, Path]
HEAD = (
    "model",
    "prefill",
    "llama.cpp",
    "ratio",
    "decode",
    "llama.cpp",
    "ratio",
    "of bandwidth",
    "of integer peak",
    "together",
    "first token",
    "memory beside weights",
)


def pair(text: str) -> Pair:
    ours, _, theirs = text.partition("=")
    return Path(ours), Path(theirs or ours)


def cells(b: Benchmark) -> tuple[str, ...]:
    """A row; rates in tokens/s."""
    assert b.peer is not None
    roofline = b.roofline
    parts = (roofline.bandwidth_part, roofline.integer_part) if roofline else ()
    together = (f"{t.sequences}: {t.rate.median / b.decode.median:.2f}×" for t in b.together)
    return (
        Path(b.model).name,
        *(f"{rate.median:.1f}" for rate in (b.prefill, b.peer.prefill)),
        f"{b.peer.prefill_ratio.median:.2f}×",
        *(f"{rate.median:.1f}" for rate in (b.decode, b.peer.decode)),
        f"{b.peer.decode_ratio.median:.2f}×",
        *([f"{100 * part.median:.0f} %" for part in parts] or ["–", "–"]),
        ", ".join(together) or "–",
        f"{b.first_token_seconds.median:.2f} s",
        "–" if b.other_memory is None else f"{b.other_memory / 1e6:.0f} MB",
    )


def line(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=pair, nargs="+", metavar="OURS[=THEIRS.gguf]")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="where it is not on PATH")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    sizes = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "runs": args.runs}
    load = Load(**sizes, sequences=tuple(args.sequences), threads=args.threads)
    results = []
    for ours, theirs in args.pairs:
        print(f"{ours.name} beside {theirs.name}", file=sys.stderr)
        results.append(
            benchmark(ours, load, found(theirs, args.llama_bench), lambda text: print(text, file=sys.stderr))
        )
    print(line(HEAD), "|" + "---|" * len(HEAD), *(line(cells(result)) for result in results), sep="\n")
    for result in results:
        print(json.dumps({"bench": "engine_speed", **as_json(result)}))


if __name__ == "__main__":
    main()
