"""Every method of the registry keeps every promise of the methods room, on a format of each family."""

from __future__ import annotations

import pytest
from method_checks import CHECKS, ONE_OF_EACH

from fewbits.methods import METHODS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, check: str) -> None:
    CHECKS[check](METHODS[name])


def test_there_is_something_to_check() -> None:
    assert len(CHECKS) >= 6
    assert len(ONE_OF_EACH) >= 10
