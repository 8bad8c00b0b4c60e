"""Documents from a table: a .jsonl file, a .parquet file, or a data set of the Hugging Face hub.

    FILE.jsonl[:FIELD]                        one object a line
    FILE.parquet[:COLUMN]                     read a few hundred rows at a time
    hub:OWNER/NAME[/CONFIG][:SPLIT[:COLUMN]]  streamed: nothing but the rows that are used is downloaded

The column is "text" and the split "train" unless the source says otherwise. Rows come in file order. The last two need
packages that fewbits itself does without: `pip install "fewbits[data]"`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, UnsupportedError

COLUMN = "text"
SPLIT = "train"
INSTALL = 'pip install "fewbits[data]"'
HUB = "hub:"

_TABLE = re.compile(r"(?P<path>.+\.(?:jsonl|parquet))(?::(?P<column>[^:/\\]+))?", re.DOTALL)
_DATASET = re.compile(r"hub:(?P<name>[^/:]+/[^/:]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>[^:]+)(?::(?P<column>.+))?)?")


def documents(source: str) -> Iterator[str] | None:
    """The documents of a source; None if it is no table, but a plain text.

    Iterating raises CheckpointError, with the row's number where there is one, for what cannot be read, and
    UnsupportedError where a package is missing.
    """
    if source.startswith(HUB):
        return _hub(source)
    table = _TABLE.fullmatch(source)
    if table is None:
        return None
    path, column = Path(table["path"]), table["column"] or COLUMN
    return _json_lines(path, column) if path.suffix == ".jsonl" else _parquet(path, column)


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _field(path, number, line, field)


def _field(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(
            f"{path}, line {number}: not JSON ({error}); a .jsonl file has one object a line"
        ) from error
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(
            f'{path}, line {number}: has no string "{field}"; each line is {{"{field}": "…"}}, and another field is '
            f"named by {path.name}:FIELD"
        )
    return text


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnsupportedError(f"{path}: reading .parquet files needs pyarrow; install it with: {INSTALL}") from error
    with readable(path), path.open("rb") as opened:
        try:
            with ParquetFile(opened) as file:
                names = file.schema_arrow.names
                if column not in names:
                    raise _no_column(str(path), column, names, f"{path.name}:COLUMN")
                batches = file.iter_batches(batch_size=256, columns=[column])
                yield from _strings(str(path), column, (text for batch in batches for text in batch[0].to_pylist()))
        except ArrowException as error:
            raise CheckpointError(f"{path}: not a readable .parquet file ({error}); write it anew") from error


def _hub(source: str) -> Iterator[str]:
    asked = _DATASET.fullmatch(source)
    if asked is None:
        raise CheckpointError(
            f"'{source}' does not name a data set of the hub; write hub:OWNER/NAME[/CONFIG][:SPLIT[:COLUMN]], such as "
            "hub:Salesforce/wikitext/wikitext-2-raw-v1:train:text"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnsupportedError(f"{source}: data sets of the hub need datasets; install it with: {INSTALL}") from error
    column = asked["column"] or COLUMN
    with _reachable(source):
        rows = load_dataset(asked["name"], asked["config"], split=asked["split"] or SPLIT, streaming=True)
        first: dict[str, Any] = next(iter(rows), {})
        if column not in first:
            raise _no_column(source, column, list(first), "hub:OWNER/NAME:SPLIT:COLUMN")
        yield from _strings(source, column, (row[column] for row in rows))


@contextmanager
def _reachable(source: str) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into CheckpointError.

    `datasets` passes on whatever its layers raise (its own classes, the hub's, aiohttp's, plain ValueErrors), and these
    have no base in common but Exception.
    """
    try:
        yield
    except (CheckpointError, GeneratorExit):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source}: cannot be streamed from the hub ({type(error).__name__}: {str(error)[:200]}); check its name, "
            "configuration, split and your connection, or name a file"
        ) from error


def _strings(source: str, column: str, values: Iterator[Any]) -> Iterator[str]:
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise CheckpointError(
                f"{source}, row {number}: '{column}' is {type(value).__name__}, not a string; name a column of text"
            )
        yield value


def _no_column(source: str, column: str, names: list[str], syntax: str) -> CheckpointError:
    return CheckpointError(f"{source}: has no column '{column}', only {', '.join(names) or 'none'}; name one: {syntax}")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a text into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); name an existing text file") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from error
