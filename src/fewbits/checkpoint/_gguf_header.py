"""A GGUF file's header: typed metadata, then where each tensor lies (ggml/docs/gguf.md; version 3, little-endian).

    magic "GGUF" · version u32 · tensors u64 · pairs u64
    pair:    key (u64 length, UTF-8) · type u32 · value; an array is its element type u32, count u64, elements
    tensor:  name (u64 length, UTF-8) · dimensions u32 · each u64, the fastest first · type u32 · offset u64
    padding to `general.alignment` (32) · tensor data, each tensor padded to the alignment

Offsets count from the start of the data. Files come from anywhere, so every count and length is held against the bytes
that are left before anything is allocated, arrays of arrays are refused (nobody writes them, and nesting is how a small
file becomes a deep recursion), and a header may not exceed HEADER_LIMIT.

Values are read as numpy scalars and arrays, which say the type that they have in the file, strings as str and lists of
str; `plain` makes Python values of them. Either is written: a plain int as uint32, a float as float32, a list of int as
int32s, of float as float32s, an empty list as strings. So what was read is written as it was.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fewbits.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

HEADER_LIMIT = 1 << 26  # bytes; the largest vocabularies with their merges take a quarter of it
KEY_LIMIT = 1 << 16  # bytes of a key or a tensor's name
DIMENSIONS = 4  # GGML_MAX_DIMS
SMALLEST_PAIR = 8 + 4 + 1
SMALLEST_TENSOR = 8 + 4 + 4 + 8

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""GGUF's numeric value types."""
NUMBER_TYPES = {dtype: number for number, dtype in NUMBERS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape is [out, in], slowest dimension first; offset counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a file says before its data. typed is its metadata, with types; data is where the data begins."""

    typed: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data: int

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata in plain Python values."""
        return {key: plain(value) for key, value in self.typed.items()}


def plain(value: Any) -> Any:
    """A value of the metadata as Python's own type."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def padded(size: int, alignment: int) -> int:
    """size rounded up to a multiple of alignment."""
    return -(-size // alignment) * alignment


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Raises CheckpointError, soon and without large allocations, where anything about the header is wrong."""
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class _Parser:
    """A cursor over the header that never asks for more bytes than there are."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._position = 0
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        if self._take(len(MAGIC), "magic") != MAGIC:
            raise self._error("does not begin with GGUF; it is no GGUF file")
        version = self._number("<I", "version")
        if version not in (2, VERSION):
            why = "it was written on a big-endian machine" if version & 0xFFFF == 0 else "fewbits reads 2 and 3"
            raise self._error(f"GGUF version {version}, and {why}; convert it anew")
        tensors = self._count("tensors", SMALLEST_TENSOR)
        pairs = self._count("metadata pairs", SMALLEST_PAIR)
        metadata = self._metadata(pairs)
        alignment = self._alignment(metadata)
        infos = tuple(self._tensor(alignment) for _ in range(tensors))
        if len({info.name for info in infos}) < tensors:
            raise self._error("names a tensor twice; it is damaged")
        return Header(metadata, infos, alignment, padded(self._position, alignment))

    def _metadata(self, pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._name("key")
            if key in metadata:
                raise self._error(f"key '{key}' stands there twice; it is damaged")
            metadata[key] = self._value(key)
        return metadata

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = plain(metadata.get(ALIGNMENT_KEY, ALIGNMENT))
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._error(f"{ALIGNMENT_KEY} is {alignment!r}, must be a power of two up to 65536; it is damaged")
        return alignment

    def _tensor(self, alignment: int) -> TensorInfo:
        name = self._name("tensor name")
        count = self._number("<I", name)
        if count > DIMENSIONS:
            raise self._error(f"tensor '{name}' has {count} dimensions, and GGUF knows {DIMENSIONS}; it is damaged")
        dimensions = [self._number("<Q", name) for _ in range(count)]
        ggml_type, offset = self._number("<I", name), self._number("<Q", name)
        if math.prod(dimensions) > 1 << 60 or any(size > 1 << 60 for size in dimensions):
            raise self._error(f"tensor '{name}' has the absurd shape {dimensions[::-1]}; it is damaged")
        if offset % alignment:
            raise self._error(f"tensor '{name}' lies at {offset}, no multiple of {alignment}; it is damaged")
        return TensorInfo(name, tuple(reversed(dimensions)), ggml_type, offset)

    def _value(self, key: str) -> Any:
        kind = self._number("<I", key)
        if kind == ARRAY:
            return self._array(key)
        if kind == STRING:
            return self._string(key)
        return self._numbers(key, kind, 1)[0]

    def _array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind = self._number("<I", key)
        if kind == ARRAY:
            raise self._error(f"'{key}' is an array of arrays, which no model needs; it is damaged or hostile")
        if kind == STRING:
            return [self._string(key) for _ in range(self._count(key, 8))]
        return self._numbers(key, kind, self._count(key, self._dtype(key, kind).itemsize))

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray[Any, Any]:
        dtype = self._dtype(key, kind)
        data = self._take(count * dtype.itemsize, key)
        if kind == BOOL and data.strip(b"\0\1"):
            raise self._error(f"'{key}' holds a byte that is neither false nor true; it is damaged")
        return np.frombuffer(data, dtype)

    def _dtype(self, key: str, kind: int) -> np.dtype[Any]:
        dtype = NUMBERS.get(kind)
        if dtype is None:
            raise self._error(f"'{key}' has value type {kind}, and GGUF knows 0 to 12; it is damaged")
        return dtype

    def _name(self, what: str) -> str:
        name = self._string(what, KEY_LIMIT)
        if not name.isprintable():
            raise self._error(f"{what} {name[:80]!r} holds characters that no name has; it is damaged")
        return name

    def _string(self, what: str, limit: int = HEADER_LIMIT) -> str:
        length = self._number("<Q", what)
        if length > limit:
            raise self._error(f"{what} of {length} bytes, and at most {limit} make sense; it is damaged")
        # A token may be a piece of a character: such bytes survive as surrogates.
        return self._take(length, what).decode("utf-8", "surrogateescape")

    def _count(self, what: str, smallest: int) -> int:
        count = self._number("<Q", what)
        left = self._left()
        if count * smallest > left:
            raise self._error(
                f"announces {count} of {what}, {smallest} bytes each, with {left} bytes left; it is damaged"
            )
        return count

    def _number(self, form: str, what: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form), what))[0])

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left():
            raise self._error(
                f"ends or exceeds {HEADER_LIMIT} bytes of header within {what!r}; it is cut short or damaged"
            )
        data = self._file.read(count)
        self._position += count
        if len(data) < count:
            raise self._error(f"ends within {what!r}; it is cut short")
        return data

    def _left(self) -> int:
        return min(self._size, HEADER_LIMIT) - self._position

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}")


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo], alignment: int) -> bytes:
    """The header, padded to the alignment. Raises UnsupportedError for a value that GGUF has no type for."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = _encoded(key, value)
        parts += [_string(key), struct.pack("<I", kind), data]
    for info in tensors:
        form = f"<I{len(info.shape)}QIQ"
        parts += [
            _string(info.name),
            struct.pack(form, len(info.shape), *reversed(info.shape), info.ggml_type, info.offset),
        ]
    header = b"".join(parts)
    return header.ljust(padded(len(header), alignment), b"\0")


def _encoded(key: str, value: Any) -> tuple[int, bytes]:
    """Value type and bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return ARRAY, _array(key, value)
    scalar = _typed(key, value, np.dtype("<u4"))
    return NUMBER_TYPES[scalar.dtype], scalar.tobytes()


def _array(key: str, values: Sequence[Any] | np.ndarray[Any, Any]) -> bytes:
    if not isinstance(values, np.ndarray) and all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(_string(value) for value in values)
    array = _typed(key, values, np.dtype("<i4"))
    return struct.pack("<IQ", NUMBER_TYPES[array.dtype], array.size) + array.tobytes()


def _typed(key: str, value: Any, integer: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A number or a list of them as numpy, in a type that GGUF has. integer is what a plain int becomes."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = value.dtype.newbyteorder("<") if value.ndim < 2 else None
    else:
        dtype = _plain_type(list(value) if isinstance(value, (list, tuple)) else [value], integer)
    if dtype not in NUMBER_TYPES:
        raise UnsupportedError(
            f"metadata '{key}': {value!r} fits no GGUF type; plain values are str, bool, float32, uint32, and lists of "
            "str, bool, float32 or int32; wrap any other number as a numpy scalar or array"
        )
    return np.asarray(value, dtype)


def _plain_type(values: list[Any], integer: np.dtype[Any]) -> np.dtype[Any] | None:
    """The type that plain values are written in, None if they have none in common."""
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return np.dtype("?")
    if kinds == {float}:
        return np.dtype("<f4")
    limits = np.iinfo(integer)
    fits = kinds == {int} and all(limits.min <= value <= limits.max for value in values)
    return integer if fits else None


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
