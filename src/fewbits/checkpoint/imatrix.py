"""llama.cpp's importance matrices: for each matrix of a model the mean of x² over the inputs that it read.

    GGUF    general.type = imatrix; `<name>.in_sum2`, sums of x², float32 [K, matrices]; `<name>.counts`, how many
            inputs, [1, matrices]; imatrix.datasets, imatrix.chunk_count and imatrix.chunk_size (tools/imatrix)
    .dat    the older one: entries · each: length, name, calls, values, float32 values, which are means times calls;
            then the number of chunks, and the length and name of the data set (all int32, little-endian)

Names are those of the tensors in the GGUF file. Fused experts are matrices of one tensor; the mean of an expert that no
token came to is unknown, and counts as 1 everywhere.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbits.checkpoint._gguf_header import ALIGNMENT, TensorInfo, header_bytes, is_gguf, padded
from fewbits.checkpoint._writer import disk_errors, flush, refuse_existing
from fewbits.checkpoint.gguf import FLOAT_TYPES, GgufReader
from fewbits.errors import CheckpointError

SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST_NAME = 1 << 10  # bytes


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """importance: tensor -> mean of x², float32 [K], or [experts, K] of fused ones. chunks: windows of `chunk` tokens
    that were seen; chunk is 0 where the file does not say. datasets: what the text was.
    """

    importance: Mapping[str, Tensor]
    chunks: int
    chunk: int = 0
    datasets: tuple[str, ...] = ()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Of either kind. Raises CheckpointError for anything else and for damaged files."""
    return _read_gguf(path) if is_gguf(path) else _read_dat(path)


def write_imatrix(path: Path, found: ImportanceMatrix) -> None:
    """As GGUF, all or nothing.

    Raises OutputError where the file exists or the disk is full, CheckpointError for NaN, Inf and negative numbers.
    """
    refuse_existing(path)
    tokens = float(max(1, found.chunks * max(1, found.chunk)))
    arrays: dict[str, Tensor] = {}
    for name, each in sorted(found.importance.items()):
        means = _checked(path, name, each.float().reshape(-1, each.shape[-1])).reshape(-1, each.shape[-1])
        arrays[name + SUMS] = means * tokens
        arrays[name + COUNTS] = torch.full((len(means), 1), tokens)
    infos, offset = [], 0
    for name, array in arrays.items():
        infos.append(TensorInfo(name, tuple(array.shape), FLOAT_TYPES[torch.float32], offset))
        offset += padded(array.nbytes, ALIGNMENT)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(found.datasets),
        "imatrix.chunk_count": found.chunks,
        "imatrix.chunk_size": max(1, found.chunk),
    }
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with disk_errors(partial):
            with partial.open("wb") as file:
                file.write(header_bytes(metadata, infos, ALIGNMENT))
                for array in arrays.values():
                    data = array.contiguous().numpy().astype("<f4").tobytes()
                    file.write(data + bytes(-len(data) % ALIGNMENT))
            flush(partial)
            refuse_existing(path)
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_gguf(path: Path) -> ImportanceMatrix:
    reader = GgufReader(path)
    if reader.config.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{path}: is a GGUF file, but no importance matrix: its general.type is "
            f"{reader.config.get('general.type')!r}, must be 'imatrix'"
        )
    importance = {}
    for name in (name.removesuffix(SUMS) for name in reader.entries if name.endswith(SUMS)):
        sums, counts = (reader.read(name + suffix).dequantize() for suffix in (SUMS, COUNTS))
        if counts.numel() != len(sums) or sums.dim() != 2:
            raise CheckpointError(
                f"{path}: '{name}' has sums {list(sums.shape)} and counts {list(counts.shape)}, which do not fit; "
                "it is damaged"
            )
        counts = counts.reshape(-1, 1)
        importance[name] = _checked(path, name, torch.where(counts > 0, sums / counts.where(counts > 0, 1.0), 1.0))
    chunks, chunk = (reader.config.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size"))
    datasets = reader.config.get("imatrix.datasets", [])
    if not (type(chunks) is type(chunk) is int and isinstance(datasets, list)):
        raise CheckpointError(f"{path}: imatrix.chunk_count, chunk_size or datasets is of another type; it is damaged")
    return ImportanceMatrix(importance, chunks, chunk, tuple(map(str, datasets)))


def _read_dat(path: Path) -> ImportanceMatrix:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    at, importance = 0, dict[str, Tensor]()

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise CheckpointError(
                f"{path}: {what} takes {size} bytes at {at} of {len(data)}; it is no importance matrix, or damaged"
            )
        at += size
        return data[at - size : at]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    for _ in range(number("the number of entries")):
        length = number("the length of a name")
        if length > LONGEST_NAME:
            raise CheckpointError(f"{path}: a name of {length} bytes; it is no importance matrix, or damaged")
        name = take(length, "a name").decode("utf-8", "replace")
        calls, values = number("calls"), number("the number of values")
        sums = torch.from_numpy(np.frombuffer(take(4 * values, name), dtype="<f4").astype(np.float32))
        importance[name] = _checked(path, name, sums[None] / max(1, calls))
    if at == len(data):  # the oldest files end here
        return ImportanceMatrix(importance, 0)
    chunks = number("the number of chunks")
    dataset = take(number("the length of the data set's name"), "the data set's name").decode("utf-8", "replace")
    return ImportanceMatrix(importance, chunks, datasets=(dataset,) if dataset else ())


def _checked(path: Path, name: str, means: Tensor) -> Tensor:
    """[K] of one matrix, [experts, K] of several."""
    if not bool(means.isfinite().all()) or bool((means < 0).any()):
        raise CheckpointError(f"{path}: the importance of '{name}' holds NaN, Inf or negative numbers; make it anew")
    return means[0] if len(means) == 1 else means
