"""Super-blocks: 256 numbers in sub-blocks whose scales are themselves small integers times one FP16 factor.

    one scale               number = d·s·level
    a scale and a minimum   number = d·s·q − k·m

Params are kept by sub-block, [..., N, G]: `factor` (d) and `minimum_factor` (k), the same in all sub-blocks of one
super-block, and the integers `steps` (s) and `minimum_steps` (m). So columns can be rounded one at a time like those of
any other format; params of 256 columns are fitted together (`span`).

The two levels are solved, not rounded one after the other. Every sub-block's best real scale (and minimum) comes first,
then the factor under whose integers they lose the least, weighed by what a change of each costs; then, in turn, each
sub-block's integers move to the neighbours that leave the least squared error of the *numbers*, and the factors to the
least-squares solution for the codes. A step is taken only where it lowers the error as stored, codes chosen anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats._blocks import Block
from fewbits.formats._search import AffineSums, best_affine, best_scale, inverse, weighted_sum
from fewbits.formats.base import Params

SPAN = 256
ROUNDS = 2  # of moving integers, then factors
NEIGHBOURS = (0, 1, -1)  # of an integer


@dataclass(frozen=True)
class SuperBlock(Block):
    """What all of them share: params by sub-block, bytes by super-block."""

    integers: ClassVar[tuple[int, int]]
    """Smallest and largest step of a scale."""

    @property
    def span(self) -> int:
        return SPAN

    @abstractmethod
    def solved(self, x: Tensor, h: Tensor | None, *, search: bool) -> Params:
        """Params [..., S, n] for x [..., S, n, g]; h, importance, broadcasts to x."""

    def scale_at(self, params: Params) -> Tensor:
        return params["factor"] * params["steps"]

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        inner = (-1, SPAN // self.group)
        h = None if importance is None else importance.expand_as(x).unflatten(-2, inner)
        found = self.solved(x.unflatten(-2, inner), h, search=search)
        return {key: p.flatten(-2) for key, p in found.items()}

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        """Scales from the range, then the integers nearest to them: ggml's own encoders search, and are not copied."""
        params = self.fit_groups(x, None, search=False)
        return self.round_at(x, {key: p.unsqueeze(-1) for key, p in params.items()}), params

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        parts = self.to_fields(codes, {key: p.unflatten(-1, (-1, SPAN // self.group)) for key, p in params.items()})
        return {"blocks": torch.cat([parts[name] for name, _ in self.fields], dim=-1).flatten(-2)}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        codes, params = super().unpack(arrays, shape)
        return codes, {key: p.expand(*p.shape[:-1], SPAN // self.group).flatten(-2) for key, p in params.items()}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        """What sub-blocks have in common moves their factor, the rest of it their integers."""
        inner = (-1, SPAN // self.group)
        factor = factor.expand_as(params["steps"]).unflatten(-1, inner)
        common, moved = factor.mean(-1, keepdim=True), dict[str, Tensor]()
        for name in ("", "minimum_") if "minimum_steps" in params else ("",):
            shared, steps = (params[f"{name}{part}"].unflatten(-1, inner) for part in ("factor", "steps"))
            new = stored(shared * common)
            moved |= {
                f"{name}factor": new.flatten(-2),
                f"{name}steps": self.steps(shared * steps * factor, new).flatten(-2),
            }
        return moved

    def steps(self, scale: Tensor, factor: Tensor) -> Tensor:
        """The integers nearest to scale / factor."""
        return (scale * inverse(factor)).round_().clamp_(*self.integers)

    def least(self, x: Tensor, h: Tensor | None, candidates: Sequence[Params], over: tuple[int, ...]) -> Params:
        """For each sub-block (over the last dimension), or super-block (the last two), the candidate with the least
        squared error; a tie goes to the first.
        """
        best, least = dict(candidates[0]), self._error(x, h, candidates[0], over)
        for params in candidates[1:]:
            error = self._error(x, h, params, over)
            better = (error < least).reshape(*error.shape, *[1] * (len(over) - 1))
            best = {key: torch.where(better, p, best[key]) for key, p in params.items()}
            least = torch.minimum(error, least)
        return best

    def _error(self, x: Tensor, h: Tensor | None, params: Params, over: tuple[int, ...]) -> Tensor:
        at = {key: p.unsqueeze(-1) for key, p in params.items()}
        residual = self.decode_at(self.round_at(x, at), at).sub_(x).square_()
        return (residual if h is None else residual.mul_(h)).sum(over)


def signed_peak(x: Tensor) -> Tensor:
    """The number of largest magnitude along the last dimension."""
    low, high = x.amin(-1), x.amax(-1)
    return torch.where(high > -low, high, low)


def stored(x: Tensor) -> Tensor:
    """As FP16 holds it."""
    return x.to(torch.float16).float()


@dataclass(frozen=True)
class ScaledBlocks(SuperBlock):
    """d·s·level: Q3_K, Q6_K, IQ4_XS. Params: factor, steps."""

    @abstractmethod
    def nearest(self, t: Tensor) -> Tensor:
        """The nearest levels, in place of t."""

    @abstractmethod
    def codes_of(self, t: Tensor) -> Tensor:
        """Their codes."""

    @abstractmethod
    def level_of(self, codes: Tensor) -> Tensor:
        """The levels of codes, float32."""

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return self.codes_of(x * inverse(self.scale_at(params)))

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return self.level_of(codes).mul_(self.scale_at(params))

    def solved(self, x: Tensor, h: Tensor | None, *, search: bool) -> Params:
        levels = self.levels
        assert levels is not None
        start = signed_peak(x) / levels[0]  # the largest weight gets the level farthest from zero
        plain = self._two_levels(start, None, (1.0,))
        if not search:
            return plain
        reach = [1.4 - 0.05 * i for i in range(20)]  # past 1 the largest weight gets a level that is nearer to zero
        scale = best_scale(x, start, [*reach, *(-f for f in reach)], self.nearest, h)
        v = self.nearest(x * inverse(scale).unsqueeze(-1))
        weight = weighted_sum(v, v, h)
        found = self._two_levels(scale, weight, [f for r in (1.0, 0.98, 0.96, 0.93, 0.9, 0.85) for f in (r, -r)])
        for _ in range(ROUNDS):
            steps = [(found["steps"] + by).clamp_(*self.integers) for by in NEIGHBOURS]
            found = self.least(x, h, [{**found, "steps": s} for s in steps], (-1,))
            found = self.least(x, h, [found, self._refactored(x, h, found)], (-2, -1))
        return self.least(x, h, [plain, found], (-2, -1))

    def _two_levels(self, scale: Tensor, weight: Tensor | None, factors: Sequence[float]) -> Params:
        """factor and steps nearest to real scales [..., S, n], whose squared errors weigh so much."""
        start = signed_peak(scale) / self.integers[0]
        if len(factors) > 1:
            start = best_scale(scale, start, factors, lambda t: t.round_().clamp_(*self.integers), weight)
        factor = stored(start).unsqueeze(-1)
        return {"factor": factor.expand_as(scale), "steps": self.steps(scale, factor)}

    def _refactored(self, x: Tensor, h: Tensor | None, params: Params) -> Params:
        """The factor of least squares for the codes and steps as they are."""
        v = self.nearest(x * inverse(self.scale_at(params)).unsqueeze(-1))
        steps = params["steps"]
        along = (weighted_sum(x, v, h) * steps).sum(-1, keepdim=True)
        size = (weighted_sum(v, v, h) * steps.square()).sum(-1, keepdim=True)
        factor = torch.where(size > 0, along / size, params["factor"][..., :1])
        return {**params, "factor": stored(factor).expand_as(steps)}


@dataclass(frozen=True)
class EvenBlocks(ScaledBlocks):
    """Whole numbers from −2^(bits−1), whose codes count from the lowest one (uint8)."""

    bits: ClassVar[int]
    group: int = 16

    @property
    def cells(self) -> str:
        return self.bits * "I"

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> Tensor:
        return torch.arange(-self.zero, self.zero, dtype=torch.float32)

    def nearest(self, t: Tensor) -> Tensor:
        return t.round_().clamp_(-self.zero, self.zero - 1)

    def codes_of(self, t: Tensor) -> Tensor:
        return self.nearest(t).add_(self.zero).to(torch.uint8)

    def level_of(self, codes: Tensor) -> Tensor:
        return codes.float().sub_(self.zero)


@dataclass(frozen=True)
class OffsetBlocks(SuperBlock):
    """d·s·q − k·m: Q2_K, Q4_K, Q5_K. Codes uint8; params: factor, steps, minimum_factor, minimum_steps."""

    bits: ClassVar[int]

    @property
    def cells(self) -> str:
        return self.bits * "I"

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def levels(self) -> Tensor:
        return torch.arange(self.highest + 1, dtype=torch.float32)

    def minimum_at(self, params: Params) -> Tensor:
        """What is subtracted."""
        return params["minimum_factor"] * params["minimum_steps"]

    def offset_at(self, params: Params) -> Tensor:
        return -self.minimum_at(params)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        t = (x + self.minimum_at(params)).mul_(inverse(self.scale_at(params)))
        return t.round_().clamp_(0, self.highest).to(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(self.scale_at(params)).sub_(self.minimum_at(params))

    def solved(self, x: Tensor, h: Tensor | None, *, search: bool) -> Params:
        low, high = x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0)
        plain = self._two_levels((high - low) / self.highest, -low)
        if not search:
            return plain
        scale, offset = best_affine(x, low, high, self.highest, self._reach, h, anchors=(0.0, 0.5, 1.0))
        sums = AffineSums(x, h)
        sums.count(scale, offset, self.highest)
        scale, minimum = scale.clamp_min_(0), -offset.clamp_max_(0)
        found = self._two_levels(scale, minimum, (sums.qq, sums.h))
        for _ in range(ROUNDS):
            found = self.least(x, h, [found, *self._neighbours(sums, found)], (-1,))
            found = self.least(x, h, [found, self._refactored(sums, found)], (-2, -1))
        return self.least(x, h, [plain, found], (-2, -1))

    @property
    def _reach(self) -> list[float]:
        """Factors of the range: those under which it is up to one step wider or narrower than the codes reach."""
        return [self.highest / (self.highest + i / 3) for i in range(-3, 4)]

    def _two_levels(self, scale: Tensor, minimum: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Params:
        """Factors and steps nearest to real scales and minima [..., S, n], whose squared errors weigh so much."""
        params: dict[str, Tensor] = {}
        for i, (name, real) in enumerate((("", scale), ("minimum_", minimum))):
            factor = real.amax(-1) / self.integers[1]
            if weights is not None:
                shrunk = [1.0 - 0.03 * k for k in range(8)]
                factor = best_scale(real, factor, shrunk, lambda t: t.round_().clamp_(*self.integers), weights[i])
            factor = stored(factor).unsqueeze(-1)
            params |= {f"{name}factor": factor.expand_as(real), f"{name}steps": self.steps(real, factor)}
        return params

    def _neighbours(self, sums: AffineSums, params: Params) -> list[Params]:
        """Steps next to those of the scales, each with the steps of the minimum that are best for its codes."""
        found = list[Params]()
        for by in NEIGHBOURS:
            steps = (params["steps"] + by).clamp_(*self.integers)
            scale = params["factor"] * steps
            sums.count(scale, self.offset_at(params), self.highest)
            minimum = (scale * sums.q - sums.x) * inverse(sums.h)
            found.append({**params, "steps": steps, "minimum_steps": self.steps(minimum, params["minimum_factor"])})
        return found

    def _refactored(self, sums: AffineSums, params: Params) -> Params:
        """The factors of least squares for the codes and steps as they are."""
        sums.count(self.scale_at(params), self.offset_at(params), self.highest)
        s, m = params["steps"], params["minimum_steps"]
        uu, vv, uv = ((a * b).sum(-1, keepdim=True) for a, b in ((s * s, sums.qq), (m * m, sums.h), (s * m, sums.q)))
        ux, vx = (s * sums.xq).sum(-1, keepdim=True), (m * sums.x).sum(-1, keepdim=True)
        det = uu * vv - uv * uv
        solvable = det > 1e-6 * uu * vv
        factor = torch.where(solvable, (ux * vv - uv * vx) / det, params["factor"][..., :1])
        minimum = torch.where(solvable, (uv * ux - uu * vx) / det, params["minimum_factor"][..., :1])
        found = {"factor": factor, "minimum_factor": minimum}
        return {**params, **{key: stored(p.clamp_min_(0)).expand_as(s) for key, p in found.items()}}
