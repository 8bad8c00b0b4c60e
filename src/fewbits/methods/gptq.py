"""GPTQ: columns are rounded one after the other, and those still to come make up for the error.

The squared error of a layer's *outputs* counts, tr(E·H·Eᵀ) with H the mean of x·xᵀ over calibration inputs, not that of
its weights. `_hessian` gives the rule: the target of a column is its weight plus a fixed linear function of the errors
made so far (Frantar et al. 2022, arXiv:2210.17323; here as LDLQ, arXiv:2307.13304).

Columns are taken in falling order of H's diagonal, so that the largest errors are made up for by many columns; but
whole groups at a time, so that every group's scale stands where it would without that order. A group's params are
fitted when it is reached, to the targets as they are then, each column weighed by what its error costs (d in
`_hessian`). Formats whose params span the row, or groups of the whole matrix, are fitted beforehand.

Behind quantized blocks a layer reads x̂ where the original's reads x, and no Ŵ near W makes W·x of that. The target is
then the least-squares answer, damped towards W,

    W + D·(H + λI)⁻¹,   D the mean of (W·x − W·x̂)·x̂ᵀ (`drift`), H of x̂·x̂ᵀ

because Σ|W·x − Ŵ·x̂|² is, but for a constant, the same objective about this target (Li et al. 2025, GPTAQ,
arXiv:2504.02692, reach it column by column). On a small Llama it takes 9 % off the divergence at 4 bits, 14 % at 3.

The correction is a regression on the calibration tokens, and one on few tokens fits their noise. A regression with k
free coefficients finds k·σ²/n of explanation in pure noise of variance σ² on n tokens, and leaves (n − k)·σ²/n. It is
shrunk to the share of what it explains that goes beyond this (James and Stein 1961).

Afterwards `sweeps` of coordinate descent go over the same columns, each with all others fixed (Behdin et al. 2023,
QuantEase, arXiv:2309.01885, algorithm 1); before a group's columns, its scale moves to the least-squares one for its
codes. Either step is taken only where it lowers the error, so the objective falls with each. A second sweep lowers it
by another few per cent on the calibration text, and not the divergence on other text.

The matrix lies transposed, [K, N], so that a column of N weights is contiguous; what the columns of a run (a group, or
128) feed back to later runs is one matrix product. Cost: 2·K²·N operations a pass and some twenty elementwise ones on
each column. Rows are independent, so matrices that read the same input are solved on top of each other, and those of
large ones a few at a time: beside the Hessian there are only `slab` weights with what belongs to them. Libraries
sum in another order where only a few rows are left, which FP32 scales show in their last bit; so rows are filled up
with zeros to a multiple of `HEIGHT`, and a row's codes do not depend on how many are solved with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import Float, Format, Grouped, Params, QTensor
from fewbits.formats.base import require_finite
from fewbits.kernels.round_columns import at_positions, round_columns
from fewbits.methods._hessian import Factors, Objective, coefficients, factored, solving_order
from fewbits.methods.base import TensorMethod

RUN = 128
"""Columns of a run in formats whose groups are not counted in columns."""

HEIGHT = 64
"""Rows are solved by so many: torch adds up four vectors of float32 at a time in one order, what is left in another."""

SHRINKING = 0.2
"""Damping for each column to a token: a Hessian of few tokens is shrunk towards a multiple of the identity.

Found on a small Llama at 2 bits: ten times the usual damping takes a third off the divergence with one token or less a
column, a seventh with 2 to 4, and adds 2 % with 32 to 64.
"""


@dataclass(frozen=True)
class GPTQ(TensorMethod):
    """Error feedback through the Hessian.

    damping: added to its diagonal, as a share of the diagonal's median. sweeps: of coordinate descent. in_sequence:
    solve the matrices of a block in the order in which it uses them.
    """

    damping: float = 0.01
    sweeps: int = 1
    in_sequence: bool = True

    summary: ClassVar[str] = "columns one by one, the rest making up for each error in the layer's outputs (Hessian)"
    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    wants: ClassVar[tuple[str, ...]] = ("drift",)
    shares: ClassVar[bool] = True
    slab: ClassVar[int | None] = 1 << 22  # where rows do not depend on each other

    @property
    def name(self) -> str:
        return "gptq"

    @property
    def in_order(self) -> bool:
        return self.in_sequence

    def quantize(self, w: Tensor, format: Format, stats: Mapping[str, Tensor]) -> QTensor:
        return self.quantize_together([w], format, [stats])[0]

    def quantize_together(
        self, matrices: Sequence[Tensor], format: Format, stats: Sequence[Mapping[str, Tensor]]
    ) -> list[QTensor]:
        """stats: `hessian` [K, K] or [experts, K, K], of how many `tokens`; `drift`, in the shape of w, with `scatter`.

        Raises UnsupportedError without a Hessian and FormatError for formats that cannot be rounded by columns.
        """
        for w in matrices:
            format.check(tuple(w.shape))
            require_finite(w, {"peak": w.abs().amax()}, format.name)
        if isinstance(format, Float):  # next to no error, and nothing shared by a group
            return [QTensor(format, format.round(w, {}), {}) for w in matrices]
        if not (format.columnwise and isinstance(format, Grouped)):
            raise FormatError(f"{format.name} cannot be rounded one column at a time, as gptq does; use rtn or hqq")
        if "hessian" not in stats[0]:
            raise UnsupportedError("gptq needs the Hessian of the layer's inputs: give calibration text, or use rtn")
        if matrices[0].dim() == 2:
            return self._solved(matrices, format, stats)
        experts = [
            self._solved([w[i] for w in matrices], format, [{key: value[i] for key, value in s.items()} for s in stats])
            for i in range(len(matrices[0]))
        ]
        return [_stacked(list(each)) for each in zip(*experts, strict=True)]

    def _solved(
        self, matrices: Sequence[Tensor], format: Grouped, stats: Sequence[Mapping[str, Tensor]]
    ) -> list[QTensor]:
        """Matrices [N, K] under one Hessian."""
        span = format.span if isinstance(format.span, int) else None
        hessian, width = stats[0]["hessian"].float(), matrices[0].shape[1]
        tokens = float(stats[0]["tokens"]) if "tokens" in stats[0] else math.inf
        heights = [len(w) for w in matrices]
        slab = max(1, self.slab // width) if format.rowwise and self.slab else sum(heights)
        done = list[QTensor]()
        order, damping = solving_order(hessian.diagonal(), span), self.damping + SHRINKING * width / tokens
        with factored(hessian, order, damping) as (objective, factors):
            free = coefficients(objective, factors) if "drift" in stats[0] else 0.0
            for start in range(0, sum(heights), slab):
                rows = slice(start, start + slab)
                target = _rows(matrices, rows).float().T[objective.columns]
                if "drift" in stats[0]:
                    drift, scatter = (_rows([found[key] for found in stats], rows) for key in ("drift", "scatter"))
                    target += _correction(objective, factors, drift, float(scatter.sum()), tokens, free)
                done.append(self._of_target(format, objective, factors, target))
        return _divided(done, heights)

    def _of_target(self, format: Grouped, objective: Objective, factors: Factors, target: Tensor) -> QTensor:
        """Rows whose targets are [K, N], in the order of solving."""
        rows = target.shape[1]
        layer = Layer(format, objective, pad(target, (0, -rows % HEIGHT)) if format.rowwise else target)
        layer.solve(factors)
        for _ in range(self.sweeps):
            layer.sweep()
        q = layer.result()
        return _first(q, rows) if format.rowwise else q


@dataclass
class Run:
    """Neighbouring positions that are solved together: a group, or a part of the row.

    columns: int64 [C], those at the positions. params: of the group, or of the matrix. codes: [C, N].
    """

    positions: slice
    columns: Tensor
    params: Params = field(default_factory=dict)
    codes: Tensor = field(default_factory=lambda: torch.empty(0))


class Layer:
    """A matrix on its way, transposed, [K, N], in reversed order of solving."""

    def __init__(self, format: Grouped, objective: Objective, target: Tensor) -> None:
        self.format = format
        self.objective = objective
        self.target = target
        self.error = torch.zeros_like(target)  # target − what the codes stand for, of what is rounded
        self.grouped = isinstance(format.span, int) and format.rowwise
        self.runs = [Run(part, objective.columns[part]) for part in reversed(self._parts())]

    def solve(self, factors: Factors) -> None:
        """Round every column at a target that makes up for the errors before it."""
        if not self.grouped:
            params = self._fitted(self.target, self.objective.columns, self.objective.damped)
            for run in self.runs:
                run.params = params
        for run in self.runs:
            part, later = run.positions, slice(run.positions.stop, None)
            targets = torch.addmm(self.target[part], factors.feedback(part, later), self.error[later])
            if self.grouped:
                run.params = self._fitted(targets, run.columns, factors.cost[part])
            self.error[part] = self._round(run, targets, factors.within(part), self.target[part])

    def sweep(self) -> None:
        """Coordinate descent: scales at fixed codes, then every column at fixed others."""
        if not isinstance(self.format.span, int):
            self._rescale_all()
        for run in self.runs:
            rows = self.objective.rows(run.positions)  # of H, [C, K]
            within = rows[:, run.positions]
            slope = rows @ self.error
            values = self.target[run.positions] - self.error[run.positions]
            if self.grouped:
                self._rescale(run, values, slope, within)
            scaled = within.diagonal().reciprocal().unsqueeze(-1)
            self.error[run.positions] += self._round(run, slope.mul_(scaled).add_(values), within * scaled, values)

    def result(self) -> QTensor:
        """In the matrix's own order."""
        codes = torch.cat([run.codes for run in reversed(self.runs)])
        codes = codes[self.objective.columns.argsort()].T.contiguous()
        if not self.grouped:
            return QTensor(self.format, codes, self.runs[0].params)
        runs = sorted(self.runs, key=lambda run: int(run.columns[0]))
        params = {key: torch.cat([run.params[key] for run in runs], dim=-1) for key in runs[0].params}
        return QTensor(self.format, codes, params)

    def _parts(self) -> list[slice]:
        columns = self.objective.columns
        starts = list(range(0, len(columns), RUN))
        if isinstance(self.format.span, int):
            groups = columns // self.format.span
            starts = [0, *((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist()]
        return [slice(*bounds) for bounds in pairwise([*starts, len(columns)])]

    def _fitted(self, targets: Tensor, columns: Tensor, importance: Tensor) -> Params:
        """Params for targets [C, N], which are put in the order of their columns first."""
        order = columns.argsort()
        return self.format.fit(targets[order].T, importance[order], search=True)

    def _round(self, run: Run, targets: Tensor, feedback: Tensor, base: Tensor) -> Tensor:
        """Set the run's codes; base − what they stand for."""
        params = self._of_columns(run, run.params)
        run.codes, moved = round_columns(self.format, targets, feedback, params, base)
        return moved

    def _rescale(self, run: Run, values: Tensor, slope: Tensor, within: Tensor) -> None:
        """Scale a run's numbers to the least-squares fit for its codes, in each row where that, stored, is better.

        values: what the codes stand for; slope: H·error; both [C, N] and kept in step. within: H of the run, [C, C].
        """
        over = (0, 1) if self.format.group == "tensor" else 0
        along, bend = (values * slope).sum(over), (values * (within @ values)).sum(over)
        factor = torch.where(bend > 0, 1 + along / bend, 1.0)
        params = self.format.rescaled(run.params, factor.reshape(-1, 1))
        step = self._values(run, params) - values
        pull = within @ step
        better = (step * (2 * slope - pull)).sum(over) > 0
        run.params = {key: torch.where(better.reshape(-1, 1), p, run.params[key]) for key, p in params.items()}
        values += step.mul_(better)
        self.error[run.positions] -= step
        slope -= pull.mul_(better)

    def _rescale_all(self) -> None:
        """The same for params that belong to the whole row or matrix."""
        whole = slice(0, len(self.target))
        codes = torch.cat([run.codes for run in reversed(self.runs)])
        run = Run(whole, self.objective.columns, self.runs[0].params, codes)
        within = self.objective.rows(whole)
        self._rescale(run, self.target - self.error, within @ self.error, within)
        for part in self.runs:
            part.params = run.params

    def _values(self, run: Run, params: Params) -> Tensor:
        """What a run's codes stand for, [C, N]."""
        return self.format.decode_at(run.codes, self._of_columns(run, params))

    def _of_columns(self, run: Run, params: Params) -> Params:
        columns = run.columns % self.format.span if self.grouped else run.columns  # type: ignore[operator]
        return at_positions(self.format, params, columns)


@dataclass(frozen=True)
class FastGPTQ(GPTQ):
    """What most tools call GPTQ: one measurement of the block as it was, and the columns once."""

    sweeps: int = 0
    in_sequence: bool = False

    summary: ClassVar[str] = (
        "gptq measured once a block and without its refinements: less than half the time, less good"
    )
    wants: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "gptq-fast"


def _correction(
    objective: Objective, factors: Factors, drift: Tensor, scatter: float, tokens: float, free: float
) -> Tensor:
    """What brings the outputs for these inputs near the original's for its own, [K, N] in the order of solving.

    drift [N, K]; scatter: summed over the rows; free: coefficients of the regression.
    """
    drift = drift.float().T[objective.columns]
    change = factors.solve_(drift.clone())
    along, size = float(change.flatten() @ drift.flatten()), float(change.norm()) ** 2
    explained = along - objective.damping * size  # tr(Δ·H·Δᵀ)
    left = scatter - 2 * along + explained
    if tokens <= free or explained <= 0:
        return torch.zeros_like(change)
    spurious = free * left / (tokens - free)
    return change.mul_(max(0.0, 1 - spurious / explained))


def _rows(matrices: Sequence[Tensor], rows: slice) -> Tensor:
    """Rows of matrices that are thought of as on top of each other; copied only where they are of several."""
    parts, above = list[Tensor](), 0
    for w in matrices:
        part = w[max(0, rows.start - above) : max(0, rows.stop - above)]
        parts += [part] if len(part) else []
        above += len(w)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _first(q: QTensor, rows: int) -> QTensor:
    return QTensor(q.format, q.codes[:rows], {key: p[:rows] for key, p in q.params.items()})


def _divided(slabs: list[QTensor], heights: list[int]) -> list[QTensor]:
    """Matrices of these heights from slabs of rows; one whose params are not by rows is a slab and a matrix."""
    if len(slabs) == len(heights) == 1:
        return slabs
    codes = torch.cat([q.codes for q in slabs]).split(heights)
    params = {key: torch.cat([q.params[key] for q in slabs]).split(heights) for key in slabs[0].params}
    format = slabs[0].format
    return [
        QTensor(format, codes[i].clone(), {key: p[i].clone() for key, p in params.items()}) for i in range(len(heights))
    ]


def _stacked(experts: list[QTensor]) -> QTensor:
    params = {key: torch.stack([q.params[key] for q in experts]) for key in experts[0].params}
    return QTensor(experts[0].format, torch.stack([q.codes for q in experts]), params)


GPTQS = (GPTQ(), FastGPTQ())
