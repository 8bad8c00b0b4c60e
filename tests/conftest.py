"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: its threads must not spin while several test processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """README's commands first: one test that takes minutes, while other processes go through the rest."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: models and texts that are not part of the project")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Repacked weights that cannot lie beside their checkpoint go into a folder of the tests', not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of real trained models that are too large to ship; skips where it is missing."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_text() -> Path:
    """Folder of evaluation and calibration texts; skips where it is missing."""
    return _shared("text")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that nothing may write into.

    Hidden 128, ffn 192: groups of 128 do not divide the latter, groups of 64 and 32 do.
    """
    from tiny import save_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    return folder


@pytest.fixture
def mutable(llama: Path, tmp_path: Path) -> Path:
    """A copy of that model to damage."""
    return Path(shutil.copytree(llama, tmp_path / "mutable"))
