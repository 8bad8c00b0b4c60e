"""Planning on a real model, the bundled one: predictions come true, budgets are kept, files hold what was planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import save_model

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import UnsupportedError
from fewbits.evals import Windows, kl_divergence
from fewbits.methods import METHODS, Recipe
from fewbits.methods.tune import Tune
from fewbits.pipeline import Calibration, make_plan
from fewbits.pipeline._calibrate import make_work, read_text
from fewbits.pipeline._job import prepare
from fewbits.pipeline._sensitivity import drawn
from fewbits.pipeline._way_back import WayBack
from fewbits.plan.planned import Budget, Planned
from fewbits.stats import Curvature

BUNDLED = Path(fewbits.__file__).parent / "bundled" / "tiny"


CANDIDATES = ("q2_k", "q3_k", "q4_k", "q6_k", "q8_0")


def of_bundled(windows: int = 24, length: int = 64) -> Calibration:
    """Text that the model writes: the tests need no other."""
    return Calibration("self", windows=windows, length=length, held_out=4, limit=100.0)


@pytest.fixture(scope="module")
def planned() -> Planned:
    return make_plan(BUNDLED, Budget(bpw=5.0), calibration=of_bundled(), candidates=CANDIDATES)


def test_what_is_written_is_what_was_planned(planned: Planned, tmp_path: Path) -> None:
    """To the byte, within the budget, each tensor in its format; and as far from the original as was expected.

    The trial has measured these formats on these windows, so the two agree but for the float32 of sums; before it the
    table, which knows nothing of blocks that make up for others, is within a factor of 2.
    """
    out = tmp_path / "m.gguf"
    made = fewbits.quantize(BUNDLED, out, plan=planned, method="gptq", calibration=of_bundled())
    assert out.stat().st_size == planned.nbytes
    assert planned.bits_per_weight <= 5.0
    formats = {t.name: t.format for t in made.tensors if t.fate == "quantized"}
    assert {name: format.name for name, format in planned.tensors().items()}.items() >= formats.items()
    assert len(set(formats.values())) > 1
    assert made.calibration is not None
    assert made.calibration.held_out_kld is not None
    assert made.calibration.held_out_kld == pytest.approx(planned.divergence, rel=1e-3)
    assert planned.trial is not None
    assert 0.5 < planned.trial < 2


def test_more_bits_are_expected_to_cost_less(planned: Planned) -> None:
    for unit in planned.table.units:
        costs = [unit.option(f).divergence for f in CANDIDATES]
        assert costs == sorted(costs, reverse=True), unit.name
        assert unit.options[-1].divergence == 0  # kept


def test_a_plan_beats_one_format_of_its_size(planned: Planned) -> None:
    everywhere = {unit.name: "q4_k" for unit in planned.table.units}
    best = planned.within(Budget(size=planned.table.nbytes(everywhere)))
    assert best.divergence < planned.table.divergence(everywhere)


def test_presets_are_plans(planned: Planned, tmp_path: Path) -> None:
    made = make_plan(BUNDLED, Budget(preset="q4_k_m"), calibration=None)
    assert made.formats["token_embd.weight"] == "q6_k"
    assert made.formats["blk.0.attn_k.weight"] == "q4_k"
    fewbits.quantize(BUNDLED, tmp_path / "m.gguf", plan=made, prove=False)
    assert (tmp_path / "m.gguf").stat().st_size == made.nbytes
    assert "Q4_K_M" in planned.presets
    with pytest.raises(UnsupportedError, match="GGUF"):
        make_plan(BUNDLED, Budget(preset="Q4_K_M"), target="vllm", calibration=None)


def test_without_text_bits_go_where_they_usually_matter() -> None:
    made = make_plan(BUNDLED, Budget(bpw=4.5), calibration=None)
    assert made.measured_on is None
    size = {"q2_k": 0, "q3_k": 1, "iq4_xs": 2, "q4_k": 3, "q5_k": 4, "q6_k": 5, "q8_0": 6, "fp16": 7}
    assert size[made.formats["blk.0.attn_v.weight"]] >= size[made.formats["blk.0.ffn_gate.weight"]]


@pytest.mark.parametrize("target", ["vllm", "cpu"])
def test_other_targets(target: str, tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama", hidden_size=128, intermediate_size=256)
    text = Windows(torch.randint(2, 300, (8, 16), generator=torch.Generator().manual_seed(0)), "drawn by lot")
    found = make_plan(
        tmp_path / "m", Budget(bpw=13), target=target, calibration=Calibration(text, 6, 16, 2), probe=False
    )
    layer = "model.layers.0."
    qkv = next(unit for unit in found.table.units if f"{layer}self_attn.q_proj.weight" in unit.tensors)
    assert set(qkv.tensors) == {f"{layer}self_attn.{x}_proj.weight" for x in "qkv"}
    out = tmp_path / "out"
    calibration = Calibration(text, 6, 16, 2, limit=1e9)
    fewbits.quantize(tmp_path / "m", out, plan=found, method="gptq", calibration=calibration)
    _, reader = open_checkpoint(out)
    assert all(reader.entries[name].format.name == format.name for name, format in found.tensors().items())
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) <= found.nbytes


def test_a_plan_of_another_model(planned: Planned, tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama", num_hidden_layers=1, hidden_size=256, intermediate_size=256)
    with pytest.raises(UnsupportedError, match="the plan is for another model"):
        fewbits.quantize(tmp_path / "m", tmp_path / "m.gguf", plan=planned, method="rtn")
    with pytest.raises(UnsupportedError, match="make a plan for this"):
        fewbits.quantize(BUNDLED, tmp_path / "out", plan=replace(planned, target="vllm"), method="rtn")


def test_the_way_back_is_backpropagation(tmp_path: Path) -> None:
    """Gradients of the embeddings, block by block, are those of the whole model by autograd: their covariance is the
    embeddings' curvature. The labels are the same ones, drawn anew from the same seed.
    """
    save_model(tmp_path / "m", "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    ids = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(3))
    calibration = Calibration(Windows(ids, "drawn by lot"), 3, 9, 0)
    job = _job(tmp_path / "m")
    work, _ = make_work(job, calibration)
    work.model.products = torch.float32
    with WayBack(work.model, ids, folder=tmp_path, limit=0) as way:  # a limit of 0: through files
        way.output()
        passed = {p.index: p for p in way.blocks(work, ("importance",))}
        found = way.embeddings()
    model = fewbits.load(tmp_path / "m")
    read = model.get_input_embeddings()(ids).detach().requires_grad_()
    log_p = model(inputs_embeds=read).logits.float().log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.multinomial(p.exp().detach(), 1, generator=generator) for p in log_p])
    (slope,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), read)
    slope = slope.flatten(0, 1)
    torch.testing.assert_close(
        found.inner, slope.T @ slope / ids.numel(), rtol=1e-3, atol=1e-6 * float(found.inner.max())
    )
    torch.testing.assert_close(found.rows, torch.bincount(ids.flatten(), minlength=len(found.rows)) / ids.numel())
    assert sorted(passed) == [0, 1, 2]
    assert all("importance" in statistics for p in passed.values() for statistics in p.statistics.values())


def test_curvature_predicts_the_divergence_of_one_matrix() -> None:
    """Of a feed-forward's matrix of the bundled model, in 4 bits: what is measured is within a quarter of it."""
    job, calibration = _job(BUNDLED), of_bundled(32, 64)
    work, _ = make_work(job, calibration)
    windows, _ = read_text(job.reader, calibration)
    name = "model.layers.1.mlp.up_proj.weight"
    with WayBack(work.model, windows.ids, folder=Path(), limit=1 << 30) as way:
        way.output()
        curvature = next(p.curvatures[name] for p in way.blocks(work) if p.index == 1)
    model = fewbits.load(BUNDLED)
    w = model.get_parameter(name).data
    error = fewbits.quantize_tensor(w, "int4-g32").dequantize() - w
    with torch.inference_mode():
        original = model(windows.ids).logits.float()
        w += error
        changed = model(windows.ids).logits.float()
    measured = float(kl_divergence(original.flatten(0, 1), changed.flatten(0, 1)).mean())
    predicted = float(curvature.of_rows(error, torch.arange(len(w))).sum())
    assert predicted == pytest.approx(measured, rel=0.25)


def test_rows_are_drawn_without_bias() -> None:
    """What a sum over all rows is, a weighed sum over those drawn is too, within its own spread."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2000, 8, generator=generator) * torch.rand(2000, 1, generator=generator).pow(4)
    use = Curvature(torch.rand(2000, generator=generator), torch.eye(8))
    costs = use.rows * w.square().sum(-1)
    rows, weight = drawn(w, [use], 200)
    assert len(rows) == pytest.approx(200, abs=1)
    assert float((costs[rows] * weight).sum()) == pytest.approx(float(costs.sum()), rel=0.02)
    every, one = drawn(w[:50], [Curvature(use.rows[:50], use.inner)], 200)
    assert every.tolist() == list(range(50))
    assert one.unique().tolist() == [1.0]


def test_the_vocabulary_is_solved(tmp_path: Path) -> None:
    """Tied embeddings in 3 bits: solved under their curvature they are nearer to the original than rounded."""
    overrides = {r"blk\.0\.attn_q": "q8_0", "blk": "keep"}  # something in a block has to be solved
    far = {}
    for method in ("rtn", "gptq-fast"):
        out = tmp_path / f"{method}.gguf"
        options = {"calibration": of_bundled(), "overrides": overrides, "vocabulary": "q3_k", "format": "q3_k"}
        fewbits.quantize(BUNDLED, out, method=method, weigh=method != "rtn", prove=False, **options)  # type: ignore[arg-type]
        far[method] = _divergence(out)
    assert far["gptq-fast"] < 0.8 * far["rtn"]


def _divergence(out: Path) -> float:
    ids = read_text(_job(BUNDLED).reader, Calibration("self", windows=8, length=64, held_out=0, seed=5))[0].ids
    with torch.inference_mode():
        p, q = (fewbits.load(path)(ids).logits.float().flatten(0, 1) for path in (BUNDLED, out))
    return float(kl_divergence(p, q).mean())


def _job(folder: Path):
    return prepare(
        folder,
        Path("out"),
        format="int4-g32",
        method="gptq",
        kind=None,
        vocabulary=None,
        overrides=None,
        pretokenizer=None,
        inputs=None,
        cache=None,
    )


def test_tune_moves_the_factors_of_super_blocks(tmp_path: Path) -> None:
    """K-quants through a solver and a finisher: on text that is held out of the training it gets no worse."""
    solver, tune, found = METHODS["gptq-fast"], Tune(steps=4, batch=4, held_out=0.25), {}
    for name, finishers in (("solved", ()), ("tuned", (tune,))):
        recipe = Recipe((), solver, finishers)  # type: ignore[arg-type]
        out = tmp_path / f"{name}.gguf"
        made = fewbits.quantize(BUNDLED, out, format="q3_k", method=recipe, calibration=of_bundled())
        assert made.calibration is not None
        found[name] = made.calibration.held_out_kld or 1.0
        assert fewbits.verify(out, BUNDLED, logits=False).passed
    assert found["tuned"] < found["solved"]


@pytest.mark.parametrize("method", ["rtn", "rtn-plain", "hqq"])
def test_methods_that_take_other_statistics_or_none(method: str) -> None:
    """Every matrix has its costs all the same."""
    formats = ("int4-g32", "int8-g128")
    found = make_plan(
        BUNDLED, Budget(bpw=12), target="vllm", method=method, calibration=of_bundled(8, 32), candidates=formats
    )
    for unit in found.table.units:
        assert unit.option("int4-g32").divergence > unit.option("int8-g128").divergence > 0, unit.name
