"""Rounding that can be trained: where a matrix lands between two codes, and the scales of its groups.

A weight w is rounded after a shift v of at most half a level,

    ŵ = decode(round(w + v·gap)),      gap = distance from the level that w starts on to the next one on w's side

so v decides between those two (Cheng et al. 2023, SignRound, arXiv:2309.05516, section 3), and the scale of its group
is s₀·(1 + δ): that is the paper's clipping factor, but seen from a scale that was searched. Where the start is another
solver's code and not the nearest one (GPTQ's make up for errors in other columns), w is first moved into that code's
cell, as little as possible: at v = 0 the codes are the ones that were given.

Rounding has no derivative. Where codes are trained it is taken as the identity within the range of the levels (the
straight-through estimate), so a scale moves the levels but not what is rounded to them; where codes are fixed, a number
is proportional to its scale:

    ∂ŵ/∂v = gap      ∂ŵ/∂δ = (ŵ − inside·w) / (1 + δ)      with fixed codes  ∂ŵ/∂δ = ŵ / (1 + δ)

Nothing here knows the format but through `round_at`, `decode_at` and `rescaled`, which are those of the stored tensor:
what is trained is what the file will hold, to the last bit. Where scales cannot move by themselves (powers of two,
double quantization) only the rounding is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format, Grouped, Params, QTensor

REACH = 0.5
"""Largest shift, in gaps: any more would skip a code."""
INSIDE = 0.49
"""How far from its level a weight starts at most, in gaps: beyond one half it would be rounded to another one."""
STRETCH = 0.5
"""Largest relative change of a scale, so that it keeps its sign and its magnitude."""


@dataclass(frozen=True)
class Choice:
    """Codes (grouped view) and params of one moment: all that a QTensor needs."""

    codes: Tensor
    params: Params


class Rescaling:
    """One matrix whose codes stay while its scales are trained. change: δ of every scale, float32, in its shape.

    `change` is None where the scales cannot move. Raises UnsupportedError for a format whose numbers are not levels
    times a scale.
    """

    def __init__(self, start: QTensor) -> None:
        self.format, self._shape = levelled(start.format), start.shape
        self._start = start.params
        self.change = still(self.format, start.params)
        codes = self.format.grouped(start.codes)
        self.choice = Choice(codes, start.params)
        self._values = torch.empty(0)

    def weights(self) -> Tensor:
        """The numbers, float32 [..., N, K], at the present scales; the codes and params for them become `choice`."""
        params = self._start if self.change is None else self.format.rescaled(self._start, 1 + self.change)
        at = per_number(params)
        codes = self._codes(at)
        self.choice, self._values = Choice(codes, params), self.format.decode_at(codes, at)
        return self.format.ungrouped(self._values, self._shape)

    def slope(self, gradient: Tensor) -> Tensor:
        """∂loss/∂δ from the loss's gradient by what `weights` returned last, in the scale's shape."""
        assert self.change is not None
        product: Tensor = torch.linalg.vecdot(self.format.grouped(gradient).float(), self._moving())
        return product.div_(1 + self.change)

    def tensor(self, choice: Choice) -> QTensor:
        return QTensor(self.format, self.format.ungrouped(choice.codes, self._shape), choice.params)

    def _codes(self, at: Params) -> Tensor:
        return self.choice.codes

    def _moving(self) -> Tensor:
        """The part of each number that goes along with its scale, grouped view."""
        return self._values


class Rounding(Rescaling):
    """One matrix w, float [..., N, K], on its way from the QTensor `start` to a better one, in codes and scales.

    Takes 17 bytes a weight: w twice and its shift in float32, the codes, and what they stand for.
    """

    def __init__(self, w: Tensor, start: QTensor) -> None:
        super().__init__(start)
        at = per_number(start.params)
        self._values = self.format.decode_at(self.choice.codes, at)
        w = self.format.grouped(w.float())
        low, high = ends(self.format, at)
        self._gap = gaps(self.format, at, self._values, w)
        self._w = into_cells(w, self._values, self._gap)
        self._inside = self._w.where((w >= low) & (w <= high), 0.0)
        self._shift = torch.zeros_like(self._w)

    def descend(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move every shift by `rate` and every scale by the share `scale_rate`, against the sign of its derivative.

        gradient: of the loss by what `weights` returned last, [..., N, K].
        """
        if self.change is not None:
            self.change.sub_(self.slope(gradient).sign_(), alpha=scale_rate).clamp_(-STRETCH, STRETCH)
        self.shift(gradient, rate)

    def shift(self, gradient: Tensor, rate: float) -> None:
        """Move the shifts alone."""
        self._shift.sub_(self.format.grouped(gradient).sign(), alpha=rate).clamp_(-REACH, REACH)

    def _codes(self, at: Params) -> Tensor:
        return self.format.round_at(torch.addcmul(self._w, self._shift, self._gap), at)

    def _moving(self) -> Tensor:
        return self._values - self._inside


def per_number(params: Params) -> Params:
    """Params as they broadcast to the grouped view."""
    return {key: p.unsqueeze(-1) for key, p in params.items()}


def still(format: Grouped, params: Params) -> Tensor | None:
    """δ = 0 for every scale; None where the format does not let them move."""
    scale = format.scale_at(params)
    return None if format.rescaled(params, torch.ones_like(scale)) is params else torch.zeros_like(scale)


def levelled(format: Format) -> Grouped:
    if not isinstance(format, Grouped) or format.levels is None:
        raise UnsupportedError(
            f"{format.name}: its numbers are not levels times a scale, so there is no rounding to train; use rtn"
        )
    return format


def into_cells(w: Tensor, values: Tensor, gap: Tensor) -> Tensor:
    """w moved, as little as possible, to where it is rounded to `values`; all in the grouped view."""
    return w.clamp(values - INSIDE * gap, values + INSIDE * gap)


def gaps(format: Grouped, at: Params, values: Tensor, w: Tensor) -> Tensor:
    """From each value (grouped view) to the next level in w's direction; inward from the last one. Broadcasts to w."""
    assert format.levels is not None
    levels = format.levels.to(w.device)
    steps = levels.diff()
    if bool((steps == steps[0]).all()):
        low, high = ends(format, at)
        return (high - low) / (levels[-1] - levels[0]) * steps[0]
    scale = format.scale_at(at)
    # values / scale is a level but for rounding, so the nearest midpoints are far away
    index = torch.searchsorted(levels[:-1] + steps / 2, values / torch.where(scale != 0, scale, 1.0))
    index -= ((w < values) ^ (scale < 0)).to(index.dtype)
    return steps[index.clamp_(0, len(steps) - 1)] * scale.abs()


def ends(format: Grouped, at: Params) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each group, by the format's own arithmetic; they broadcast to its view."""
    like = max((p for p in at.values() if p.is_floating_point()), key=Tensor.numel)
    found = [format.decode_at(format.round_at(torch.full_like(like, end), at), at) for end in (-1e30, 1e30)]
    return torch.minimum(*found), torch.maximum(*found)
