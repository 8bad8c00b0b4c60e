"""What the server's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import CHATML, folder_with


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template that has a place for tools."""
    return folder_with(CHATML, tmp_path_factory.mktemp("chatty") / "m")
