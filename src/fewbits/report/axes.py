"""The axes of figures: where they begin and end, and what is written at them.

They end at round numbers, so a figure needs no more than its ticks to be read, and all of its points lie inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewbits.errors import FewbitsError
from fewbits.report.numbers import number
from fewbits.results import FrontierPoint

FINE: tuple[tuple[float, ...], ...] = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7))
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


@dataclass(frozen=True)
class Axis:
    """What an axis shows, where it begins and ends, and what is written at it: value -> text."""

    label: str
    low: float
    high: float
    ticks: Mapping[float, str]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axes_of(points: Sequence[FrontierPoint], across: int, up: int) -> tuple[Axis, Axis]:
    """The axis of sizes and that of divergences, with about so many ticks."""
    if not points:
        raise FewbitsError("there are no points to draw; a figure needs at least one")
    for point in points:
        for what, value in (("divergence", point.divergence), ("size", point.nbytes)):
            if not (math.isfinite(value) and value > 0):
                raise FewbitsError(f"point {point.name}: its {what} is {value}, which must be above 0; leave it out")
    return _size_axis([p.nbytes for p in points], across), _divergence_axis([p.divergence for p in points], up)


def _size_axis(sizes: Sequence[int], about: int) -> Axis:
    unit = next(name for name, factor in UNITS.items() if max(sizes) >= factor)
    low, high = min(sizes) / UNITS[unit], max(sizes) / UNITS[unit]
    margin = 0.04 * (high - low) or 0.1 * low
    step = _round_step((high - low + 2 * margin) / about)
    first, last = math.floor((low - margin) / step), math.ceil((high + margin) / step)
    ticks = [i * step for i in range(max(first, 0), last + 1)]
    written = {tick * UNITS[unit]: number(tick, 6) for tick in ticks}
    return Axis(f"size, {unit}", min(written), max(written), written)


def _round_step(least: float) -> float:
    """The smallest of … 1, 2, 5, 10, 20 … that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _divergence_axis(divergences: Sequence[float], about: int) -> Axis:
    label = "divergence from the original, nats per token"
    return logarithmic(label, min(divergences) / 1.15, max(divergences) * 1.15, about)


def linear(label: str, low: float, high: float, about: int) -> Axis:
    """From the round number at or below `low` to that at or above `high`, with about so many ticks."""
    step = _round_step((high - low) / about or abs(high) or 1.0)
    ticks = [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    written = {tick: number(tick, 6) for tick in ticks}
    return Axis(label, min(written), max(written), written)


def within(label: str, low: float, high: float, about: int, least: float = 0.0) -> Axis:
    """From low to high, with about so many round ticks between them, at least `least` apart."""
    high = high if high > low else low + 1
    step = _round_step(max((high - low) / about, least))
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, {tick: number(tick, 6) for tick in ticks})


def logarithmic(label: str, low: float, high: float, about: int, *, fine: bool = False) -> Axis:
    """Ticks are 1, 2 and 5 times powers of ten, or fewer of them where that would be too many; or, where it is to be
    fine, more of them if there is room, and the axis ends at those.
    """
    high = max(high, 1.01 * low)  # one number alone has no logarithm of a range
    if fine:
        for factors in FINE:
            ticks = _log_ticks(low, high, factors)
            if len(ticks) <= about:
                return Axis(label, ticks[0], ticks[-1], {tick: number(tick) for tick in ticks}, logarithmic=True)
    every = _log_ticks(low, high, (1, 2, 5))
    low, high = every[0], every[-1]
    coarser = [[tick for tick in _log_ticks(low, high, some) if low <= tick <= high] for some in ((1, 3), (1,))]
    sparse = coarser[-1][:: max(1, math.ceil(len(coarser[-1]) / about))]
    ticks = next((some for some in (every, *coarser) if len(some) <= about), sparse)
    written = {tick: number(tick) for tick in ticks}
    return Axis(label, low, high, written, logarithmic=True)


def _log_ticks(low: float, high: float, factors: Sequence[float]) -> list[float]:
    """These multiples of powers of ten, from the last that is not above `low` to the first not below `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)  # logarithms are rounded
    every = [float(f"{factor}e{power}") for power in powers for factor in factors]
    first, last = max(tick for tick in every if tick <= low), min(tick for tick in every if tick >= high)
    return [tick for tick in every if first <= tick <= last]
