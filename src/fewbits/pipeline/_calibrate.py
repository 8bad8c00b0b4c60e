"""A calibrated run: text, streams of hidden states, block after block into the journal, the guard beside them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import Reader
from fewbits.engine import LayeredModel
from fewbits.errors import UnsupportedError
from fewbits.evals import Windows, calibration_windows, model_identity
from fewbits.formats import Float
from fewbits.methods import Finisher
from fewbits.methods.products import product_type
from fewbits.models import Slot
from fewbits.pipeline._blocks import Work, replay_block, solve_block
from fewbits.pipeline._finish import finish_blocks, held_out_divergence, run_solved
from fewbits.pipeline._foresight import foresee, needs_original
from fewbits.pipeline._guard import Guard
from fewbits.pipeline._job import Job
from fewbits.pipeline._journal import Journal, unfinished
from fewbits.pipeline._memory import give_back_free_memory
from fewbits.pipeline._solved import Overlay, Solved
from fewbits.pipeline._streams import Streams
from fewbits.pipeline._vocabulary import VOCABULARY, put_vocabulary
from fewbits.results import CalibrationReport, Estimate

Progress = Callable[[int, int, str], None]
SOLVED = "block"  # stage of the journal


@dataclass(frozen=True)
class Calibration:
    """On what text, where, and within what limits a run is calibrated.

    text: a file (.txt, .jsonl, a column of .parquet), a hub data set, or `self`, text that the model writes. windows of
    `length` tokens are calibrated on, `held_out` more are only looked at. memory: bytes of hidden states in memory;
    more of them go to a file beside the output. limit: largest divergence from the original on the held-out windows,
    nats per token.
    observer: how static scales of inputs are found (minmax, percentile, mse).
    """

    text: str | Path | Windows = "self"
    windows: int = 128
    length: int = 256
    held_out: int = 8
    seed: int = 0
    device: str = "cpu"
    memory: int = 4 << 30
    observer: str = "percentile"
    limit: float = 1.0


@dataclass(frozen=True)
class Ready:
    """A calibrated run that can begin: its text is read, its model is open, its cost is known.

    held: windows that nothing is calibrated on, None where the text has but one. entries: parameter of the running
    model -> its entry in the checkpoint. window_seconds: that a window takes through all blocks.
    """

    calibration: Calibration
    work: Work
    entries: Mapping[str, str]
    windows: Windows
    held: Windows | None
    need: Estimate
    window_seconds: float

    def facts(self, job: Job) -> dict[str, Any]:
        """Whatever decides the output's bytes."""
        return {
            "source": model_identity(job.source),
            "output": output_facts(job),
            "method": repr(job.recipe),
            "observer": self.calibration.observer if job.rounded.observed else None,
            "calibration": self.windows.digest,
            "device": f"{self.work.model.device.type}, products in {self.work.model.products}",
            "versions": {name: version(name) for name in ("fewbits", "torch", "transformers")},
        }

    def report(self, divergence: float | None) -> CalibrationReport:
        return CalibrationReport(
            source=self.windows.source,
            text=self.windows.description,
            windows=self.windows.ids.shape[0],
            length=self.windows.ids.shape[1],
            tokens=self.windows.ids.numel(),
            digest=self.windows.digest,
            held_out_tokens=0 if self.held is None else self.held.ids.numel(),
            held_out_kld=divergence,
        )


def output_facts(job: Job) -> dict[str, str]:
    """What each entry of the output is to be."""
    return {entry.name: f"{entry.format} {entry.inputs or ''}".strip() for entry in job.entries}


def make_ready(job: Job, calibration: Calibration) -> Ready:
    """Read (or write) the text and find out what solving the blocks will take."""
    work, entries = make_work(job, calibration)
    windows, held = read_text(job.reader, calibration)
    need, seconds = foresee(work, windows.ids, 0 if held is None else len(held.ids), calibration.memory)
    return Ready(calibration, work, entries, windows, held, need, seconds)


@dataclass(frozen=True)
class Run:
    """A run whose blocks are solved and in the journal. divergence: on held-out text, None without such text."""

    ready: Ready
    journal: Journal
    guard: Guard | None
    stage: str = SOLVED
    divergence: float | None = None

    def finish(self, finisher: Finisher) -> Run:
        """The run after a finisher."""
        work, ids = self.ready.work, self.ready.windows.ids
        spills = 8 * ids.numel() * work.model.hidden_size > self.ready.calibration.memory
        folder = self.journal.folder if spills else None
        stage = finish_blocks(work, ids, self.journal, self.stage, finisher, folder)
        divergence = None
        if self.guard is not None and self.ready.held is not None:
            divergence = held_out_divergence(work, self.journal, stage, self.guard, self.ready.held.ids)
        return replace(self, stage=stage, divergence=divergence)

    def job(self, job: Job) -> Job:
        """The job with its blocks taken from here."""
        changed = {self.ready.entries[name]: value for name, value in self.journal.changed(self.stage).items()}
        reader = Overlay(job.reader, changed) if changed else job.reader
        solved = Solved(self.journal, (VOCABULARY, self.stage), transformed=bool(job.recipe.transforms))
        return replace(job, solved=solved, reader=reader, calibrated=self.ready.report(self.divergence))


@contextmanager
def solve(job: Job, ready: Ready, progress: Progress | None) -> Iterator[Job]:
    """The job with its blocks solved and finished; all that is on disk of it is removed once the job is done."""
    with solving(job, ready, progress) as solved:
        finished = solved
        for finisher in ready.work.recipe.finishers:
            if progress:
                progress(1, 2, finisher.name)
            finished = finished.finish(finisher)
        gc.collect()
        give_back_free_memory()
        yield finished.job(job)
        solved.journal.remove()


@contextmanager
def solving(
    job: Job,
    ready: Ready,
    progress: Progress | None,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """Solve the blocks that the journal has not. folder: of the journal, by default beside the output. facts: what
    else decides the output.
    """
    work = ready.work
    steps = len(work.model.layers) * (1 + len(work.recipe.finishers))
    with Journal(folder or unfinished(job.out), {**ready.facts(job), **(facts or {})}, work.formats) as journal:
        put_vocabulary(work, ready.windows.ids, journal, ready.calibration.memory)
        streams = Streams(
            work.model,
            ready.windows.ids,
            folder=journal.folder,
            limit=ready.calibration.memory,
            original=needs_original(work.recipe),
            held=None if ready.held is None else ready.held.ids,
        )
        try:
            guard = None
            if ready.held is not None and streams.held is not None:
                guard = Guard(work.model, ready.held.ids, streams.held, ready.calibration.limit, streams.batch)
            finished = journal.finished(SOLVED)
            for index, layer in enumerate(work.model.layers):
                if progress:
                    progress(index, steps, f"{work.recipe.name} {layer}")
                if index < finished:
                    replay_block(work, index, streams, journal.load(SOLVED, index))
                else:
                    journal.save(SOLVED, index, solve_block(work, index, streams))
                if guard is not None and streams.held is not None:
                    guard.check(index, streams.held, partial(run_solved, work, journal, SOLVED))
                give_back_free_memory()
        finally:
            streams.close()
        yield Run(ready, journal, guard, divergence=None if guard is None else guard.divergence)


def make_work(job: Job, calibration: Calibration) -> tuple[Work, dict[str, str]]:
    """What the blocks are made of; and for each parameter of the running model its entry in the checkpoint.

    Raises UnsupportedError if no matrix to be quantized lies in a block.
    """
    reader, plan = job.reader, job.plan
    model = LayeredModel(reader, calibration.device)
    places = model.slots()
    slots, vocabulary = dict[str, Slot](), dict[str, Slot]()
    for piece in job.pieces:
        slot = places.get(piece.source)
        if slot is None or not plan[piece.name].quantized:
            continue
        if model.layer_of(slot.parameter) is not None:
            slots[piece.name] = slot.narrowed(piece)
        elif any(model.uses(slot.parameter)):
            vocabulary[piece.name] = slot.narrowed(piece)
    if not slots:
        raise UnsupportedError(
            f"{reader.path}: no matrix that is to be quantized lies in a decoder layer; use rtn, which needs no blocks"
        )
    entries = {slot.parameter: name for name, slot in places.items() if slot == Slot(slot.parameter)}
    dtypes = {parameter: _dtype(job, name) for parameter, name in entries.items()}
    formats = {name: plan[name].format for name in (*slots, *vocabulary)}
    shapes = {piece.name: piece.shape for piece in job.pieces if piece.name in formats}
    model.products = product_type((formats[name] for name in slots), model.device)
    rounded = replace(job.rounded, observer=calibration.observer)
    return Work(model, job.recipe, formats, slots, vocabulary, shapes, dtypes, rounded), entries


def _dtype(job: Job, name: str) -> torch.dtype:
    """The type that an entry of the source is written in, where it stays in floating point."""
    kept = (job.plan[piece.name].format for piece in job.pieces if piece.source == name)
    return next((format.dtype for format in kept if isinstance(format, Float)), torch.float32)


def read_text(reader: Reader, calibration: Calibration) -> tuple[Windows, Windows | None]:
    """The windows to calibrate on, and held-out ones that follow them; None where the text has but one window."""
    found = text_of(reader, calibration)
    held = min(calibration.held_out, -(-len(found.ids) // 4), len(found.ids) - 1)
    kept = len(found.ids) - held
    windows = replace(found, ids=found.ids[:kept])
    return windows, replace(found, ids=found.ids[kept:]) if held else None


def text_of(reader: Reader, calibration: Calibration) -> Windows:
    """All windows, the held-out ones last."""
    text, length = calibration.text, calibration.length
    if isinstance(text, Windows):
        return text
    wanted = calibration.windows + calibration.held_out
    return calibration_windows(text, reader.path, wanted, length, seed=calibration.seed, device=calibration.device)
