"""Training end to end on the bundled model: what is written is what was trained, and nothing is lost on the way."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import fewbits
from fewbits.errors import OutputError, QualityError, UnsupportedError
from fewbits.pipeline import _qat
from fewbits.pipeline._journal import unfinished
from fewbits.pipeline._qat import Qat, train_qat
from fewbits.pipeline._qlora import Qlora, train_qlora
from fewbits.pipeline._told import training
from fewbits.results import Training
from fewbits.train import Course, Length, Student
from fewbits.train.course import FLOOR

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"
QUICK = Qat(length=Length(None, 4), window=32, batch=2, held_out=4)
ADAPTER = Qlora(length=Length(None, 3), window=32, batch=2, rank=4)


def trained(out: Path, qat: Qat = QUICK, **more: Any) -> Training:
    settings: dict[str, Any] = {"format": "int2-g64", "start": "rtn", "prove": False} | more
    return train_qat(TINY, out, data=TEXT, qat=qat, **settings)


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """The students whose training came to its end."""
    found: list[Student] = []
    keep = _qat._keep

    def noted(run: Any, student: Student, *more: Any) -> None:
        found.append(student)
        keep(run, student, *more)

    monkeypatch.setattr(_qat, "_keep", noted)
    return found


@pytest.mark.parametrize(
    ("name", "format", "more"),
    [
        ("a", "int2-g64", {"start": "gptq", "prove": True}),
        ("b", "ternary", {}),
        ("c", "binary", {}),
        ("d.gguf", "tq2_0", {}),
        ("e.gguf", "q4_0", {}),
        ("f", "nf4", {"overrides": {"down_proj": "fp8-e4m3"}}),
        ("g", "int8", {"inputs": "int8-token"}),
        ("h", "ternary-tensor", {"kind": "bitnet", "start": "gptq", "prove": True}),
    ],
)
def test_what_is_written_is_what_was_trained(
    name: str, format: str, more: dict[str, Any], tmp_path: Path, students: list[Student]
) -> None:
    qat = replace(QUICK, rate=0.05)  # so that codes change
    result = trained(tmp_path / name, qat, format=format, **more)
    assert result.steps == 4
    assert result.tokens == 4 * 2 * 32
    (student,) = students
    model = fewbits.load(tmp_path / name, packed=False)
    now = {name: p.detach() for name, p in student.parameters_now().items()}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in now}
    written = {name: getattr(layer, name.rpartition(".")[2]) for name, layer in layers.items()}
    assert all(torch.equal(written[name], now[name]) for name in now)
    start = dict(fewbits.load(TINY).named_parameters())
    assert any(not torch.equal(written[name], start[name]) for name in now)
    if any(report.inputs for report in result.tensors):  # a sum in another order may round to another code
        return
    ids = torch.arange(40, 104).view(2, 32)
    with torch.no_grad():
        expected, found = student.run(ids).logits, model(input_ids=ids, use_cache=False).logits
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("format", ["tq1_0", "tq2_0"])
def test_llama_cpp_runs_what_was_trained(format: str, tmp_path: Path) -> None:
    """Its kernels for both, on a model whose matrices all have whole blocks of 256."""
    pytest.importorskip("llama_cpp")
    result = trained(tmp_path / "out.gguf", format=format)
    assert [tensor.format for tensor in result.tensors].count(format) == 28
    found = fewbits.verify(tmp_path / "out.gguf")
    assert found.passed
    assert found.stack is not None
    assert found.stack.startswith("llama.cpp")


def test_static_scales_of_inputs_are_trained_and_written(tmp_path: Path, students: list[Student]) -> None:
    trained(tmp_path / "static", replace(QUICK, scale_rate=0.01), format="int8", inputs="int8-static")
    (student,) = students
    model, started = fewbits.load(tmp_path / "static"), {name: x.start for name, x in student._inputs().items()}
    for name, scale in student.input_scales().items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer._floats("input_scale"), scale)
        assert not torch.equal(scale, started[name])


def test_it_gets_better(tmp_path: Path) -> None:
    qat = replace(QUICK, length=Length(None, 30), rate=3e-3, batch=8)
    result = trained(tmp_path / "out", qat)
    assert result.after < 0.9 * result.before
    assert [point.step for point in result.curve] == sorted(point.step for point in result.curve)
    ledger = json.loads((tmp_path / "out" / "fewbits.json").read_text())
    assert ledger["method"] == "rtn+qat"
    told = training(ledger["training"])
    assert (told.start, told.steps, told.tokens) == ("rtn", result.steps, result.tokens)
    assert (told.before, told.after, told.curve) == (result.before, result.after, result.curve)


def at_step(step: int, action: Callable[[], None]) -> Callable[[int, int, str], None]:
    done = []

    def progress(_: int, __: int, label: str) -> None:
        if label.startswith(f"step {step},") and not done:
            done.append(step)
            action()

    return progress


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """To the same bytes as without."""
    stop = at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="interrupted after 3 steps"):
        trained(tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="another training"):
        trained(tmp_path / "out", replace(QUICK, rate=0.5))
    result = trained(tmp_path / "out")
    assert result.steps == 4
    assert not unfinished(tmp_path / "out").exists()
    trained(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = Student._compare

    def broken(self: Student, *more: Any) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.free[0][0] = math.nan
        return compare(self, *more) * math.nan if self.training else compare(self, *more)

    monkeypatch.setattr(Student, "_compare", broken)
    with pytest.raises(QualityError, match=r"the loss is nan at step 1: the first tensor .* is free\.0"):
        trained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_training_refuses(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="leave transforms out"):
        trained(tmp_path / "out", start="rotate+gptq")
    (tmp_path / "short.txt").write_text("It was a dark night. " * 10)
    with pytest.raises(UnsupportedError, match="too few to train on"):
        train_qat(TINY, tmp_path / "out", format="int2-g64", data=tmp_path / "short.txt", qat=QUICK)


def test_an_output_that_exists_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        trained(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_the_rate_rises_and_falls() -> None:
    course = Course(None, 100)
    rates = []
    for course.step in range(101):
        rates.append(course.rate())
    assert max(rates) <= 1
    assert rates.index(max(rates)) == 3
    assert rates[-1] == pytest.approx(FLOOR)
    assert Course(2, 100, spent=60).share == 0.5


def samples(path: Path, count: int = 40) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i + 1}."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_adapter(tmp_path: Path) -> None:
    data = samples(tmp_path / "data.jsonl")
    qlora = replace(ADAPTER, length=Length(None, 30), rate=3e-3)
    result = train_qlora(TINY, tmp_path / "adapter", data=data, qlora=qlora)
    assert result.after < 0.9 * result.before
    assert result.base == "nf4-dq"
    assert not unfinished(tmp_path / "adapter").exists()
    fewbits.quantize(TINY, tmp_path / "base", format="nf4-dq", kind="fewbits", prove=False)
    model = PeftModel.from_pretrained(fewbits.load(tmp_path / "base"), tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(TINY)
    note = json.loads((tmp_path / "adapter" / "fewbits.json").read_text())
    assert (note["base"], note["base_made"]) == ("nf4-dq", True)
    with pytest.raises(OutputError, match="exists already"):
        train_qlora(TINY, tmp_path / "adapter", data=data, qlora=qlora)


def test_an_adapter_of_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    fewbits.quantize(TINY, tmp_path / "int4", format="int4-g64", prove=False)
    qlora = replace(ADAPTER, residual=False)
    result = train_qlora(tmp_path / "int4", tmp_path / "adapter", data=samples(tmp_path / "data.jsonl"), qlora=qlora)
    assert result.base == "int4-g64"
    assert json.loads((tmp_path / "adapter" / "fewbits.json").read_text())["base_made"] is False


def test_an_adapter_that_begins_at_what_the_format_lost(tmp_path: Path) -> None:
    """It begins nearer to the original, which 8 bits are as good as."""
    data, whole = samples(tmp_path / "data.jsonl"), replace(ADAPTER, rank=256)  # all singular values

    def begins(base: str, *, residual: bool) -> float:
        qlora = replace(whole, residual=residual)
        return train_qlora(TINY, tmp_path / f"{base}-{residual}", data=data, base=base, qlora=qlora).before

    original = begins("int8", residual=False)
    with_it, without = (abs(begins("int2-g64", residual=residual) - original) for residual in (True, False))
    assert with_it < 0.1 * without


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_interrupted_adapter_goes_on(tmp_path: Path, optimizer: str) -> None:
    data, qlora = samples(tmp_path / "data.jsonl"), replace(ADAPTER, rank=16, optimizer=optimizer)
    stop = at_step(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_qlora(TINY, tmp_path / "adapter", data=data, qlora=qlora, progress=stop)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(OutputError, match="another text"):
        train_qlora(TINY, tmp_path / "adapter", data=samples(tmp_path / "other.jsonl", 41), qlora=qlora)
    assert train_qlora(TINY, tmp_path / "adapter", data=data, qlora=qlora).steps == 3
    train_qlora(TINY, tmp_path / "whole", data=data, qlora=qlora)
    assert files(tmp_path / "adapter") == files(tmp_path / "whole")
