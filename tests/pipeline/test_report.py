"""What a report gathers: from headers, ledger, original, text; and what it says of the rest."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import fewbits
from fewbits import origin
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.findings import Report
from fewbits.formats import FORMATS, Grouped, QTensor
from fewbits.formats.explain import code_bits
from fewbits.methods import quantize_tensor
from fewbits.pipeline import _told as told
from fewbits.pipeline import make_plan, quantize
from fewbits.pipeline._histograms import SAME, histogram, in_units
from fewbits.pipeline._report import Wanted, gather, hub_name
from fewbits.pipeline._tensors import place
from fewbits.plan.planned import Budget
from fewbits.report.card import card
from fewbits.report.page import page
from fewbits.results import CalibrationReport

QUICK = Wanted(windows=3, length=24, speed=False)


@pytest.fixture(scope="module")
def planned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by a plan of rules of thumb, on the command line."""
    out = tmp_path_factory.mktemp("planned") / "planned.gguf"
    plan = make_plan(llama, Budget(bpw=6.0), target="gguf", method="rtn", calibration=None)
    with origin.running(["quantize", "a model", "planned.gguf"]):
        quantize(llama, out, plan=plan, method="rtn-plain", calibration=None, weigh=False, prove=False)
    return out


@pytest.fixture(scope="module")
def alone(planned: Path) -> Report:
    return gather(planned, wanted=QUICK)


@pytest.fixture(scope="module")
def beside(planned: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return gather(planned, llama, QUICK)


def test_headers_and_ledger_are_told(alone: Report, planned: Path) -> None:
    _, reader = open_checkpoint(planned)
    assert [t.name for t in alone.tensors] == list(reader.entries)
    assert alone.file_bytes == planned.stat().st_size
    assert alone.nbytes == sum(part.nbytes for part in alone.memory.weights)
    assert all((t.error is None) == t.floating for t in alone.tensors)
    assert all(t.digest and len(t.digest) == 64 for t in alone.tensors)
    assert alone.made_by == "fewbits quantize 'a model' planned.gguf"
    assert alone.made_with is not None
    assert alone.made_with.keys() == {"fewbits", "torch"}
    assert alone.command is None
    assert alone.language_model
    assert alone.source == "llama"


def test_what_is_left_out_has_a_sentence(alone: Report) -> None:
    assert alone.predictions is alone.speed is alone.energy is alone.training is alone.calibration is None
    wanted = {"predictions", "speed", "energy", "training", "calibration", "original weights"}
    assert alone.missing.keys() == wanted
    assert "--against" in alone.missing["predictions"]


def test_the_plan_is_told_with_other_sizes_and_presets(alone: Report) -> None:
    plan = alone.planning
    assert plan is not None
    assert plan.budget == "6 bits a weight"
    assert {p.kind for p in plan.points} == {"plan", "preset"}
    here = next(p for p in plan.points if p.name == "this plan")
    assert here.nbytes == alone.file_bytes


def test_predictions_are_those_of_evaluate(beside: Report, planned: Path, llama: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    assert beside.predictions is not None
    assert beside.predictions.evaluation == fewbits.evaluate(planned, llama, windows=3, length=24)
    assert beside.missing.keys() == {"speed", "energy", "training", "calibration"}
    assert beside.verification is not None
    assert beside.verification.passed
    assert beside.source_bytes == beside.memory.original


def test_histograms_are_of_both(beside: Report, alone: Report) -> None:
    for found, without in zip(beside.histograms, alone.histograms, strict=True):
        assert sum(found.counts) == found.sampled
        assert without.counts == ()
        assert found.shares == without.shares
        assert sum(found.shares) == pytest.approx(1) or not found.levels
        assert list(found.levels) == sorted(found.levels)


def test_without_a_ledger_errors_are_measured(planned: Path, llama: Path, alone: Report, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    copy = Path(shutil.copyfile(planned, tmp_path / "copy.gguf"))
    found = gather(copy, llama, QUICK)
    errors = {t.name: t.error for t in alone.tensors if t.error is not None}
    assert {t.name: t.error for t in found.tensors if t.error is not None} == pytest.approx(errors, rel=1e-4)
    assert found.verification is None
    assert "no ledger" in found.missing["ledger"]
    assert "no ledger" in gather(copy, wanted=QUICK).missing["errors"]


def test_a_broken_output_is_told(planned: Path, tmp_path: Path) -> None:
    for file in planned.parent.glob("planned*"):
        shutil.copyfile(file, tmp_path / file.name)
    copy = tmp_path / planned.name
    data = bytearray(copy.read_bytes())
    data[-8] ^= 1
    copy.write_bytes(data)
    found = gather(copy, wanted=QUICK)
    assert found.verification is not None
    assert not found.verification.passed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", {"budget": {"bpw": 4}}),
        ("plan", "4.25"),
        ("training", {"start": "gptq"}),
        ("calibration", [1]),
        ("calibration", {"source": "x", "held_out_kld": float("inf")}),
    ],
)
def test_a_changed_ledger_is_refused_by_name(planned: Path, tmp_path: Path, key: str, value: object) -> None:
    copy = Path(shutil.copyfile(planned, tmp_path / planned.name))
    ledger = json.loads(planned.with_suffix(".fewbits.json").read_text())
    copy.with_suffix(".fewbits.json").write_text(json.dumps({**ledger, key: value}))
    with pytest.raises(CheckpointError, match=f"the ledger's '{key}'"):
        gather(copy, wanted=QUICK)


def test_a_checkpoint_that_was_not_quantized(llama: Path) -> None:
    found = gather(llama, wanted=QUICK)
    assert found.histograms == ()
    assert {part.name for part in found.memory.weights} == {"kept in FP32"}


def test_an_encoder_has_no_next_tokens(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    source, out = tmp_path / "source", tmp_path / "out"
    BertModel(BertConfig(**shape, vocab_size=120, max_position_embeddings=64)).save_pretrained(source)
    quantize(source, out, format="int8", kind="fewbits", prove=False)
    found = gather(out, source, QUICK)
    assert not found.language_model
    assert found.missing["predictions"] == "it does not predict next tokens"
    assert found.histograms[0].counts
    assert {t.layer for t in found.tensors} == {0, 1, None}
    assert "pipeline_tag" not in card(found)
    assert "it does not predict next tokens" in page(found)


def test_calibration_comes_back_as_it_went() -> None:
    report = CalibrationReport("c.txt", "c.txt, 2 windows", 2, 16, 32, "ab", 8, None)
    assert told.told({"calibration": told_dict(report)}, "calibration", told.calibration) == report
    held = replace(report, held_out_kld=0.25)
    assert told.told({"calibration": told_dict(held)}, "calibration", told.calibration) == held
    assert told.told({}, "calibration", told.calibration) is None


def told_dict(report: CalibrationReport) -> object:
    return json.loads(json.dumps(fewbits.results.as_json(report)))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"bpw": 4.25, "context": 8192}, "4.25 bits a weight"),
        ({"size": 4.5e9, "context": 8192}, "a file of 4500 MB"),
        ({"memory": 6e9, "context": 4096}, "a process of 6000 MB with 4096 tokens of context"),
        ({"max_kld": 0.02, "context": 8192}, "at most 0.02 nats a token from the original"),
        ({"preset": "Q4_K_M", "context": 8192}, "the mixture of llama.cpp's preset Q4_K_M"),
    ],
)
def test_budgets_in_words(budget, words) -> None:
    assert told.in_words(budget) == words


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", 3, "mlp.experts.*.up_proj"),
        ("blk.0.attn_q.weight", 0, "attn_q"),
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
        ("token_embd.weight", None, "token_embd"),
        ("h.5.weight", 5, "5"),
    ],
)
def test_places_of_tensors(name, layer, part) -> None:
    assert place(name) == (layer, part)


def test_units_of_a_scale_are_levels() -> None:
    """int4 by hand: with a scale of 0.5 the numbers −4 … 3.5 are the levels −8 … 7."""
    format = FORMATS["int4"]
    w = (torch.arange(-8, 8) * 0.5).expand(3, 16).contiguous()
    params = {"scale": torch.tensor([[0.5], [0.5], [0.0]])}
    used, units = in_units(QTensor(format, format.round(w, params), params), w)
    assert used.all(1).tolist() == [True, True, False]
    assert units[0].tolist() == list(range(-8, 8))


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if isinstance(format, Grouped)])
def test_levels_are_the_same_in_all_groups(name: str) -> None:
    """In units of the scale a format has at most as many levels as codes, whatever its groups' scales are."""
    format = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 512, generator=generator) * torch.rand(64, 1, generator=generator)
    q = quantize_tensor(w, format, method="rtn-plain")
    used, units = in_units(q, q.dequantize())
    assert bool(units[used].isfinite().all())
    levels = torch.unique((units[used] / SAME).round())
    assert len(levels) <= 2 ** math.ceil(code_bits(format))


def test_samples_of_a_large_matrix_are_small(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.pipeline import _histograms

    monkeypatch.setattr(_histograms, "SAMPLE", 2048)
    out = tmp_path / "out"
    quantize(llama, out, format="int4-g32", prove=False)
    _, reader = open_checkpoint(out)
    found = histogram(reader, "model.layers.0.mlp.gate_proj.weight", None, None)
    assert found is not None
    assert found.sampled == 2048
    assert len(found.levels) <= 16
    assert found.low < -7


def test_weights_that_were_rewritten_are_not_laid_beside(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    quantize(llama, out, format="int4-g32", method="rotate+rtn", prove=False)
    found = gather(out, llama, QUICK)
    assert [each.counts for each in found.histograms] == [()]
    assert "transform rewrote them" in found.missing["original weights"]


def test_names_on_the_hub(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    assert hub_name(str(cached), cached) == "owner/a-model"
    assert hub_name("owner/a-model", tmp_path) == "owner/a-model"
    assert hub_name(str(tmp_path), tmp_path) is None


def test_a_license_is_the_cards_or_the_configurations(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    out = tmp_path / "out"
    quantize(source, out, format="int4-g32", prove=False)
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: other\n")
    from fewbits.pipeline._report import _licenses, _Source

    kind, reader = open_checkpoint(out)
    assert next(_licenses(_Source(source, kind), reader)) == "apache-2.0"
    (source / "README.md").write_text("license: mit\n")
    assert list(_licenses(_Source(source, kind), reader)) == [None, None, None]
