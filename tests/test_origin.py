"""The command that runs, and versions."""

from __future__ import annotations

import shlex

import pytest

from fewbits import origin


def test_a_command_is_known_while_it_runs() -> None:
    assert origin.command() is None
    with origin.running(["quantize", "a model", "out"]):
        assert shlex.split(origin.command() or "") == ["fewbits", "quantize", "a model", "out"]
    with pytest.raises(ZeroDivisionError), origin.running([]):
        _ = 1 / 0
    assert origin.command() is None


def test_versions_have_what_results_depend_on() -> None:
    found = origin.versions()
    assert {"Python", "fewbits", "torch", "system", "processor"} <= found.keys()
    assert all(found.values())
