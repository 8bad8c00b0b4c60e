"""The original's predictions on a text, in a file, so that each further model needs no second pass over the original.

A window of T predictions over a vocabulary of V takes T · (20 + 2 · V) bytes: of each prediction its exact loss and
most likely token, and the log-probabilities in 16 bits each (llama.cpp's --kl-divergence-base has the same idea):

    ln p = high − range · (code / 65535)²,   high = the largest, range = the largest minus the smallest, at most 80

Steps grow with the distance d from the largest, so the likely tokens, whose error counts, are the finest: half a step
is √(d · range) / 65535, some 2e-4 nats in the middle of a usual range of 30. After reading, probabilities are
normalised again. An error e(t) of a log-probability then moves KL(p ‖ q) by Σ p(t) (e(t) − ē) (ln p − ln q) to first
order, roughly 1e-4 · √(2 KL) of either sign, and by half the variance of e, about 1e-9, to second order. Averaged over
thousands of tokens it stays below 1e-6 nats. Below e^−80 a probability is nothing.

Layout, little-endian: MAGIC; the header's length and CRC-32, uint32 each; the header, JSON; token ids, int32
[windows, length]; then for each window its records (RECORD [T]), its codes (uint16 [T, V]) and the CRC-32 of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbits.checkpoint.adapter import adapter_inside
from fewbits.checkpoint.gguf_parts import open_parts
from fewbits.errors import CheckpointError, OutputError
from fewbits.evals.text import Windows

MAGIC = b"fewbits reference 1\n"
RECORD = np.dtype([("loss", "<f8"), ("top", "<i4"), ("high", "<f4"), ("range", "<f4")])
HIGHEST = 65535
DEEPEST = 80.0  # nats below the likeliest token
SAMPLE = 1 << 20  # bytes at either end of a model file that go into its identity


@dataclass(frozen=True)
class Prediction:
    """A model's predictions over one window; those of a file are on the CPU.

    loss: −ln p of the token that came, float64 [T]; top: the likeliest token, int64 [T];
    logits: float32 [T, vocab]; those of a file are log-probabilities, normalised only nearly.
    """

    loss: Tensor
    top: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Reference:
    """An original's predictions on a text, in a file that has been read once and found whole."""

    path: Path
    windows: Windows
    vocabulary: int

    def __iter__(self) -> Iterator[Prediction]:
        """One window after the other."""
        with self.path.open("rb") as file:
            _read_header(file)
            file.seek(self.windows.ids.numel() * 4, os.SEEK_CUR)
            for _ in self.windows.ids:
                records, codes = _read_window(file, self.windows.ids.shape[1] - 1, self.vocabulary)
                yield Prediction(
                    torch.from_numpy(records["loss"].astype(np.float64)),
                    torch.from_numpy(records["top"].astype(np.int64)),
                    _decoded(records, codes),
                )


def cache_folder() -> Path:
    """FEWBITS_CACHE, or `fewbits` in XDG_CACHE_HOME, or ~/.cache/fewbits. Everything in it may be deleted."""
    own = os.environ.get("FEWBITS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def reference_path(facts: Mapping[str, Any]) -> Path:
    """Where predictions are kept that all of these facts (JSON values) determine."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "references" / f"{key[:32]}.reference"


def model_identity(path: Path) -> str:
    """SHA-256 over a model's weights and configuration: names, sizes, times of change, and both ends of each file. An
    adapter inside is a part of it.

    Hashing all of it would take as long as running the model.
    """
    parts = [part.path for part in open_parts(path)] if path.is_file() else []
    folders = [path, *filter(None, [adapter_inside(path)])]
    files = parts or [f for each in folders for f in sorted(each.iterdir()) if f.suffix in (".safetensors", ".json")]
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(json.dumps([file.name, facts.st_size, facts.st_mtime_ns]).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(SAMPLE))
            opened.seek(max(0, facts.st_size - SAMPLE))
            digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def write_reference(
    path: Path, windows: Windows, vocabulary: int, facts: Mapping[str, Any], predictions: Iterable[Prediction]
) -> Reference:
    """Store predictions as they come, under a temporary name until they are complete.

    facts go into the header, for whoever finds the file. Raises OutputError if there is no room or no permission.
    """
    header = dict(facts) | {
        "windows": len(windows.ids),
        "length": windows.ids.shape[1],
        "vocabulary": vocabulary,
        "description": windows.description,
        "tokens": windows.digest,
    }
    _require_room(path, _nbytes(header))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            try:
                _write(file, header, windows, predictions)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); set FEWBITS_CACHE to another folder"
        ) from error
    return Reference(path, windows, vocabulary)


def open_reference(path: Path) -> Reference:
    """A stored reference, read through once and checked. Raises CheckpointError if it is damaged or something else."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            shape, vocabulary = (int(header["windows"]), int(header["length"])), int(header["vocabulary"])
            ids = torch.from_numpy(np.frombuffer(_exactly(file, shape[0] * shape[1] * 4), "<i4").astype(np.int64))
            windows = Windows(ids.view(shape), str(header["description"]))
            for _ in windows.ids:
                _read_window(file, shape[1] - 1, vocabulary)
            if windows.digest != header["tokens"] or file.read(1):
                raise ValueError("its tokens or its end are not those it was written with")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a whole reference file ({error})") from error
    return Reference(path, windows, vocabulary)


def encoded(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(high [T], range [T], code [T, vocab] as int32) of log-probabilities, float [T, vocab]; −Inf becomes e^−80."""
    high = log_p.amax(-1, keepdim=True)
    span = (high - log_p.amin(-1, keepdim=True)).clamp(1e-6, DEEPEST)
    codes = ((high - log_p) / span).clamp_(0, 1).sqrt_().mul_(HIGHEST).round_()
    return high.squeeze(-1), span.squeeze(-1), codes.int()


def _decoded(records: NDArray[Any], codes: NDArray[np.uint16]) -> Tensor:
    """Log-probabilities, float32 [T, vocab]."""
    high, span = (torch.from_numpy(records[key].astype(np.float32))[:, None] for key in ("high", "range"))
    return torch.from_numpy(codes.astype(np.float32)).div_(HIGHEST).square_().mul_(-span).add_(high)


def _write(file: Any, header: Mapping[str, Any], windows: Windows, predictions: Iterable[Prediction]) -> None:
    text = json.dumps(header).encode()
    file.write(
        MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text + windows.ids.numpy().astype("<i4").tobytes()
    )
    for prediction in predictions:
        high, span, codes = encoded(prediction.logits.float().log_softmax(-1))
        records = np.zeros(len(high), RECORD)
        records["loss"], records["top"] = prediction.loss.cpu().numpy(), prediction.top.cpu().numpy()
        records["high"], records["range"] = high.cpu().numpy(), span.cpu().numpy()
        data = records.tobytes(), codes.cpu().numpy().astype("<u2").tobytes()
        for part in data:
            file.write(part)
        file.write(_checksum(*data))


def _read_header(file: BinaryIO) -> dict[str, Any]:
    if _exactly(file, len(MAGIC)) != MAGIC:
        raise ValueError("it begins with other bytes")
    length, checksum = struct.unpack("<II", _exactly(file, 8))
    text = _exactly(file, length)
    if zlib.crc32(text) != checksum:
        raise ValueError("the header's checksum does not fit")
    header: dict[str, Any] = json.loads(text)
    return header


def _read_window(file: BinaryIO, tokens: int, vocabulary: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """Records [T] and codes [T, vocab]. Raises ValueError if their checksum does not fit."""
    data = _exactly(file, tokens * RECORD.itemsize), _exactly(file, tokens * vocabulary * 2)
    if _exactly(file, 4) != _checksum(*data):
        raise ValueError("a checksum does not fit")
    return np.frombuffer(data[0], RECORD), np.frombuffer(data[1], "<u2").reshape(tokens, vocabulary)


def _checksum(records: bytes, codes: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(codes, zlib.crc32(records)))


def _exactly(file: BinaryIO, nbytes: int) -> bytes:
    """Bytes of a file that has them; what a damaged header asks for is compared with its size before it is read."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= nbytes <= left:
        raise ValueError(f"{nbytes} bytes expected, {left} left")
    return file.read(nbytes)


def _nbytes(header: Mapping[str, Any]) -> int:
    windows, length, vocabulary = header["windows"], header["length"], header["vocabulary"]
    window = (length - 1) * (RECORD.itemsize + 2 * vocabulary) + 4
    return int(len(MAGIC) + 8 + len(json.dumps(header)) + windows * (4 * length + window))


def _require_room(path: Path, nbytes: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OutputError(
            f"{path.parent}: cannot be made ({error.strerror}); set FEWBITS_CACHE to a folder that can"
        ) from error
    if nbytes > free:
        raise OutputError(
            f"{path.parent}: the original's predictions take {nbytes:,} bytes, {free:,} are free; set FEWBITS_CACHE to "
            "a folder on another disk, or evaluate on fewer windows"
        )
