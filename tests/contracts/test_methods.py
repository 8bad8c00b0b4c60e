"""Every method of the registry keeps every promise of the methods room, on a format of each family."""

from __future__ import annotations

import pytest
from method_checks import CHECKS, ONE_OF_EACH

from fewbits.methods import METHODS, Solver

OF_ANY = ("description",)
"""Checks of every method; the others are of solvers, since a transform makes no codes."""
PROMISES = [
    (name, check) for name in METHODS for check in CHECKS if isinstance(METHODS[name], Solver) or check in OF_ANY
]


@pytest.mark.parametrize(("name", "check"), PROMISES)
def test_contract(name: str, check: str) -> None:
    CHECKS[check](METHODS[name])


def test_there_is_something_to_check() -> None:
    assert len(CHECKS) >= 6
    assert len(ONE_OF_EACH) >= 10
