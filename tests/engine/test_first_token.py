"""The process that opens a checkpoint for one token: the token is the engine's, and memory is told apart."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import fewbits
from fewbits.engine import Engine
from fewbits.engine.first_token import in_memory

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"


def test_the_first_token_and_memory(tmp_path: Path) -> None:
    """All weights are in memory once a prompt has run: at least FP16's two bytes each, at most the whole file."""
    tiny = Path(shutil.copytree(TINY, tmp_path / "tiny"))
    (expected,) = Engine(tiny, threads=1).stream([5, 17, 3], max_tokens=1, temperature=0)
    asked = [str(tiny), "--tokens", "5", "17", "3", "--prompt-tokens", "24", "--threads", "1", "--context", "32"]
    command = [sys.executable, "-m", "fewbits.engine.first_token", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    token, memory = done.stdout.splitlines()
    assert int(token) == expected.token
    found = json.loads(memory)
    if found["weights"] is not None:
        mapped = (tiny / ".fewbits-tiles").stat().st_size
        assert 2 * 3_900_000 < found["weights"] <= mapped + 4096
        assert found["other"] > 1e7


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="the system does not tell")
def test_other_files_are_other_memory(tmp_path: Path) -> None:
    gc.collect()  # engines of other tests, whose weights would leave meanwhile
    before = in_memory()["weights"]
    held = {}
    for name in ("model.fewbits-tiles", "model.bin"):
        np.ones(1 << 20, np.uint8).tofile(tmp_path / name)
        held[name] = np.memmap(tmp_path / name, np.uint8, "r")
        assert held[name].sum() == 1 << 20
    assert before is not None
    assert in_memory()["weights"] == before + (1 << 20)
