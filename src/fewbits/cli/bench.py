"""`fewbits bench`: how fast a model runs, beside what the machine can do at most, and beside llama.cpp."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fewbits.cli._print import number, size, table
from fewbits.results import Benchmark, Measured, Roofline

PEER = "llama-bench:"


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="how fast a model runs: prefill, decode, first token, memory",
        description="Measure a model's speed, the part of the machine's limits that it reaches, and its memory. "
        "Figures are medians of rounds in which everything is measured once.",
    )
    parser.add_argument("out", metavar="OUT", help="any checkpoint that fewbits reads: a folder or a GGUF file")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of a prompt (default %(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="decoded, from an empty context (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default %(default)s)")
    parser.add_argument(
        "--sequences", type=_counts, default=(1, 8), metavar="N,N", help="decoded together (default 1,8)"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (default: as many as it takes)")
    parser.add_argument(
        "--kv", choices=("f16", "int8", "int4"), default="f16", help="keys and values are kept in (default %(default)s)"
    )
    parser.add_argument(
        "--against", type=_peer, metavar=f"{PEER}FILE.gguf", help="run llama.cpp's llama-bench in every round too"
    )
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="the program, where it is not on PATH")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Benchmark:
    from fewbits.evals.llama_bench import found
    from fewbits.evals.speed import Load, benchmark

    if args.llama_bench is not None and args.against is None:
        args.wrong_usage(f"--llama-bench goes with --against {PEER}FILE.gguf")
    load = Load(
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        sequences=args.sequences,
        runs=args.runs,
        context=args.context,
        kv=args.kv,
        threads=args.threads,
    )
    peer = None if args.against is None else found(args.against, args.llama_bench)
    return benchmark(Path(args.out), load, peer, _say)


def show(result: Benchmark, console: Console) -> None:
    console.print(Text.assemble((result.model, "bold"), f"   {result.runner}, {_counted(result.threads, 'thread')}"))
    rounds = "one round" if result.runs == 1 else f"medians of {result.runs} rounds"
    console.print(f"{rounds}; tokens drawn at random, keys and values in {result.kv}\n", style="dim")
    names = ("", ">median", ">least", ">most", "", f">{result.peer.program if result.peer else ''}", ">ratio")
    columns = names if result.peer else names[:5]
    console.print(table(columns, [row[: len(columns)] for row in _rows(result)]))
    if result.peer:
        console.print(
            f"\n{result.peer.program} ran {result.peer.model}, with the same threads", style="dim", markup=False
        )
    if result.roofline is None:
        console.print("\nThe machine's limits are left out: they are those of the compiled kernels.", style="dim")
    elif result.roofline.bandwidth_part.most > 1:
        console.print("\nWeights are read faster than from memory: caches hold them.", style="dim")


def _say(line: str) -> None:
    """A line on stderr; no progress bar, whose thread would take time from what is measured."""
    Console(stderr=True, highlight=False).print(line, style="dim", markup=False)


def _counts(text: str) -> tuple[int, ...]:
    """Distinct counts, in order."""
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _peer(text: str) -> Path:
    if not text.startswith(PEER) or text == PEER:
        raise argparse.ArgumentTypeError(f"{text!r} is not {PEER}FILE.gguf, the only peer there is")
    return Path(text.removeprefix(PEER))


def _rows(b: Benchmark) -> Iterator[tuple[str, ...]]:
    peer = b.peer
    prefill = (peer.prefill, peer.prefill_ratio) if peer else ()
    decode = (peer.decode, peer.decode_ratio) if peer else ()
    yield _row(f"prefill, {b.prompt_tokens} tokens", b.prefill, "tokens/s", *prefill)
    yield _row(f"decode, {b.new_tokens} tokens", b.decode, "tokens/s", *decode)
    for together in b.together:
        times = f"tokens/s, {number(together.rate.median / b.decode.median, 3)}× one"
        yield _row(f"decode, {together.sequences} sequences", together.rate, times)
    yield _row("first token", b.first_token_seconds, "s from a process' start")
    if b.roofline:
        yield from _limits(b.roofline)
    if b.other_memory is not None:
        weights = f"beside {size(b.weight_memory)} of weights" if b.weight_memory else "weights included"
        yield _alone("memory", b.other_memory, weights)
    if b.cache_bytes is not None:
        slots = max((1, *(together.sequences for together in b.together)))
        yield _alone("keys and values", b.cache_bytes, f"{_counted(slots, 'sequence')} of {b.context} tokens")


def _limits(r: Roofline) -> Iterator[tuple[str, ...]]:
    bandwidth = f"of {number(r.read_bandwidth.median / 1e9, 3)} GB/s, {size(r.bytes_per_token)} a token"
    yield _row("decode reads weights at", r.bandwidth_part, bandwidth, percent=True)
    if r.operations_per_token:
        peak = f"of {number(r.integer_peak.median / 1e12, 3)} TOPS of integers"
        yield _row("prefill multiplies at", r.integer_part, peak, percent=True)


def _row(name: str, ours: Measured, unit: str, *peer: Measured, percent: bool = False) -> tuple[str, ...]:
    def cell(x: float) -> str:
        return f"{100 * x:.1f} %" if percent else number(x)

    theirs, ratio = (number(peer[0].median), f"{number(peer[1].median, 3)}×") if peer else ("", "")
    return (name, cell(ours.median), cell(ours.least), cell(ours.most), unit, theirs, ratio)


def _alone(name: str, nbytes: int, unit: str) -> tuple[str, ...]:
    return (name, size(nbytes), "", "", unit, "", "")


def _counted(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"
