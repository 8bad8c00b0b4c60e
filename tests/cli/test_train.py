"""`fewbits train`: its curve, and that a verb's result can be printed and read by machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_model

import fewbits
from fewbits.cli import main
from fewbits.cli._curve import curve
from fewbits.engine import load
from fewbits.results import LossPoint

TINY = str(Path(fewbits.__file__).parent / "bundled" / "tiny")
TEXT = str(Path(__file__).parents[2] / "ARCHITECTURE.md")


def test_a_curve_by_hand() -> None:
    drawn = curve([LossPoint(0, None, 1.0), LossPoint(50, 0.1, None), LossPoint(100, 0.01, 0.02)], 40).splitlines()
    rows, ruler = drawn[:12], drawn[13]
    assert rows[0].startswith("     1 ┤o")
    assert rows[-1].startswith("  0.01 ┤")
    assert rows[-1].endswith("·")
    assert len(rows[-1]) == 8 + 31  # the last step is at the right end
    assert sum(row.count("o") for row in rows) == 2
    assert sum(row.count("·") for row in rows) == 2
    assert ruler.split() == ["0", "100"]


def test_too_little_for_a_curve() -> None:
    assert curve([], 80) == ""
    assert curve([LossPoint(3, 0.5, 0.5)], 80) == ""
    flat = curve([LossPoint(1, 0.5, None), LossPoint(2, 0.5, None)], 80)
    assert flat.count("·") == 3  # the key's among them


def test_qat_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "qat", TINY, str(tmp_path / "out"), "--format", "int3-g64", "--data", TEXT]
    how = ["--steps", "2", "--window", "32", "--batch", "2", "--start", "rtn", "--rate", "0.001", "--free-rate", "0"]
    assert main([*arguments, *how, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["format"], found["start"]) == (2, "int3-g64", "rtn")
    assert found["verified_with"]
    assert main(["verify", str(tmp_path / "out"), "--against", TINY]) == 0
    norms = [load(path).model.norm.weight for path in (tmp_path / "out", TINY)]
    assert torch.equal(*norms), "at a free rate of 0 only matrices move"


def test_qlora_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "It was a dark night."}\n\n{"text": "The rain fell."}\n{"text": "Nobody came."}\n')
    arguments = ["train", "qlora", TINY, str(tmp_path / "adapter"), "--data", str(data), "--base", "int4-g64"]
    assert main([*arguments, "--steps", "2", "--window", "16", "--batch", "1", "--rank", "2"]) == 0
    shown = capsys.readouterr()
    assert "weights trained on a base in int4-g64" in shown.out
    assert "1 empty lines were passed over: lines 2" in shown.out
    assert "1 empty lines were passed over" in shown.err


def test_a_length_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "qat", TINY, str(tmp_path / "out"), "--format", "int3-g64", "--data", TEXT]
    for length in (["--steps", "0"], ["--minutes", "0"], ["--minutes", "-1"]):
        assert main([*arguments, *length]) == 3
        assert "give it more than 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_formats_that_a_model_does_not_fit_are_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of 256 in a model with 192 channels: matrices that are no multiple of that get Q4_0, as in llama.cpp."""
    save_model(tmp_path / "model", "llama", hidden_size=192, intermediate_size=512)
    arguments = ["train", "qat", str(tmp_path / "model"), str(tmp_path / "out.gguf"), "--format", "tq2_0"]
    short = ["--data", TEXT, "--steps", "1", "--window", "32", "--batch", "1", "--start", "rtn", "--no-verify"]
    assert main([*arguments, *short]) == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "more: q4_0 instead of tq2_0: tq2_0: in_features 192 is not a multiple" in " ".join(text.split())
    assert "note: blk.0.attn_k.weight and 11 more: q4_0 instead" in shown.err


def test_ternary_for_transformers_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = ["train", "qat", TINY, out, "--format", "ternary-tensor", "--as", "bitnet", "--data", TEXT]
    assert main([*arguments, "--steps", "2", "--window", "32", "--batch", "2", "--start", "rtn"]) == 0
    shown = capsys.readouterr().out
    assert "inputs of 28 matrices are rounded to int8-token as the model runs" in shown
    assert "(bitnet), verified with transformers" in shown
    assert main(["verify", out, "--against", TINY]) == 0
    assert "transformers" in capsys.readouterr().out
    assert main(["generate", out, "--prompt", "It was", "--max-tokens", "3"]) == 0
