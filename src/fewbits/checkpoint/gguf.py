"""GGUF: one file that holds hyper-parameters, tokenizer and tensors, for llama.cpp, Ollama and LM Studio.

A reader's `config` and the config given to `create` are the file's metadata (see `_gguf_header` for how Python values
and GGUF's types correspond), not a config.json; entries carry llama.cpp's names and torch's order of dimensions. What
the metadata of a model has to say is `fewbits.models`' affair.

Beside the file lie its ledger, `<stem>.fewbits.json`, and `<stem>.Modelfile`, with which `ollama create` takes it in.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.checkpoint._arrays import Located
from fewbits.checkpoint._gguf_header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    TensorInfo,
    header_bytes,
    is_gguf,
    padded,
)
from fewbits.checkpoint._writer import (
    ArrayOnDisk,
    EntryProgress,
    OutputFile,
    StreamWriter,
    disk_errors,
    flush,
    refuse_existing,
    require_space,
)
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Kind, Reader, Writer, row_slabs
from fewbits.checkpoint.gguf_parts import Part, open_parts
from fewbits.errors import CheckpointError, FormatError, LedgerError, OutputError, UnsupportedError
from fewbits.formats import FORMATS, ArraySpec, Float, Format, QTensor
from fewbits.formats._blocks import Block
from fewbits.formats.gguf_mxfp4 import NUMBERS, MxFp4Blocks

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Type numbers (ggml.h, enum ggml_type) of the dtypes that are written. Block formats carry theirs."""
READ_TYPES: dict[int, Format] = {
    **{number: Float(dtype) for dtype, number in FLOAT_TYPES.items()},
    **{24: Float(torch.int8), 25: Float(torch.int16), 26: Float(torch.int32), 27: Float(torch.int64)},
    28: Float(torch.float64),
    **{format.ggml_type: format for format in FORMATS.values() if isinstance(format, Block)},
    MxFp4Blocks.ggml_type: NUMBERS,
}
FILE_TYPES = {
    **{"fp32": 0, "fp16": 1, "bf16": 32},
    **{"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9},
    **{"q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18},  # the smallest mixture of each name
    **{"iq4_nl": 25, "iq4_xs": 30, "tq1_0": 36, "tq2_0": 37},
}
"""general.file_type (llama.h, enum llama_ftype) of a file that is mostly in one format."""
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: how block formats are laid out
NAME_BYTES = 63  # GGML_MAX_NAME, less the closing zero


class Gguf(Kind):
    """One .gguf file."""

    name = "gguf"
    summary = "one GGUF file: llama.cpp, Ollama, LM Studio"
    decoder = "gguf-py"

    def detect(self, path: Path) -> bool:
        return path.is_file() and is_gguf(path)

    def open(self, path: Path) -> Reader:
        return GgufReader(path)

    def admits(self, entry: Entry) -> str | None:
        if len(entry.name.encode()) > NAME_BYTES:
            return f"{entry.name}: llama.cpp reads names of at most {NAME_BYTES} bytes"
        if entry.inputs is not None:
            return (
                f"{entry.name}: a GGUF file cannot say that inputs are rounded to {entry.inputs} (llama.cpp decides "
                "that itself); write compressed-tensors or fewbits instead"
            )
        if not 1 <= len(entry.shape) <= 4:
            return f"{entry.name}: GGUF holds 1 to 4 dimensions, not {list(entry.shape)}"
        if isinstance(entry.format, Block) and not entry.format.runs:
            return f"{entry.name}: llama.cpp rounds inputs to {entry.format} and runs no weights in it; take q8_0"
        if ggml_type(entry.format) is None:
            known = ", ".join(format.name for format in READ_TYPES.values() if _written(format))
            return f"{entry.name}: GGUF has no type for {entry.format}; it holds {known}"
        if len(entry.shape) == 1 and entry.format != Float(torch.float32):
            return f"{entry.name}: llama.cpp computes with vectors in fp32 only, not {entry.format}"
        try:
            laid_out(entry.format).check(entry.shape)  # blocks are whole here, also of a format that is not elsewhere
        except FormatError as error:
            return f"{entry.name}: {error}"
        return None

    def file_bytes(self, format: Format, shape: tuple[int, ...]) -> int:
        return padded(format.nbytes(shape), ALIGNMENT)

    def header_bytes(self, entries: Sequence[Entry], config: Mapping[str, Any]) -> int:
        header, _, _ = _layout(entries, {**config, **_file_facts(config, entries)})
        return len(header)

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        for entry in entries:
            trouble = self.admits(entry)
            if trouble is not None:
                raise UnsupportedError(trouble)
        return GgufWriter(path, entries, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        """By gguf-py, which shares no code with this file."""
        for part in open_parts(path):
            yield from _decoded_by_gguf_py(part.path)


def _decoded_by_gguf_py(path: Path) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors of one file, as `Gguf.foreign` gives them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    for tensor in GGUFReader(path).tensors:
        # Read rather than taken from gguf-py's mapping of the file, which would keep every page that was touched.
        shape = tuple(reversed(tensor.shape.tolist()))
        row = int(tensor.n_bytes) // (shape[0] if shape else 1)
        for rows in row_slabs(shape, FOREIGN_PART):
            offset = int(tensor.data_offset) + rows.start * row
            data = np.fromfile(path, np.uint8, len(rows) * row, offset=offset)
            part = (len(rows), *shape[1:])
            packed = data.reshape(quant_shape_to_byte_shape(part, tensor.tensor_type))
            numbers = dequantize(packed, tensor.tensor_type).astype(np.float32)
            yield tensor.name, rows.start, torch.from_numpy(numbers).reshape(part if shape else shape)


def ggml_type(format: Format) -> int | None:
    """The type number of a format that GGUF can hold, else None."""
    format = laid_out(format)
    if isinstance(format, Block):
        return format.ggml_type
    return FLOAT_TYPES.get(format.dtype) if isinstance(format, Float) else None


def _written(format: Format) -> bool:
    return ggml_type(format) is not None and not (isinstance(format, Block) and not format.runs)


def laid_out(format: Format) -> Format:
    """The format whose bytes stand for it in a GGUF file: itself, but for MXFP4."""
    return MxFp4Blocks() if format == NUMBERS else format


class GgufReader(Reader):
    """An open file, or all parts of a model by its first one. `config` is the metadata, `typed` the same with the
    types that it has in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = open_parts(path)
        self.typed = parts[0].header.typed
        self.config = parts[0].header.metadata
        self.entries: dict[str, Entry] = {}
        self._arrays: dict[str, Located] = {}
        for part in parts:
            for info in part.header.tensors:
                self._add(part, info)

    def _add(self, part: Part, info: TensorInfo) -> None:
        entry = self._entry(part.path, info)
        (spec,) = laid_out(entry.format).arrays(entry.shape).values()
        located = Located(part.path, part.size, spec.dtype, spec.shape, part.header.data + info.offset)
        if located.offset + located.nbytes > part.size:
            raise CheckpointError(
                f"{part.path}: tensor '{info.name}' ends at byte {located.offset + located.nbytes}, but the file has "
                f"{part.size}; it is cut short or damaged, so download it again"
            )
        if info.name in self.entries:
            raise CheckpointError(
                f"{part.path}: tensor '{info.name}' is also in {self._arrays[info.name].file.name}; "
                "download all parts of one revision"
            )
        self.entries[info.name], self._arrays[info.name] = entry, located

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor '{name}' is missing; the file holds {len(self.entries)}")
        located = self._arrays[name].rows(rows)
        shape = located.shape[:1] + entry.shape[1:]
        layout = laid_out(entry.format)
        (array,) = layout.arrays(shape)
        found = QTensor.from_arrays(layout, {array: located.read()}, shape)
        return QTensor(entry.format, found.codes, found.params)

    def digests(self, name: str) -> dict[str, str]:
        entry = self.entries[name]
        (array,) = laid_out(entry.format).arrays(entry.shape)
        return {array: self._arrays[name].sha256()}

    def _entry(self, path: Path, info: TensorInfo) -> Entry:
        format = READ_TYPES.get(info.ggml_type)
        if format is None:
            raise CheckpointError(
                f"{path}: tensor '{info.name}' is of type {_type_name(info.ggml_type)}, which fewbits does not "
                f"read; it reads {', '.join(str(format) for format in READ_TYPES.values())}"
            )
        try:
            laid_out(format).check(info.shape)
        except FormatError as error:
            raise CheckpointError(f"{path}: tensor '{info.name}': {error}") from error
        return Entry(info.name, info.shape, format)


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"{number}, unknown to gguf-py too"


class GgufWriter(StreamWriter):
    """A file under construction: header first, every tensor at the place that the header gives it."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, Any]) -> None:
        self.digests = {}
        stem = path.name.removesuffix(".gguf")
        self._path = path
        self._beside = {"ledger": path.with_name(f"{stem}.fewbits.json"), "Ollama": path.with_name(f"{stem}.Modelfile")}
        self._metadata = {**metadata, **_file_facts(metadata, entries)}
        self._partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        self._leftovers = [self._partial]
        self._file: OutputFile | None = None
        for target in (path, *self._beside.values()):
            refuse_existing(target)
        header, infos, size = _layout(entries, self._metadata)
        try:
            with disk_errors(self._partial):
                path.parent.mkdir(parents=True, exist_ok=True)
                require_space(path.parent, size)
                self._file = OutputFile(self._partial, size)
                self._file.write(memoryview(header), 0)
        except BaseException:
            self.abort()
            raise
        self._progress = {
            entry.name: EntryProgress(entry, [_array(entry, self._file, len(header) + info.offset)])
            for entry, info in zip(entries, infos, strict=True)
        }

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        return laid_out(entry.format).pack(part.codes, part.params)

    def commit(self, ledger: Mapping[str, Any]) -> None:
        self.require_complete()
        if self._file is None:
            raise OutputError(f"{self._path}: the output was abandoned already")
        texts = {"ledger": json.dumps(ledger, indent=2, ensure_ascii=False) + "\n", "Ollama": self._modelfile()}
        with disk_errors(self._partial):
            self._file.close(flush=True)
            for target in (self._path, *self._beside.values()):
                refuse_existing(target)
            for which, target in self._beside.items():
                self._leftovers.append(target)
                target.write_text(texts[which], encoding="utf-8")
                flush(target)
            self._partial.rename(self._path)
            self._leftovers.clear()
            flush(self._path.parent)
        self._file = None

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        for leftover in self._leftovers:
            leftover.unlink(missing_ok=True)
        self._leftovers.clear()

    def _modelfile(self) -> str:
        """Ollama reads the chat template from the GGUF; what it needs beside is where a reply ends."""
        lines = [f"# ollama create NAME -f {self._beside['Ollama'].name}", f"FROM ./{self._path.name}"]
        tokens, eos = self._metadata.get("tokenizer.ggml.tokens", ()), self._metadata.get("tokenizer.ggml.eos_token_id")
        stop = tokens[eos] if eos is not None and eos < len(tokens) else ""
        if stop and stop.isprintable() and '"' not in stop:
            lines.append(f'PARAMETER stop "{stop}"')
        return "\n".join(lines) + "\n"


def _file_facts(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """Keys that say how the tensors are stored, where the metadata does not."""
    weights: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) > 1:
            weights[entry.format.name] += torch.Size(entry.shape).numel()
    facts: dict[str, Any] = {"general.quantization_version": QUANTIZATION_VERSION}
    mostly = max(weights, key=weights.__getitem__, default="fp32")
    if mostly in FILE_TYPES:
        facts["general.file_type"] = FILE_TYPES[mostly]
    return {key: value for key, value in facts.items() if key not in metadata}


def _layout(entries: Sequence[Entry], metadata: Mapping[str, Any]) -> tuple[bytes, list[TensorInfo], int]:
    """Header, where each tensor goes, and the size of the whole file."""
    alignment = int(metadata.get(ALIGNMENT_KEY, ALIGNMENT))
    infos, offset = [], 0
    for entry in entries:
        number = ggml_type(entry.format)
        assert number is not None  # `admits` has refused all others
        infos.append(TensorInfo(entry.name, entry.shape, number, offset))
        offset += padded(entry.nbytes, alignment)
    if len({info.name for info in infos}) < len(infos):
        raise LedgerError("an entry is declared twice; each must be written once")
    header = header_bytes(metadata, infos, alignment)
    return header, infos, len(header) + offset


def _array(entry: Entry, file: OutputFile, start: int) -> ArrayOnDisk:
    ((name, spec),) = laid_out(entry.format).arrays(entry.shape).items()
    return ArrayOnDisk(name, ArraySpec(spec.dtype, spec.shape), file, start)
