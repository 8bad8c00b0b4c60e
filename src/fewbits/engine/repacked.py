"""The cache beside a checkpoint: its program and weights as the kernels read them, in one file that is mapped.

    bytes 0 … 63      magic, then the header's offset, length and SHA-256, and the file's length
    arrays            each at a multiple of 64 bytes, large ones of a page
    header            JSON: the source's fingerprint, facts (configuration, tokenizer …), the program, and each array's
                      dtype, shape, offset and the CRC-32 of its first and last page, and of all of it

The header comes last, because arrays are written while they are made: a model is never in memory as a whole. The first
64 bytes are written when all else is on the disk, and only then does the file take its name, so what has the name is
complete. What is damaged later is found out as far as a start can afford to look: a cut, any bit of the header, and
pages at both ends of every array. Then, or if the checkpoint has changed, it is made again. A bit that turns in the
middle of an array goes unseen, as it does in a safetensors or GGUF file; with FEWBITS_CHECK_CACHE=1 in the environment
the file is read as a whole, at about a gigabyte a second, and that is found out too.

The file lies beside a GGUF file as `NAME.gguf.fewbits-tiles`, in a folder as `.fewbits-tiles`, else, where nothing may
be written there, in the user's cache folder. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.engine.program_json import decode, encode
from fewbits.errors import CheckpointError
from fewbits.runtime.mapping import Mapping
from fewbits.runtime.ops import Program
from fewbits.runtime.tiles import Array, Direct, Floats, Offset, Scale, Stepped, Weight, Zeros

log = logging.getLogger(__name__)

NAME = "fewbits-tiles"
MAGIC = b"fewbits\x02"
PREAMBLE = struct.Struct("<8sQQQ32s")
PAGE = 4096
CHECK = "FEWBITS_CHECK_CACHE"
"""Environment variable: with `1` every byte of a cache is checked before it is used."""
WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
PACKAGE = Path(__file__).parents[1]
NARROW = 64
"""Alignment of arrays below a page: a cache line."""


@dataclass(frozen=True, eq=False)
class Repacked:
    """A program, and what else a text engine needs of its checkpoint.

    facts: config, tokenizer, tokenizer_config, generation_config (see `text_files`), and longest, the tokens up to
    which the program computes what the model does.
    settle: moves mapped weights into memory that is faster to read; None where they are not mapped.
    """

    program: Program
    facts: dict[str, Any]
    settle: Callable[[], None] | None = None


def places(path: Path) -> Iterator[Path]:
    """Where the cache of a checkpoint may lie: beside it, then in the user's cache folder.

    A folder that nobody is meant to write into, by its permissions or because it is this package, is left alone, also
    where a superuser could.
    """
    folder = path if path.is_dir() else path.parent
    if folder.stat().st_mode & WRITABLE and PACKAGE not in folder.resolve().parents:
        yield path / f".{NAME}" if path.is_dir() else path.with_name(f"{path.name}.{NAME}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield home / "fewbits" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.{NAME}"


def read(place: Path, fingerprint: str) -> Repacked | None:
    """The cache at a place, mapped; None, and a line in the log, where it is missing, stale or damaged."""
    try:
        header, mapped = _open(place)
        if header["fingerprint"] != fingerprint:
            log.info("%s was made of another state of the checkpoint: repacking", place)
            return None
        arrays = [_view(mapped, facts) for facts in header["arrays"]]
        return Repacked(decode(header["program"], arrays), header["facts"], mapped.move)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a header that is wrong leads to
        log.warning("%s cannot be used (%s): repacking", place, error)
        return None


def _open(place: Path) -> tuple[dict[str, Any], Mapping]:
    with place.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic, offset, length, total, expected = PREAMBLE.unpack(file.read(PREAMBLE.size))
        if magic != MAGIC:
            raise CheckpointError("it is no cache of this version of fewbits")
        if total != size or offset + length != size:
            raise CheckpointError(f"it has {size} bytes and says {total}")
    mapped = Mapping(place)
    text = mapped.bytes[offset : offset + length].tobytes()
    if hashlib.sha256(text).digest() != expected:
        raise CheckpointError("its header is damaged")
    return json.loads(text), mapped


def _view(mapped: Mapping, facts: dict[str, Any]) -> Array:
    dtype, shape, offset = np.dtype(facts["dtype"]), tuple(facts["shape"]), facts["offset"]
    array = np.frombuffer(mapped.bytes, dtype, int(np.prod(shape)), offset).reshape(shape)
    if _ends(array) != facts["ends"] or (os.environ.get(CHECK) == "1" and _whole(array) != facts["whole"]):
        raise CheckpointError(f"the array at byte {offset} is damaged")
    return array


def _ends(array: Array) -> int:
    """CRC-32 of the first and the last page."""
    data = _bytes(array)
    return zlib.crc32(data[-PAGE:], zlib.crc32(data[:PAGE]))


def _whole(array: Array) -> int:
    return zlib.crc32(_bytes(array))


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Packing:
    """A cache being written: weights as they are made, then the program of them."""

    def __init__(self, partial: Path) -> None:
        self._partial, self._file = partial, partial.open("xb")
        self._file.write(bytes(PREAMBLE.size))
        self._arrays: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Array] = []  # so that no other array gets the id of one that has a number

    def keep(self, weight: Weight) -> Weight:
        """Write a weight; the same one, its arrays mapped from the file."""
        if isinstance(weight, Floats):
            scale = None if weight.scale is None else Direct(self._mapped(weight.scale.values))
            return replace(weight, values=self._mapped(weight.values), scale=scale)
        codes: Any = self._mapped(weight.codes)
        offset = None if weight.offset is None else self._params(weight.offset)
        scales = self._params(weight.scale)
        assert not isinstance(scales, Zeros)
        return replace(weight, codes=codes, scale=scales, offset=offset)

    def finish(self, repacked: Repacked, fingerprint: str, place: Path) -> None:
        """Write the rest, flush it, and give the file its name."""
        program = encode(repacked.program, self._number)
        header = {
            "fingerprint": fingerprint,
            "facts": repacked.facts,
            "program": program,
            "arrays": self._arrays,
        }
        text = json.dumps(header).encode()
        offset = self._file.tell()
        self._file.write(text)
        self._flush()
        self._file.seek(0)
        digest = hashlib.sha256(text).digest()
        self._file.write(PREAMBLE.pack(MAGIC, offset, len(text), offset + len(text), digest))
        self._flush()
        self._partial.replace(place)

    def close(self) -> None:
        """Close the file, and remove it if it was not finished."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _params(self, params: Scale | Offset) -> Scale | Offset:
        if isinstance(params, Stepped):
            return replace(params, factor=self._mapped(params.factor), steps=self._mapped(params.steps))
        return replace(params, values=self._mapped(params.values))

    def _mapped(self, array: Array) -> Array:
        """Write an array; it as the file has it."""
        number = self._write(array)
        self._file.flush()
        facts = self._arrays[number]
        found: Array = np.memmap(self._partial, array.dtype, "r", facts["offset"], array.shape)
        self._remember(found, number)
        return found

    def _number(self, array: Array) -> int:
        if id(array) not in self._numbers:
            self._remember(array, self._write(array))
        return self._numbers[id(array)]

    def _remember(self, array: Array, number: int) -> None:
        self._numbers[id(array)] = number
        self._alive.append(array)

    def _write(self, array: Array) -> int:
        array = np.ascontiguousarray(array)
        self._file.write(bytes(-self._file.tell() % (PAGE if array.nbytes >= PAGE else NARROW)))
        facts = {"dtype": array.dtype.str, "shape": array.shape, "offset": self._file.tell()}
        facts |= {"ends": _ends(array), "whole": _whole(array)}
        self._file.write(_bytes(array))
        self._arrays.append(facts)
        return len(self._arrays) - 1


@contextmanager
def packing(place: Path) -> Iterator[Packing]:
    """A cache to be written at a place. Raises OSError where nothing can be written there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place)
    opened = Packing(place.with_name(f"{place.name}.{os.getpid()}.part"))
    try:
        yield opened
    finally:
        opened.close()


def _remove_abandoned(place: Path) -> None:
    """Remove what processes that are gone have left half written."""
    for left in place.parent.glob(f"{place.name}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return process != os.getpid()
