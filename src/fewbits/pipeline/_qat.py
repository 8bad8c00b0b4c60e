"""Quantization-aware training, told once: solve as any calibrated run does, train what came out, write and prove that.

The start is a run of its own that ends in the journal (`_calibrate`). Training makes one more stage of it, whose
matrices and other parameters then go into the file as those of any other stage do: so what is written is what was
trained, and a killed run goes on at the stage, and in the training at the step, that it had reached.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbits.checkpoint._writer import refuse_existing
from fewbits.engine import fast_float32, load
from fewbits.errors import UnsupportedError
from fewbits.evals import Windows
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.evals.whole_text import read_all
from fewbits.findings import TrainingFacts
from fewbits.formats import Format, QTensor
from fewbits.methods.products import product_type
from fewbits.models import Role, Slot
from fewbits.pipeline._blocks import SolvedBlock, Work, relative_error, scale_name
from fewbits.pipeline._calibrate import SOLVED, Calibration, Progress, Ready, Run, make_ready, solving
from fewbits.pipeline._estimate import check_room, source_bytes
from fewbits.pipeline._job import Job, prepare
from fewbits.pipeline._journal import Journal, unfinished
from fewbits.pipeline._quantize import output_bytes, proven
from fewbits.pipeline._stages import Stages
from fewbits.pipeline._stream import run as write
from fewbits.pipeline._training_need import in_words, training_need
from fewbits.pipeline._vocabulary import VOCABULARY
from fewbits.plan.rules import parse
from fewbits.results import Estimate, Training
from fewbits.train import Course, FakeInputs, Length, Loss, Matrix, Student, Trained, processes, train
from fewbits.train.data import Packed

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
QAT = "qat"  # stage of the journal
CALIBRATED = 128 + 8  # windows that the start is calibrated on, held-out ones included
START_SHARE, WRITING_SHARE = 0.1, 0.05  # of the progress bar


@dataclass(frozen=True)
class Qat:
    """How a model is trained in a format.

    length: when it ends. batch: windows a step, `accumulate` of them one after the other. rate: of latent weights, in
    levels a step; scale_rate, free_rate: relative, of scales, and of norms and whatever else is not quantized.
    held_out: windows that are only measured. teacher: a model to learn from, by default the one that is quantized.
    """

    length: Length = field(default_factory=Length)
    window: int = 256
    batch: int = 8
    accumulate: int = 1
    rate: float = 5e-4
    scale_rate: float = 1e-4
    free_rate: float = 3e-4
    held_out: int = 16
    loss: Loss = field(default_factory=Loss)
    teacher: str | Path | None = None
    seed: int = 0
    device: str = "cpu"


def train_qat(
    model: str | Path,
    out: str | Path,
    *,
    format: str | Format,
    data: str | Path,
    qat: Qat | None = None,
    start: str = "gptq",
    inputs: str | None = None,
    kind: str | None = None,
    vocabulary: str | Format | None = None,
    overrides: Mapping[str, str | Format] | None = None,
    pretokenizer: str | None = None,
    prove: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Training:
    """Train a model in a format, from a post-training result on, and write it.

    model, out, format, inputs, kind, vocabulary, overrides, prove, progress: as `fewbits.quantize` takes them.
    data: text to train on, a file that `evaluate` would take; its last windows are held out. start: the method that
    makes what training begins with; no transforms. announce: called, before anything runs, with a sentence for each
    reason why matrices get another format than was asked for.
    Run by several processes (`train.processes`), the main one makes the start and writes, and all of them return.
    Started again with the same arguments after a kill or Ctrl-C it goes on from the last saved state. Raises a
    FewbitsError; then nothing is left at `out`, and KeyboardInterrupt once the state is saved.
    """
    began, qat = time.monotonic(), qat or Qat()
    processes.join(qat.device)
    with fast_float32(qat.device), ExitStack() as until_written:
        stages, result = Stages(progress if processes.is_main() else None), None
        with processes.main_first():
            refuse_existing(Path(out))
            job = prepare(
                model,
                out,
                format=format,
                method=start,
                kind=kind,
                vocabulary=vocabulary,
                overrides=overrides,
                pretokenizer=pretokenizer,
                inputs=inputs,
                cache=None,
            )
            _require_trainable(job)
            text, held = _text(job, data, qat)
            say = announce if processes.is_main() else None
            run = _solved(job, text, qat, stages.next(START_SHARE), until_written, say)
        trained = _trained(run, text, held, qat, stages.next(1 - START_SHARE - WRITING_SHARE))
        with processes.main_first():
            if processes.is_main():
                facts = _facts(start, text, trained, qat)
                job = replace(job, finished_by=(QAT,), facts={"training": asdict(facts)})
                done = replace(run, stage=QAT, divergence=trained.after).job(job)
                reports = write(done, threads or os.cpu_count() or 1, stages.next(WRITING_SHARE / 2))
                decoder = proven(done.out, done.source, stages.next(WRITING_SHARE / 2)) if prove else None
                run.journal.remove()
                result = Training(
                    source=str(job.source),
                    output=str(job.out),
                    kind=job.kind.name,
                    format=parse(format).name,
                    start=start,
                    data=facts.data,
                    steps=facts.steps,
                    tokens=facts.tokens,
                    seconds=time.monotonic() - began,
                    before=trained.before,
                    after=trained.after,
                    curve=trained.curve,
                    source_bytes=source_bytes(job.reader),
                    output_bytes=output_bytes(job.out),
                    weights=sum(entry.weights for entry in job.entries),
                    verified_with=decoder,
                    tensors=reports,
                )
        return processes.from_main(result)


def _require_trainable(job: Job) -> None:
    if processes.sharded():
        raise UnsupportedError(
            "quantization-aware training keeps all of the model in each process; leave --use_fsdp out"
        )
    if job.recipe.transforms:
        raise UnsupportedError(
            f"start '{job.recipe.name}': training begins with the model's own weights; leave transforms out"
        )


def _solved(
    job: Job,
    text: Windows,
    qat: Qat,
    progress: Progress | None,
    until_written: ExitStack,
    announce: Callable[[str], None] | None,
) -> Run:
    """The run that training begins with: solved by the main process, read from its journal by the others.

    The journal stays open, and locked, in `until_written`. announce: told what the run will be before it begins.
    """
    # Without a limit to the start's divergence: three levels and two are far away until they are trained.
    few = replace(text, ids=text.ids[:CALIBRATED])
    ready = make_ready(job, Calibration(text=few, length=qat.window, device=qat.device, limit=math.inf))
    if not processes.is_main():
        journal = Journal(unfinished(job.out), {}, ready.work.formats)
        processes.require_shared(journal.folder)
        return Run(ready, journal, None)
    need = _need(job, ready, qat)
    check_room(job.out, need.disk)
    for note in (*exceptions(job), in_words(need)):
        if announce:
            announce(note)
    facts = {
        "training": repr(replace(qat, length=Length())),
        "text": text.digest,
        "processes": processes.count(),
    }
    return until_written.enter_context(solving(job, ready, progress, facts=facts))


def _need(job: Job, ready: Ready, qat: Qat) -> Estimate:
    """What solving the start and training take."""
    trained = sum(math.prod(ready.work.shapes[name]) for name in ready.work.slots)
    parameters = sum(entry.weights for entry in job.reader.entries.values())
    tokens = qat.batch * qat.window
    return ready.need.then(training_need(job.reader.config, parameters, trained, tokens))


def exceptions(job: Job) -> list[str]:
    """What becomes of matrices that the file type cannot hold as was asked for, one sentence a reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for piece in job.pieces:
        reason = job.plan[piece.name].reason
        if piece.role in (Role.LINEAR, Role.EXPERTS) and reason is not None:
            found[reason.replace(f"{piece.name}: ", "")].append(piece.name)
    return [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {why}" for why, names in found.items()]


def _text(job: Job, data: str | Path, qat: Qat) -> tuple[Windows, Windows]:
    """The windows to train on, and those that are held out."""
    found = read_all(data, tokenizer_of(job.reader.path), qat.window)
    held = min(qat.held_out, len(found.ids) // 4)
    if held == 0:
        raise UnsupportedError(
            f"{data}: {len(found.ids)} windows of {qat.window} tokens are too few to train on and to hold some out; "
            "give a longer text"
        )
    return replace(found, ids=found.ids[:-held]), replace(found, ids=found.ids[-held:])


def _trained(run: Run, text: Windows, held: Windows, qat: Qat, progress: Progress | None) -> Trained:
    """Train what a run solved, and put what becomes of it into the run's journal."""
    work = run.ready.work
    torch.manual_seed(qat.seed)
    original = load(work.model.path, device=qat.device, packed=False)
    teacher = None if qat.teacher is None else load(qat.teacher, device=qat.device, packed=False)
    solved = [run.journal.load(SOLVED, index) for index in range(len(work.model.layers))]
    student = student_of(run, original, teacher, solved, qat).to(qat.device)
    optimizer = torch.optim.AdamW(
        student.groups(qat.rate, qat.scale_rate, qat.free_rate), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    course = Course(qat.length.minutes, qat.length.steps)
    trained = train(
        student,
        optimizer,
        course,
        Packed(text.ids),
        Packed(held.ids),
        run.journal.folder / "training",
        progress,
        per_device_train_batch_size=qat.batch,
        per_device_eval_batch_size=qat.batch,
        gradient_accumulation_steps=qat.accumulate,
        label_names=["input_ids"],
        seed=qat.seed,
        max_grad_norm=1.0,
    )
    if trained.after > trained.before:
        log.warning("training made it worse, %.4g → %.4g nats a token: lower the rate", trained.before, trained.after)
    if processes.is_main():
        _keep(run, student, solved, original)
    return trained


def _facts(start: str, text: Windows, trained: Trained, qat: Qat) -> TrainingFacts:
    """What the ledger tells of the training."""
    return TrainingFacts(
        start=start,
        data=text.description,
        steps=trained.steps,
        tokens=trained.steps * qat.batch * qat.accumulate * processes.count() * qat.window,
        before=trained.before,
        after=trained.after,
        curve=trained.curve,
    )


def student_of(
    run: Run, original: PreTrainedModel, teacher: PreTrainedModel | None, solved: list[SolvedBlock], qat: Qat
) -> Student:
    """The student that begins as what a run solved."""
    work, parameters = run.ready.work, dict(original.named_parameters())
    starts = {name: q for block in solved for name, q in block.matrices.items()}
    scales = {name: scale for block in solved for name, scale in block.scales.items()}
    quantized = {slot.parameter for slot in (*work.slots.values(), *work.vocabulary.values())}
    free = {name: t for name, t in work.dtypes.items() if name in parameters and name not in quantized}
    rounded = work.rounded.inputs
    inputs = {name: FakeInputs(rounded[name], scales.get(scale_name(name))) for name in starts if name in rounded}
    return Student(
        original,
        {name: Matrix(work.slots[name], _on(work.model.device, q)) for name, q in starts.items()},
        free=free,
        fixed=_vocabulary(work, run.journal, parameters),
        inputs=inputs,
        teacher=teacher,
        loss=qat.loss,
        products=product_type((q.format for q in starts.values()), work.model.device),
    )


def _vocabulary(work: Work, journal: Journal, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings and projection to the vocabulary as the file has them, where they are quantized."""
    if not work.vocabulary:
        return {}
    found: dict[str, Tensor] = {}
    for name, q in journal.load(VOCABULARY, 0).matrices.items():
        slot = work.vocabulary[name]
        whole = found.setdefault(slot.parameter, parameters[slot.parameter].detach().float().clone())
        slot.put(whole, q.dequantize())
    return found


def _keep(run: Run, student: Student, solved: list[SolvedBlock], original: PreTrainedModel) -> None:
    """The trained stage of the journal: a block's matrices, what else changed in it, and the scales of its inputs."""
    work, tensors, written = run.ready.work, student.tensors(), student.written()
    scales = {scale_name(name): value for name, value in student.input_scales().items()}
    for index, before in enumerate(solved):
        prefix = f"{work.model.layers[index]}."
        matrices = {name: _on(CPU, tensors[name]) for name in before.matrices}
        errors = {name: relative_error(_matrix(original, work.slots[name]), q) for name, q in matrices.items()}
        changed = {name: value.cpu() for name, value in written.items() if name.startswith(prefix)}
        found = {name: scales.get(name, value).cpu() for name, value in before.scales.items()}
        run.journal.save(QAT, index, SolvedBlock(matrices, changed, errors, found))
    inside = tuple(f"{name}." for name in work.model.layers)
    outside = {name: value.cpu() for name, value in written.items() if not name.startswith(inside)}
    run.journal.save(QAT, len(solved), SolvedBlock({}, outside, {}))


def _matrix(model: PreTrainedModel, slot: Slot) -> Tensor:
    return slot.take(model.get_parameter(slot.parameter).detach().float().cpu())


def _on(device: torch.device, q: QTensor) -> QTensor:
    return QTensor(q.format, q.codes.to(device), {key: value.to(device) for key, value in q.params.items()})
