"""From a checkpoint to a smaller one, told once: open, describe, plan, solve what needs calibration block by block,
stream every tensor into the file, and prove the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from fewbits.errors import VerificationError
from fewbits.evals import model_identity
from fewbits.formats import Format
from fewbits.methods import Recipe
from fewbits.pipeline._calibrate import Calibration, Overlay, changed_entries, make_work, read_text, solved_blocks
from fewbits.pipeline._estimate import check_room, estimate, source_bytes
from fewbits.pipeline._job import Job, prepare
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._stream import PART, Progress, run
from fewbits.pipeline._verify import verify
from fewbits.plan.rules import parse
from fewbits.results import CalibrationReport, Estimate, Quantization


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
        weights=sum(entry.weights for entry in job.entries),
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


def output_bytes(out: Path) -> int:
    """Bytes of the weights of an output on disk."""
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)
