"""Writing a folder of safetensors files as a stream.

All entries are declared first, so every array's place is known before any data: headers are written with exact offsets,
the files are allocated at their full size (a full disk is found here, not after an hour), and each part of a tensor is
then written at its array's cursor, from whatever thread it comes. Within a file wider types come first, so that every
array is aligned to its element. Files hold at most SHARD bytes.

Everything happens in a folder `<name>.partial-<random>` beside the final one. The last steps are, in this order: the
ledger, flushing every file, flushing the folder, renaming it. Whatever carries the final name is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint._arrays import CONFIG, INDEX, NAMES, SINGLE
from fewbits.checkpoint.base import Entry, Writer
from fewbits.errors import LedgerError, OutputError
from fewbits.formats import ArraySpec, QTensor

LEDGER = "fewbits.json"
SHARD = 5 * 10**9  # bytes of data in one file, as on the hub
WRITE_BACK = 1 << 23  # bytes of an array after which the disk is set to work, so that the final flush is short
SPARE = 1 << 24  # bytes of the folder that are not weights: tokenizer, configuration, ledger

COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe", ".spm", ".vocab")
COMPANION_NAMES = ("LICENSE", "LICENCE", "NOTICE")
NOT_COMPANIONS = (CONFIG, LEDGER, "quantize_config.json", "quant_config.json")
COMPANION_FOLDERS = ("additional_chat_templates",)


@dataclass
class ArrayOnDisk:
    """One array of a file: where its next bytes go."""

    name: str
    spec: ArraySpec
    file: OutputFile
    start: int
    written: int = 0
    sent: int = 0  # bytes that the disk was set to work on
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def end(self) -> int:
        return self.start + self.spec.nbytes

    def append(self, data: Tensor) -> None:
        """The next rows. Hashing and writing both let other threads run."""
        if data.dtype != self.spec.dtype or self.written + data.nbytes > self.spec.nbytes:
            raise LedgerError(
                f"array '{self.name}' was declared as {self.spec.dtype} {list(self.spec.shape)}, {self.spec.nbytes} "
                f"bytes, but {data.dtype} {list(data.shape)} came after {self.written} bytes; write what was declared"
            )
        flat = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        view = flat.numpy().data
        self.file.write(view, self.start + self.written)
        self.written += len(view)
        if self.written - self.sent >= WRITE_BACK:
            self.file.send(self.start + self.sent, self.written - self.sent)
            self.sent = self.written
        self.digest.update(view)


class OutputFile:
    """A file of known size under construction. `write` may be called from several threads."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if size and hasattr(os, "posix_fallocate"):
            self._allocate(size)

    def _allocate(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.close()
                raise
            os.ftruncate(self._descriptor, size)  # this file system cannot allocate ahead

    def write(self, data: memoryview, offset: int) -> None:
        with self._lock:
            if self._descriptor < 0:
                raise OutputError(f"{self.path}: the output was abandoned while it was being written")
            begin, end = offset, offset + len(data)
            while offset < end:
                offset += os.pwrite(self._descriptor, data[offset - begin :], offset)

    def send(self, offset: int, length: int) -> None:
        """Set the disk to work on bytes already written, without waiting for it.

        Linux starts to write dirty pages back when told that they are not needed, and keeps them until that is done.
        """
        with self._lock:
            if self._descriptor >= 0 and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self, *, flush: bool = False) -> None:
        with self._lock:
            if self._descriptor >= 0:
                if flush:
                    os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1


@dataclass
class EntryProgress:
    """How far one entry has been written."""

    entry: Entry
    arrays: list[ArrayOnDisk]
    rows: int = 0
    complete: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return self.entry.shape[0] if self.entry.shape else 1

    def advance(self, part: QTensor) -> bool:
        """Count the part's rows; whether it was the last one. Raises LedgerError if it does not fit the entry."""
        rows = part.shape[0] if part.shape else 1
        fits = part.format == self.entry.format and part.shape[1:] == self.entry.shape[1:]
        whole = part.format.rowwise or rows == self.total
        if self.complete or not fits or not whole or self.rows + rows > self.total:
            raise LedgerError(
                f"'{self.entry.name}' is {self.entry.format} {list(self.entry.shape)} with {self.rows} rows written; "
                f"{part.format} {list(part.shape)} cannot follow (a format that is not rowwise is written whole)"
            )
        self.rows += rows
        return self.rows == self.total

    def finish(self) -> dict[str, str]:
        """Digests of the arrays. Raises LedgerError unless each is full."""
        for array in self.arrays:
            if array.written != array.spec.nbytes:
                raise LedgerError(f"array '{array.name}': {array.written} of {array.spec.nbytes} bytes were written")
        self.complete = True
        return {array.name: array.digest.hexdigest() for array in self.arrays}


class StreamWriter(Writer):
    """What every kind's writer does with a part: count its rows, append its arrays, finish the entry with the last.

    A subclass sets `_path` (the final name), `_partial` (the name until then) and `_progress` (entry name -> how far).
    """

    _path: Path
    _partial: Path
    _progress: dict[str, EntryProgress]

    @abstractmethod
    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        """The next rows of an entry's arrays, by name in the file; `last` when the entry ends with this part."""

    def write(self, name: str, part: QTensor) -> None:
        progress = self._progress.get(name)
        if progress is None:
            raise LedgerError(f"'{name}' was not declared when {self._path} was begun; declare every entry first")
        with progress.lock, disk_errors(self._partial):
            last = progress.advance(part)
            encoded = self.encode(progress.entry, part, last=last)
            for array in progress.arrays:
                if array.name in encoded:
                    array.append(encoded[array.name])
            if last:
                self.digests[name] = progress.finish()

    def require_complete(self) -> None:
        """Raise LedgerError if an entry has not been written to its last row."""
        missing = [name for name, progress in self._progress.items() if not progress.complete]
        if missing:
            raise LedgerError(
                f"{self._path}: {len(missing)} of {len(self._progress)} entries are not written to their last row, "
                f"the first of them '{missing[0]}'; nothing was kept"
            )


class FolderWriter(StreamWriter):
    """What all safetensors kinds share; a kind says which arrays an entry becomes and what its config.json says."""

    def __init__(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> None:
        self.digests = {}
        self._path = path
        self._entries = _unique(entries)
        self._progress: dict[str, EntryProgress] = {}
        self._files: list[OutputFile] = []
        self._shard_of: dict[str, str] = {}
        refuse_existing(path)
        self._partial = path.parent / f"{path.name}.partial-{secrets.token_hex(4)}"
        try:
            with disk_errors(self._partial):
                path.parent.mkdir(parents=True, exist_ok=True)
                require_space(
                    path.parent, sum(spec.nbytes for e in entries for spec in self.arrays(e).values()) + SPARE
                )
                self._partial.mkdir()
                self._create_files()
                _copy_companions(source, self._partial, with_code="auto_map" in config)
                _write_json(self._partial / CONFIG, self.config(config))
        except BaseException:
            self.abort()
            raise

    @abstractmethod
    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        """Name in the file -> dtype and shape, of every array of an entry."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json will hold."""
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        """What the header of a file with these entries says beside its arrays."""
        return {"format": "pt"}

    def commit(self, ledger: Mapping[str, Any]) -> None:
        self.require_complete()
        with disk_errors(self._partial):
            _write_json(self._partial / LEDGER, ledger)
            for file in self._files:
                file.close(flush=True)
            flush_folder(self._partial)
            refuse_existing(self._path)
            self._partial.rename(self._path)
            flush(self._path.parent)

    def abort(self) -> None:
        for file in self._files:
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _create_files(self) -> None:
        shards = list(self._sharded())
        for number, entries in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._create_file(name, entries)
        if len(shards) > 1:
            size = sum(array.spec.nbytes for p in self._progress.values() for array in p.arrays)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._shard_of.items()))}
            _write_json(self._partial / INDEX, index)

    def _sharded(self) -> Iterator[list[Entry]]:
        """Entries in order, cut where a file would grow beyond SHARD."""
        shard: list[Entry] = []
        size = 0
        for entry in self._entries:
            nbytes = sum(spec.nbytes for spec in self.arrays(entry).values())
            if shard and size + nbytes > SHARD:
                yield shard
                shard, size = [], 0
            shard.append(entry)
            size += nbytes
        yield shard

    def _create_file(self, name: str, entries: Sequence[Entry]) -> None:
        specs = [(entry, array, spec) for entry in entries for array, spec in self.arrays(entry).items()]
        for _, array, _ in specs:
            if array in self._shard_of:
                raise LedgerError(f"two entries would both write an array '{array}'; rename one of them")
            self._shard_of[array] = name
        specs.sort(key=lambda item: -item[2].dtype.itemsize)
        header, starts = _header({array: spec for _, array, spec in specs}, self.metadata(entries))
        total = len(header) + sum(spec.nbytes for _, _, spec in specs)
        file = OutputFile(self._partial / name, total)
        self._files.append(file)
        file.write(memoryview(header), 0)
        for entry in entries:
            self._progress[entry.name] = EntryProgress(entry, [])
        for entry, array, spec in specs:
            self._progress[entry.name].arrays.append(ArrayOnDisk(array, spec, file, starts[array]))


def _header(arrays: Mapping[str, ArraySpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where each array starts in it."""
    facts: dict[str, Any] = {"__metadata__": dict(metadata)}
    ends = 0
    for name, spec in arrays.items():
        offsets = [ends, ends + spec.nbytes]
        facts[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        ends = offsets[1]
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + facts[name]["data_offsets"][0] for name in arrays}


def _unique(entries: Sequence[Entry]) -> list[Entry]:
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise LedgerError(f"entry '{entry.name}' is declared twice; each must be written once")
        seen.add(entry.name)
    return list(entries)


def refuse_existing(path: Path) -> None:
    """Raise OutputError if something already has the output's name."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already and is never overwritten; choose another path or remove it")


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless the disk of this folder has that many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: the output needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room or choose another disk"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into OutputError."""
    try:
        yield
    except OSError as error:
        advice = "make room or choose another disk" if error.errno == errno.ENOSPC else "nothing was kept"
        raise OutputError(f"{path} cannot be written: {error}; {advice}") from error


def flush(path: Path) -> None:
    """Put a file's or a folder's bytes on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush everything in a folder, the folder last."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path, *, with_code: bool) -> None:
    """Tokenizer, chat template, generation settings, licence: what stands beside the weights and is not one.

    Python files only go along where the configuration refers to them (auto_map).
    """
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in COMPANION_FOLDERS:
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and (_is_companion(path) or (with_code and path.suffix == ".py")):
            shutil.copyfile(path, folder / path.name)


def _is_companion(path: Path) -> bool:
    if path.name in NOT_COMPANIONS or path.name.endswith(".index.json") or path.name.upper().startswith("README"):
        return False
    return path.suffix in COMPANIONS or path.stem.upper() in COMPANION_NAMES
