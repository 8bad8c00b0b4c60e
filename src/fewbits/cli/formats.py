"""`fewbits formats`: the registry of formats as a table."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.console import Console

from fewbits.cli._print import number, table
from fewbits.errors import FormatError

ROOMY = 140  # columns that the whole table needs


@dataclass(frozen=True)
class Line:
    """One format. levels is None for plain floating point; file_types are the kinds of checkpoint that hold it."""

    name: str
    family: str
    group: int | str | None
    bits_per_weight: float
    levels: int | None
    file_types: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class Listing:
    """What `fewbits formats` prints. all: one row each rather than one for each family."""

    formats: tuple[Line, ...]
    all: bool


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "formats",
        help="all formats: bits per weight, levels, file types",
        description="The formats a tensor can be stored in, one row a family, with the group sizes to choose from.",
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'int4*' or 'nf4'")
    parser.add_argument("--all", action="store_true", help="one row for every format")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Listing:
    lines = tuple(line for line in _lines() if fnmatchcase(line.name, args.pattern))
    if not lines:
        raise FormatError(f"no format matches '{args.pattern}'; a pattern is a name or has wildcards, such as 'int4*'")
    return Listing(lines, all=args.all)


def show(result: Listing, console: Console) -> None:
    universal = [kind for kind in result.formats[0].file_types if all(kind in x.file_types for x in result.formats)]
    heading: tuple[str, ...] = ("format", ">bits", ">levels", "file types", "what it is")
    if result.all:
        rows = [_full(line, universal) for line in result.formats]
        console.print(table(heading, rows))
    else:
        # A narrow terminal does without the last column.
        columns = ("format", "variants", *heading[1:])[: None if console.width >= ROOMY else -1]
        rows = [_condensed(lines, universal)[: len(columns)] for lines in _families(result.formats)]
        console.print(table(columns, rows))
        console.print(
            "\nA name is a format with or without a variant: int4, int4-g128. A file type with * holds some only."
        )
    console.print(
        f"File types besides {' and '.join(universal)}. Bits are those of a weight and its share of the scales "
        "in a 4096 × 4096 matrix."
    )


def _full(line: Line, universal: list[str]) -> tuple[str, ...]:
    return line.name, f"{line.bits_per_weight:.3f}", _levels(line), _types([line], universal), line.summary


def _families(lines: tuple[Line, ...]) -> list[list[Line]]:
    families: dict[str, list[Line]] = {}
    for line in lines:
        families.setdefault(line.family, []).append(line)
    return list(families.values())


def _lines() -> list[Line]:
    from fewbits.checkpoint import KINDS
    from fewbits.formats import FORMATS
    from fewbits.formats.base import Grouped
    from fewbits.formats.explain import USUAL, bits_per_weight, family

    return [
        Line(
            name=name,
            family=family(format),
            group=format.group if isinstance(format, Grouped) else None,
            bits_per_weight=bits_per_weight(format),
            levels=None if format.levels is None else len(format.levels),
            file_types=tuple(
                kind.name for kind in KINDS.values() if kind.admits(kind.entry("model.weight", USUAL, format)) is None
            ),
            summary=format.summary,
        )
        for name, format in FORMATS.items()
    ]


def _condensed(lines: list[Line], universal: list[str]) -> tuple[str, ...]:
    first = lines[0]
    variants = " ".join(line.name.removeprefix(line.family) for line in lines if line.name != line.family)
    least, most = (number(bound(x.bits_per_weight for x in lines), 3) for bound in (min, max))
    bits = least if least == most else f"{least}–{most}"
    return first.family, variants, bits, _levels(first), _types(lines, universal), first.summary


def _levels(line: Line) -> str:
    return "" if line.levels is None else str(line.levels)


def _types(lines: list[Line], universal: list[str]) -> str:
    kinds = dict.fromkeys(kind for line in lines for kind in line.file_types if kind not in universal)
    return ", ".join(kind if all(kind in x.file_types for x in lines) else f"{kind}*" for kind in kinds)
