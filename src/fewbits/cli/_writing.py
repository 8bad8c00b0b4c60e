"""What the verbs that write text share: how a model is opened and asked, and text that is shown while it comes.

These verbs print before they return, unlike all others: a text is read as it is written. With `--json` they print
nothing but the result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fewbits.cli._print import number

if TYPE_CHECKING:
    from fewbits.engine import Engine, Piece

SAMPLING = {
    "--temperature": (float, "X", "0 is always the most likely token (default: what the checkpoint says, or 0.8)"),
    "--top-k": (int, "N", "draw from so many of the likeliest tokens"),
    "--top-p": (float, "P", "draw from the fewest tokens that together are so probable"),
    "--min-p": (float, "P", "draw from tokens that are so probable relative to the likeliest"),
    "--repetition-penalty": (float, "X", "divide the logits of tokens that are there already"),
    "--seed": (int, "N", "the same seed gives the same text"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="any checkpoint that fewbits reads: a folder or a GGUF file")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens (default: until the context is full)")
    for name, (kind, metavar, text) in SAMPLING.items():
        parser.add_argument(name, type=kind, metavar=metavar, help=text)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end in front of this text; may be repeated")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a text, prompt included")
    parser.add_argument(
        "--kv", choices=("f16", "int8", "int4"), default="f16", help="keys and values are kept in (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")


def opened(args: argparse.Namespace) -> Engine:
    from fewbits.engine import Engine

    return Engine(args.out, threads=args.threads, context=args.context, kv=args.kv)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of a text, by the names that the engine knows it by."""
    names = [name.removeprefix("--").replace("-", "_") for name in SAMPLING]
    return {name: getattr(args, name) for name in (*names, "max_tokens")} | {"stop": args.stop or ()}


class Clock:
    """When pieces came: seconds to the first, and tokens a second after that."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first = self.last = self.start
        self.tokens = 0

    def watched(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.last = time.perf_counter()
            self.first = self.first if self.tokens else self.last
            self.tokens += 1
            yield piece

    @property
    def to_first(self) -> float | None:
        """Seconds to the first token; None where none came."""
        return self.first - self.start if self.tokens else None

    def prefill(self, tokens: int) -> float | None:
        """Tokens of a prompt a second."""
        return tokens / self.to_first if self.to_first else None

    @property
    def decode(self) -> float | None:
        """New tokens a second behind the first one."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else None


def figures(prompt: int, clock: Clock, reused: int = 0) -> str:
    """One line: what went in and came out, and how fast. reused: tokens of the prompt that did not have to be run."""
    parts = [f"prompt {prompt} tokens" + (f" ({reused} known already)" if reused else "")]
    if (first := clock.to_first) is not None:
        parts += [f"prefill {_rate(clock.prefill(prompt - reused))}", f"first token after {number(first, 3)} s"]
        parts += [f"{clock.tokens} new tokens", f"decode {_rate(clock.decode)}"]
    return ", ".join(parts)


def say(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _rate(tokens: float | None) -> str:
    return "–" if tokens is None else f"{number(tokens, 3)} tokens/s"
