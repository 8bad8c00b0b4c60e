"""Where the weights come from: a folder or a hub name, read a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoint import Kind, Reader, open_checkpoint
from fewbits.checkpoint.activations import is_scale
from fewbits.checkpoint.adapter import adapter_inside, read_adapter
from fewbits.checkpoint.gguf import GgufReader
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Float, QTensor
from fewbits.models import Architecture, Piece, Role, gguf_pieces, unfused
from fewbits.pipeline._adapted import AdaptedReader
from fewbits.pipeline._gguf_source import GgufSource

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
COMPARED = 1024  # rows
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")


def local_folder(model: str | Path) -> Path:
    """The folder that holds the model: the path itself, or the hub's files of that name (downloaded if need be).

    Raises CheckpointError if it is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(str(model)):
        raise CheckpointError(f"{model}: no such file or folder, and not a hub name such as owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: no such folder here, and the hub could not be asked for it ({type(error).__name__}); "
            "give the path of a downloaded model, or try again online"
        ) from error


def open_any(path: Path) -> Reader:
    """A checkpoint in any format, by transformers' names and in its layout."""
    _, reader = open_checkpoint(path)
    return GgufSource(reader) if isinstance(reader, GgufReader) else reader


def open_source(path: Path) -> Reader:
    """A checkpoint whose weights are still floating point, by transformers' names and in its layout.

    One with an adapter inside is read with that added, whatever its own weights are in.
    Raises UnsupportedError if it is quantized already.
    """
    _, reader = open_checkpoint(path)
    if (adapter := adapter_inside(path)) is not None:
        return AdaptedReader(reader, read_adapter(adapter))
    quantized = next((e for e in reader.entries.values() if not isinstance(e.format, Float)), None)
    rounded = any(is_scale(entry) for entry in reader.entries.values())
    if quantized is not None or rounded or "quantization_config" in reader.config:
        what = f"{quantized.name} is {quantized.format}" if quantized else "config.json has a quantization_config"
        raise UnsupportedError(
            f"{path} is quantized already ({what}); quantize from the original checkpoint. `fewbits convert` moves it "
            "to another file type without rounding it again, and with `--to hf` writes its weights in floating point"
        )
    return GgufSource(reader) if isinstance(reader, GgufReader) else reader


class Unscaled(Reader):
    """A checkpoint's parameters: its entries without static scales, which `read` still reads."""

    def __init__(self, reader: Reader) -> None:
        self.path, self.config, self._reader = reader.path, reader.config, reader
        self.entries = {name: entry for name, entry in reader.entries.items() if not is_scale(entry)}

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        return self._reader.read(name, rows)


def require_ties(reader: Reader, tied: Mapping[str, str]) -> None:
    """Raise CheckpointError if a parameter that the configuration ties is in the files with other numbers.

    Loaders disagree on which of the two counts then, so leaving one out would change the model for some of them.
    """
    for name, other in tied.items():
        if name in reader.entries and not _same_numbers(reader, name, other):
            raise CheckpointError(
                f"{name} differs from {other}, although config.json ties them (tie_word_embeddings); set that to false "
                f"to use both, or remove {name}"
            )


def _same_numbers(reader: Reader, name: str, other: str) -> bool:
    shape = reader.entries[name].shape
    if reader.entries[other].shape != shape:
        return False
    slabs = (slice(i, i + COMPARED) for i in range(0, shape[0], COMPARED))
    if not all(reader.entries[each].format.rowwise for each in (name, other)):
        return torch.equal(reader.read(name).dequantize(), reader.read(other).dequantize())
    return all(
        torch.equal(reader.read(name, rows).dequantize(), reader.read(other, rows).dequantize()) for rows in slabs
    )


def dtype_of(reader: Reader, name: str) -> torch.dtype:
    format = reader.entries[name].format
    if not isinstance(format, Float):
        raise UnsupportedError(f"{name} is stored as {format}, where a floating-point tensor is needed")
    return format.dtype


def cut(kind: Kind, architecture: Architecture, reader: Reader) -> Iterator[Piece]:
    """The tensors of the output. GGUF has names and layouts of its own; folders keep the source's."""
    shapes = {name: entry.shape for name, entry in reader.entries.items() if name not in architecture.tied}
    if kind.name == "gguf":
        yield from gguf_pieces(reader.config, shapes)
        return
    for name, shape in shapes.items():
        role = architecture.roles[name]
        if role is Role.EXPERTS and kind.name == "compressed-tensors":
            yield from unfused(name, shape, reader.config)
        else:
            yield Piece(name, name, role, shape)


def row_step(piece: Piece, elements: int) -> int:
    """How many rows of a piece make about `elements` weights, in whole rotary heads."""
    rows = max(1, elements // max(1, piece.shape[-1]))
    if piece.interleaved_heads is None:
        return rows
    head = piece.shape[0] // piece.interleaved_heads
    return -(-rows // head) * head


def read_rows(reader: Reader, piece: Piece, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a piece, in the source's dtype; all of a vector or a scalar."""
    w = _narrowed(reader, piece, start, stop)
    if piece.interleaved_heads is not None:
        head = piece.shape[0] // piece.interleaved_heads
        w = w.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)
    return w.float() + piece.added if piece.added else w  # in float32: w + 1 would lose digits in 16 bits


def _narrowed(reader: Reader, piece: Piece, start: int, stop: int) -> Tensor:
    if piece.expert is None and not piece.transposed:
        first = piece.rows[0] if piece.rows else 0
        rows = slice(first + start, first + stop) if piece.shape else None
        return reader.read(piece.source, rows).codes
    if piece.expert is None:
        w = reader.read(piece.source).codes
    else:
        w = reader.read(piece.source, slice(piece.expert, piece.expert + 1)).codes[0]
    w = w.transpose(-1, -2) if piece.transposed else w
    w = w[slice(*piece.rows)] if piece.rows else w
    return w[start:stop]
