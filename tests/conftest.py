"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: its threads must not spin while several test processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: models and texts that are not part of the project")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of real trained models that are too large to ship; skips where it is missing."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_text() -> Path:
    """Folder of evaluation and calibration texts; skips where it is missing."""
    return _shared("text")
