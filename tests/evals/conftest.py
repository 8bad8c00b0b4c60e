"""A small real model, and a copy of it that is a little damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def stories(shared_models) -> Path:
    return shared_models / "stories260K"


@pytest.fixture(scope="session")
def damaged(stories, tmp_path_factory) -> Path:
    """stories260K with noise on every matrix, a tenth of its standard deviation."""
    folder = tmp_path_factory.mktemp("damaged")
    for file in stories.iterdir():
        shutil.copyfile(file, folder / file.name)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for w in tensors.values():
        if w.dim() == 2:
            w.add_(0.1 * w.std() * torch.randn(w.shape, generator=generator))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
