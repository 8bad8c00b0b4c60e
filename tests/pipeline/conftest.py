"""Small random models, one for all tests of this room: nothing may write into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_model


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one matrix for embeddings and output projection."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    save_model(folder, "llama", tie_word_embeddings=True, hidden_size=128, intermediate_size=192)
    return folder
