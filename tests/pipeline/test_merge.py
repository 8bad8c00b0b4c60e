"""Merging, against PEFT: what it computes of base and adapter is what every way starts from and is measured against."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.checkpoint.adapter import read_adapter
from fewbits.errors import CheckpointError, FormatError, OutputError, UnsupportedError
from fewbits.pipeline import Calibration, Merging, merge
from fewbits.pipeline._journal import unfinished
from fewbits.pipeline._merge import Tried, chosen
from fewbits.pipeline._merge_ways import WAYS
from fewbits.pipeline._source import open_source
from fewbits.results import Figure, MergeWay
from fewbits.train.lora import linear_layers

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"
STORED = 1e-6  # the divergence that comes of keeping the original's predictions in 16 bits (`evals.reference`)
IDS = torch.arange(40, 80).view(2, 20)
QUICK = Merging(calibration=Calibration(TEXT, windows=8, length=64), text=TEXT, windows=4, length=64)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT's own making, large enough to change predictions, with a note of what base it is for."""
    out = tmp_path_factory.mktemp("merge") / "adapter"
    torch.manual_seed(0)
    model = fewbits.load(TINY)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=linear_layers(model)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(out))
    (out / "fewbits.json").write_text(json.dumps({"base": "nf4-dq", "base_made": True, "vocabulary": None}))
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_the_adapter_is_kept_beside_the_base_it_was_trained_on(tmp_path: Path, adapter: Path) -> None:
    result = merge(TINY, adapter, tmp_path / "out", way="adapter", merging=QUICK)
    assert (result.base, result.chosen) == ("nf4-dq", "adapter")
    assert result.ways[0].kld is not None
    assert abs(result.ways[0].kld.value) < STORED
    assert not unfinished(tmp_path / "out").exists()
    fewbits.quantize(TINY, tmp_path / "base", format="nf4-dq", kind="fewbits", prove=False)
    theirs = logits(PeftModel.from_pretrained(fewbits.load(tmp_path / "base"), str(adapter)).eval())
    ours = logits(fewbits.load(tmp_path / "out"))
    assert float((ours - theirs).abs().max()) < 1e-4  # sums of the same numbers in another order
    assert float((ours - logits(fewbits.load(tmp_path / "base"))).abs().max()) > 0.1


def test_merged_in_full_it_is_what_peft_merges(tmp_path: Path, adapter: Path) -> None:
    """On the original in FP32, whose base is its own."""
    plain = tmp_path / "adapter"
    shutil.copytree(adapter, plain, ignore=shutil.ignore_patterns("fewbits.json"))
    result = merge(TINY, plain, tmp_path / "out", format="fp32", merging=QUICK)
    assert (result.base, result.chosen) == ("full precision", "full")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(plain)).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, theirs in merged.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], theirs, rtol=0, atol=1e-6), name


def test_every_way_and_the_best_of_them(tmp_path: Path, adapter: Path) -> None:
    result = merge(TINY, adapter, tmp_path / "out", format="int3-g64", choose=True, merging=QUICK)
    klds = {way.name: way.kld.value for way in result.ways if way.kld is not None}
    sizes = {way.name: way.nbytes or 0 for way in result.ways}
    assert abs(klds["adapter"]) < STORED
    assert klds["full"] < 0.01 * klds["round"]
    assert klds["residual"] < klds["calibrate"] < 0.8 * klds["round"]
    assert sizes["round"] == sizes["calibrate"] < sizes["residual"] < sizes["adapter"] < sizes["full"]
    assert result.chosen == "residual"
    assert "adapter is" in result.reason
    found = fewbits.evaluate(tmp_path / "out", TINY, text=TEXT, windows=4, length=64)
    assert found.mean_kld.value > 0
    assert fewbits.verify(tmp_path / "out").passed
    engine = fewbits.Engine(tmp_path / "out")
    assert type(engine.runner).__name__ == "TransformersRunner"
    assert len(list(engine.generate("Once", max_tokens=4, temperature=0))) > 0


def test_an_interrupted_merge_goes_on(tmp_path: Path, adapter: Path) -> None:
    def stop(done: int, total: int, label: str) -> None:
        if label.startswith("correct "):
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"format": "int4-g64", "choose": True}
    with pytest.raises(KeyboardInterrupt):
        merge(TINY, adapter, tmp_path / "out", merging=QUICK, progress=stop, **settings)
    made = unfinished(tmp_path / "out") / "calibrate" / "model.safetensors"
    before = made.stat().st_ino
    with pytest.raises(OutputError, match="unfinished"):
        merge(TINY, adapter, tmp_path / "out", merging=replace(QUICK, rank=2), **settings)
    assert made.stat().st_ino == before
    result = merge(TINY, adapter, tmp_path / "out", merging=QUICK, **settings)
    assert {way.name for way in result.ways if way.kld is not None} == set(WAYS)
    assert not unfinished(tmp_path / "out").exists()


def test_a_base_that_is_quantized_already(tmp_path: Path, adapter: Path) -> None:
    fewbits.quantize(TINY, tmp_path / "int4", format="int4-g64", prove=False)
    result = merge(tmp_path / "int4", adapter, tmp_path / "out", way="adapter", merging=QUICK)
    assert result.base == "int4-g64"
    assert not any(each.is_symlink() for each in (tmp_path / "out").rglob("*"))
    reader, added = open_source(tmp_path / "out"), read_adapter(adapter)
    layer = "model.layers.1.mlp.down_proj"
    base = fewbits.load(tmp_path / "int4").get_submodule(layer).weight
    w = reader.read(f"{layer}.weight", slice(3, 9)).codes
    assert torch.equal(w, base[3:9] + added[layer].rows(slice(3, 9)))


def test_a_gguf_file(tmp_path: Path, adapter: Path) -> None:
    result = merge(TINY, adapter, tmp_path / "out.gguf", format="q4_0", choose=True, merging=QUICK)
    notes = {way.name: way.note for way in result.ways if way.note}
    assert notes == dict.fromkeys(("adapter", "residual"), "a GGUF file holds no adapter")
    assert (tmp_path / "out.fewbits.json").exists()
    assert fewbits.verify(tmp_path / "out.gguf").passed
    with pytest.raises(UnsupportedError, match="holds no adapter"):
        merge(TINY, adapter, tmp_path / "more.gguf", format="q4_0", way="residual", merging=QUICK)


def test_what_is_refused_before_anything_is_made(tmp_path: Path, adapter: Path, mutable: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge(TINY, adapter, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="'paste' is no way"):
        merge(TINY, adapter, tmp_path / "a", way="paste")
    with pytest.raises(FormatError):
        merge(TINY, adapter, tmp_path / "a", format="int5000")
    with pytest.raises(CheckpointError, match=r"the adapter changes model\.layers.*give its own model"):
        merge(mutable, adapter, tmp_path / "a")
    given = tmp_path / "given"
    shutil.copytree(adapter, given)
    (given / "fewbits.json").write_text(json.dumps({"base": "int4-g64", "base_made": False, "vocabulary": None}))
    with pytest.raises(UnsupportedError, match="was int4-g64 already; give that one"):
        merge(TINY, given, tmp_path / "a")
    kept = tmp_path / "kept"
    merge(TINY, adapter, kept, way="adapter", merging=QUICK)
    with pytest.raises(UnsupportedError, match="has an adapter inside already"):
        merge(kept, adapter, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", "kept", "given", mutable.name])


def tried(name: str, nbytes: int | None, kld: float) -> Tried:
    if nbytes is None:
        return Tried(MergeWay(name, "", 0.0, note="why not"))
    return Tried(MergeWay(name, "", 0.0, nbytes, Figure(kld, 0.0)), Path(name))


def test_the_choice() -> None:
    ways = [tried("adapter", 130, 0.0), tried("full", 400, 0.001), tried("round", 100, 0.5)]
    ways += [tried("calibrate", 100, 0.2), tried("residual", 108, 0.1)]
    best, reason = chosen(ways, 0.1)
    assert best.way.name == "residual"
    assert reason.endswith("; adapter is 1.30 times as large, full is 4.00 times as large")
    assert chosen(ways, 0.05)[0].way.name == "calibrate"
    assert chosen(ways, 0.4)[0].way.name == "adapter"
    with pytest.raises(UnsupportedError, match="round: why not"):
        chosen([tried("round", None, 0.0)], 0.1)
