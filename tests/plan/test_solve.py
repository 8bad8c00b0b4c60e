"""The knapsack: optimal, within its limit, the same at every call."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import UnsupportedError
from fewbits.plan.solve import GAP, fewest_bytes, frontier, smallest_divergence
from fewbits.plan.table import Option, Table, Unit, undominated

OPTIONS = st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-6, 10)), min_size=1, max_size=4)
TABLES = st.lists(OPTIONS, min_size=1, max_size=5).map(
    lambda units: Table(
        tuple(
            Unit(f"u{i}", (f"u{i}",), 1, tuple(Option(f"f{j}", *option) for j, option in enumerate(options)))
            for i, options in enumerate(units)
        ),
        fixed=7,
    )
)


def every_choice(table: Table) -> list[dict[str, str]]:
    names = [unit.name for unit in table.units]
    return [
        dict(zip(names, [option.format for option in options], strict=True))
        for options in product(*(unit.options for unit in table.units))
    ]


@settings(max_examples=60, deadline=None)
@given(TABLES, st.floats(0, 1))
def test_no_other_choice_within_the_size_is_better(table: Table, share: float) -> None:
    largest = max(map(table.nbytes, every_choice(table)))
    budget = round(table.smallest + share * (largest - table.smallest))
    found = smallest_divergence(table, budget)
    assert table.nbytes(found) <= budget
    best = min(table.divergence(c) for c in every_choice(table) if table.nbytes(c) <= budget)
    highest = max(option.divergence for unit in table.units for option in unit.options)
    assert table.divergence(found) <= best * (1 + 2 * GAP) + 1e-6 * highest * len(table.units)  # and HiGHS' tolerance


@settings(max_examples=60, deadline=None)
@given(TABLES, st.floats(0, 1))
def test_no_smaller_choice_is_as_good(table: Table, share: float) -> None:
    divergences = sorted(map(table.divergence, every_choice(table)))
    limit = divergences[0] + share * (divergences[-1] - divergences[0])
    found = fewest_bytes(table, limit)
    assert table.divergence(found) <= limit
    clearly = [table.nbytes(c) for c in every_choice(table) if table.divergence(c) <= limit * (1 - 1e-5)]
    assert all(table.nbytes(found) <= nbytes * (1 + 2 * GAP) for nbytes in clearly)


def test_of_a_thousand_units_the_same_at_every_call() -> None:
    """A table as large as that of a model of 70 billion weights (560 matrices) is solved, twice alike."""
    sizes = {"a": (2.6, 40.0), "b": (3.4, 12.0), "c": (4.5, 3.0), "d": (5.5, 0.8), "e": (6.6, 0.2)}
    units = tuple(
        Unit(
            f"u{i}",
            (f"u{i}",),
            1000 + i,
            tuple(Option(f, int((1000 + i) * b * 1000), d * (1 + i * 7919 % 97)) for f, (b, d) in sizes.items()),
        )
        for i in range(560)
    )
    table = Table(units, 0)
    budget = int(4.25 * 1000 * table.weights)
    found = smallest_divergence(table, budget)
    assert table.nbytes(found) <= budget
    assert found == smallest_divergence(table, budget)
    assert len(set(found.values())) > 1


def test_budgets_that_nothing_fits() -> None:
    table = Table((Unit("u", ("u",), 1, (Option("small", 100, 1.0), Option("large", 200, 0.5))),), 10)
    with pytest.raises(UnsupportedError, match=r"already take 0\.00 MB"):
        smallest_divergence(table, 109)
    with pytest.raises(UnsupportedError, match=r"expected to reach 0\.5"):
        fewest_bytes(table, 0.4)
    assert smallest_divergence(table, 110) == {"u": "small"}
    assert fewest_bytes(table, 0.5) == {"u": "large"}


def test_a_frontier_falls() -> None:
    options = (Option("a", 100, 1.0), Option("b", 150, 0.4), Option("c", 260, 0.1), Option("kept", 1000, 0.0))
    table = Table(tuple(Unit(f"u{i}", (f"u{i}",), 1, options) for i in range(6)), 0)
    choices = frontier(table, 8)
    divergences = [table.divergence(choice) for choice in choices]
    assert divergences == sorted(divergences, reverse=True)
    assert all("kept" not in choice.values() for choice in choices)  # it ends where nothing is kept


def test_undominated_options() -> None:
    kept = undominated([Option("a", 10, 1.0), Option("worse", 11, 1.0), Option("b", 12, 0.5), Option("same", 12, 0.7)])
    assert [option.format for option in kept] == ["a", "b"]
