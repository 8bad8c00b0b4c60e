"""bench: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fewbits
from fewbits.cli import main
from fewbits.evals import speed
from fewbits.runtime.compiled import compiled

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
RECORDED = Path(__file__).parents[1] / "evals" / "llama_bench.json"
SMALL = ("--prompt-tokens", "16", "--new-tokens", "2", "--runs", "1", "--sequences", "1,2", "--threads", "1")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(speed, "READ", 1 << 22)
    monkeypatch.setenv("COLUMNS", "160")
    return str(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def peer(tmp_path: Path) -> tuple[str, ...]:
    """Options for a program that prints what llama-bench once did."""
    program, model = tmp_path / "bench.sh", tmp_path / "model.gguf"
    program.write_text(f"#!/bin/sh\ncat {RECORDED}\n")
    program.chmod(0o755)
    model.touch()
    return "--against", f"llama-bench:{model}", "--llama-bench", str(program)


@pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")
def test_a_table(tiny: str, peer: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each figure, the peer's two beside ours, one line on stderr for each round."""
    assert main(["bench", tiny, *SMALL, *peer]) == 0
    seen = capsys.readouterr()
    lines = seen.out.splitlines()
    assert lines[0].startswith(f"{tiny}   compiled kernels for")
    assert lines[0].endswith("1 thread")
    names = ["prefill, 16 tokens", "decode, 2 tokens", "decode, 2 sequences", "first token", "decode reads weights at"]
    names += ["keys and values"]
    for name in names:
        assert sum(line.startswith(name) for line in lines) == 1, name
    head = next(line for line in lines if "median" in line)
    assert head.split() == ["median", "least", "most", "llama-bench", "0c1e570", "ratio"]
    tests = json.loads(RECORDED.read_text())
    for name, test in (("prefill, 16", tests[0]), ("decode, 2 tokens", tests[1])):
        line = next(line for line in lines if line.startswith(name))
        assert line.split()[-2] == f"{test['avg_ts']:.0f}"
        assert line.endswith("×")
    assert seen.err.startswith("round 1 of 1: prefill")


def test_one_json_object(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt_tokens"], found["new_tokens"], found["runs"], found["kv"]) == (16, 2, 1, "f16")
    assert found["prefill"]["least"] <= found["prefill"]["median"] <= found["prefill"]["most"]
    assert found["together"][0]["sequences"] == 2
    assert found["peer"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "12"), "the prompt has 16 tokens, and the context holds 12"),
        (("--prompt-tokens", "2000"), "made for 1024 tokens, and a context of 2000 was asked for"),
        (("--against", "llama-bench:model.gguf", "--llama-bench", "/nowhere"), "not a program at /nowhere; build it"),
    ],
)
def test_what_is_refused(tiny: str, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SMALL, *options]) == 3
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options",
    [
        ("--against", "model.gguf"),
        ("--llama-bench", "program"),
        ("--sequences", "1,many"),
        ("--against", "llama-bench:"),
    ],
)
def test_wrong_usage(tiny: str, options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["bench", tiny, *options])
    assert usage.value.code == 2
