"""`fewbits convert` from the command line: tables for people, JSON for machines, refusals with exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fewbits
from fewbits.cli import main

TINY = str(Path(fewbits.__file__).parent / "bundled" / "tiny")
TEXT = str(Path(__file__).parents[2] / "ARCHITECTURE.md")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("convert") / "tiny.gguf"
    fewbits.quantize(TINY, out, format="q4_0", prove=False)
    return str(out)


def test_converted_shown_and_verified(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", source, out, "--to", "compressed-tensors"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["q4_0", "int4-g32", "28", "1.769", "MB", "1.769", "MB", "the", "same"] in rows
    assert "every number of all 38 tensors is the source's, verified with compressed-tensors" in shown
    assert main(["verify", out, "--against", source, "--no-logits"]) == 0
    assert "proven 38 tensors" in capsys.readouterr().out
    assert main(["inspect", out]) == 0


def test_rounded_as_json(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["convert", source, str(tmp_path / "out"), "--to", "bitsandbytes"]
    assert main(given) == 3
    assert "--allow-rounding, which says what it changes" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
    assert main([*given, "--allow-rounding", "--text", TEXT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rounded = [tensor for tensor in found["tensors"] if tensor["error"] is not None]
    assert len(rounded) == 28
    assert found["divergence"]["mean_kld"]["value"] > 0
    assert main(["convert", source, str(tmp_path / "other"), "--to", "bitsandbytes", "--allow-rounding",
                 "--text", TEXT]) == 0  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "rounded, error" in shown
    assert "KL divergence from" in shown
    assert "every number of 10 tensors is the source's, 28 are rounded" in shown


def test_wrong_usage(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", source, str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert main(["convert", TINY, str(tmp_path / "out"), "--to", "gptq"]) == 3
    assert "fewbits quantize" in capsys.readouterr().err
