"""What a conversion comes to, decided before a byte is written: each tensor's format in the target, or a refusal.

Weights decide alone whether a conversion is exact. What does not show in them is said in notes: inputs that the
source's engine rounded and the target's does not, last bits of norms that GGUF stores with 1 added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fewbits.checkpoint import KINDS, Entry, Kind, Reader, is_scale, open_checkpoint
from fewbits.checkpoint._writer import refuse_existing
from fewbits.checkpoint.adapter import adapter_inside
from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format
from fewbits.models import Architecture, Piece, describe, gguf_dropped
from fewbits.pipeline._gguf_source import GgufSource
from fewbits.pipeline._job import gguf_facts
from fewbits.pipeline._moves import FP32, Move, Wish, keeps, move, smallest_float, with_rounding
from fewbits.pipeline._parts import added_exactly
from fewbits.pipeline._source import Unscaled, cut, local_folder, open_any, require_ties
from fewbits.pipeline._stream import Meter, Progress, on_threads
from fewbits.plan.rules import parse

FLOATING = "huggingface"
NAMES = {name: name for name, kind in KINDS.items() if kind.written and name != FLOATING} | {"hf": FLOATING}
"""What `--to` takes, and the kind that it means."""
SHORT = {"f32": "fp32", "f16": "fp16"}
ALONE = "--to hf writes its weights alone"


@dataclass(frozen=True)
class Conversions:
    """Everything that is decided. entries: those of the moves in their order, then of extras, then scales. config: of a
    GGUF file, its metadata. beside: JSON files of a folder that the source has in another form.
    """

    source: Path
    out: Path
    source_kind: Kind
    kind: Kind
    reader: Reader
    architecture: Architecture
    moves: tuple[Move, ...]
    entries: tuple[Entry, ...]
    scales: tuple[Entry, ...]
    config: Mapping[str, Any]
    extras: Mapping[str, tuple[float, ...]]
    beside: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, str]
    notes: tuple[str, ...]


def prepare(
    model: str | Path,
    out: Path,
    *,
    to: str,
    format: str | Format | None,
    allow_rounding: bool,
    pretokenizer: str | None,
    threads: int,
    progress: Progress | None,
) -> Conversions:
    """Open the source and find every tensor's format in the target; nothing is written."""
    kind, asked, source = _kind(to, out), _asked(format), local_folder(model)
    refuse_existing(out)
    source_kind, opened = _opened(source, kind, asked)
    reader = Unscaled(opened)
    shapes = {name: entry.shape for name, entry in reader.entries.items()}
    architecture = describe(reader.config, shapes)
    require_ties(reader, architecture.tied)
    pieces = tuple(cut(kind, architecture, reader))
    if kind.name == FLOATING and asked is None:
        asked = smallest_float(reader, pieces)
    wish = Wish(kind, {piece.name for piece in pieces}, asked)
    lossy = _lossy_norms(opened, pieces, allow_rounding)
    scales = _scales(opened, kind)
    imposed = source_kind.inputs is not None
    if kind.name != FLOATING and kind.inputs is None and not imposed:
        _require_inputs(reader, pieces, kind)
    moves = _moves(reader, pieces, wish, allow_rounding, threads, progress)
    tensors = tuple(_entry(reader, each, kind, imposed=imposed) for each in moves)
    extras: Mapping[str, tuple[float, ...]] = {}
    config: Mapping[str, Any] = _config(opened, moves)
    beside, dropped = dict[str, dict[str, Any]](), dict[str, str]()
    if kind.name == "gguf":
        config, extras = gguf_facts(opened, reader.config, source, pretokenizer)
        dropped = gguf_dropped(reader.config, shapes)
    elif isinstance(opened, GgufSource):
        beside = opened.companions()
    return Conversions(
        source=source,
        out=out,
        source_kind=source_kind,
        kind=kind,
        reader=reader,
        architecture=architecture,
        moves=moves,
        entries=(*tensors, *(Entry(name, (len(values),), FP32) for name, values in extras.items()), *scales),
        scales=scales,
        config=config,
        extras=extras,
        beside=beside,
        dropped=dropped,
        notes=(*lossy, *_input_notes(opened, tensors, kind)),
    )


def _kind(to: str, out: Path) -> Kind:
    if to not in NAMES:
        raise UnsupportedError(f"--to '{to}' is no kind of checkpoint; choose one of {', '.join(NAMES)}")
    if (out.suffix == ".gguf") != (to == "gguf"):
        what = "a file whose name ends in .gguf" if to == "gguf" else "a folder"
        raise UnsupportedError(f"{out}: --to {to} makes {what}; name it so")
    return KINDS[NAMES[to]]


def _asked(format: str | Format | None) -> Format | None:
    return None if format is None else parse(SHORT.get(format, format) if isinstance(format, str) else format)


def _opened(source: Path, kind: Kind, asked: Format | None) -> tuple[Kind, Reader]:
    """The source. Raises UnsupportedError for what is another verb's work."""
    if adapter_inside(source) is not None:
        raise UnsupportedError(f"{source} has an adapter inside; make the two one first, with `fewbits merge`")
    source_kind, reader = open_checkpoint(source)[0], open_any(source)
    floating = isinstance(asked, Float)
    quantized = any(not isinstance(entry.format, Float) for entry in reader.entries.values())
    if not quantized and not (kind.name in ("gguf", FLOATING) and (asked is None or floating)):
        raise UnsupportedError(
            f"{source} is in floating point, and {asked or kind.name} would round it: that is `fewbits quantize`"
        )
    if floating and kind.name not in ("gguf", FLOATING):
        raise UnsupportedError(f"{asked} in a {kind.name} folder: weights in floating point are --to hf")
    if kind.name == FLOATING and asked is not None and not floating:
        raise UnsupportedError(f"--to hf holds floating point, not {asked}; choose f32, bf16 or f16, or another --to")
    return source_kind, reader


def _moves(
    reader: Reader, pieces: Sequence[Piece], wish: Wish, rounding: bool, threads: int, progress: Progress | None
) -> tuple[Move, ...]:
    """A move for every piece. Raises UnsupportedError if numbers would change, and that was not allowed."""
    meter = Meter(sum(_stored_bytes(reader, piece) for piece in pieces), progress)

    def chosen(piece: Piece, stop: Event) -> Move:
        found = move(reader, piece, wish, stop)
        meter.add(_stored_bytes(reader, piece), f"choose {piece.name}")
        return found

    moves = on_threads(chosen, pieces, threads)
    refused = [each for each in moves if each.format is None]
    if refused and not rounding:
        raise UnsupportedError(_refusal(reader, refused, wish.kind))
    return tuple(with_rounding(reader, moves, wish) if refused else moves)


def _stored_bytes(reader: Reader, piece: Piece) -> int:
    return reader.entries[piece.source].format.nbytes(piece.shape)


def _refusal(reader: Reader, refused: Sequence[Move], kind: Kind) -> str:
    first, more = refused[0], f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    reason = (first.reason or "").removeprefix(f"{first.piece.name}: ")
    return (
        f"{first.piece.name} ({first.before}){more} cannot move to {kind.name} with the same numbers: {reason}. "
        f"Take --to {_holder(reader, first, kind)}, which holds them, or --allow-rounding, which says what it changes"
    )


def _holder(reader: Reader, refused: Move, kind: Kind) -> str:
    """Another kind that holds a tensor as it is, one of nearly the same name first (gptq-v2), our own last; else hf."""
    others = [other for other in KINDS.values() if other.written and other.name not in (kind.name, "gguf")]
    found = [other.name for other in others if keeps(reader, refused.piece, other)]
    return min(found, key=lambda name: (not name.startswith(kind.name), name == "fewbits"), default="hf")


def _lossy_norms(reader: Reader, pieces: Sequence[Piece], allow_rounding: bool) -> list[str]:
    """A note where taking 1 from norms, or adding it to them, loses last bits; UnsupportedError if it may not."""
    lossy = [piece.name for piece in pieces if not _added_exactly(reader, piece)]
    if lossy and not allow_rounding:
        raise UnsupportedError(
            f"{lossy[0]} and {len(lossy) - 1} more norms: GGUF stores 1 more than they are, and FP32 does not hold "
            "both exactly; --allow-rounding lets their last bits go"
        )
    return [f"last bits of {len(lossy)} norms are lost, because GGUF stores 1 more than they are"] if lossy else []


def _added_exactly(reader: Reader, piece: Piece) -> bool:
    return added_exactly(reader, piece) and (not isinstance(reader, GgufSource) or reader.exact(piece.source))


def _require_inputs(reader: Reader, pieces: Sequence[Piece], kind: Kind) -> None:
    """Raise UnsupportedError where a kind holds a matrix as it is, but cannot say that its inputs are rounded."""
    for piece in pieces:
        stored = reader.entries[piece.source]
        plain = Entry(piece.name, piece.shape, stored.format)
        trouble = kind.admits(replace(plain, inputs=stored.inputs))
        if stored.inputs is not None and trouble is not None and kind.admits(plain) is None:
            raise UnsupportedError(f"{trouble} ({ALONE})")


def _entry(reader: Reader, each: Move, kind: Kind, *, imposed: bool) -> Entry:
    """The entry of a move, with its inputs rounded as the source says, if the target can say it.

    imposed: whether the source's engine rounds the inputs of every matrix, which is not asked of another one. Raises
    UnsupportedError where the target cannot say what the source chose.
    """
    assert each.format is not None
    entry = kind.entry(each.piece.name, each.piece.shape, each.format)
    inputs = reader.entries[each.piece.source].inputs
    if inputs is None or kind.inputs is not None or isinstance(each.format, Float):
        return entry
    with_inputs = replace(entry, inputs=inputs)
    trouble = kind.admits(with_inputs)
    if trouble is not None and not imposed:
        raise UnsupportedError(f"{trouble} ({ALONE})")
    return entry if trouble else with_inputs


def _scales(reader: Reader, kind: Kind) -> tuple[Entry, ...]:
    """The source's static scales, which go along where inputs (or keys and values) stay rounded."""
    found = tuple(entry for entry in reader.entries.values() if is_scale(entry))
    if kind.name == FLOATING:
        return ()
    for entry in found:
        trouble = kind.admits(entry)
        if trouble is not None:
            raise UnsupportedError(f"{trouble} ({ALONE})")
    return found


def _input_notes(reader: Reader, entries: Sequence[Entry], kind: Kind) -> list[str]:
    """Inputs that were rounded as the model ran and are not any more, or the other way round."""
    before = {entry.inputs.name for entry in reader.entries.values() if entry.inputs is not None}
    after = {entry.inputs.name for entry in entries if entry.inputs is not None}
    gone = [f"the source rounds inputs of matrices to {name}; the output does not" for name in sorted(before - after)]
    return gone + [
        f"engines of {kind.name} files round inputs of matrices to {name}" for name in sorted(after - before)
    ]


def _config(reader: Reader, moves: Sequence[Move]) -> dict[str, Any]:
    """config.json. Where tensors were decoded it names the widest type among them, so that loaders round none."""
    decoded = any(isinstance(each.format, Float) and each.format != each.before for each in moves)
    if not decoded and not isinstance(reader, GgufSource):
        return dict(reader.config)
    floats = [each.format for each in moves if isinstance(each.format, Float)]
    floating = {format.dtype for format in floats if format.dtype.is_floating_point}
    widest = floating.pop() if len(floating) == 1 else torch.float32
    plain = {key: value for key, value in reader.config.items() if key != "torch_dtype"}
    return plain | {"dtype": str(widest).removeprefix("torch.")}
