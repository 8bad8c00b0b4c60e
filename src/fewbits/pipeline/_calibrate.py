"""A calibrated run: text, streams of hidden states, block after block into the journal, the guard beside them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from fewbits.checkpoint import Reader
from fewbits.engine import LayeredModel, load
from fewbits.errors import UnsupportedError
from fewbits.evals import Windows, read_windows, self_text
from fewbits.formats import Float, QTensor
from fewbits.methods.recipe import Recipe
from fewbits.models import Piece, Slot
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._blocks import Streams, Work, advance, open_block, replay_block, restore, solve_block
from fewbits.pipeline._guard import Guard
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._memory import give_back_free_memory
from fewbits.plan.rules import Plan

Progress = Callable[[int, int, str], None]
SOLVED = "block"  # stage of the journal


@dataclass(frozen=True)
class Calibration:
    """On what text, where, and within what limits a run is calibrated.

    text: a file (.txt, .jsonl, a column of .parquet), a hub data set, or `self`, text that the model writes. windows of
    `length` tokens are calibrated on, `held_out` more are only looked at. memory: bytes of hidden states in memory;
    more of them go to a file beside the output. limit: largest divergence from the original on the held-out windows,
    nats per token.
    """

    text: str | Path | Windows = "self"
    windows: int = 128
    length: int = 256
    held_out: int = 8
    seed: int = 0
    device: str = "cpu"
    memory: int = 4 << 30
    limit: float = 1.0


class Overlay(Reader):
    """A checkpoint some of whose tensors are other ones: those that a transform rewrote and the plan keeps."""

    def __init__(self, reader: Reader, changed: Mapping[str, torch.Tensor]) -> None:
        self.path, self.config, self.entries = reader.path, reader.config, reader.entries
        self.changed = changed
        self._reader = reader

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        if name not in self.changed:
            return self._reader.read(name, rows)
        value = self.changed[name]
        return QTensor(self.entries[name].format, value if rows is None else value[rows], {})


class Solved:
    """The matrices that blocks were solved for, read back from the journal as they are asked for."""

    def __init__(self, journal: Journal, stage: str, *, transformed: bool, divergence: float | None) -> None:
        self._journal, self._stage = journal, stage
        self._index = journal.index(stage)
        self.transformed = transformed
        self.divergence = divergence

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def error(self, name: str) -> float:
        return self._index[name][1]

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        return self._journal.read(self._stage, self._index[name][0], name, rows)


def make_work(
    reader: Reader, pieces: tuple[Piece, ...], plan: Plan, recipe: Recipe, calibration: Calibration
) -> tuple[Work, dict[str, str]]:
    """What the blocks are made of; and for each parameter of the running model its entry in the checkpoint.

    Raises UnsupportedError if no matrix to be quantized lies in a block.
    """
    model = LayeredModel(reader, calibration.device)
    places = model.slots()
    slots: dict[str, Slot] = {}
    for piece in pieces:
        slot = places.get(piece.source)
        if slot is not None and model.layer_of(slot.parameter) is not None and plan[piece.name].quantized:
            slots[piece.name] = slot.narrowed(piece)
    if not slots:
        raise UnsupportedError(
            f"{reader.path}: no matrix that is to be quantized lies in a decoder layer; use rtn, which needs no blocks"
        )
    entries = {slot.parameter: name for name, slot in places.items() if slot == Slot(slot.parameter)}
    dtypes = {parameter: _dtype(reader, name) for parameter, name in entries.items()}
    return Work(model, recipe, {name: plan[name].format for name in slots}, slots, dtypes), entries


def _dtype(reader: Reader, name: str) -> torch.dtype:
    format = reader.entries[name].format
    return format.dtype if isinstance(format, Float) else torch.float32


def read_text(reader: Reader, calibration: Calibration) -> tuple[Windows, Windows | None]:
    """The windows to calibrate on, and held-out ones that follow them; None where the text has but one window."""
    found = _windows(reader.path, calibration, calibration.windows + calibration.held_out)
    held = min(calibration.held_out, -(-len(found.ids) // 4), len(found.ids) - 1)
    kept = len(found.ids) - held
    windows = Windows(found.ids[:kept], found.description)
    return windows, Windows(found.ids[kept:], found.description) if held else None


def _windows(path: Path, calibration: Calibration, wanted: int) -> Windows:
    if isinstance(calibration.text, Windows):
        return calibration.text
    if calibration.text == "self":
        return self_text(load(path, device=calibration.device), wanted, calibration.length, calibration.seed)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return read_windows(Path(calibration.text), tokenizer, wanted, calibration.length)


@contextmanager
def solved_blocks(
    work: Work,
    journal: Journal,
    windows: Windows,
    held: Windows | None,
    calibration: Calibration,
    progress: Progress | None,
) -> Iterator[Solved]:
    """Solve every block that the journal has not, and offer what came out."""
    streams = Streams(
        work,
        windows.ids,
        folder=journal.folder,
        limit=calibration.memory,
        original=needs_original(work.recipe),
        held=None if held is None else held.ids,
    )
    try:
        divergence = _solve_all(work, journal, streams, calibration, progress)
    finally:
        streams.close()
    gc.collect()
    give_back_free_memory()
    yield Solved(journal, SOLVED, transformed=bool(work.recipe.transforms), divergence=divergence)


def needs_original(recipe: Recipe) -> bool:
    """Whether a method compares with what the original's blocks return."""
    methods = (*recipe.transforms, recipe.solver)
    return any(method.runs or "cross" in (*method.needs, *method.wants) for method in methods)


def _solve_all(
    work: Work, journal: Journal, streams: Streams, calibration: Calibration, progress: Progress | None
) -> float | None:
    """The divergence on held-out text with all blocks quantized; None without such text."""
    count, finished = len(work.model.layers), journal.finished(SOLVED)
    guard = None
    if streams.held is not None:
        guard = Guard(work.model, streams.held, calibration.limit, streams.batch)

    def redo(index: int, stream: Activations) -> None:
        block = open_block(work, index)
        restore(block, journal.load(SOLVED, index))
        with torch.no_grad():
            advance(block, stream, streams.batch)
        work.model.drop(index)

    for index in range(count):
        if progress:
            progress(index, count, f"{work.recipe.name} {work.model.layers[index]}")
        if index < finished:
            replay_block(work, index, streams, journal.load(SOLVED, index))
        else:
            journal.save(SOLVED, index, solve_block(work, index, streams))
        if guard is not None and streams.held is not None:
            guard.check(index, streams.held, redo)
        give_back_free_memory()
    return None if guard is None else guard.divergence


def changed_entries(journal: Journal, entries: Mapping[str, str], blocks: int) -> dict[str, torch.Tensor]:
    """Entries of the checkpoint that transforms changed and the plan keeps, with their numbers."""
    changed: dict[str, torch.Tensor] = {}
    for index in range(blocks):
        changed |= {entries[name]: value for name, value in journal.changed(SOLVED, index).items()}
    return changed
