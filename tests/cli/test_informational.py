"""explain, memory, formats, methods: what they print, as tables and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from fewbits.cli import VERBS, main
from fewbits.formats import FORMATS


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in 160 columns and returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def as_json(run: Any) -> Any:
    """Runs a command with --json and returns its object."""

    def call(*argv: str) -> Any:
        code, out, _ = run(*argv, "--json")
        assert code == 0
        assert out.count("\n") == 1
        return json.loads(out)

    return call


# explain FORMAT


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_explains_itself(run: Any, name: str) -> None:
    code, out, err = run("explain", name)
    assert (code, err) == (0, "")
    assert out.startswith(name)
    assert FORMATS[name].summary in out
    assert "\x1b" not in out
    assert all(len(line) <= 160 and line == line.rstrip() for line in out.splitlines())


def test_explain_int8(as_json: Any) -> None:
    found = as_json("explain", "int8")
    assert found["cells"] == "SIIIIIII"
    assert (found["lowest"], found["highest"], found["smallest_step"], found["largest_step"]) == (-128, 127, 1, 1)
    assert found["group"] == "row"
    assert len(found["levels"]) == 256


def test_explain_lists_sixteen_levels(run: Any) -> None:
    _, out, _ = run("explain", "nf4")
    assert "−1  −0.6962  −0.5251" in out
    assert "┼────────┼─────┼───┼──┼" in out  # 0.3038 and 0.4749 of 2 along 64 columns: 9 and 15
    assert "4.5 with its share of the scales" in out


@pytest.mark.parametrize(
    ("name", "highest", "epsilon", "smallest"),
    [
        ("fp32", (2 - 2**-23) * 2.0**127, 2**-23, 2.0**-149),
        ("fp16", 65504, 2**-10, 2**-24),
        ("bf16", 3.3895313892515355e38, 2**-7, 2.0**-133),
    ],
)
def test_explain_floats(as_json: Any, name: str, highest: float, epsilon: float, smallest: float) -> None:
    found = as_json("explain", name)
    assert (found["highest"], found["epsilon"], found["smallest_step"]) == (highest, epsilon, smallest)
    assert found["group"] is None


def test_explain_shows_numbered_cells(run: Any) -> None:
    _, out, _ = run("explain", "fp8-e4m3")
    lines = [line.split() for line in out.splitlines()]
    assert lines[2:4] == [list("76543210"), list("SEEEEMMM")]
    assert lines[4] == ["S", "sign", "E", "exponent", "M", "mantissa"]


# explain NUMBER


@pytest.mark.parametrize(
    ("argv", "level", "decoded", "error"),
    [
        (["0.74", "--format", "int8", "--range", "2.0"], 47, 94 / 127, 1.6e-4),
        (["-0.74", "--format", "int8", "--range", "2.0"], -47, -94 / 127, 1.6e-4),
        (["-7.4e-1", "--format", "int8", "--range", "-2", "2"], -47, -94 / 127, 1.6e-4),
        (["3.1415", "--format", "int8", "--range", "127"], 3, 3.0, 0.1416),
        (["-0.74", "--format", "int8-asym", "--range", "-1.0", "3.0"], 17, -47 * 4 / 255, 2.8e-3),
        (["5", "--format", "int8", "--range", "2"], 127, 2.0, 3.0001),
        (["0.3", "--format", "mxfp4", "--range", "2"], 0.5, 0.25, 0.051),
        (["0.3", "--format", "nvfp4", "--range", "2"], 1.0, 1 / 3, 0.034),
        (["0.32", "--format", "nf4", "--range", "2"], 0.16093020141124725, 0.3218604, 2e-3),
        (["-300", "--format", "fp8-e4m3", "--range", "448"], -288, -288, 12.1),
        (["0.9", "--format", "ternary-g64", "--range", "2"], 1, 64 / 63, 0.12),
        (["-0.1", "--format", "binary-g64", "--range", "2"], -1, -64 / 63, 0.92),
        (["1.0", "--format", "q4_0", "--range", "-3", "8"], -1, 1.0, 1e-9),
        (["0.5", "--format", "q5_1", "--range", "-1", "14.5"], 3, 0.5, 1e-9),
        (["0.5", "--format", "q8_0", "--range", "127"], 0, 0.0, 0.51),
        (["0", "--format", "int4"], 0, 0.0, 1e-9),
    ],
)  # fmt: skip
def test_a_number_goes_through(as_json: Any, argv: list[str], level: float, decoded: float, error: float) -> None:
    found = as_json("explain", *argv)
    assert found["level"] == pytest.approx(level, abs=1e-6)
    assert found["decoded"] == pytest.approx(decoded, rel=5e-4)  # scales are FP16 in some
    assert found["error"] == found["decoded"] - found["value"]
    assert abs(found["error"]) < error
    assert found["factor"] * found["level"] + found["offset"] == pytest.approx(found["decoded"], abs=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", ["-0.74", "0"])
def test_every_format_takes_a_number_through(run: Any, name: str, value: str) -> None:
    code, out, _ = run("explain", value, "--format", name)
    assert code == 0
    assert all(stage in out for stage in ("1 calibrate", "2 scale", "3 quantize", "4 dequantize"))


def test_the_arithmetic_is_written_out(run: Any) -> None:
    _, out, _ = run("explain", "0.74", "--format", "int8", "--range", "2.0")
    assert "scale = 2 / 127 = 0.01575" in out
    assert "0.74 / 0.01575 = 46.99 → nearest level 47" in out
    assert "0.01575 · 47 = 0.7402" in out
    _, out, _ = run("explain", "-0.74", "--format", "int8-asym", "--range", "-1", "3")
    assert "scale = (3 − (−1)) / 255 = 0.01569; zero = round(1 / 0.01569) = 64" in out
    assert "−0.74 / 0.01569 + 64 = 16.83 → nearest level 17" in out
    assert "0.01569 · (17 − 64) = −0.7373" in out


def test_a_negative_scale_is_told_from_a_positive_one(as_json: Any) -> None:
    """Q4_0 points its code without a mirror image at the weight of largest magnitude, here +8."""
    assert as_json("explain", "1", "--format", "q4_0", "--range", "-3", "8")["factor"] == pytest.approx(-1)
    assert as_json("explain", "1", "--format", "q4_0", "--range", "-8", "3")["factor"] == pytest.approx(1)


def test_pi_as_float32(as_json: Any, run: Any) -> None:
    found = as_json("explain", "3.1415", "--format", "fp32")
    assert 0 < found["relative_error"] < 6e-8  # half of 2⁻²³
    assert found["bits"] == "01000000010010010000111001010110"
    assert "+ 2^1 · 1.57075" in run("explain", "3.1415", "--format", "fp32")[1]


# memory


def by_format(found: Any) -> dict[str, Any]:
    return {row["format"].split("-")[0]: row for row in found["rows"]}


def test_memory_of_seven_billion_weights(as_json: Any) -> None:
    rows = by_format(as_json("memory", "7B"))
    known = {"fp32": 28, "fp16": 14, "bf16": 14, "int4": 3.5, "q8_0": 7, "nf4": 3.5, "q4_0": 3.5}
    assert {name: rows[name]["weights"] for name in known} == {name: gb * 1e9 for name, gb in known.items()}
    assert as_json("memory", "7B", "--all")["rows"][9]["weights"] == 7e9
    assert rows["q4_0"]["scales"] == 7e9 / 32 * 2
    assert rows["fp16"]["scales"] == 0


def test_memory_of_seventy_billion_weights(as_json: Any) -> None:
    found = as_json("memory", "70b", "--context", "1000", "--batch", "3")
    rows = by_format(found)
    assert (rows["fp16"]["weights"], rows["int4"]["weights"]) == (140e9, 35e9)
    assert found["architecture"] == "Llama-3.1-70B"
    assert found["kv_fp16"] == 2 * 80 * 8 * 128 * 1000 * 3 * 2 == 2 * found["kv_int8"]
    assert rows["int4"]["total"] == rows["int4"]["weights"] + rows["int4"]["scales"] + found["kv_fp16"]
    assert rows["fp16"]["fits"] == []
    assert rows["int4"]["fits"] == [64, 80]


def test_memory_lists_each_family_once(as_json: Any) -> None:
    short, everything = as_json("memory", "1.5B")["rows"], as_json("memory", "1.5B", "--all")["rows"]
    assert [row["format"] for row in everything] == list(FORMATS)
    assert {"int8", "int4-g128", "nf4", "q4_0"} <= {row["format"] for row in short}
    assert len(short) < 50


def test_memory_of_a_folder(as_json: Any, tmp_path: Path) -> None:
    import torch

    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 32), "model.norm.weight": torch.zeros(32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = as_json("memory", str(tmp_path), "--context", "100")
    assert found["parameters"] == 8 * 32 + 32
    assert found["kv_fp16"] == 2 * 2 * 4 * 8 * 100 * 2


def test_memory_of_a_real_folder(as_json: Any, shared_models: Path) -> None:
    found = as_json("memory", str(shared_models / "books"))
    assert found["parameters"] == pytest.approx(11.5e6, rel=0.01)
    assert found["kv_int8"] == 2 * 4 * 4 * 64 * 8192


def test_memory_prints_a_table(run: Any) -> None:
    code, out, _ = run("memory", "7B")
    assert code == 0
    assert "the shape of Mistral-7B" in out
    assert any(line.split()[:3] == ["fp32", "32", "28.00"] for line in out.splitlines())


# formats, methods


def test_formats(run: Any, as_json: Any) -> None:
    found = as_json("formats")
    assert [line["name"] for line in found["formats"]] == list(FORMATS)
    q4_0 = next(line for line in found["formats"] if line["name"] == "q4_0")
    assert q4_0["bits_per_weight"] == 4.5
    assert "gguf" in q4_0["file_types"]
    assert "compressed-tensors" not in q4_0["file_types"]
    _, out, _ = run("formats", "int4*", "--all")
    assert out.count("int4") == 12
    _, out, _ = run("formats")
    assert any(line.split()[:6] == ["int4", "-tensor", "-g16", "-g32", "-g64", "-g128"] for line in out.splitlines())


def test_methods(run: Any, as_json: Any) -> None:
    from fewbits.methods import METHODS

    assert [line["name"] for line in as_json("methods")["methods"]] == list(METHODS)
    assert "rtn" in run("methods")[1]


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "int9"], "format 'int9' is not known"),
        (["explain", "1", "--format", "int9"], "format 'int9' is not known"),
        (["explain", "1", "--format", "int8", "--range", "3", "2"], "range 3.0 … 2.0 is empty"),
        (["explain", "1e6", "--format", "fp16"], "above 65504"),
        (["explain", "1e300", "--format", "fp32"], "must be finite numbers within FP32"),
        (["explain", "3.4e38", "--format", "bf16"], "beyond the largest number, 3.3895"),
        (["explain", "nan", "--format", "int8"], "must be finite"),
        (["explain", "-inf", "--format", "int8"], "must be finite"),
        (["formats", "zz*"], "no format matches 'zz\\*'"),
        (["memory", "nowhere/at/all"], "does not exist"),
        (["memory", "0B"], "at least 1"),
    ],
)
def test_mistakes_are_sentences(run: Any, argv: list[str], message: str) -> None:
    import re

    code, out, err = run(*argv)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert re.search(message, err.replace("\n", " "))
    code, out, _ = run(*argv, "--json")
    assert code == 3
    assert re.search(message, json.loads(out)["error"]["message"])
    assert json.loads(out)["error"]["type"].endswith("Error")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["explode"],
        ["explain"],
        ["explain", "0.74"],
        ["explain", "int8", "--format", "int4"],
        ["explain", "1", "--format", "int8", "--range", "1", "2", "3"],
        ["memory", "7B", "--context", "0"],
        ["memory", "7B", "--batch", "many"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: fewbits" in capsys.readouterr().err


def test_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(verb.__name__.rpartition(".")[2] in out for verb in VERBS)
    assert all(f"\n  {code}" in out for code in (0, 1, 2, 3, 130))


def test_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.formats.explain.anatomy", interrupted)
    code, out, err = run("explain", "int8")
    assert (code, out) == (130, "")
    assert "interrupted" in err


def test_a_failed_proof_is_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.errors import VerificationError

    def failed(*_: object) -> None:
        raise VerificationError("layer 3 differs")

    monkeypatch.setattr("fewbits.formats.explain.anatomy", failed)
    assert run("explain", "int8")[0] == 1


def test_unexpected_errors_keep_their_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.formats.explain.anatomy", lambda format: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("explain", "int8")


def test_explaining_does_not_wait_for_transformers() -> None:
    script = (
        "import sys; from fewbits.cli import main; main(['explain', 'int8']); main(['memory', '7B']); "
        "assert 'transformers' not in sys.modules, 'transformers was imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m fewbits formats --all | head -1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_progress_bar_speaks_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    from fewbits.cli._print import progress_bar

    with progress_bar() as progress:
        progress(1, 4, "layer 1 [of 4]")
        progress(4, 4, "layer 4 [of 4]")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (3.5, "3.5"), (28.0, "28"), (-0.74, "−0.74"), (1e-5, "1e−5"), (2.5e-7, "2.5e−7"), (123456.0, "123456"),
     (1e6, "1e6"), (2 / 127, "0.01575"), (65504.0, "65504")],
)  # fmt: skip
def test_numbers(x: float, text: str) -> None:
    from fewbits.cli._print import number

    assert number(x) == text


def test_sizes_and_counts() -> None:
    from fewbits.cli._print import count, size

    assert [size(x) for x in (0, 812, 999.96e6, 3.5e9, 140e9, 2.1e12)] == [
        "0 B",
        "812 B",
        "1 GB",
        "3.5 GB",
        "140 GB",
        "2.1 TB",
    ]
    assert [count(x) for x in (12, 260e3, 494e6, 7e9, 1.24e9)] == ["12", "260k", "494M", "7B", "1.24B"]


# gguf


def test_gguf_split_and_merge(run: Any, as_json: Any, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in "abc":
        writer.add_tensor(name, np.ones((4, 300), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    parts = as_json("gguf", "split", str(tmp_path / "m.gguf"), str(tmp_path / "x"), "--max-size", "9.7kB")
    assert [Path(file).name for file in parts["files"]] == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    code, out, _ = run("gguf", "merge", parts["files"][0], str(tmp_path / "again.gguf"))
    assert (code, out.splitlines()[-1][:7]) == (0, "1 file,")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.parametrize("limit", [[], ["--max-size", "2 parsecs"], ["--max-size", "1GB", "--max-tensors", "2"]])
def test_gguf_split_wants_one_limit(run: Any, limit: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("gguf", "split", "m.gguf", "x", *limit)
    assert exit.value.code == 2
