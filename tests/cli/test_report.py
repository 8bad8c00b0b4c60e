"""`fewbits report`: files, JSON, exit codes, and what it does not overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.cli import main

QUICK = ("--no-speed", "--windows", "2", "--length", "16")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def out(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made = tmp_path / "out"
    assert main(["quantize", str(llama), str(made), "--format", "int4-g32", "--no-verify"]) == 0
    capsys.readouterr()
    return made


def test_a_page_and_a_card(out: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(out), "--against", str(llama), "--markdown", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "mean KL divergence" in text
    assert "--base-model OWNER/NAME" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert f"fewbits quantize {llama} {out} --format int4-g32 --no-verify" in page
    assert f"fewbits report {out} --against {llama} --markdown" in page
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "fewbits quantize llama out --format int4-g32 --no-verify" in card
    assert main(["report", str(out), "--markdown", "--base-model", "me/llama", *QUICK]) == 0  # over its own files
    assert "base_model: me/llama" in (out / "README.md").read_text(encoding="utf-8")
    assert "--base-model OWNER/NAME" not in capsys.readouterr().out


def test_json_has_everything_that_was_gathered(out: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(out), "--to", str(tmp_path / "a.html"), "--json", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(tmp_path / "a.html")
    assert found["report"]["kind"] == "compressed-tensors"
    assert found["report"]["predictions"] is None
    assert "--against" in found["report"]["missing"]["predictions"]
    assert not (out / "report.html").exists()


def test_files_of_others_are_left_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "README.md").write_text("# Mine\n")
    assert main(["report", str(out), "--markdown", *QUICK]) == 3
    assert "no report wrote it" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "# Mine\n"
    assert not (out / "report.html").exists()
    (out / "report.html").write_text("<p>mine")
    assert main(["report", str(out), *QUICK]) == 3


def test_a_failed_proof_is_written_and_is_exit_code_1(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["report", str(out), *QUICK]) == 1
    assert "not as meant" in capsys.readouterr().out
    assert "not as meant" in (out / "report.html").read_text(encoding="utf-8")


def test_a_picture_without_a_browser_is_refused_at_once(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["report", str(out), "--png", *QUICK]) == 3
    assert "install" in capsys.readouterr().err
    assert not (out / "report.html").exists()


def test_beside_a_file(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    made = tmp_path / "a.gguf"
    assert main(["quantize", str(llama), str(made), "--format", "q4_0", "--no-verify"]) == 0
    assert main(["report", str(made), "--markdown", "--open", *QUICK]) == 0
    page = tmp_path / "a.report.html"
    assert shown == [page.as_uri()]
    assert "library_name: gguf" in (tmp_path / "a.README.md").read_text(encoding="utf-8")
