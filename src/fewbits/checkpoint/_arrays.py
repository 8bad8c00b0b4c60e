"""Reading named arrays out of a folder of safetensors files, in bounded memory.

A safetensors file is an 8-byte length, a JSON header (name -> dtype, shape, [begin, end)) and the data. A model is one
such file, or several with an index, `model.safetensors.index.json`, that says which tensor lies in which.

The library `safetensors` judges the header (length, JSON, overlaps, gaps, sizes), since that is what stands between us
and a hostile file. The data is then mapped window by window: a mapped page counts as resident memory once touched, so
a mapping of the whole file would grow to the whole file, whereas a window dies with the tensor that was read from it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
HASHED = 1 << 22  # bytes hashed at a time
MAPPED = 1 << 16  # bytes; smaller arrays are copied, because the number of mappings a process may have is limited

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of element types, and torch's."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Located:
    """Where one array lies: `offset` counts from the start of a file of `file_bytes` bytes."""

    file: Path
    file_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self, rows: slice | None) -> Located:
        """The part of it that a slice along dimension 0 selects."""
        if rows is None:
            return self
        start, stop, step = rows.indices(self.shape[0] if self.shape else 0)
        if step != 1 or stop < start:
            raise CheckpointError(
                f"{self.file}: rows {rows} of a {list(self.shape)} array are not a run of rows; "
                "read them as slice(start, stop) with start <= stop"
            )
        row = Located(self.file, self.file_bytes, self.dtype, self.shape[1:], self.offset).nbytes
        shape = (stop - start, *self.shape[1:])
        return Located(self.file, self.file_bytes, self.dtype, shape, self.offset + start * row)

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def read(self) -> Tensor:
        """The array. Mapped, not copied: its pages come from the file when touched, and go when the tensor is freed."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            self._check(file.fileno())
            if self.nbytes < MAPPED:
                data = torch.frombuffer(bytearray(os.pread(file.fileno(), self.nbytes, self.offset)), dtype=torch.uint8)
                return data.view(self.dtype).view(self.shape)
            window = mmap.mmap(file.fileno(), self.offset - start + self.nbytes, access=mmap.ACCESS_COPY, offset=start)
        window.madvise(mmap.MADV_WILLNEED)
        data = torch.frombuffer(window, dtype=torch.uint8, count=self.nbytes, offset=self.offset - start)
        if self.offset % self.dtype.itemsize:
            data = data.clone()  # a file by a writer that does not align its arrays
        return data.view(self.dtype).view(self.shape)

    def sha256(self) -> str:
        """SHA-256 of its bytes, in hex."""
        digest = hashlib.sha256()
        with self.file.open("rb") as file:
            self._check(file.fileno())
            for at in range(0, self.nbytes, HASHED):
                digest.update(os.pread(file.fileno(), min(HASHED, self.nbytes - at), self.offset + at))
        return digest.hexdigest()

    def _check(self, descriptor: int) -> None:
        """Touching a mapped page beyond the end of a file kills the process, so its size is checked each time."""
        found = os.fstat(descriptor).st_size
        if found != self.file_bytes:
            raise CheckpointError(
                f"{self.file}: {found} bytes now, but {self.file_bytes} when it was opened; "
                "leave the file alone while it is read"
            )


class ArrayFolder:
    """The arrays of one safetensors checkpoint. `metadata` is what each file's header says beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, Located] = {}
        self.metadata: list[dict[str, str]] = []
        index = folder / INDEX
        if not (folder / SINGLE).is_file() and index.is_file():
            self._open_sharded(index)
        else:
            self._add(_only_file(folder))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """An array, or a run of its rows. Raises CheckpointError if there is none of that name."""
        return self.located(name).rows(rows).read()

    def located(self, name: str) -> Located:
        found = self.arrays.get(name)
        if found is None:
            raise CheckpointError(f"{self.folder}: tensor '{name}' is missing; the checkpoint holds {len(self.arrays)}")
        return found

    def _open_sharded(self, index: Path) -> None:
        shard_of = _shards(index)
        for shard in dict.fromkeys(shard_of.values()):
            if not (self.folder / shard).is_file():
                raise CheckpointError(
                    f"{self.folder / shard}: this shard is missing, though {INDEX} names it; download it again"
                )
            self._add(self.folder / shard)
        for name, located in self.arrays.items():
            if shard_of.get(name) != located.file.name:
                raise CheckpointError(
                    f"{located.file}: tensor '{name}' is in this shard, but {INDEX} says "
                    f"{shard_of.get(name, 'nothing of it')}; download the index and all shards of one revision"
                )
        for name in sorted(shard_of.keys() - self.arrays.keys()):
            raise CheckpointError(
                f"{self.folder / shard_of[name]}: tensor '{name}' is not in this shard, though {INDEX} names it there; "
                "download the index and all shards of one revision"
            )

    def _add(self, file: Path) -> None:
        arrays, metadata = read_header(file)
        for name in sorted(arrays.keys() & self.arrays.keys()):
            raise CheckpointError(
                f"{file}: tensor '{name}' is also in {self.arrays[name].file.name}; each must be stored once"
            )
        self.arrays |= arrays
        self.metadata.append(metadata)


def read_header(file: Path) -> tuple[dict[str, Located], dict[str, str]]:
    """Arrays and metadata of one file. Raises CheckpointError where the library or we find fault with the header."""
    try:
        with safe_open(file, "pt") as judged:
            metadata = judged.metadata() or {}
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length), object_pairs_hook=_without_duplicates)
            size = os.fstat(handle.fileno()).st_size
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); it is cut short or damaged, so download it again"
        ) from error
    header.pop("__metadata__", None)
    return {name: _located(file, size, 8 + length, name, facts) for name, facts in header.items()}, metadata


def read_json(path: Path) -> Any:
    """A JSON object. Raises CheckpointError if the file is missing, is not JSON, or names a key twice."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the whole repository, not only its weights") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, must hold an object; download it again")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands there twice")
    return found


def _located(file: Path, size: int, data: int, name: str, facts: dict[str, Any]) -> Located:
    dtype = DTYPES.get(facts["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor '{name}' has type {facts['dtype']}, which fewbits does not read; "
            f"cast it to one of {', '.join(DTYPES)}"
        )
    return Located(file, size, dtype, tuple(facts["shape"]), data + facts["data_offsets"][0])


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> file name, every one of them plainly inside the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' of tensors to files; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor '{name}' is said to lie in {shard!r}, which must be the name of a .safetensors file "
                "in the same folder; do not trust this checkpoint"
            )
    return weight_map


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    files = safetensors_in(folder)
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        f"{folder}: {len(files)} safetensors files and neither {SINGLE} nor {INDEX}; "
        "download the index too, it says which of them make up the model"
    )


def safetensors_in(folder: Path) -> list[Path]:
    """Safetensors files directly in a folder, by name."""
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def first_metadata(folder: Path) -> dict[str, str]:
    """What the header of the first safetensors file in a folder says beside its arrays; nothing if it is unsound."""
    try:
        return next((read_header(file)[1] for file in safetensors_in(folder)), {})
    except CheckpointError:
        return {}
