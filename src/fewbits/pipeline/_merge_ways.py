"""The ways to make one model of a base and an adapter.

    adapter     the base as it was trained on, with the adapter beside it
    full        the sum in floating point
    round       the sum, rounded to the format: what merging usually means
    calibrate   the sum, quantized by a calibrated method
    residual    that, with the best low-rank correction of its error beside it (`methods.low_rank`)

All of them read one adapted checkpoint (`checkpoint.adapter`), which is the sum for whoever reads numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint._writer import disk_errors
from fewbits.checkpoint.adapter import FOLDER, Added, adapter_inside, read_adapter, write_adapter
from fewbits.errors import UnsupportedError
from fewbits.evals.text import LENGTH, WINDOWS
from fewbits.formats import Float
from fewbits.pipeline._calibrate import Calibration, text_of
from fewbits.pipeline._corrections import corrections
from fewbits.pipeline._quantize import quantize
from fewbits.pipeline._source import open_source
from fewbits.pipeline._stages import Stages
from fewbits.pipeline._stream import Progress
from fewbits.plan.rules import parse


@dataclass(frozen=True)
class Merging:
    """How an adapter is merged.

    method: of the calibrated ways, as `quantize` takes it. calibration: the text that they run on. text: a file that
    divergences are measured on, None for text that the adapted model writes; windows of `length` tokens. rank: of the
    correction, None for the adapter's. larger: how much larger than the plainly rounded file the chosen one may be, 0.1
    for 10 %.
    """

    method: str = "gptq"
    calibration: Calibration = field(default_factory=Calibration)
    text: str | Path | None = None
    windows: int = WINDOWS
    length: int = LENGTH
    rank: int | None = None
    larger: float = 0.1


@dataclass(frozen=True)
class Task:
    """What is merged, and where what becomes of it is made: in `folder`, under the name of its way."""

    adapted: Path
    folder: Path
    format: str
    merging: Merging
    kind: str | None
    vocabulary: str | None
    suffix: str  # of the output's name

    def place(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    @property
    def gguf(self) -> bool:
        return self.kind == "gguf" or self.suffix == ".gguf"


@dataclass(frozen=True)
class Way:
    """make: makes the output, unless it is there, and says where. Raises UnsupportedError where it is no way here."""

    summary: str
    make: Callable[[Task, Progress | None], Path]


def _adapter(task: Task, progress: Progress | None) -> Path:
    _require_folder(task)
    return task.adapted


def _full(task: Task, progress: Progress | None) -> Path:
    if isinstance(parse(task.format), Float):
        return _quantized(task, "full", task.format, "rtn", progress)
    entries = open_source(task.adapted).entries.values()
    (largest,) = sorted((e for e in entries if isinstance(e.format, Float)), key=lambda e: e.weights)[-1:]
    return _quantized(task, "full", largest.format.name, "rtn", progress)


def _round(task: Task, progress: Progress | None) -> Path:
    return _quantized(task, "round", task.format, "rtn", progress)


def _calibrate(task: Task, progress: Progress | None) -> Path:
    return _quantized(task, "calibrate", task.format, task.merging.method, progress)


def _residual(task: Task, progress: Progress | None) -> Path:
    _require_folder(task)
    made, stages = task.place("residual"), Stages(progress)
    if adapter_inside(made) is None:
        calibrated = _quantized(task, "calibrate", task.format, task.merging.method, stages.next(0.5))
        with disk_errors(made), TemporaryDirectory(dir=task.folder) as scratch:
            found = _corrections(task, calibrated, Path(scratch), stages.next(0.5))
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(calibrated, made)
            write_adapter(Path(scratch, FOLDER), found)
            Path(scratch, FOLDER).rename(made / FOLDER)
    return made


WAYS: Mapping[str, Way] = {
    "adapter": Way("the base it was trained on, the adapter beside it", _adapter),
    "full": Way("the sum in floating point", _full),
    "round": Way("the sum, rounded", _round),
    "calibrate": Way("the sum, quantized with calibration", _calibrate),
    "residual": Way("that, a low-rank correction beside it", _residual),
}


def _require_folder(task: Task) -> None:
    if task.gguf:
        raise UnsupportedError("a GGUF file holds no adapter")


def _quantized(task: Task, name: str, format: str, method: str, progress: Progress | None) -> Path:
    """The sum, quantized (or cast) as any floating-point checkpoint is."""
    made = task.place(name)
    if not made.exists():
        quantize(
            task.adapted,
            made,
            format=format,
            method=method,
            calibration=None if method == "rtn" else task.merging.calibration,
            kind=None if isinstance(parse(format), Float) and not task.gguf else task.kind,
            vocabulary=task.vocabulary,
            progress=progress,
        )
    return made


def _corrections(task: Task, quantized: Path, scratch: Path, progress: Progress | None) -> dict[str, Added]:
    """Layer -> the correction of a quantized output."""
    given, layers = task.merging.calibration, read_adapter(task.adapted / FOLDER)
    adapted, (_, reader) = open_source(task.adapted), open_checkpoint(quantized)
    ids = text_of(adapted, given).ids[: given.windows]
    return corrections(
        adapted,
        reader,
        layers,
        ids,
        task.merging.rank or max(len(layer.a) for layer in layers.values()),
        device=given.device,
        memory=given.memory,
        folder=scratch,
        progress=progress,
    )
