"""Small random models, one for all tests of this room: nothing may write into them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import save_model

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 128, ffn 192: groups of 128 do not divide it, groups of 64 and 32 do."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, "llama", **SHAPE)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tied"
    save_model(folder, "llama", tie_word_embeddings=True, **SHAPE)
    return folder


@pytest.fixture
def mutable(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(llama, tmp_path / "mutable"))
