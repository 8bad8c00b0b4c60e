"""`auto`: each recipe's blocks are solved into a journal of their own; the best on held-out text is trained further."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fewbits.errors import QualityError, UnsupportedError
from fewbits.evals import model_identity
from fewbits.methods.auto import Auto
from fewbits.methods.tune import Tune
from fewbits.pipeline._calibrate import Calibration, Progress, Run, make_ready, output_facts, solving, text_of
from fewbits.pipeline._job import Job
from fewbits.pipeline._journal import Journal, unfinished
from fewbits.results import Trial

TRAINING = 5.0
"""Forward passes that a step of training costs for each of its windows: one, another to go back through each block, the
way back, and the predictions."""
RESERVED = 0.4
"""Share of the time that is kept for training in the end."""


@dataclass(frozen=True)
class Outcome:
    """A recipe that was run to its end."""

    job: Job
    run: Run


@contextmanager
def solve_auto(
    auto: Auto, prepare: Callable[..., Job], calibration: Calibration, progress: Progress | None
) -> Iterator[Job]:
    """The job of the best recipe, solved and trained. prepare: makes the job of a `method`.

    Raises UnsupportedError or QualityError if no recipe at all works.
    """
    clock = _Clock(60 * auto.minutes, progress)
    trials: list[Trial] = []
    first = prepare(method=auto.candidates[0])
    text = text_of(first.reader, calibration)
    calibration = replace(calibration, text=text)
    with ExitStack() as stack:
        whole = stack.enter_context(Journal(unfinished(first.out), _facts(auto, first, text.digest), {}))
        outcomes = [
            outcome
            for index, name in enumerate(auto.candidates)
            if (outcome := _tried(stack, name, index, prepare, calibration, clock, trials)) is not None
        ]
        if not outcomes:
            raise QualityError(f"no recipe works on this model: {'; '.join(f'{t.recipe}: {t.note}' for t in trials)}")
        best = min(outcomes, key=_divergence)
        run = _trained(best.run, auto, clock, trials)
        added = () if run is best.run else ("tune",)
        yield run.job(replace(best.job, trials=tuple(trials), finished_by=added))
        whole.remove()


def _facts(auto: Auto, job: Job, digest: str) -> dict[str, Any]:
    """Whatever makes it the same run, with more time or less; each recipe's own journal knows the rest."""
    return {
        "source": model_identity(job.source),
        "output": output_facts(job),
        "method": repr(replace(auto, minutes=0.0)),
        "calibration": digest,
    }


def _divergence(outcome: Outcome) -> float:
    """What recipes are compared by. Raises UnsupportedError where no text was held out to measure it on."""
    if outcome.run.divergence is None:
        raise UnsupportedError("auto compares recipes on held-out text, and there is none: give 2 or more windows")
    return outcome.run.divergence


class _Clock:
    """The time that is left, and the bar that shows it."""

    def __init__(self, seconds: float, progress: Progress | None) -> None:
        self._began, self._seconds, self._progress = time.monotonic(), seconds, progress

    @property
    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def show(self, done: int, total: int, label: str) -> None:
        if self._progress:
            self._progress(round(1000 * (1 - max(0.0, self.left) / self._seconds)), 1000, label)


def _tried(
    stack: ExitStack,
    name: str,
    index: int,
    prepare: Callable[..., Job],
    calibration: Calibration,
    clock: _Clock,
    trials: list[Trial],
) -> Outcome | None:
    """Run a recipe, if it is expected to be done in time; the first one always."""
    began = time.monotonic()
    try:
        job = prepare(method=name)
        ready = make_ready(job, calibration)
        left = clock.left * (1 - RESERVED)
        if index and ready.need.seconds > left:
            note = f"not tried: about {ready.need.seconds:.0f} s, and {max(left, 0):.0f} s are left before training"
            trials.append(Trial(name, None, 0.0, note))
            return None
        run = stack.enter_context(solving(job, ready, clock.show, unfinished(job.out) / name))
    except (UnsupportedError, QualityError) as error:
        trials.append(Trial(name, None, time.monotonic() - began, str(error)))
        return None
    trials.append(Trial(name, run.divergence, time.monotonic() - began))
    return Outcome(job, run)


def _trained(run: Run, auto: Auto, clock: _Clock, trials: list[Trial]) -> Run:
    """The best run after as many steps of training as fit into the time that is left; itself if it was better."""
    began = time.monotonic()
    step = TRAINING * auto.batch * run.ready.window_seconds
    steps = min(auto.steps, int(clock.left / step))
    if steps < 1 or len(run.ready.windows.ids) < 2:
        return run
    clock.show(0, 1, f"tune, {steps} steps")
    tuned = run.finish(Tune(steps=steps, batch=auto.batch))
    name = f"{run.ready.work.recipe.name}+tune"
    trials.append(Trial(name, tuned.divergence, time.monotonic() - began, f"{steps} steps"))
    worse = tuned.divergence is not None and run.divergence is not None and tuned.divergence > run.divergence
    return run if worse else tuned
