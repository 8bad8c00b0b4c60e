"""What is left of decoding where another process keeps one core busy, beside llama.cpp in the same state?

A laptop is never idle. A program whose threads wait for one another by spinning, and cut the work into as many equal
parts as there are threads, stands still whenever one of its threads is taken off its core. Here a Python process spins
beside it; idle and busy, ours and theirs alternate, and figures are medians of each round's own. A small model
wants more new tokens, so that a run lasts much longer than the few milliseconds that a process is given at once.

    python bench/engine_busy.py OURS[=THEIRS.gguf] --llama-bench PATH [--runs 5] [--new-tokens 64] [--neighbours 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.engine.opening import open_runner
from fewbits.evals.llama_bench import LlamaBench, found
from fewbits.evals.speed import Load, Meter
from fewbits.runtime.compiled import cores

SETTLE = 0.3
"""Seconds that a neighbour has to start, and the system to place it."""
Round = dict[str, float]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that do nothing, as fast as they can."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(SETTLE)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def decode(ours: Meter, theirs: LlamaBench, new_tokens: int, threads: int, state: str) -> Round:
    """Tokens a second of both."""
    peer = theirs.run(0, new_tokens, threads).decode
    assert peer is not None
    return {f"ours {state}": ours.decode(1), f"theirs {state}": peer}


def one_round(ours: Meter, theirs: LlamaBench, args: argparse.Namespace) -> Round:
    rates = decode(ours, theirs, args.new_tokens, args.threads, "idle")
    with neighbours(args.neighbours):
        rates |= decode(ours, theirs, args.new_tokens, args.threads, "busy")
    kept = {f"{who} kept": rates[f"{who} busy"] / rates[f"{who} idle"] for who in ("ours", "theirs")}
    ratios = {f"ratio {state}": rates[f"ours {state}"] / rates[f"theirs {state}"] for state in ("idle", "busy")}
    return rates | kept | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", metavar="OURS[=THEIRS.gguf]")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="where it is not on PATH")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--neighbours", type=int, default=1, help="processes that keep a core busy each")
    parser.add_argument("--threads", type=int, default=cores())
    args = parser.parse_args()
    ours, _, theirs = args.pair.partition("=")
    load = Load(prompt_tokens=1, new_tokens=args.new_tokens, sequences=(1,), threads=args.threads)
    runner, _ = open_runner(Path(ours), slots=1, context=load.tokens, kv="f16", threads=args.threads, cache=True)
    meter, peer = Meter(Path(ours), load, runner, None), found(Path(theirs or ours), args.llama_bench)
    rounds = [one_round(meter, peer, args) for _ in range(args.runs)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print("| decode, tokens/s | idle | busy | kept |\n|---|---|---|---|")
    for who, name in (("ours", "fewbits"), ("theirs", "llama.cpp")):
        rates = " | ".join(f"{medians[f'{who} {state}']:.1f}" for state in ("idle", "busy"))
        print(f"| {name} | {rates} | {medians[f'{who} kept']:.0%} |")
    print(f"| ratio | {medians['ratio idle']:.2f}× | {medians['ratio busy']:.2f}× | |")
    facts = {"model": Path(ours).name, "threads": args.threads, "neighbours": args.neighbours, "runs": args.runs}
    print(json.dumps({"bench": "engine_busy", **facts, **medians}))


if __name__ == "__main__":
    main()
