"""From a checkpoint to a smaller one, told once: open, describe, plan, then stream every tensor through its method.

A method that needs calibration solves the decoder layers first, block after block (`_calibrate`); what it found is then
streamed with all the rest.

A tensor is read a few rows at a time, quantized, decoded again to measure its error, and written, so memory stays the
same whatever the model's size. Tensors are spread over threads, largest first: torch's elementwise operations release
the interpreter's lock, and a part of a million weights stays in the cache from the first operation to the last.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from fewbits.checkpoint import KINDS, Entry, Kind, Reader, Writer
from fewbits.errors import FormatError, LedgerError, UnsupportedError, VerificationError
from fewbits.evals import model_identity
from fewbits.formats import Float, Format, QTensor
from fewbits.methods import METHODS, Recipe, TensorMethod, recipe_named
from fewbits.models import Architecture, Piece, describe, gguf_dropped, gguf_extras, gguf_metadata
from fewbits.pipeline._calibrate import (
    Calibration,
    Overlay,
    Solved,
    changed_entries,
    make_work,
    read_text,
    solved_blocks,
)
from fewbits.pipeline._estimate import check_room, estimate, source_bytes
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._memory import give_back_free_memory
from fewbits.pipeline._source import cut, dtype_of, local_folder, open_source, read_rows, require_ties, row_step
from fewbits.pipeline._verify import verify
from fewbits.plan.rules import Choice, Plan, Rules, parse
from fewbits.plan.rules import Tensor as PlanTensor
from fewbits.results import CalibrationReport, Estimate, Fate, Quantization, TensorReport

PART = 1 << 20  # weights quantized at a time: 4 MB as FP32, which an L3 cache holds with its temporaries
TRIMMED = 64  # parts after which free memory goes back to the system
FP32 = Float(torch.float32)
FOLDERS = ("huggingface", "compressed-tensors", "fewbits")  # most widely loaded first

Progress = Callable[[int, int, str], None]
"""Called with (done, total, label) as work goes on."""


@dataclass(frozen=True)
class Job:
    """Everything decided before the first weight is read."""

    source: Path
    out: Path
    reader: Reader
    architecture: Architecture
    kind: Kind
    pieces: tuple[Piece, ...]
    plan: Plan
    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any]
    extras: Mapping[str, tuple[float, ...]]  # tensors that no parameter of the source holds
    dropped: Mapping[str, str]  # parameters that the file has no need of: name -> reason
    recipe: Recipe
    method: TensorMethod  # of what is not solved block by block
    solved: Solved | None = None


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    format: str | Format = "int4-g128",
    method: str | Recipe = "rtn",
    calibration: str | Path | Calibration | None = None,
    weigh: bool | None = None,
    kind: str | None = None,
    vocabulary: str | Format | None = None,
    overrides: Mapping[str, str | Format] | None = None,
    pretokenizer: str | None = None,
    prove: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[Estimate, Job], None] | None = None,
) -> Quantization:
    """Quantize a model into a new folder or GGUF file.

    model: a Hugging Face folder, or a hub name. out: a path that does not exist; a name ending in .gguf makes a GGUF
    file. format: for the matrices; vocabulary: for embeddings and output projection (None: the file type's own rule).
    method: a name, several joined by + (`rotate+gptq`), or a Recipe. calibration: the text that methods which measure
    inputs run on, a file or `self` (written by the model; the default for them); weigh: whether a method that
    can do without runs on it too, to weigh errors by what they do to outputs (None: if a calibration is given).
    overrides: regular expression -> format (or "keep"), for tensors of the output whose name it is found in.
    kind: a name from `checkpoint.KINDS`, by default the first that holds the format. pretokenizer: llama.cpp's name
    of a pre-tokenizer that fewbits does not know (GGUF only). prove: reopen the files with an
    independent decoder and compare every tensor. progress: called with (bytes done, bytes, label). announce: called
    with the estimate before anything is written.
    Raises a FewbitsError; then nothing is left at `out`.
    """
    job = prepare(
        model,
        out,
        format=format,
        method=method,
        kind=kind,
        vocabulary=vocabulary,
        overrides=overrides,
        pretokenizer=pretokenizer,
    )
    began = time.monotonic()
    threads = threads or os.cpu_count() or 1
    given = calibration if isinstance(calibration, Calibration) else Calibration(calibration or "self")
    weigh = calibration is not None if weigh is None else weigh
    need = estimate(job.entries, job.method, threads, PART, decoder=job.kind.decoder if prove else None)
    check_room(job.out, need.disk)
    if announce:
        announce(need, job)
    with ExitStack() as stack:
        calibrated = None
        if weigh or not job.recipe.streams:
            calibrated = stack.enter_context(calibrate(job, given, progress))
            job = calibrated.job
        reports = run(job, threads, progress)
        decoder = proven(job, progress) if prove else None
        if calibrated is not None:
            calibrated.journal.remove()
    return Quantization(
        source=str(job.source),
        output=str(job.out),
        kind=job.kind.name,
        format=parse(format).name,
        method=job.recipe.name,
        source_bytes=source_bytes(job.reader),
        output_bytes=output_bytes(job.out),
        weights=sum(_numel(entry.shape) for entry in job.entries),
        seconds=time.monotonic() - began,
        verified_with=decoder,
        tensors=reports,
        calibration=None if calibrated is None else calibrated.facts,
    )


@dataclass(frozen=True)
class Calibrated:
    """A job whose blocks are solved, and what they were calibrated on."""

    job: Job
    journal: Journal
    facts: CalibrationReport


@contextmanager
def calibrate(job: Job, calibration: Calibration, progress: Progress | None) -> Iterator[Calibrated]:
    """Solve the job's blocks, or go on where a killed run stopped."""
    windows, held = read_text(job.reader, calibration)
    work, entries = make_work(job.reader, job.pieces, job.plan, job.recipe, calibration)
    facts = {
        "source": model_identity(job.source),
        "output": {entry.name: entry.format.name for entry in job.entries},
        "method": repr(job.recipe),
        "calibration": windows.digest,
        "versions": {name: version(name) for name in ("fewbits", "torch", "transformers")},
    }
    with (
        Journal(job.out, facts, work.formats) as journal,
        solved_blocks(work, journal, windows, held, calibration, progress) as solved,
    ):
        changed = changed_entries(journal, entries, len(work.model.layers))
        overlaid = replace(job, solved=solved, reader=Overlay(job.reader, changed) if changed else job.reader)
        report = CalibrationReport(
            text=windows.description,
            tokens=windows.ids.numel(),
            digest=windows.digest,
            held_out_tokens=0 if held is None else held.ids.numel(),
            held_out_kld=solved.divergence,
        )
        yield Calibrated(overlaid, journal, report)


def proven(job: Job, progress: Progress | None) -> str:
    """Verify what was written and return the decoder's name. Raises VerificationError if a tensor is not as meant."""
    proof = verify(job.out, against=job.source, logits=False, progress=progress)
    if not proof.passed:
        raise VerificationError(
            f"{job.out}: {len(proof.mismatches)} tensors do not read back as meant ({proof.mismatches[0]}); "
            "do not use this output, and please report it"
        )
    return proof.decoder or "fewbits itself"


def prepare(
    model: str | Path,
    out: str | Path,
    *,
    format: str | Format,
    method: str | Recipe,
    kind: str | None,
    vocabulary: str | Format | None,
    overrides: Mapping[str, str | Format] | None,
    pretokenizer: str | None,
) -> Job:
    """Open the source and decide every tensor's fate; nothing is written."""
    source, out = local_folder(model), Path(out)
    reader = open_source(source)
    wanted = parse(format)
    target = choose_kind(out, wanted, kind)
    architecture = describe(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    require_ties(reader, architecture.tied)
    pieces = tuple(cut(target, architecture, reader))
    rules = Rules(
        format=wanted,
        admits=lambda name, shape, f: target.admits(Entry(name, shape, f)),
        vocabulary=None if vocabulary is None else parse(vocabulary),
        overrides=tuple((p, None if f == "keep" else parse(f)) for p, f in (overrides or {}).items()),
        gguf=target.name == "gguf",
    )
    plan = rules.plan([PlanTensor(p.name, p.role.value, p.shape, dtype_of(reader, p.source)) for p in pieces])
    metadata, extras, dropped = reader.config, dict[str, tuple[float, ...]](), dict[str, str]()
    if target.name == "gguf":
        metadata, extras = gguf_metadata(reader.config, source, pre=pretokenizer), gguf_extras(reader.config)
        dropped = gguf_dropped(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    recipe = recipe_named(method) if isinstance(method, str) else method
    streamed = recipe.solver if recipe.streams else METHODS["rtn"]
    assert isinstance(streamed, TensorMethod)
    entries = (
        *(Entry(piece.name, piece.shape, plan[piece.name].format) for piece in pieces),
        *(Entry(name, (len(values),), FP32) for name, values in extras.items()),
    )
    return Job(
        source, out, reader, architecture, target, pieces, plan, entries, metadata, extras, dropped, recipe, streamed
    )


def choose_kind(out: Path, format: Format, kind: str | None) -> Kind:
    """The kind asked for, or GGUF by the output's name, or the first folder kind that can hold the format."""
    if kind is not None:
        if kind not in KINDS:
            raise UnsupportedError(f"file type '{kind}' is not known; choose one of {', '.join(KINDS)}")
        return KINDS[kind]
    if out.suffix == ".gguf":
        return KINDS["gguf"]
    probe = Entry("model.layers.0.mlp.up_proj.weight", (4096, 4096), format)
    return next(KINDS[name] for name in FOLDERS if KINDS[name].admits(probe) is None)


def run(job: Job, threads: int, progress: Progress | None) -> tuple[TensorReport, ...]:
    """Stream every piece into the output and commit it with its ledger."""
    with job.kind.create(job.out, job.entries, job.source, job.metadata) as writer:
        for name, values in job.extras.items():
            writer.write(name, QTensor(FP32, torch.tensor(values), {}))
        reports = stream(job, writer, threads, progress)
        reports |= {name: _extra_report(job, writer, name) for name in job.extras}
        ledger = account(job, reports)
        writer.commit(ledger_document(job, ledger))
    return ledger


def stream(job: Job, writer: Writer, threads: int, progress: Progress | None) -> dict[str, TensorReport]:
    """Quantize and write all pieces on `threads` threads. The first error stops them all."""
    stop, meter = Event(), _Meter(sum(entry.nbytes for entry in job.entries), progress)
    largest_first = sorted(job.pieces, key=lambda piece: _numel(piece.shape), reverse=True)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = [pool.submit(_convert, job, piece, writer, meter, stop) for piece in largest_first]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            stop.set()
            raise
        if any(task.exception() for task in done):
            stop.set()
    reports = [task.result() for task in tasks]
    return {report.name: report for report in reports if report is not None}


def _convert(job: Job, piece: Piece, writer: Writer, meter: _Meter, stop: Event) -> TensorReport | None:
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


def _copy(job: Job, solved: Solved, piece: Piece, writer: Writer, meter: _Meter, stop: Event) -> TensorReport | None:
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
    return replace(report, method=job.recipe.name, transformed=solved.transformed or None)


def _quantized(job: Job, piece: Piece, w: torch.Tensor, format: Format) -> QTensor:
    try:
        if isinstance(format, Float):
            params = format.fit(w)
            return QTensor(format, format.round(w, params), params)
        return job.method.quantize(w.float(), format, {})
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
    changed = choice.quantized or error > 0  # a cast to fewer bits is quantization too
    if not changed and isinstance(job.reader, Overlay) and piece.source in job.reader.changed:
        return _folded_report(job, piece, choice, digests)
    method = job.method.name if choice.quantized else "cast"
    return TensorReport(
        name=piece.name,
        fate="quantized" if changed else "kept",
        shape=piece.shape,
        format=choice.format.name,
        nbytes=choice.format.nbytes(piece.shape),
        method=method if changed else None,
        error=error if changed else None,
        reason=choice.reason,
        digests=digests,
        source=piece.source,
    )


def _folded_report(job: Job, piece: Piece, choice: Choice, digests: Mapping[str, str]) -> TensorReport:
    return TensorReport(
        name=piece.name,
        fate="kept",
        shape=piece.shape,
        format=choice.format.name,
        nbytes=choice.format.nbytes(piece.shape),
        reason=f"factors of {job.recipe.name} are folded into it",
        digests=digests,
        source=piece.source,
        transformed=True,
    )


def account(job: Job, reports: Mapping[str, TensorReport]) -> tuple[TensorReport, ...]:
    """The ledger: the outputs in file order, then the parameters that are in none, with the reason.

    Raises LedgerError if a parameter of the source is nowhere.
    """
    written = [reports[entry.name] for entry in job.entries]
    used = defaultdict(list)
    for report in written:
        used[report.source].append(report.name)
    absent = {name: f"shares the weights of {other}" for name, other in job.architecture.tied.items()}
    unwritten = [_absent_report(name, "tied", why) for name, why in absent.items() if name not in used]
    unwritten += [_absent_report(n, "dropped", why) for n, why in job.dropped.items() if n not in absent]
    lost = job.reader.entries.keys() - used.keys() - {report.name for report in unwritten}
    if lost:
        raise LedgerError(
            f"{len(lost)} parameters of {job.source} have no place in the output, the first is {min(lost)}; "
            f"{job.kind.name} files of this architecture cannot hold them"
        )
    return (*written, *unwritten)


def _absent_report(name: str, fate: Fate, reason: str) -> TensorReport:
    return TensorReport(name=name, fate=fate, shape=(), format="", nbytes=0, reason=reason, source=name)


def _extra_report(job: Job, writer: Writer, name: str) -> TensorReport:
    return TensorReport(
        name=name,
        fate="kept",
        shape=(len(job.extras[name]),),
        format=FP32.name,
        nbytes=4 * len(job.extras[name]),
        source="config.json",
        reason="computed from the configuration",
        digests=writer.digests[name],
    )


def ledger_document(job: Job, ledger: tuple[TensorReport, ...]) -> dict[str, Any]:
    """fewbits.json."""
    return {
        "fewbits": version("fewbits"),
        "source": str(job.source.name),
        "kind": job.kind.name,
        "method": job.recipe.name,
        "torch": torch.__version__,
        "tensors": [{key: value for key, value in asdict(report).items() if value is not None} for report in ledger],
    }


def output_bytes(out: Path) -> int:
    """Bytes of the weights of an output on disk."""
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class _Meter:
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
