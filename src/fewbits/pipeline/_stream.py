"""Every tensor from the source through its method into the file, a part at a time, and its line in the ledger.

A tensor is read a few rows at a time, quantized, decoded again to measure its error, and written, so memory stays the
same whatever the model's size. Tensors are spread over threads, largest first: torch's elementwise operations release
the interpreter's lock, and a part of a million weights stays in the cache from the first operation to the last.
Matrices that were solved block by block are copied from the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import Any, TypeVar

import torch

from fewbits import origin
from fewbits.checkpoint import Entry, Kind, Reader, Writer
from fewbits.errors import FormatError, LedgerError
from fewbits.formats import Float, Format, QTensor
from fewbits.kernels.threads import workers
from fewbits.models import Architecture, Piece
from fewbits.pipeline._job import FP32, Job
from fewbits.pipeline._memory import give_back_free_memory
from fewbits.pipeline._solved import Solved, rewritten
from fewbits.pipeline._source import read_rows, row_step
from fewbits.plan.rules import Choice
from fewbits.results import Fate, TensorReport

PART = 1 << 20  # weights quantized at a time: 4 MB as FP32, which an L3 cache holds with its temporaries
TRIMMED = 64  # parts after which free memory goes back to the system

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int, str], None]
"""Called with (done, total, label) as work goes on."""


def run(job: Job, threads: int, progress: Progress | None) -> tuple[TensorReport, ...]:
    """Stream every piece into the output and commit it with its ledger."""
    with (
        companions(job.source, job.beside) as beside,
        job.kind.create(job.out, job.entries, beside, job.metadata) as writer,
    ):
        for name, values in job.extras.items():
            writer.write(name, QTensor(FP32, torch.tensor(values), {}))
        for entry in job.scales:
            writer.write(entry.name, QTensor(FP32, job.solved.scales[entry.name], {}))  # type: ignore[union-attr]
        reports = stream(job, writer, threads, progress)
        reports |= {name: _extra_report(job, writer, name) for name in job.extras}
        reports |= {entry.name: _scale_report(job, writer, entry) for entry in job.scales}
        absent = absences(job.architecture, job.dropped)
        ledger = account([reports[entry.name] for entry in job.entries], absent, job.reader, job.kind)
        writer.commit(ledger_document(job, ledger))
    return ledger


@contextmanager
def companions(source: Path, made: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """The folder whose files go along with the weights: the source, or one of the JSON files that were made of it."""
    if not made:
        yield source
        return
    with TemporaryDirectory() as folder:
        for name, content in made.items():
            Path(folder, name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        yield Path(folder)


def stream(job: Job, writer: Writer, threads: int, progress: Progress | None) -> dict[str, TensorReport]:
    """Quantize and write all pieces on `threads` threads. The first error stops them all."""
    meter = Meter(sum(entry.nbytes for entry in job.entries), progress)
    largest_first = sorted(job.pieces, key=lambda piece: _numel(piece.shape), reverse=True)
    reports = on_threads(lambda piece, stop: _convert(job, piece, writer, meter, stop), largest_first, threads)
    return {report.name: report for report in reports if report is not None}


def on_threads(work: Callable[[T, Event], R], items: Sequence[T], threads: int) -> list[R]:
    """What becomes of each item, worked on by `threads` threads. An error, or Ctrl-C, sets the event for the others."""
    stop = Event()
    with workers(threads) as pool:
        tasks = [pool.submit(work, item, stop) for item in items]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            stop.set()
            raise
        if any(task.exception() for task in done):
            stop.set()
    return [task.result() for task in tasks]


def _convert(job: Job, piece: Piece, writer: Writer, meter: Meter, stop: Event) -> TensorReport | None:
    choice = job.plan[piece.name]
    whole = not choice.format.rowwise or not job.method.rowwise
    step = piece.shape[0] if whole and piece.shape else row_step(piece, PART)
    squared_error = squared_norm = 0.0
    if job.solved is not None and piece.name in job.solved:
        return _copy(job, job.solved, piece, writer, meter, stop)
    for start in range(0, piece.shape[0] if piece.shape else 1, step):
        if stop.is_set():
            return None
        w = read_rows(job.reader, piece, start, min(start + step, piece.shape[0] if piece.shape else 1))
        part = _quantized(job, piece, w, choice.format)
        writer.write(piece.name, part)
        meter.add(part.nbytes, piece.name)
        error, norm = _squares(w, part)
        squared_error, squared_norm = squared_error + error, squared_norm + norm
    relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    return _report(job, piece, choice, relative, writer.digests[piece.name])


def _copy(job: Job, solved: Solved, piece: Piece, writer: Writer, meter: Meter, stop: Event) -> TensorReport | None:
    """Write a matrix that was solved block by block."""
    choice = job.plan[piece.name]
    step = row_step(piece, PART) if choice.format.rowwise else piece.shape[0]
    for start in range(0, piece.shape[0], step):
        if stop.is_set():
            return None
        rows = slice(start, min(start + step, piece.shape[0])) if choice.format.rowwise else None
        part = solved.read(piece.name, rows)
        writer.write(piece.name, part)
        meter.add(part.nbytes, piece.name)
    report = _report(job, piece, choice, solved.error(piece.name), writer.digests[piece.name])
    return replace(report, method=job.method_name, transformed=solved.transformed or None)


def _quantized(job: Job, piece: Piece, w: torch.Tensor, format: Format) -> QTensor:
    try:
        if isinstance(format, Float):
            params = format.fit(w)
            return QTensor(format, format.round(w, params), params)
        return job.method.quantize(w.float(), format, job.weighing.statistics(piece.name) if job.weighing else {})
    except FormatError as error:
        raise FormatError(f"{piece.name}: {_not_finite(job, piece) or error}") from error


def _not_finite(job: Job, piece: Piece) -> str | None:
    """How many numbers of the whole tensor are NaN or Inf, as a sentence; None if all is well."""
    total, step = _numel(piece.shape), row_step(piece, PART)
    starts = range(0, piece.shape[0] if piece.shape else 1, step)
    bad = sum(int((~read_rows(job.reader, piece, i, i + step).isfinite()).sum()) for i in starts)
    return f"{bad} of {total} weights are NaN or Inf; repair the source checkpoint first" if bad else None


def _squares(w: torch.Tensor, part: QTensor) -> tuple[float, float]:
    """‖w − ŵ‖² and ‖w‖²."""
    norm = torch.linalg.vector_norm
    return float(norm(part.dequantize().sub_(w))) ** 2, float(norm(w, dtype=torch.float32)) ** 2


def _report(job: Job, piece: Piece, choice: Choice, error: float, digests: Mapping[str, str]) -> TensorReport:
    transformed = rewritten(job.reader, piece.source)
    changed = choice.quantized or (error > 0 and not transformed)  # a cast to fewer bits is quantization too
    method = (job.recipe.name if job.recipe.streams else job.method.name) if choice.quantized else "cast"
    return TensorReport(
        name=piece.name,
        fate="quantized" if changed else "kept",
        shape=piece.shape,
        format=choice.format.name,
        nbytes=job.kind.file_bytes(choice.format, piece.shape),
        method=method if changed else None,
        error=error if changed else None,
        reason=f"rewritten by {job.method_name}" if transformed and not changed else choice.reason,
        digests=digests,
        source=piece.source,
        transformed=transformed or None,
        inputs=job.rounded.inputs[piece.name].name if piece.name in job.rounded.inputs else None,
    )


def absences(architecture: Architecture, dropped: Mapping[str, str]) -> dict[str, TensorReport]:
    """Lines of the parameters that need no tensor of their own, by name."""
    found: dict[str, tuple[Fate, str]] = {name: ("dropped", why) for name, why in dropped.items()}
    found |= {name: ("tied", f"shares the weights of {other}") for name, other in architecture.tied.items()}
    return {
        name: TensorReport(name=name, fate=fate, shape=(), format="", nbytes=0, reason=why, source=name)
        for name, (fate, why) in found.items()
    }


def account(
    written: Sequence[TensorReport], absent: Mapping[str, TensorReport], reader: Reader, kind: Kind
) -> tuple[TensorReport, ...]:
    """The ledger: the outputs in file order, then the parameters that are in none, with the reason.

    Raises LedgerError if a parameter of the source is nowhere.
    """
    used = {report.source for report in written}
    unwritten = [line for name, line in absent.items() if name not in used]
    lost = reader.entries.keys() - used - absent.keys()
    if lost:
        raise LedgerError(
            f"{len(lost)} parameters of {reader.path} have no place in the output, the first is {min(lost)}; "
            f"{kind.name} files of this architecture cannot hold them"
        )
    return (*written, *unwritten)


def _extra_report(job: Job, writer: Writer, name: str) -> TensorReport:
    carried = job.source.is_file()  # from a GGUF file, which had it
    return TensorReport(
        name=name,
        fate="kept",
        shape=(len(job.extras[name]),),
        format=FP32.name,
        nbytes=4 * len(job.extras[name]),
        source=name if carried else "config.json",
        reason="carried over: the configuration's, not a parameter" if carried else "computed from the configuration",
        digests=writer.digests[name],
    )


def _scale_report(job: Job, writer: Writer, entry: Entry) -> TensorReport:
    return TensorReport(
        name=entry.name,
        fate="kept",
        shape=entry.shape,
        format=FP32.name,
        nbytes=entry.nbytes,
        source="calibration",
        reason=f"static scale ({entry.inputs}), found on the calibration text",
        digests=writer.digests[entry.name],
        inputs=str(entry.inputs),
    )


def ledger_document(job: Job, ledger: tuple[TensorReport, ...]) -> dict[str, Any]:
    """fewbits.json."""
    return {
        "fewbits": version("fewbits"),
        "source": str(job.source.name),
        "kind": job.kind.name,
        "method": job.method_name,
        "calibration": None if job.calibrated is None else asdict(job.calibrated),
        "imatrix": None if job.weighing is None else job.weighing.file,
        "torch": torch.__version__,
        **made_here(),
        **job.facts,
        "tensors": [{key: value for key, value in asdict(report).items() if value is not None} for report in ledger],
    }


def made_here() -> dict[str, Any]:
    """For a ledger: the command that writes it, if a command does."""
    return {} if origin.command() is None else {"command": origin.command()}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class Meter:
    """Counts bytes from several threads, passes the sum on, and sees to it that memory stays flat meanwhile."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._done, self._progress, self._lock = total, 0, progress, Lock()
        self._parts = 0

    def add(self, nbytes: int, label: str) -> None:
        with self._lock:
            self._done += nbytes
            self._parts += 1
            if self._progress:
                self._progress(self._done, self._total, label)
        if self._parts % TRIMMED == 0:
            give_back_free_memory()
