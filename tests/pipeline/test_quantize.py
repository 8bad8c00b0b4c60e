"""Whole runs on small models: what is written, what is said about it, and what must never happen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.checkpoint import KINDS, open_checkpoint
from fewbits.errors import CheckpointError, FormatError, LedgerError, OutputError, UnsupportedError
from fewbits.pipeline import _job as pipeline
from fewbits.pipeline._verify import read_ledger


def left_behind(folder: Path) -> list[str]:
    """Everything in a folder that a failed run should have removed."""
    return [path.name for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("out", "format", "kind"),
    [
        ("out", "int4-g32", "compressed-tensors"),
        ("out", "int8", "compressed-tensors"),
        ("out", "int3-asym-g64", "compressed-tensors"),
        ("out", "fp8-e4m3", "compressed-tensors"),
        ("out", "nf4-dq", "fewbits"),
        ("out", "ternary", "fewbits"),
        ("out", "q4_0", "fewbits"),
        ("out", "ternary-tensor", "bitnet"),
        ("out", "bf16", "huggingface"),
        ("out.gguf", "q4_0", "gguf"),
        ("out.gguf", "q5_1", "gguf"),
        ("out.gguf", "fp16", "gguf"),
    ],
)
def test_every_kind_is_written_proven_and_accounted_for(
    llama: Path, tmp_path: Path, out: str, format: str, kind: str
) -> None:
    made = fewbits.quantize(llama, tmp_path / out, format=format, kind="bitnet" if kind == "bitnet" else None)
    assert made.kind == kind
    source = load_file(llama / "model.safetensors")
    assert {t.source for t in made.tensors} == source.keys()
    assert made.weights == sum(w.numel() for w in source.values())
    assert sum(t.nbytes for t in made.tensors) <= made.output_bytes < sum(t.nbytes for t in made.tensors) + 2**16
    assert fewbits.verify(tmp_path / out, llama, logits=False).passed


def test_the_ledger_tells_the_error_of_every_tensor(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "out", format="int4-g32")
    ledger = read_ledger(tmp_path / "out")["tensors"]
    source = load_file(llama / "model.safetensors")
    _, reader = open_checkpoint(tmp_path / "out")
    for name, line in ledger.items():
        ours = reader.read(name).dequantize()
        error = float((ours - source[name]).norm() / source[name].norm())
        assert line.get("error", 0.0) == pytest.approx(error, rel=1e-4, abs=1e-12)
        assert (line["fate"] == "quantized") == name.endswith("_proj.weight")


def test_threads_do_not_change_a_byte(llama: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        fewbits.quantize(llama, tmp_path / f"{threads}", format="int4-g32", threads=threads)
    one, three = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "3"))
    assert one == three


def test_parts_do_not_change_a_byte(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewbits.quantize(llama, tmp_path / "whole.gguf", format="q4_0")
    monkeypatch.setattr("fewbits.pipeline._stream.PART", 5 * 128)
    fewbits.quantize(llama, tmp_path / "parts.gguf", format="q4_0")
    whole, parts = ((tmp_path / n).read_bytes() for n in ("whole.gguf", "parts.gguf"))
    assert whole == parts


def test_a_group_that_does_not_divide_is_narrowed_and_said(llama: Path, tmp_path: Path) -> None:
    made = fewbits.quantize(llama, tmp_path / "out", format="int4-g128")
    down = next(t for t in made.tensors if "down_proj" in t.name)
    assert down.shape[-1] == 192
    assert down.format == "int4-g64"
    assert down.reason is not None
    assert "192 is not a multiple" in down.reason


@pytest.mark.parametrize("down", ["int8-g64", "fp8-e4m3"])
def test_overrides_make_a_mixed_model(llama: Path, tmp_path: Path, down: str) -> None:
    overrides = {"down_proj": down, r"layers\.0\..*v_proj": "keep"}
    made = fewbits.quantize(llama, tmp_path / "out", format="int4-g32", overrides=overrides)
    assert {t.format for t in made.tensors if "down_proj" in t.name} == {down}
    kept = next(t for t in made.tensors if "layers.0.self_attn.v_proj" in t.name)
    assert (kept.fate, kept.reason) == ("kept", r"asked for by override 'layers\.0\..*v_proj'")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert config["format"] == ("mixed-precision" if down == "fp8-e4m3" else "pack-quantized")
    assert fewbits.verify(tmp_path / "out", llama).passed
    with pytest.raises(UnsupportedError, match="'nothing' matches no tensor"):
        fewbits.quantize(llama, tmp_path / "other", overrides={"nothing": "int8"})


def test_bf16_models_get_bf16_scales(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=64)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    made = fewbits.quantize(tmp_path / "model", tmp_path / "out", format="int4-g32")
    assert {t.format for t in made.tensors if t.fate == "quantized"} == {"int4-g32-bf16"}
    scales = load_file(tmp_path / "out" / "model.safetensors")
    assert scales["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


def test_tied_embeddings_have_a_line(tied: Path, tmp_path: Path) -> None:
    for out in ("out", "out.gguf"):
        made = fewbits.quantize(tied, tmp_path / out, format="q4_0" if out.endswith("gguf") else "int4-g32")
        assert [t.source for t in made.tensors if t.fate == "tied"] == ["lm_head.weight"]
        assert fewbits.verify(tmp_path / out, tied, logits=False).passed


def test_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    """Experts fused into one 3-D parameter are the ones that tools skip without a word."""
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 64}
    save_model(tmp_path / "moe", "qwen3_moe", head_dim=16, **settings)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(4)])
            for name in ("gate", "up", "down")
        )
        weights |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    save_file(weights, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    made = fewbits.quantize(tmp_path / "moe", tmp_path / "out", format="int4-g32")
    experts = [t for t in made.tensors if "experts" in t.name]
    assert len(experts) == 2 * 4 * 3
    assert {t.fate for t in experts} == {"quantized"}
    assert {t.source for t in made.tensors} == weights.keys()
    assert fewbits.verify(tmp_path / "out", tmp_path / "moe", logits=False).passed
    native = fewbits.quantize(tmp_path / "moe", tmp_path / "native", format="nf4")
    assert {t.fate for t in native.tensors if "experts" in t.name} == {"quantized"}


def test_transformers_loads_the_output_and_predicts_the_same(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "out", format="int4-g32")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        ours = fewbits.load(tmp_path / "out")(input_ids=tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=tokens).logits
    # Same numbers, multiplied in another order: products of K = 192 terms differ by some K·2^-24 of their size.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=192 * 2**-24 * float(theirs.abs().max()) * 8)


def test_an_unknown_architecture_is_quantized_generically_and_refused_for_gguf(tmp_path: Path) -> None:
    save_model(tmp_path / "phi", "phi", hidden_size=64, intermediate_size=64)
    made = fewbits.quantize(tmp_path / "phi", tmp_path / "out", format="int4-g32")
    assert sum(t.fate == "quantized" for t in made.tensors) == 2 * 6  # q, k, v, dense, fc1, fc2 of two layers
    with pytest.raises(UnsupportedError, match="'phi'"):
        fewbits.quantize(tmp_path / "phi", tmp_path / "out.gguf", format="q4_0")


class TestBadInput:
    """Each is a clear error, and nothing is left at the output."""

    def test_a_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such file or folder"):
            fewbits.quantize(tmp_path / "nowhere", tmp_path / "out")

    def test_a_truncated_file(self, mutable: Path, tmp_path: Path) -> None:
        weights = mutable / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            fewbits.quantize(mutable, tmp_path / "out")
        assert left_behind(tmp_path) == []

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    @pytest.mark.parametrize("out", ["out", "out.gguf"])
    def test_nan_and_inf_are_named_and_counted(
        self, mutable: Path, tmp_path: Path, bad: float, name: str, out: str
    ) -> None:
        weights = load_file(mutable / "model.safetensors")
        weights[name].view(-1)[:3] = bad
        save_file(weights, mutable / "model.safetensors", metadata={"format": "pt"})
        ours = {"model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight", "model.norm.weight": "output_norm.weight"}
        called = ours[name] if out.endswith("gguf") else name
        with pytest.raises(FormatError, match=rf"{called}: .*\b3 of \d+ weights are NaN or Inf"):
            fewbits.quantize(mutable, tmp_path / out, format="q8_0" if out.endswith("gguf") else "int8")
        assert left_behind(tmp_path) == []

    def test_bad_numbers_are_counted_over_all_parts(
        self, mutable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fewbits.pipeline._stream.PART", 10 * 128)
        weights = load_file(mutable / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][50:100, 3] = float("nan")
        save_file(weights, mutable / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FormatError, match=f"50 of {192 * 128} weights"):
            fewbits.quantize(mutable, tmp_path / "out")

    def test_tied_weights_that_are_not_the_same(self, tied: Path, tmp_path: Path) -> None:
        weights = load_file(tied / "model.safetensors")
        shutil.copytree(tied, tmp_path / "model")
        for change, error in ((0.0, False), (1e-3, True)):
            copy = weights["model.embed_tokens.weight"] + change
            save_file(weights | {"lm_head.weight": copy}, tmp_path / "model" / "model.safetensors")
            if error:
                with pytest.raises(CheckpointError, match=r"although config\.json ties them"):
                    fewbits.quantize(tmp_path / "model", tmp_path / "out2")
            else:
                made = fewbits.quantize(tmp_path / "model", tmp_path / "out1")
                assert [t.source for t in made.tensors if t.fate == "tied"] == ["lm_head.weight"]
        assert left_behind(tmp_path) == ["out1"]

    def test_an_output_that_exists(self, llama: Path, tmp_path: Path) -> None:
        for name in ("out", "out.gguf"):
            (tmp_path / name).write_text("precious")
            with pytest.raises(OutputError, match="exist"):
                fewbits.quantize(llama, tmp_path / name, format="q8_0")
            assert (tmp_path / name).read_text() == "precious"

    def test_a_format_that_the_file_type_cannot_hold(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="nf4"):
            fewbits.quantize(llama, tmp_path / "out.gguf", format="nf4")
        with pytest.raises(UnsupportedError, match="ternary"):
            fewbits.quantize(llama, tmp_path / "out", format="ternary", kind="compressed-tensors")
        assert left_behind(tmp_path) == []

    def test_unknown_names(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="did you mean int4-g32"):
            fewbits.quantize(llama, tmp_path / "out", format="int4-g33")
        with pytest.raises(UnsupportedError, match="did you mean"):
            fewbits.quantize(llama, tmp_path / "out", method="rtm")
        with pytest.raises(UnsupportedError, match=", ".join(KINDS)):
            fewbits.quantize(llama, tmp_path / "out", kind="zip")

    def test_a_full_disk_is_seen_before_anything_is_written(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("usage", (), {"free": 1000, "total": 1000, "used": 0})
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match="free"):
            fewbits.quantize(llama, tmp_path / "out")
        assert left_behind(tmp_path) == []

    def test_a_disk_that_fills_up_on_the_way(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        for out in ("out", "out.gguf"):
            with pytest.raises(OutputError, match=r"[Nn]o space left|full"):
                fewbits.quantize(llama, tmp_path / out, format="q8_0")
        assert left_behind(tmp_path) == []

    def test_what_is_quantized_already(self, llama: Path, tmp_path: Path) -> None:
        fewbits.quantize(llama, tmp_path / "four", format="int4-g32")
        with pytest.raises(UnsupportedError, match="quantized already"):
            fewbits.quantize(tmp_path / "four", tmp_path / "out")

    def test_a_parameter_without_a_place_fails_the_run(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        everything = pipeline.cut
        monkeypatch.setattr(pipeline, "cut", lambda *args: list(everything(*args))[:-1])
        with pytest.raises(LedgerError, match="1 parameters"):
            fewbits.quantize(llama, tmp_path / "out")
        assert left_behind(tmp_path) == []


KILLED = """
import signal, sys, time, os
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in a shell's background ignore
import fewbits.checkpoint._writer as writer
plain = os.pwrite
def slow(*args):
    print("writing", flush=True)
    time.sleep(0.5)  # the machine may be busy: the signal has to come before the last write
    return plain(*args)
os.pwrite = slow
import fewbits
fewbits.quantize(sys.argv[1], sys.argv[2], format="q4_0", prove=False)
"""


@pytest.mark.parametrize("out", ["out", "out.gguf"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_that_looks_whole(
    llama: Path, tmp_path: Path, out: str, how: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(llama), str(tmp_path / out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / out).exists()
    found = left_behind(tmp_path)
    if how == signal.SIGINT:
        assert found == []
    else:
        assert all(".partial-" in name for name in found)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / out)


def test_json_of_the_ledger_is_plain(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "out.gguf", format="q8_0")
    ledger = json.loads((tmp_path / "out.fewbits.json").read_text())
    assert {"fewbits", "source", "kind", "method", "torch", "tensors"} <= ledger.keys()
    assert str(llama) not in json.dumps(ledger)  # a ledger travels with the model; paths of a machine do not


ESTIMATED = """
import resource, sys
import fewbits
said = []
fewbits.quantize(sys.argv[1], sys.argv[2], format=sys.argv[3], announce=lambda need, job: said.append(need))
print(said[0].peak_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, said[0].disk)
"""


@pytest.mark.parametrize(("out", "format"), [("out", "int4-g32"), ("out.gguf", "q8_0")])
def test_the_estimate_of_memory_and_disk(tmp_path: Path, out: str, format: str) -> None:
    """On the bundled model: what was announced is what the process took, proof included."""
    bundled = Path(fewbits.__file__).parent / "bundled" / "tiny"
    command = [sys.executable, "-c", ESTIMATED, str(bundled), str(tmp_path / out), format]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    announced, taken, disk = map(int, done.stdout.split())
    assert 0.7 * taken < announced < 1.5 * taken
    files = [tmp_path / out] if out.endswith("gguf") else list((tmp_path / out).glob("*.safetensors"))
    assert 0 <= sum(file.stat().st_size for file in files) - disk < 200_000  # headers; GGUF's holds the tokenizer
