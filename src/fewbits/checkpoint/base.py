"""What every kind of checkpoint has in common: entries, a reader, a writer.

A checkpoint is a set of named entries, each a tensor of a known logical shape in a known format; tensors that stay in
floating point are entries too, in the format that is their dtype. All of it is declared before the first byte is
written, so a file's header comes first and its data can be streamed: nobody ever holds a whole model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import ActivationFormat, Float, Format, QTensor

ARRAYS, ARRAY_HEADER = 4, 120  # of an entry in safetensors files, at most; bytes of an array's line beside its name
FOREIGN_PART = 1 << 22  # numbers that an independent decoder is asked for at a time


def row_slabs(shape: tuple[int, ...], numbers: int, multiple: int = 1) -> Iterator[range]:
    """Runs of rows of a tensor of this shape, each of about so many numbers, starting at multiples of `multiple`."""
    rows = shape[0] if shape else 1
    step = max(1, numbers * rows // max(1, math.prod(shape)) // multiple) * multiple
    starts = range(0, rows, step) or (0,)  # an empty tensor has one empty slab
    return (range(start, min(start + step, rows)) for start in starts)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name in that checkpoint, its logical shape and its format.

    inputs: of a linear layer's weight, what its inputs are rounded to, None if they are not. Of a static scale, which
    is an entry too (see `activations`), the format that it is the scale of.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    inputs: ActivationFormat | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)


class Reader(ABC):
    """An open checkpoint. Nothing but headers is in memory until `read` is called."""

    path: Path
    config: dict[str, Any]
    """The model's configuration as transformers writes it (config.json), less what it says about quantization."""
    entries: Mapping[str, Entry]

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> QTensor:
        """One tensor, or some rows of it (a slice along dimension 0, where its format is rowwise).

        Raises CheckpointError if its bytes are missing or damaged.
        """

    def digests(self, name: str) -> dict[str, str]:
        """SHA-256, in hex, of each array of an entry as its bytes lie in the file now: what `Writer.digests` held."""
        raise UnsupportedError(f"{self.path}: '{name}' cannot be hashed again, because its arrays have no names there")


class Writer(ABC):
    """A checkpoint being written under a temporary name. Leaves nothing behind unless `commit` is reached."""

    digests: dict[str, dict[str, str]]
    """Of each finished entry: array name in the file -> SHA-256 of its bytes, in hex."""

    @abstractmethod
    def write(self, name: str, part: QTensor) -> None:
        """The next rows of entry `name` (all of it, where its format is not rowwise), in order from row 0.

        Entries may be written in any order. Raises OutputError if the disk is full.
        """

    @abstractmethod
    def commit(self, ledger: Mapping[str, Any]) -> None:
        """Write the ledger (fewbits.json), flush everything to the disk and take the final name, in that order.

        Raises LedgerError if an entry has not been written to its last row.
        """

    @abstractmethod
    def abort(self) -> None:
        """Remove everything written so far. Safe to call at any time, more than once; does nothing after `commit`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class Kind(ABC):
    """A kind of checkpoint on disk."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for `fewbits formats`: who loads it."""
    decoder: ClassVar[str | None] = None
    """The library, not ours, that `foreign` decodes with."""
    inputs: ClassVar[ActivationFormat | None] = None
    """What its engine rounds the inputs of every quantized matrix to; None where an entry may choose."""
    fine_rows: ClassVar[bool] = True
    """Whether it holds one scale a row as rounding makes it, in float32, so that this can stand in for a group."""
    written: ClassVar[bool] = True
    """Whether fewbits writes it, or only reads it."""

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Whether the path holds a checkpoint of this kind, judged by content."""

    @abstractmethod
    def open(self, path: Path) -> Reader:
        """Open for reading. Raises CheckpointError if anything about it is wrong."""

    @abstractmethod
    def admits(self, entry: Entry) -> str | None:
        """None if this kind can hold the entry exactly, else a sentence that says why not."""

    def admits_beside(self, entry: Entry, names: Collection[str]) -> str | None:
        """The same in a checkpoint with entries of these names, where what stands beside an entry matters."""
        return self.admits(entry)

    def number_trouble(self, entry: Entry, part: QTensor) -> str | None:
        """None if this kind can hold these rows of an entry that it admits, else a sentence that says why not."""
        return None

    def entry(self, name: str, shape: tuple[int, ...], format: Format) -> Entry:
        """An entry as this kind's engine runs it: with rounded inputs, if it rounds those of every matrix."""
        return Entry(name, shape, format, None if isinstance(format, Float) else self.inputs)

    def file_bytes(self, format: Format, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor takes in the file, padding included."""
        return format.nbytes(shape)

    def header_bytes(self, entries: Sequence[Entry], config: Mapping[str, Any]) -> int:
        """Bytes of the files besides tensors; an upper bound, where they depend on the formats."""
        return sum(ARRAYS * (len(entry.name.encode()) + ARRAY_HEADER) for entry in entries)

    @abstractmethod
    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        """Start a checkpoint at `path`, which must not exist. `source` is the folder whose tokenizer goes along.

        Raises UnsupportedError for an entry that `admits` refuses, OutputError if the path exists or the disk is full.
        """

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]] | None:
        """(entry name, first row, rows in float32) of a checkpoint, decoded by a library that is not ours.

        An entry's parts follow each other in row order and are of about FOREIGN_PART numbers, so that a large matrix
        need not be in memory whole.

        None where no such library exists (`decoder` is None), as for our own kind.
        """
        return None

    def rehash(self, path: Path) -> dict[str, dict[str, str]]:
        """Entry name -> array name -> SHA-256 of the bytes in the file now, to compare with a ledger's digests."""
        reader = self.open(path)
        return {name: reader.digests(name) for name in reader.entries}
