"""Observers: what static scale an input should have, from the batches that came by.

Each sees every |x| once and keeps little: `MinMax` the largest, the other two a histogram. A scale is asked for in an
activation format, in the end:

    minmax       the largest |x| has the highest code. Nothing seen is clipped; one outlier takes everybody's levels.
    percentile   the quantile p of |x| has it: a fraction 1 − p is clipped, whatever that costs.
    mse          whichever clipping leaves the least squared error Σ (x − x̂)² on what was seen.

Comparison of the three: Wu et al. 2020 (arXiv:2004.09602), section 4.2 (there entropy in place of mse).

The histogram has BINS bins of equal width from 0 to a limit that is a power of two. When something larger comes, the
limit doubles and bins are merged in pairs; as limits and widths are powers of two, a number then is in the very bin in
which it would have been counted at once, so the order of batches does not matter. At least half of the bins lie below
the largest |x|.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.activations import UNSEEN, ActivationFormat

BINS = 1 << 14
PERCENTILE = 0.9999
CLIPPED = 16.0
"""How far below the largest |x| mse looks: there a step of INT8 still spans four bins or more."""
CANDIDATES = 128
LEAST = 2.0**-100
"""The smallest limit of a histogram, so that the inverse of a bin's width is a float32."""


class Observer(ABC):
    """Sees inputs and gives the static scale for them."""

    def __init__(self) -> None:
        self.peak = 0.0
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Count every number of x, floating point of any shape. Raises FormatError if one is NaN or Inf."""
        if x.numel() == 0:
            return
        sizes = x.detach().abs().float()
        peak = float(sizes.amax())
        if not math.isfinite(peak):
            raise FormatError("an input holds NaN or Inf on the calibration text; no static scale can be right for it")
        self.peak = max(self.peak, peak)
        self.count += x.numel()
        self._count(sizes, peak)

    def scale(self, format: ActivationFormat) -> Tensor:
        """The static scale, float32 [1], on the CPU. Where nothing but zeros was seen it is UNSEEN."""
        if self.peak == 0:
            return torch.tensor([UNSEEN])
        return format.scale_of(torch.tensor([self._highest(format)]))

    def _count(self, sizes: Tensor, peak: float) -> None:  # noqa: B027  # not all observers need more than the peak
        """Take note of |x|, float32, the largest of which is `peak`."""

    @abstractmethod
    def _highest(self, format: ActivationFormat) -> float:
        """The |x| that gets the highest code; some is above zero."""


class MinMax(Observer):
    """The largest |x|."""

    def _highest(self, format: ActivationFormat) -> float:
        return self.peak


class _Histogram(Observer):
    """Counts of |x| in BINS bins."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    @property
    def width(self) -> float:
        return self.limit / BINS

    def _count(self, sizes: Tensor, peak: float) -> None:
        if peak >= self.limit:
            self._grow(max(LEAST, 2.0 ** math.frexp(peak)[1]))
        found = (sizes.flatten() * (1 / self.width)).long()  # exact: the width is a power of two
        self.counts += torch.bincount(found, minlength=BINS).cpu()

    def _grow(self, limit: float) -> None:
        if self.limit:
            merged = min(BINS, round(limit / self.limit))
            counts = self.counts.view(-1, merged).sum(1)
            self.counts = torch.cat([counts, counts.new_zeros(BINS - len(counts))])
        self.limit = limit


class Percentile(_Histogram):
    """The quantile p of |x|, to within a bin."""

    def __init__(self, p: float = PERCENTILE) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise FormatError(f"percentile {p} must be a fraction above 0 and at most 1, such as {PERCENTILE}")
        self.p = p

    def _highest(self, format: ActivationFormat) -> float:
        """By linear interpolation inside the bin in which the rank falls; at least a bin, as zero is no range."""
        rank, below = self.p * self.count, self.counts.cumsum(0)
        at = int(torch.searchsorted(below, math.ceil(rank)))
        share = (rank - float(below[at] - self.counts[at])) / float(self.counts[at])
        return min(self.peak, max((at + share) * self.width, self.width))


class LeastSquares(_Histogram):
    """The clipping of least squared error, each bin standing for the number in its middle."""

    def _highest(self, format: ActivationFormat) -> float:
        middles = (torch.arange(BINS) + 0.5) * self.width
        candidates = self.peak * CLIPPED ** -torch.linspace(0, 1, CANDIDATES)
        errors = [self._error(middles, highest, format) for highest in candidates]
        return float(candidates[torch.stack(errors).argmin()])

    def _error(self, middles: Tensor, highest: Tensor, format: ActivationFormat) -> Tensor:
        codes, scale = format.quantize(middles, format.scale_of(highest.reshape(1)))
        residual = (format.dequantize(codes, scale) - middles).double().square()
        return (residual * self.counts).sum()


OBSERVERS: dict[str, Callable[[], Observer]] = {"minmax": MinMax, "percentile": Percentile, "mse": LeastSquares}
"""Every observer by its name, each made anew by a call."""


def observer_named(name: str) -> Callable[[], Observer]:
    """The observer of that name. Raises FormatError if there is none."""
    if name not in OBSERVERS:
        raise FormatError(f"observer '{name}' is not known; choose one of {', '.join(OBSERVERS)}")
    return OBSERVERS[name]
