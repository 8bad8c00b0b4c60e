"""verify must be able to say no: each link of its chain, broken on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

import fewbits
from fewbits.checkpoint.compressed_tensors import CompressedTensors
from fewbits.errors import CheckpointError, UnsupportedError, VerificationError
from fewbits.formats import QTensor
from fewbits.pipeline import _stacks

UP = "model.layers.{}.mlp.up_proj"


@pytest.fixture
def out(llama: Path, tmp_path: Path) -> Path:
    fewbits.quantize(llama, tmp_path / "out", format="int4-g32", prove=False)
    return tmp_path / "out"


@pytest.fixture
def gguf(llama: Path, tmp_path: Path) -> Path:
    fewbits.quantize(llama, tmp_path / "out.gguf", format="q4_0", prove=False)
    return tmp_path / "out.gguf"


def edit(file: Path, **arrays: Tensor) -> None:
    save_file(load_file(file) | arrays, file, metadata={"format": "pt"})


def mismatches(*args: Any, **kwargs: Any) -> str:
    found = fewbits.verify(*args, logits=False, **kwargs)
    assert found.passed == (not found.mismatches)
    return "\n".join(found.mismatches)


def test_untouched_outputs_pass(out: Path, gguf: Path, llama: Path) -> None:
    assert mismatches(out) == mismatches(gguf) == mismatches(out, llama) == mismatches(gguf, llama) == ""


@pytest.mark.parametrize("offset", [1, 1000, 20_000])
def test_one_flipped_bit_is_found_and_its_tensor_named(out: Path, gguf: Path, offset: int) -> None:
    for file in (out / "model.safetensors", gguf):
        data = bytearray(file.read_bytes())
        data[-offset] ^= 4
        file.write_bytes(data)
    assert "the bytes of" in mismatches(out)
    assert "the bytes of" in mismatches(gguf)


def test_another_original_is_not_the_source(out: Path, llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    weights = load_file(llama / "model.safetensors")
    edit(other / "model.safetensors", **{"model.norm.weight": weights["model.norm.weight"] + 1e-3})
    assert "model.norm.weight: error against the source" in mismatches(out, other)


def test_swapped_tensors_are_found(out: Path, llama: Path) -> None:
    """Two layers' weights in each other's place, with a ledger that agrees: only the source can tell."""
    weights = load_file(out / "model.safetensors")
    swapped = {
        f"{UP.format(a)}.{array}": weights[f"{UP.format(1 - a)}.{array}"].clone()
        for a in (0, 1)
        for array in ("weight_packed", "weight_scale")
    }
    edit(out / "model.safetensors", **swapped)
    ledger = json.loads((out / "fewbits.json").read_text())
    lines = {line["name"]: line for line in ledger["tensors"]}
    first, second = (lines[f"{UP.format(i)}.weight"] for i in (0, 1))
    for array in ("weight_packed", "weight_scale"):
        one, other = (f"{UP.format(i)}.{array}" for i in (0, 1))
        first["digests"][one], second["digests"][other] = second["digests"][other], first["digests"][one]
    (out / "fewbits.json").write_text(json.dumps(ledger))
    assert mismatches(out) == ""
    assert mismatches(out, llama).count("error against the source") == 2


def test_a_decoder_that_disagrees_is_found(out: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if fewbits read its own bytes wrongly: one code of one tensor."""
    plain = QTensor.dequantize

    def wrong(self: QTensor) -> Tensor:
        w = plain(self)
        w.view(-1)[0] += 1e-3
        return w

    monkeypatch.setattr(QTensor, "dequantize", wrong)
    assert "compressed-tensors reads" in mismatches(out)
    assert "gguf-py reads" in mismatches(gguf)


def test_a_model_that_predicts_otherwise_is_found(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fewbits.verify(out).passed
    plain = _stacks._transformers

    def wrong(path: Path, tokens: Tensor) -> tuple[str, Tensor]:
        stack, logits = plain(path, tokens)
        return stack, logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * 0.1

    monkeypatch.setattr(_stacks, "_transformers", wrong)
    found = fewbits.verify(out)
    assert not found.passed
    assert "predicts differently" in found.mismatches[0]


def test_an_independent_stack_that_is_not_installed_is_said(
    gguf: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewbits.quantize(llama, tmp_path / "bitnet", format="ternary-tensor", kind="bitnet", prove=False)
    monkeypatch.setattr(_stacks, "find_spec", lambda package: None)
    for path, missing in ((gguf, "llama-cpp-python"), (tmp_path / "bitnet", "accelerate")):
        found = fewbits.verify(path)
        assert found.passed
        assert found.stack is None
        assert missing in found.notes[0]


def test_a_missing_or_extra_tensor_is_found(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights | {"model.extra.weight": norm}, out / "model.safetensors", metadata={"format": "pt"})
    found = mismatches(out)
    assert "model.extra.weight: not in the ledger" in found
    assert "model.norm.weight: missing from the file" in found


DAMAGED = ["{}", "", "[" * 100_000, "[1]", '{"tensors": [1]}', '{"tensors": [{"name": "a", "error": "x"}]}']
DAMAGED += ['{"tensors": [{"name": "a", "error": null}]}', '{"tensors": [{"name": "a", "error": 1' + 400 * "0" + "}]}"]


def test_no_ledger_or_a_damaged_one(out: Path, llama: Path) -> None:
    for damaged in DAMAGED:
        (out / "fewbits.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="not a ledger"):
            fewbits.verify(out)
    with pytest.raises(CheckpointError, match="only outputs of fewbits"):
        fewbits.verify(llama)


def test_a_quantize_run_that_wrote_something_else_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CompressedTensors.foreign
    monkeypatch.setattr(CompressedTensors, "foreign", lambda *args: ((n, i, w + 1) for n, i, w in honest(*args)))
    with pytest.raises(VerificationError, match="do not read back as meant"):
        fewbits.quantize(llama, tmp_path / "out", format="int4-g32")


def test_our_own_kind_says_that_nobody_else_reads_it(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "out", format="nf4")
    found = fewbits.verify(tmp_path / "out", llama)
    assert found.passed
    assert found.decoder is None
    assert any("no other library" in note for note in found.notes)


def test_an_encoder(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=100, **shape)).save_pretrained(tmp_path / "model")
    made = fewbits.quantize(tmp_path / "model", tmp_path / "out", format="int4-g32")
    # Of each layer q, k, v, output and the two of the feed-forward; and the pooler.
    assert sum(t.fate == "quantized" for t in made.tensors) == 2 * 6 + 1
    found = fewbits.verify(tmp_path / "out", tmp_path / "model")
    assert found.passed
    assert found.logit_kld is not None
    with pytest.raises(UnsupportedError, match="does not predict next tokens"):
        fewbits.evaluate(tmp_path / "out", tmp_path / "model")


def test_a_model_that_the_other_stack_cannot_run_fails_the_proof(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stacks, "_transformers", lambda *_: 1 / 0)
    with pytest.raises(VerificationError, match="transformers cannot run it"):
        fewbits.verify(out)
