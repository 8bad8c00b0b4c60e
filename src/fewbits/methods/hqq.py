"""Half-quadratic quantization: params for the least p-norm of the weights' error, p < 1, without any data.

Squares let the few largest weights of a group decide about its range. Badri and Shaji (2023, "Half-Quadratic
Quantization of Large Machine Learning Models", Mobius Labs) minimise Σ|w − ŵ|^p with p = 0.7 instead, which is how
errors are distributed that have outliers. Their solver splits off a copy of the error, shrinks it towards zero
(a proximal step) and refits a real-valued zero-point to the rest, in turns.

Files hold integer zero-points, and most formats none at all, so the same objective is descended here in the other
classical way, by reweighted least squares (half-quadratic too: Geman and Reynolds 1992). |e|^p is bounded from above by
a quadratic that touches it at the present error, whose weight is |e|^(p−2); so a turn is a weighted fit,

    h = (e² + ε²)^((p−2)/2),   params ← fit(w, h),   codes ← round(w, params)

and `fit` is the format's own: scales, zero-points and two-level scales alike, as the bytes hold them. A turn's params
are taken in the groups where they lower Σ|e|^p, so it falls in each; ε, a share of the group's error, keeps numbers
that happen to lie on a level from deciding everything. Where params are shared beyond a group, the whole matrix is
accepted or not. The problem is not convex: this ends in a hollow near the least squares, not in the lowest one. Costs
`iterations` + 1 searches.

What it buys depends on the weights: with long tails the bulk of a group gets finer steps. Where tails are short,
searched least squares (`rtn`) leave less divergence; where there is calibration text, `gptq` leaves less in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format, Grouped, Params, QTensor
from fewbits.methods.base import TensorMethod

SMOOTH = 0.1
"""ε, relative to the root of the group's mean squared error."""


@dataclass(frozen=True)
class HQQ(TensorMethod):
    """Reweighted fits. norm: p."""

    norm: float = 0.7
    iterations: int = 4

    summary: ClassVar[str] = "no data: params for the least p-norm (p = 0.7) of the error, which outliers sway little"

    @property
    def name(self) -> str:
        return "hqq"

    def quantize(self, w: Tensor, format: Format, stats: Mapping[str, Tensor]) -> QTensor:
        if "importance" in stats:
            raise UnsupportedError("hqq counts all weights alike and cannot use an importance; use rtn")
        params = format.fit(w, search=True)
        if isinstance(format, Grouped):
            params = self._descended(w.float(), format, params)
        return QTensor(format, format.round(w, params), params)

    def _descended(self, w: Tensor, format: Grouped, params: Params) -> Params:
        error = self._error(w, format, params)
        for _ in range(self.iterations):
            weights = format.ungrouped(self._weights(error), tuple(w.shape))
            found = format.fit(w, weights, search=True)
            tried = self._error(w, format, found)
            better = _accepted(format, self._powers(tried) - self._powers(error), params)
            params = {key: torch.where(_like(better, p), found[key], p) for key, p in params.items()}
            error = torch.where(better.unsqueeze(-1), tried, error)
        return params

    def _error(self, w: Tensor, format: Grouped, params: Params) -> Tensor:
        """w − ŵ in the grouped view."""
        return format.grouped(w - format.decode(format.round(w, params), params))

    def _powers(self, error: Tensor) -> Tensor:
        """Σ|e|^p of each group."""
        return error.abs().pow_(self.norm).sum(-1)

    def _weights(self, error: Tensor) -> Tensor:
        """Weights of the squares that stand for the p-th powers, in units of each group's own error."""
        square = error.square()
        mean = square.mean(-1, keepdim=True)
        scaled = square / torch.where(mean > 0, mean, 1.0)
        return scaled.add_(SMOOTH**2).pow_(self.norm / 2 - 1)


def _accepted(format: Grouped, change: Tensor, params: Params) -> Tensor:
    """Where params are taken, by group as change: where the sum falls over all whose params are fitted together."""
    if any(p.shape != change.shape for p in params.values()):  # a param of the whole matrix
        return change.sum((-2, -1), keepdim=True).expand_as(change) < 0
    return format.fitted_together(change) < 0


def _like(better: Tensor, param: Tensor) -> Tensor:
    """One answer for each value of a param: its group's, or its matrix's, where all groups have the same."""
    if better.shape == param.shape:
        return better
    whole = better[..., 0, 0]
    return whole.reshape(*whole.shape, *(1,) * (param.dim() - whole.dim()))


HQQS = (HQQ(),)
