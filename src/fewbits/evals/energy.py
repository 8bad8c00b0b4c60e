"""Joules a token, from the processor's own counters (RAPL, Linux' powercap: Documentation/power/powercap).

    /sys/class/powercap/intel-rapl:0/          a package (AMD's are there too): name, energy_uj, max_energy_range_uj
    /sys/class/powercap/intel-rapl:0:1/        a part of it: cores, or dram, which lies beside the package's own sum

A counter has microjoules and begins again at 0 behind max_energy_range_uj, which takes a package minutes; since it is
read once a second here, a smaller number than before means that it went round once. Reading needs a right that most
systems leave to root. Where there are no counters nothing is estimated: UnsupportedError says why.

What is measured is the whole package with everything that runs on it, so a second in which nothing is asked of it comes
first, to be told beside.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewbits.engine.opening import open_runner
from fewbits.errors import UnsupportedError
from fewbits.findings import Energy
from fewbits.runtime.runner import Runner

POWERCAP = Path("/sys/class/powercap")
SECONDS = 5.0
IDLE = 1.0
CONTEXT = 256  # tokens; then a new text begins
TOGETHER = 8  # tokens between two looks at the clock

_PACKAGE = re.compile(r"intel-rapl:\d+")
_PART = re.compile(r"intel-rapl:\d+:\d+")


@dataclass(frozen=True)
class Counter:
    """One counter's folder."""

    folder: Path
    name: str
    range: int

    def read(self) -> int:
        """Microjoules. Raises UnsupportedError without the right to."""
        file = self.folder / "energy_uj"
        try:
            return int(file.read_text())
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise UnsupportedError(
                f"{file} cannot be read ({why}); as root: chmod a+r {POWERCAP}/intel-rapl*/energy_uj, until the next "
                "start of the machine"
            ) from error

    def between(self, before: int, after: int) -> int:
        """Microjoules from one reading to a later one."""
        return after - before if after >= before else after + self.range - before


def counters(root: Path = POWERCAP) -> tuple[Counter, ...]:
    """The counters whose sum is the processor's energy: packages, and memory where it is counted.

    Raises UnsupportedError where there are none.
    """
    found = [counter for folder in sorted(root.glob("intel-rapl:*")) if (counter := _counter(folder))]
    if not any(_PACKAGE.fullmatch(counter.folder.name) for counter in found):
        raise UnsupportedError(
            f"{root} has no intel-rapl counters, as in most virtual machines and on processors that are not Intel's or "
            "AMD's; measure on the machine itself"
        )
    return tuple(found)


def _counter(folder: Path) -> Counter | None:
    """A counter that belongs to the sum."""
    try:
        name = (folder / "name").read_text().strip()
        most = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None
    package = _PACKAGE.fullmatch(folder.name) and name.startswith("package")
    memory = _PART.fullmatch(folder.name) and name == "dram"
    return Counter(folder, name, most) if package or memory else None


class Meter:
    """A sum of counters that never goes back: `joules` since it was made."""

    def __init__(self, found: Sequence[Counter]) -> None:
        self._counters = found
        self._last = [counter.read() for counter in found]
        self._sum = 0

    @property
    def joules(self) -> float:
        now = [counter.read() for counter in self._counters]
        steps = zip(self._counters, self._last, now, strict=True)
        self._sum += sum(counter.between(before, after) for counter, before, after in steps)
        self._last = now
        return self._sum / 1e6


def decode_energy(path: Path, seconds: float = SECONDS, root: Path = POWERCAP, threads: int | None = None) -> Energy:
    """Decode tokens one after the other for so long, and tell what each took.

    Raises UnsupportedError where there are no counters or they cannot be read.
    """
    found = counters(root)
    meter = Meter(found)
    runner, _ = open_runner(path, slots=1, context=None, kv="f16", threads=threads, cache=True)
    text = Text(runner)
    text.write(1)
    idle, lasted = _idle(meter)
    before, start, tokens, told = meter.joules, time.perf_counter(), 0, 1.0
    while (passed := time.perf_counter() - start) < seconds:
        tokens += text.write(TOGETHER)
        if passed > told:  # once a second, so that a counter cannot go round unseen
            told = passed + 1
            _ = meter.joules
    used, took = meter.joules - before, time.perf_counter() - start
    return Energy(used / tokens, used / took, idle / lasted, tokens, took, tuple(c.name for c in found))


def _idle(meter: Meter) -> tuple[float, float]:
    """Joules of a second without work, and how long it was."""
    before, start = meter.joules, time.perf_counter()
    time.sleep(IDLE)
    return meter.joules - before, time.perf_counter() - start


class Text:
    """A text without meaning that goes on, and begins anew behind CONTEXT tokens."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._at = runner, 0

    def write(self, count: int) -> int:
        """Decode so many tokens, and say how many."""
        slot = np.zeros(1, np.int32)
        for _ in range(count):
            at = np.full(1, self._at, np.int32)
            self._runner.forward(at % self._runner.vocabulary, slot, at, slot)
            self._at = (self._at + 1) % min(CONTEXT, self._runner.context)
        return count
