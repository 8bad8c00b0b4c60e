"""`fewbits generate`: let a model continue a text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from fewbits.cli._writing import Clock, add_arguments, figures, opened, say, settings

if TYPE_CHECKING:
    from fewbits.engine import Engine, Piece


@dataclass(frozen=True)
class Token:
    """A token of the text with its logarithm of probability, and the likeliest ones with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Generation:
    """What was written, and how fast. Rates are in tokens a second, None where there was nothing to measure."""

    model: str
    text: str
    finish: str | None
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    first_token_seconds: float | None
    prefill_rate: float | None
    decode_rate: float | None
    tokens: tuple[Token, ...] | None
    line: str


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="let a model continue a text",
        description="Continue a text, shown as it is written; one line of figures follows on stderr.",
    )
    add_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads it from stdin")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: each token's log probability, and the N likeliest ones"
    )
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Generation:
    if args.logprobs is not None and not args.json:
        args.wrong_usage("--logprobs goes with --json, which has room for them")
    start = time.perf_counter()
    engine = opened(args)
    loaded = time.perf_counter() - start
    prompt = engine.text.encode(sys.stdin.read() if args.prompt == "-" else args.prompt).tolist()
    clock = Clock()
    pieces = _shown(clock, engine.stream(prompt, logprobs=args.logprobs, **settings(args)), quiet=args.json)
    return Generation(
        model=args.out,
        text="".join(piece.text for piece in pieces),
        finish=pieces[-1].finish,
        prompt_tokens=len(prompt),
        new_tokens=len(pieces),
        load_seconds=loaded,
        first_token_seconds=clock.to_first,
        prefill_rate=clock.prefill(len(prompt)),
        decode_rate=clock.decode,
        tokens=None if args.logprobs is None else tuple(_token(engine, piece) for piece in pieces),
        line=figures(len(prompt), clock),
    )


def show(result: Generation, _: Console) -> None:
    line = f"{result.line}; opened in {result.load_seconds:.2f} s"
    Console(stderr=True, highlight=False).print(line, style="dim", markup=False, soft_wrap=True)


def _shown(clock: Clock, stream: Iterator[Piece], *, quiet: bool) -> list[Piece]:
    """All pieces, each shown when it comes."""
    pieces = []
    for piece in clock.watched(stream):
        pieces.append(piece)
        if not quiet:
            say(piece.text)
    if not quiet:
        say("\n")
    return pieces


def _token(engine: Engine, piece: Piece) -> Token:
    assert piece.logprob is not None
    top = tuple((engine.text.token(token), logprob) for token, logprob in piece.top)
    return Token(engine.text.token(piece.token), piece.logprob, top)
