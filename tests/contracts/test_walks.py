"""CONTRIBUTING.md's walks, carried out word for word on a copy of the package: one file, one line, and it is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_model

ROOT = Path(__file__).resolve().parents[2]
WALKS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(section: str, language: str) -> list[tuple[str, str]]:
    """(path, text) of the section's code blocks, each of which names its file in its first line."""
    text = WALKS.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n# (\S+)\n(.*?)```", text, re.DOTALL)


def carry_out(section: str, copy: Path) -> None:
    """Write the section's file into a copy of the package, and change its registry as the diff says."""
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (new,), (registry,) = blocks(section, "python"), blocks(section, "diff")
    path, text = new
    (copy / Path(path).relative_to("src")).write_text(text, encoding="utf-8")
    path, text = registry
    target = copy / Path(path).relative_to("src")
    for sign, line, added in re.findall(r"^([ -])(.*)\n\+(.*)$", text, re.MULTILINE):
        before = target.read_text(encoding="utf-8")
        assert before.count(f"{line}\n") == 1, f"{path} has no line {line!r}"
        kept = f"{line}\n" if sign == " " else ""
        target.write_text(before.replace(f"{line}\n", f"{kept}{added}\n"), encoding="utf-8")


# An editable installation's finder comes before PYTHONPATH.
FROM_THE_COPY = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]"


def run(copy: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "160"}
    environment.pop("PYTEST_ADDOPTS", None)
    found = subprocess.run(
        [sys.executable, "-c", f"{FROM_THE_COPY}\n{code}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def contract_tests(copy: Path, file: str, name: str) -> str:
    arguments = ["-q", "-p", "no:cacheprovider", f"tests/contracts/{file}", "-k", name]
    return run(copy, f"import pytest; sys.exit(pytest.main({arguments}))")


def commands(copy: Path, *lines: str) -> str:
    """What these commands of the copy print."""
    calls = "; ".join(f"assert main({line.split()}) == 0" for line in lines)
    return run(copy, f"from fewbits.cli import main; {calls}")


def test_add_a_format(tmp_path: Path) -> None:
    copy = tmp_path / "src"
    carry_out("Add a format", copy)
    passed = re.search(r"(\d+) passed", contract_tests(copy, "test_formats.py", "pow2"))
    assert passed is not None
    assert int(passed[1]) >= 2 * 15
    shown = commands(copy, "explain pow2-g32", "formats pow2* --all", "explain 0.3 --format pow2-g32 --range 1")
    assert "4.5 with its share of the scales" in shown
    assert "pow2-g128" in shown
    assert "0.3 / 1 = 0.3 → nearest level 0.25, code 2" in shown


def test_add_a_method(tmp_path: Path) -> None:
    copy = tmp_path / "src"
    carry_out("Add a method", copy)
    passed = re.search(r"(\d+) passed", contract_tests(copy, "test_methods.py", "shrink"))
    assert passed is not None
    assert int(passed[1]) >= 6
    assert "least absolute error" in commands(copy, "methods")


LOGITS = """
from pathlib import Path
import numpy as np
from fewbits.engine.composing import compose
from fewbits.runtime.reference import ReferenceRunner
program = compose(Path("{folder}"), lambda weight: weight).program
tokens, rows = np.arange(5, 25, dtype=np.int32), np.arange(20, dtype=np.int32)
print(ReferenceRunner(program, 1, 32, "f32", exact=True).forward(tokens, 0 * rows, rows, rows).tolist())
"""


def test_add_a_family(tmp_path: Path) -> None:
    """Its logits are those of transformers, within what test_families derives for a model of this size."""
    kinds = ["sliding_attention", "full_attention"]
    model = save_model(tmp_path / "cwm", "cwm", sliding_window=6, layer_types=kinds, head_dim=8)
    carry_out("Add a family", tmp_path / "src")
    found = np.array(json.loads(run(tmp_path / "src", LOGITS.format(folder=tmp_path / "cwm"))))
    with torch.no_grad():
        expected = model(torch.arange(5, 25)[None]).logits[0].numpy()
    assert np.abs(found - expected).max() <= 20 * 64**0.5 * 2.0**-24 * np.abs(expected).max()


@pytest.mark.parametrize("section", ["Add a format", "Add a method", "Add a family"])
def test_the_files_of_the_walks_are_clean(section: str, tmp_path: Path) -> None:
    """They pass the project's own checks, as they would once they are in it."""
    (path, text), *_ = blocks(section, "python")
    file = tmp_path / Path(path).name
    file.write_text(text, encoding="utf-8")
    for check in (["check", "--quiet"], ["format", "--diff", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(file)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr
