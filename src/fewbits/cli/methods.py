"""`fewbits methods`: the registry of methods as a table."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console

from fewbits.cli._print import table


@dataclass(frozen=True)
class Line:
    """One method. needs names the statistics of the layers' inputs that it cannot do without."""

    name: str
    needs: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class Listing:
    """What `fewbits methods` prints."""

    methods: tuple[Line, ...]


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "methods",
        help="all methods: how codes are chosen, and what each needs",
        description="The methods that choose codes. Any of them works with any format it can solve.",
    )
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Listing:
    from fewbits.methods import METHODS

    return Listing(tuple(Line(name, tuple(method.needs), method.summary) for name, method in METHODS.items()))


def show(result: Listing, console: Console) -> None:
    rows = [(line.name, ", ".join(line.needs) or "nothing", line.summary) for line in result.methods]
    console.print(table(("method", "needs", "how it chooses codes"), rows))
