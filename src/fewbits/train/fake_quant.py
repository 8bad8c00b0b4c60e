"""Fake quantization: numbers that are rounded at every use and trained all the same, in any format with levels.

A matrix is kept twice while it is trained: as *latent* weights in float32, which move by less than a level at a time,
and as what the file will hold, which the model runs on. With s̃ the scale as it is stored,

    ŵ = decode(round(w, s̃), s̃)

Rounding has no derivative. For a weight within the range of the levels it is taken as the identity (the
straight-through estimate, Bengio et al. 2013, arXiv:1308.3432), and scales are learned with the gradient of Esser et
al. 2020 (LSQ, arXiv:1902.08153, equation 3), in which what rounding adds, r = (ŵ − w) / s, is a constant:

    within the range    ŵ = w + s·r        ∂ŵ/∂w = 1      ∂ŵ/∂s = (ŵ − w) / s
    beyond its end Q    ŵ = s·Q            ∂ŵ/∂w = 0      ∂ŵ/∂s = ŵ / s

with one difference: a weight beyond the end goes on learning where its gradient leads back into the range. Otherwise it
would stay out there for good, and with three levels or two that is where many are.

Latent weights are counted in their group's first scale and scales relative to it, so that one learning rate fits all
matrices, groups and formats. Formats whose scales cannot move by themselves (powers of two, FP8, double quantization)
keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.formats import Params, QTensor
from fewbits.methods.fake_quant import ends, gaps, into_cells, levelled, per_number, still

LEAST, MOST = 0.1, 10.0
"""What a scale may become, of what it was: it keeps its sign and does not vanish."""


class FakeQuantizer(nn.Module):
    """A matrix that is trained in a format. Called without arguments: its numbers, float32, in the logical shape.

    w: what is to be rounded, [..., N, K]; start: codes and params to begin with. Weights that another code than the
    nearest was chosen for (by GPTQ) begin in that code's cell, so the first numbers are those of `start` to the bit.
    `latent` [..., G, g] and `change` (of scales, relative, in their shape; None where they cannot move) are trained.

    Raises UnsupportedError for a format whose numbers are not levels times a scale.
    """

    def __init__(self, w: Tensor, start: QTensor) -> None:
        super().__init__()
        self.format, self.shape = levelled(start.format), start.shape
        self._keys = tuple(start.params)
        for key, value in start.params.items():
            self.register_buffer(f"start_{key}", value, persistent=False)
        at = per_number(start.params)
        values = self.format.decode_at(self.format.grouped(start.codes), at)
        grouped = self.format.grouped(w.float())
        unit = self.format.scale_at(at).abs()
        self.register_buffer("unit", torch.where(unit > 0, unit, 1.0), persistent=False)
        moved = into_cells(grouped, values, gaps(self.format, at, values, grouped))
        self.latent = nn.Parameter(self._exact(moved, values, at))
        change = still(self.format, start.params)
        self.change = None if change is None else nn.Parameter(change)

    def forward(self) -> Tensor:
        found: Tensor = _Round.apply(self.latent, self.change, self)  # type: ignore[no-untyped-call]
        return self.format.ungrouped(found, self.shape)

    @torch.no_grad()
    def tensor(self) -> QTensor:
        """What the file holds, whose numbers are those that `forward` returns."""
        params = self.params()
        codes = self.format.round_at(self.weights(), per_number(params))
        return QTensor(self.format, self.format.ungrouped(codes, self.shape), params)

    def weights(self) -> Tensor:
        """The latent weights, grouped view."""
        return self.latent.detach() * self.get_buffer("unit")

    def params(self) -> Params:
        """Params at the present scales, as they will be stored."""
        start = {key: self.get_buffer(f"start_{key}") for key in self._keys}
        if self.change is None:
            return start
        return self.format.rescaled(start, (1 + self.change.detach()).clamp(LEAST, MOST))

    def _exact(self, w: Tensor, values: Tensor, at: Params) -> Tensor:
        """w in units, or the value itself where the division by the unit would round to another code."""
        unit = self.get_buffer("unit")
        latent = w / unit
        same = self.format.decode_at(self.format.round_at(latent * unit, at), at) == values
        return torch.where(same, latent, values / unit)


class _Round(torch.autograd.Function):
    """latent, change -> numbers in the grouped view."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, change: Tensor | None, quantizer: FakeQuantizer) -> Tensor:
        format, at = quantizer.format, per_number(quantizer.params())
        values = format.decode_at(format.round_at(quantizer.weights(), at), at)
        ctx.save_for_backward(change, values)
        ctx.quantizer = quantizer
        return values

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (slope,), quantizer = slopes, ctx.quantizer
        change, values = ctx.saved_tensors
        w, unit = quantizer.weights(), quantizer.get_buffer("unit")
        low, high = ends(quantizer.format, per_number(quantizer.params()))
        inside = (w >= low) & (w <= high)
        of_change = None
        if change is not None:
            product = torch.linalg.vecdot(slope, values - w.where(inside, torch.zeros((), device=w.device)))
            of_change = product / (1 + change).clamp(LEAST, MOST)
        back = inside | ((w > high) & (slope > 0)) | ((w < low) & (slope < 0))
        return slope.where(back, torch.zeros((), device=w.device)) * unit, of_change, None
