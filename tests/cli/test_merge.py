"""`fewbits merge` from the command line: a table for people, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fewbits
from fewbits.cli import main, merge
from fewbits.pipeline._merge_ways import WAYS

TINY = str(Path(fewbits.__file__).parent / "bundled" / "tiny")
TEXT = str(Path(__file__).parents[2] / "ARCHITECTURE.md")


def test_its_ways_are_the_pipelines() -> None:
    assert tuple(WAYS) == merge.NAMES


def test_trained_merged_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = str(tmp_path / "adapter"), str(tmp_path / "out")
    quick = ["--steps", "2", "--window", "16", "--batch", "1", "--rank", "2"]
    assert main(["train", "qlora", TINY, adapter, "--data", TEXT, "--base", "int4-g64", *quick]) == 0
    capsys.readouterr()
    assert main(["merge", TINY, adapter, out, "--format", "int4-g64", "--way", "round", "--text", TEXT]) == 0
    shown = capsys.readouterr().out
    assert "→  round" in shown
    assert "divergence from the base (int4-g64) with its adapter" in shown
    assert main(["merge", TINY, adapter, f"{out}2", "--way", "adapter", "--text", TEXT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ways"][0]["kld"]["value"] < 1e-6
    assert main(["inspect", f"{out}2"]) == 0
    assert "an adapter inside" in capsys.readouterr().out
