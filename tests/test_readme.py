"""The README's commands work as they stand there, and it tells the truth about the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.formats import FORMATS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUNDLED = Path(fewbits.__file__).parent / "bundled" / "tiny"


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for found, text in fenced if found == language]


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `fewbits` is this one, and nothing is kept."""
    scripts = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "FEWBITS_CACHE": str(tmp_path / "cache")}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_commands(tmp_path: Path, shell: dict[str, str]) -> None:
    (script,) = blocks("sh")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")  # a text that lies where the commands are run
    out = run(["bash", "-eux", "-c", script.replace("src/fewbits/bundled/tiny", str(BUNDLED))], tmp_path, shell)
    assert "proven" in out
    assert "mean KL divergence" in out
    assert "0.7402" in out


def test_the_python(tmp_path: Path, shell: dict[str, str]) -> None:
    (script,) = blocks("python")
    script = script.replace("src/fewbits/bundled/tiny", str(BUNDLED))
    out = run([sys.executable, "-c", script], tmp_path, shell)
    assert re.search(r"KL divergence 0\.0\d+ ± 0\.0\d+", out)
    assert "4.5" in out


def test_make_demo_and_make_test(tmp_path: Path, shell: dict[str, str]) -> None:
    """What the two commands run, once .venv is there; setting that up is what a fresh machine does before the tests."""
    demo = run(["make", "--dry-run", "demo"], ROOT, shell)
    assert ".venv/bin/python -m fewbits demo" in demo.splitlines()
    assert "pytest" in run(["make", "--dry-run", "test"], ROOT, shell)
    out = run([sys.executable, "-m", "fewbits", "demo"], tmp_path, shell)
    for format in ("original", "int8", "int4-g32", "int3-g32", "int2-g32"):
        assert out.count(format) >= 2, out  # in the table and with its sentence


def test_the_tree_names_every_room() -> None:
    tree = next(block for block in blocks("") if block.startswith("src/fewbits/"))
    rooms = {p.name for p in (ROOT / "src" / "fewbits").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(re.findall(r"^  (\w+)/", tree, flags=re.M)) == rooms


def test_formats_in_the_tables_exist() -> None:
    named = re.findall(r"^\| ([a-z]+\d[\w-]*)", README, flags=re.M)
    assert named
    assert set(named) <= FORMATS.keys()


def test_the_bundled_model_is_small() -> None:
    """At most 8 MB in FP16, every in_features a multiple of 256 so that each block format fits."""
    _, reader = open_checkpoint(BUNDLED)
    assert 2 * sum(entry.weights for entry in reader.entries.values()) <= 8e6
    assert all(e.shape[-1] % 256 == 0 for e in reader.entries.values())
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 10e6
