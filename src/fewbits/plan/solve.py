"""The best choice within a budget: a multiple-choice knapsack problem, solved to optimality.

    minimize Σ divergence   subject to   one option a unit,  Σ bytes ≤ budget

or the other way round, the fewest bytes within a divergence. HiGHS, as scipy ships it, proves the optimum by branch and
bound; the linear relaxation leaves at most two units undecided, so there is little to branch on. Options that no budget
would take are left out first. The result depends on the table alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from fewbits.errors import UnsupportedError
from fewbits.plan.table import Option, Table, Unit, undominated

Choice = dict[str, str]
"""Unit -> format."""

Measure = Callable[[Option], float]

GAP = 1e-6
"""Relative distance from the optimum at which the search ends: measured divergences are far less certain."""

TRIES = 8
"""Tightenings of a limit, before the smallest formats are taken: near them rounding may hide every other choice."""


def smallest_divergence(table: Table, budget: int) -> Choice:
    """The formats with the least expected divergence whose file takes at most `budget` bytes.

    Raises UnsupportedError if the smallest ones take more.
    """
    if budget < table.smallest:
        raise UnsupportedError(
            f"a budget of {budget / 1e6:.2f} MB: the smallest formats already take {table.smallest / 1e6:.2f} MB; "
            "allow more, or a smaller model"
        )
    return _solved(table.units, minimized=_divergence, limited=_nbytes, limit=float(budget - table.fixed))


def fewest_bytes(table: Table, limit: float) -> Choice:
    """The formats that take the fewest bytes with an expected divergence of at most `limit` nats a token.

    Raises UnsupportedError if the best ones are further away.
    """
    best = sum(min(option.divergence for option in unit.options) for unit in table.units)
    if limit < best:
        raise UnsupportedError(
            f"a divergence of at most {limit:g} nats a token: the largest formats are expected to reach {best:.3g}; "
            "allow more"
        )
    return _solved(table.units, minimized=_nbytes, limited=_divergence, limit=limit)


def frontier(table: Table, points: int) -> list[Choice]:
    """The best choices at `points` sizes, spread evenly from the smallest to where nothing is kept as it was."""
    sizes = np.linspace(table.smallest, max(table.smallest, table.finest), points)
    return [smallest_divergence(table, int(size)) for size in sizes]


def _nbytes(option: Option) -> float:
    return float(option.nbytes)


def _divergence(option: Option) -> float:
    return option.divergence


def _solved(units: Sequence[Unit], *, minimized: Measure, limited: Measure, limit: float) -> Choice:
    """The choice with the least sum of one measure and at most `limit` of the other.

    The solver keeps limits to its own tolerance, a millionth; what is past one is asked for again with a tighter one.
    """
    options = [undominated(unit.options) for unit in units]
    tightest = [min(each, key=limited) for each in options]
    aim = limit
    for _ in range(TRIES):
        chosen = _optimum(options, minimized, limited, aim)
        if chosen is None:
            break
        excess = sum(map(limited, chosen)) - limit
        if excess <= 0:
            return {unit.name: option.format for unit, option in zip(units, chosen, strict=True)}
        aim -= 2 * excess
    return {unit.name: option.format for unit, option in zip(units, tightest, strict=True)}


def _optimum(
    options: Sequence[Sequence[Option]], minimized: Measure, limited: Measure, limit: float
) -> list[Option] | None:
    """One option of each; None where no choice keeps the limit."""
    flat = [option for each in options for option in each]
    owner = np.repeat(np.arange(len(options)), [len(each) for each in options])
    cost, weight = (np.array([of(option) for option in flat]) for of in (minimized, limited))
    once = csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(options), len(flat)))
    scale = limit if limit > 0 else 1.0  # rows of numbers near 1, as the solver's tolerances expect
    with _stdout_to_stderr():
        found = milp(
            cost / max(cost.max(), np.finfo(float).tiny),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(weight[None] / scale, -np.inf, limit / scale)],
            options={"mip_rel_gap": GAP},
        )
    return None if found.x is None else [flat[i] for i in np.flatnonzero(found.x > 0.5)]


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS now and then prints a line of its own, and stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
