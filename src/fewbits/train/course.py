"""How long a training goes on, what is said of it meanwhile, and how it is stopped and taken up again.

Training itself runs on transformers' Trainer. A *course* is its callback: it ends the training after so many minutes or
steps, lets the learning rate follow (a short rise, then half a cosine down to a twentieth), measures on held-out text
now and then, and saves the state every few minutes and when Ctrl-C is pressed, so that the same command goes on from
there. Minutes are those of training, over all sessions. Several processes (`processes`) have one clock, read after each
step, so that their rates are the same and all of them end at the same step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from fewbits.errors import QualityError, UnsupportedError
from fewbits.results import LossPoint
from fewbits.train import processes

Progress = Callable[[int, int, str], None]
WARM_UP = 0.03
"""Share of the training in which the rate rises."""
FLOOR = 0.05
"""Share of the rate that is left in the end."""
MEASURED = 10
"""How often held-out text is measured."""
SAVED = 300.0
"""Seconds between saved states."""
BAR = 1000


@dataclass(frozen=True)
class Length:
    """When training ends: after so many minutes or steps of the optimizer, whichever comes first.

    Raises UnsupportedError for a length of nothing, or none at all.
    """

    minutes: float | None = 30.0
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.minutes, self.steps) if value is not None]
        if not given or not all(value > 0 for value in given):
            raise UnsupportedError(f"a training of {self.minutes} minutes, {self.steps} steps: give it more than 0")

    def share(self, seconds: float, steps: int) -> float:
        """How much of it is over, 0 to 1."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        by_steps = 0.0 if self.steps is None else steps / self.steps
        return min(1.0, max(by_time, by_steps))


class Course(TrainerCallback, ExportableState):
    """The callback. spent: seconds of training in sessions before this one.

    seconds: of training so far, when the last step ended. before: the loss on held-out text that it began with.
    """

    def __init__(self, minutes: float | None, steps: int | None, spent: float = 0.0) -> None:
        self.length = Length(minutes, steps)
        self.seconds, self.step, self.loss, self.before = spent, 0, math.nan, math.nan
        self.interrupted = self._asked_to_stop = False
        self.progress: Progress | None = None
        self._began = self._saved = self._measured = 0.0

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {}, "attributes": {"spent": self.seconds, "before": self.before}}

    def go_on(self, saved: Path) -> None:
        """Take up what an earlier session saved. (The Trainer would make a new Course.)"""
        found = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME)).stateful_callbacks[type(self).__name__]
        self.seconds, self.before = found["attributes"]["spent"], found["attributes"]["before"]

    def stop(self) -> None:
        """End after the step, in every process, with the state saved."""
        self._asked_to_stop = True

    @property
    def share(self) -> float:
        return self.length.share(self.seconds, self.step)

    def rate(self, _: int = 0) -> float:
        """The learning rate now, in units of the highest."""
        if self.share < WARM_UP:
            return max(self.share / WARM_UP, FLOOR)
        over = (self.share - WARM_UP) / (1 - WARM_UP)
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * over))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self.step = time.monotonic() - self.seconds, state.global_step
        self._saved, self._measured = self.seconds, self.share

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step == 0:
            self.before, self._began = more["metrics"]["eval_loss"], time.monotonic()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read the clock, before the rate of the next step is asked for."""
        self.seconds, stops = processes.largest(time.monotonic() - self._began, self._asked_to_stop)
        self.interrupted = bool(stops)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step
        ended = self.share >= 1
        control.should_training_stop = ended or self.interrupted
        control.should_save = not ended and (self.interrupted or self.seconds - self._saved > SAVED)
        control.should_evaluate = not control.should_training_stop and self.share - self._measured >= 1 / MEASURED
        if control.should_save:
            self._saved = self.seconds
        if control.should_evaluate:
            self._measured = self.share
        if self.progress is not None:
            self.progress(round(BAR * self.share), BAR, f"step {self.step}, loss {self.loss:.4g}")


class CheckedTrainer(Trainer):
    """A Trainer that ends with an error, in every process, at the first loss that is no number."""

    def __init__(self, course: Course, optimizer: torch.optim.Optimizer, **more: Any) -> None:
        super().__init__(**more)
        # Not as arguments: the first version of FSDP makes other parameters, so the Trainer refuses an optimizer of
        # what was there before. The second exchanges them in the optimizer.
        self.optimizer = optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course.rate)
        self._course = course
        self.add_callback(course)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = None  # it rounds what a model returns, and the loss with it
            plugin.cpu_ram_efficient_loading = False  # every process has read the base

    def compute_loss_context_manager(self) -> ExitStack:
        within = super().compute_loss_context_manager()
        if self.is_fsdp_enabled and self.args.bf16:
            within.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return within

    def compute_loss(self, model: nn.Module, *args: Any, **more: Any) -> Any:
        found = super().compute_loss(model, *args, **more)
        loss: Tensor = (found[0] if isinstance(found, tuple) else found).detach()
        finite = bool(torch.isfinite(loss))
        processes.require_well(finite)
        if not finite:
            raise QualityError(_not_finite(self.model, self._course.step + 1, float(loss)))
        if model.training:
            self._course.loss = float(loss)
        return found


@dataclass(frozen=True)
class Trained:
    """What a training came to. before, after: the loss on held-out text; curve: of training and held-out losses."""

    steps: int
    seconds: float
    before: float
    after: float
    curve: tuple[LossPoint, ...]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    course: Course,
    data: Dataset[Any],
    held: Dataset[Any],
    folder: Path,
    progress: Progress | None = None,
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
    **arguments: Any,
) -> Trained:
    """Train until the course is over; `folder` keeps the states, and where it has one, training goes on from it.

    arguments: of TrainingArguments. Raises KeyboardInterrupt once the state is saved if Ctrl-C was pressed,
    QualityError where the loss becomes NaN or Inf.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=course.length.steps or 2**31 - 1,
        # Not before: what accelerate has prepared for evaluation it never prepares for several processes.
        eval_on_start=last is None,
        save_strategy="no",
        save_total_limit=1,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        **arguments,
    )
    if processes.sharded():
        processes.share_out(model)
    else:
        processes.spare_frozen(model)
    trainer = CheckedTrainer(
        course=course,
        optimizer=optimizer,
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=held,
        data_collator=collate,
    )
    _keep_quiet(trainer)
    course.progress = progress
    if last is not None:
        course.go_on(Path(last))
    with _interruptible(course):
        trainer.train(resume_from_checkpoint=last)
    if course.interrupted:
        raise KeyboardInterrupt(
            f"interrupted after {course.step} steps; the state is kept, and the same command goes on"
        )
    history = trainer.state.log_history
    after = trainer.evaluate()["eval_loss"]
    return Trained(course.step, course.seconds, course.before, after, _curve(history))


def _keep_quiet(trainer: Trainer) -> None:
    """Leave out what prints to stdout: the command line says what is worth saying."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _curve(history: list[dict[str, Any]]) -> tuple[LossPoint, ...]:
    steps = sorted({entry["step"] for entry in history if "loss" in entry or "eval_loss" in entry} - {0})
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    held = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return tuple(LossPoint(step, losses.get(step), held.get(step)) for step in steps)


@contextmanager
def _interruptible(course: Course) -> Iterator[None]:
    """Within it, the first Ctrl-C ends the training after its step, its state saved; the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        course.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _not_finite(model: Any, step: int, loss: float) -> str:
    """Which loss, when, and the first tensor that is no longer made of numbers."""
    own = {name: processes.own_share(p.detach()) for name, p in model.named_parameters()}
    named = [name for name, p in own.items() if not bool(torch.isfinite(p).all())]
    where = f"the first tensor with numbers that are none is {named[0]}" if named else "all trained tensors are finite"
    return f"the loss is {loss} at step {step}: {where}; train at a lower rate, or look at the text of that step"
