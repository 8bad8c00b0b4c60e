"""The command line: one file per verb; parses, calls, prints.

A verb is a module with three functions:

    add(subparsers)         its arguments; ends in `set_defaults(run=run, show=show)`
    run(args) -> result     calls the library; returns one of its dataclasses and prints nothing to stdout
    show(result, console)   prints the result for people, tables by `_print`

A group of verbs (`gguf`) has subparsers of its own, each of which sets `run` and `show`.

`main` does what they have in common. With `--json` it prints the result as one JSON object instead of calling `show`,
so nothing else can reach stdout; progress and notes go to stderr. (Verbs that write text show it while it comes: see
`_writing`.) Of several processes that a launcher started, the first prints. A result with a property `passed` that is
false makes the exit code 1. Rooms that are slow to import (transformers) are imported inside `run`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fewbits import origin
from fewbits.cli import (
    bench,
    chat,
    convert,
    demo,
    evaluate,
    explain,
    export,
    formats,
    generate,
    gguf,
    imatrix,
    inspect,
    memory,
    merge,
    methods,
    plan,
    quantize,
    report,
    serve,
    train,
    verify,
)
from fewbits.cli._print import EXIT_CODES, console, error, printed, speaks
from fewbits.errors import ElsewhereError, FewbitsError, QualityError, VerificationError
from fewbits.results import as_json

VERBS = (
    plan,
    quantize,
    convert,
    train,
    merge,
    export,
    verify,
    evaluate,
    generate,
    chat,
    serve,
    bench,
    report,
    imatrix,
    inspect,
    formats,
    methods,
    memory,
    explain,
    gguf,
    demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage and --help end in SystemExit, as argparse does it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars; ours is the one on stderr
    # torch's threads spin while they wait, unless told otherwise before torch is imported: with one other busy process
    # on the machine an evaluation took six times as long. A short spin costs nothing there, and makes rows of small
    # operations up to three times as fast as none.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(_with_negative_numbers(given))
    try:
        with origin.running(given):
            result = args.run(args)
        if not speaks():
            pass
        elif args.json:
            print(json.dumps(as_json(result), ensure_ascii=False))
        else:
            sys.stdout.write(printed(console(), lambda c: args.show(result, c)))
        sys.stdout.flush()
        return 0 if getattr(result, "passed", True) else 1
    except FewbitsError as problem:
        _report(problem, as_object=args.json)
        return 1 if isinstance(problem, VerificationError | QualityError) else 3
    except KeyboardInterrupt as problem:
        _report(problem, as_object=args.json)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has seen enough; keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewbits",
        description="AI models in fewer bits: smaller, faster, and proven to still work.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for verb in VERBS:
        verb.add(subparsers)
    for command in _commands(parser):
        command.add_argument(
            "--json", action="store_true", help="print one JSON object to stdout, and nothing else there"
        )
        command.set_defaults(wrong_usage=command.error)
    return parser


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers that take a command's arguments: those below, or, of a group of verbs, those below that."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in below:
        for command in group.choices.values():
            yield from _commands(command)
    if not below:
        yield parser


def _with_negative_numbers(argv: Sequence[str]) -> list[str]:
    """Arguments such as -1e-3, which argparse takes for options, behind a space: then it takes them for values."""
    return [f" {arg}" if arg.startswith("-") and _is_number(arg) else arg for arg in argv]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _report(problem: BaseException, *, as_object: bool) -> None:
    if not speaks() and isinstance(problem, ElsewhereError | KeyboardInterrupt):
        return  # the process that speaks says it
    message = str(problem) or "interrupted"
    if as_object and speaks():
        details: dict[str, Any] = {"type": type(problem).__name__, "message": message}
        print(json.dumps({"error": details}, ensure_ascii=False))
    error(message)
