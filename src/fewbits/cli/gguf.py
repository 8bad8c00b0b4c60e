"""`fewbits gguf`: a GGUF model in several files, and in one again."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fewbits.cli._print import size

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?")


@dataclass(frozen=True)
class Written:
    """Files that a verb of this group wrote, and their bytes together."""

    files: tuple[str, ...]
    nbytes: int


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "gguf",
        help="split a GGUF file into parts, join them again",
        description="Cut a GGUF file into parts as llama.cpp does, for disks and hubs that limit a file's size, and "
        "join them again. Every command that reads a GGUF file takes the first part for the whole.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_split(verbs)
    _add_merge(verbs)


def _add_split(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("split", help="one file into PREFIX-00001-of-0000N.gguf …")
    parser.add_argument("file", metavar="IN.gguf", type=Path, help="the file, or the first part, to cut anew")
    parser.add_argument("prefix", metavar="PREFIX", type=Path, help="folder and beginning of the parts' names")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--max-size", metavar="SIZE", type=_bytes, help="of a part's tensors, such as 2GB or 500MB")
    limit.add_argument("--max-tensors", metavar="N", type=int, help="in a part")
    parser.set_defaults(run=_split, show=show)


def _add_merge(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("merge", help="all parts into one file")
    parser.add_argument("first", metavar="FIRST_PART", type=Path, help="…-00001-of-0000N.gguf; the rest lies beside it")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="a path that does not exist")
    parser.set_defaults(run=_merge, show=show)


def _bytes(text: str) -> int:
    found = SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 2GB, 500MB or 1000000")
    return int(float(found[1]) * UNITS[found[2]])


def _split(args: argparse.Namespace) -> Written:
    from fewbits.checkpoint.gguf_parts import split

    return _written(split(args.file, args.prefix, max_bytes=args.max_size, max_tensors=args.max_tensors))


def _merge(args: argparse.Namespace) -> Written:
    from fewbits.checkpoint.gguf_parts import merge

    merge(args.first, args.out)
    return _written([args.out])


def _written(paths: list[Path]) -> Written:
    return Written(tuple(map(str, paths)), sum(path.stat().st_size for path in paths))


def show(result: Written, console: Console) -> None:
    for file in result.files:
        console.print(file, markup=False)
    console.print(f"{len(result.files)} {'file' if len(result.files) == 1 else 'files'}, {size(result.nbytes)}")
