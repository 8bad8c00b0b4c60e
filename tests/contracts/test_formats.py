"""Every format of the registry keeps every promise of the formats room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from format_checks import CHECKS

from fewbits.formats import FORMATS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FORMATS)
def test_contract(name: str, check: str) -> None:
    CHECKS[check](FORMATS[name])


def test_there_is_something_to_check() -> None:
    assert len(CHECKS) >= 15
    assert len(FORMATS) >= 90
