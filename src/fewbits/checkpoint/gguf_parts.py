"""A GGUF model in several files, as llama.cpp splits, joins and loads it (tools/gguf-split, llama-model-loader.cpp).

    NAME-00001-of-00003.gguf   all of the metadata, split.no 0, split.count 3, split.tensors.count, the first tensors
    NAME-00002-of-00003.gguf   split.no 1, split.count 3, split.tensors.count, the tensors that follow
    NAME-00003-of-00003.gguf   …

A model is opened by its first part, and the others are found by name; each is a GGUF file of its own, aligned to 32
bytes where it does not say otherwise. Splitting and joining copy bytes and decode nothing, so that they work for every
type of tensor: one whose size gguf-py does not know ends where the next one begins. They hold one CHUNK in memory.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.checkpoint._gguf_header import ALIGNMENT, Header, TensorInfo, header_bytes, padded, plain, read_header
from fewbits.checkpoint._writer import OutputFile, disk_errors, flush, refuse_existing, require_space
from fewbits.errors import CheckpointError, UnsupportedError

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (NUMBER, COUNT, TENSORS)
NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.gguf")
MOST_PARTS = 65535  # split.count is a uint16
CHUNK = 1 << 23  # bytes copied at a time


@dataclass(frozen=True)
class Part:
    """One file of a model."""

    path: Path
    header: Header
    size: int

    def number(self, key: str, default: int) -> int:
        """A number of its metadata. Raises CheckpointError if it is none."""
        value = plain(self.header.typed.get(key, default))
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, must be a whole number; it is damaged")
        return value


def open_parts(path: Path) -> tuple[Part, ...]:
    """All parts of the model whose first one is at `path`; one part where the model is a single file.

    Raises CheckpointError for a part that is missing, damaged or of another model, and for a path that is not the
    first part, naming that.
    """
    first = _part(path)
    count = first.number(COUNT, 1)
    if count < 2:  # files that were joined by llama.cpp say 0
        return (first,)
    prefix = _prefix(first, count)
    parts = (first, *(_follower(path, part_path(prefix, number, count), number, count) for number in range(1, count)))
    found = sum(len(part.header.tensors) for part in parts)
    announced = first.number(TENSORS, found)
    if found != announced:
        raise CheckpointError(
            f"{path}: the {count} parts hold {found} tensors, and {TENSORS} says {announced}; "
            "download all parts of one revision"
        )
    return parts


def part_path(prefix: Path, number: int, count: int) -> Path:
    """Name of a part, number counting from 0."""
    return prefix.with_name(f"{prefix.name}-{number + 1:05d}-of-{count:05d}.gguf")


def split(path: Path, prefix: Path, *, max_bytes: int | None = None, max_tensors: int | None = None) -> list[Path]:
    """Cut a GGUF model into parts `PREFIX-00001-of-…`; the paths, the first part first.

    max_bytes: of the tensors in one part (headers come on top, as llama.cpp counts it); max_tensors: their number. One
    of them is needed. Raises CheckpointError if the model is damaged, UnsupportedError for limits that cannot be kept,
    OutputError if a part exists or there is no room; then nothing is left behind.
    """
    parts = open_parts(path)
    groups = list(_groups(_stored(parts), max_bytes, max_tensors))
    if len(groups) > MOST_PARTS:
        raise UnsupportedError(
            f"{path}: would be {len(groups)} parts, and {MOST_PARTS} are possible; allow larger ones"
        )
    tensors = sum(len(group) for group in groups)
    metadata, outputs = _without_split(parts), list[_Output]()
    for number, group in enumerate(groups):
        keys = {NUMBER: np.uint16(number), COUNT: np.uint16(len(groups)), TENSORS: np.int32(tensors)}
        target = part_path(prefix, number, len(groups))
        alignment = ALIGNMENT if number else parts[0].header.alignment
        outputs.append(_output(target, keys if number else metadata | keys, group, alignment))
    _write(outputs)
    return [output.path for output in outputs]


def merge(first: Path, out: Path) -> None:
    """Join the parts of a GGUF model, given by its first one, into the file `out`.

    Raises CheckpointError if a part is missing or damaged, OutputError if `out` exists or there is no room; then
    nothing is left behind.
    """
    parts = open_parts(first)
    _write([_output(out, _without_split(parts), _stored(parts), parts[0].header.alignment)])


def _part(path: Path) -> Part:
    header = read_header(path)
    return Part(path, header, path.stat().st_size)


def _prefix(part: Part, count: int) -> Path:
    """What the names of all parts begin with. Raises CheckpointError where `part` is not the first by name and key."""
    number, named = part.number(NUMBER, 0), NAME.fullmatch(part.path.name)
    if named is None or (int(named[2]), int(named[3])) != (number + 1, count):
        expected = part_path(Path("NAME"), number, count).name
        raise CheckpointError(
            f"{part.path}: is part {number + 1} of {count} of a model, which must be named {expected} for the others "
            "to be found; give it the name that it was split under"
        )
    prefix = part.path.with_name(named[1])
    if number:
        raise CheckpointError(
            f"{part.path}: is part {number + 1} of {count} of a model; give the first, {part_path(prefix, 0, count)}"
        )
    return prefix


def _follower(first: Path, path: Path, number: int, count: int) -> Part:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: part {number + 1} of {count} of {first}; download it too")
    part = _part(path)
    found = part.number(NUMBER, count), part.number(COUNT, count)
    if found != (number, count):
        raise CheckpointError(
            f"{path}: its {NUMBER} is {found[0]} of {found[1]}, must be {number} of {count} for its name; "
            "it belongs to another model, or was renamed"
        )
    return part


def _without_split(parts: Sequence[Part]) -> dict[str, Any]:
    return {key: value for key, value in parts[0].header.typed.items() if key not in SPLIT_KEYS}


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of one tensor lie now."""

    info: TensorInfo
    file: Path
    start: int
    nbytes: int


def _stored(parts: Sequence[Part]) -> list[_Stored]:
    """All tensors in file order. Raises CheckpointError where they do not lie one after the other, each complete."""
    found = [tensor for part in parts for tensor in _stored_in(part)]
    if len({tensor.info.name for tensor in found}) < len(found):
        raise CheckpointError(f"{parts[0].path}: two of its parts hold the same tensor; they belong to several models")
    return found


def _stored_in(part: Part) -> Iterator[_Stored]:
    infos = part.header.tensors
    starts = [*(part.header.data + info.offset for info in infos), part.size]
    for info, start, end in zip(infos, starts, starts[1:], strict=False):
        nbytes = _nbytes(info)
        nbytes = end - start if nbytes is None else nbytes
        if nbytes < 0 or start + nbytes > end:
            raise CheckpointError(
                f"{part.path}: tensor '{info.name}' lies from byte {start} on and does not end before {end}, where the "
                "next one begins or the file ends; it is cut short or damaged"
            )
        yield _Stored(info, part.path, start, nbytes)


def _nbytes(info: TensorInfo) -> int | None:
    """Bytes of a tensor; None for a type that gguf-py does not know either."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if info.ggml_type not in set(GGMLQuantizationType):
        return None
    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.ggml_type)]
    return math.prod(info.shape) // numbers * nbytes


def _groups(tensors: Sequence[_Stored], max_bytes: int | None, max_tensors: int | None) -> Iterator[list[_Stored]]:
    """Tensors in order, cut before a limit would be passed."""
    limits = [limit for limit in (max_bytes, max_tensors) if limit is not None]
    if len(limits) != 1 or limits[0] < 1:
        raise UnsupportedError(f"parts of {max_bytes} bytes and {max_tensors} tensors: give one limit, of at least 1")
    group: list[_Stored] = []
    size = 0
    for tensor in tensors:
        nbytes = padded(tensor.nbytes, ALIGNMENT)
        if max_bytes is not None and nbytes > max_bytes:
            raise UnsupportedError(
                f"tensor '{tensor.info.name}' takes {nbytes} bytes and cannot be cut; allow parts of at least that"
            )
        if group and (len(group) == max_tensors or (max_bytes is not None and size + nbytes > max_bytes)):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += nbytes
    yield group


@dataclass(frozen=True)
class _Output:
    """One file to be written: its header, and where each tensor goes."""

    path: Path
    header: bytes
    tensors: tuple[tuple[_Stored, int], ...]
    size: int


def _output(path: Path, metadata: Mapping[str, Any], tensors: Sequence[_Stored], alignment: int) -> _Output:
    infos, offset = list[TensorInfo](), 0
    for tensor in tensors:
        infos.append(TensorInfo(tensor.info.name, tensor.info.shape, tensor.info.ggml_type, offset))
        offset += padded(tensor.nbytes, alignment)
    header = header_bytes(metadata, infos, alignment)
    placed = tuple((tensor, len(header) + info.offset) for tensor, info in zip(tensors, infos, strict=True))
    return _Output(path, header, placed, len(header) + offset)


def _write(outputs: Sequence[_Output]) -> None:
    """All of the files or none: they take their names once each is whole, the first, which is opened, last."""
    for output in outputs:
        refuse_existing(output.path)
    folder, leftovers, token = outputs[0].path.parent, list[Path](), secrets.token_hex(4)
    try:
        with disk_errors(outputs[0].path):
            folder.mkdir(parents=True, exist_ok=True)
            require_space(folder, sum(output.size for output in outputs))
            for output in outputs:
                leftovers.append(output.path.with_name(f"{output.path.name}.partial-{token}"))
                _copy(output, leftovers[-1])
            for i, output in reversed(list(enumerate(outputs))):
                refuse_existing(output.path)
                leftovers[i] = leftovers[i].rename(output.path)
            flush(folder)
        leftovers.clear()
    finally:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)


def _copy(output: _Output, partial: Path) -> None:
    file = OutputFile(partial, output.size)
    try:
        file.write(memoryview(output.header), 0)
        for tensor, start in output.tensors:
            for at, data in _chunks(tensor):
                file.write(memoryview(data), start + at)
                file.send(start + at, len(data))
        file.close(flush=True)
    finally:
        file.close()


def _chunks(tensor: _Stored) -> Iterator[tuple[int, bytes]]:
    with tensor.file.open("rb") as file:
        for at in range(0, tensor.nbytes, CHUNK):
            wanted = min(CHUNK, tensor.nbytes - at)
            data = os.pread(file.fileno(), wanted, tensor.start + at)
            if len(data) < wanted:
                raise CheckpointError(f"{tensor.file}: became shorter while it was read; leave it alone meanwhile")
            yield at, data
