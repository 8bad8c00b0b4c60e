"""Calibrated runs: block after block, resumed where they were stopped, guarded, within a stated memory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import OutputError, QualityError, UnsupportedError
from fewbits.evals import Windows, calibration_windows
from fewbits.evals.evaluation import calibration_warning
from fewbits.methods import Recipe, recipe_named
from fewbits.methods.auto import Auto
from fewbits.methods.signround import SignRound
from fewbits.pipeline import _calibrate
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._guard import Guard
from fewbits.pipeline._journal import Journal, unfinished

BUNDLED = Path(fewbits.__file__).parent / "bundled" / "tiny"
SMALL = {"windows": 6, "length": 16, "held_out": 2}


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    save_model(folder, "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=6)
    return folder


def text(windows: int = 8, length: int = 16, seed: int = 0) -> Windows:
    ids = torch.randint(2, 300, (windows, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, "drawn by lot")


def calibration(**changed: Any) -> fewbits.Calibration:
    return fewbits.Calibration(**{"text": text(), "limit": 100.0, **SMALL, **changed})


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "fewbits.json"
    }


def test_the_whole_way(deep: Path, tmp_path: Path) -> None:
    made = fewbits.quantize(deep, tmp_path / "out", format="int4-g32", calibration=calibration())
    assert made.calibration is not None
    assert made.calibration.tokens == 6 * 16
    assert made.calibration.held_out_tokens == 2 * 16
    assert made.calibration.digest == Windows(text().ids[:6], "").digest
    assert fewbits.verify(tmp_path / "out", against=deep).passed
    assert not (tmp_path / "out.unfinished").exists()


def test_what_the_guard_reports_is_what_evaluation_measures(deep: Path, tmp_path: Path) -> None:
    """The last check's divergence is the divergence of the model in the files, on the same windows."""
    held = text().ids[6:]
    made = fewbits.quantize(deep, tmp_path / "out", format="int3-g32", calibration=calibration())
    original, ours = (fewbits.load(path, packed=False) for path in (deep, tmp_path / "out"))
    with torch.inference_mode():
        p, q = (model(input_ids=held).logits[:, :-1].double().log_softmax(-1) for model in (original, ours))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert made.calibration is not None
    assert made.calibration.held_out_kld == pytest.approx(expected, rel=1e-4)


def test_goes_on_where_it_was_stopped(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fewbits.quantize(deep, whole, format="int4-g32", calibration=calibration())
    solved: list[int] = []
    solve = _calibrate.solve_block

    def stops_at_four(work: Any, index: int, streams: Any) -> Any:
        if index == 4 and 4 not in solved:
            solved.append(4)
            raise KeyboardInterrupt
        solved.append(index)
        return solve(work, index, streams)

    monkeypatch.setattr(_calibrate, "solve_block", stops_at_four)
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(deep, parts, format="int4-g32", calibration=calibration())
    assert not parts.exists()
    assert (tmp_path / "parts.unfinished").is_dir()
    fewbits.quantize(deep, parts, format="int4-g32", calibration=calibration())
    assert solved == [0, 1, 2, 3, 4, 4, 5]
    assert digests(parts) == digests(whole)
    assert not (tmp_path / "parts.unfinished").exists()


COMMAND = """
import sys, fewbits, torch
from fewbits.evals import Windows, calibration_windows
from fewbits.evals.evaluation import calibration_warning
from fewbits.methods.auto import Auto
ids = torch.randint(2, 300, (8, 16), generator=torch.Generator().manual_seed(0))
calibration = fewbits.Calibration(text=Windows(ids, "drawn by lot"), windows=6, length=16, held_out=2, limit=100.0)
print("ready", flush=True)
fewbits.quantize(sys.argv[1], sys.argv[2], format="int4-g32", calibration=calibration)
"""


def test_killed_at_random_moments(deep: Path, tmp_path: Path) -> None:
    """kill -9 loses at most the block it hits, and never the output's bytes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fewbits.quantize(deep, whole, format="int4-g32", calibration=calibration())
    draw, finished = random.Random(0), 0
    for _ in range(4):
        process = _started(deep, parts)
        time.sleep(draw.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if parts.exists():
            break
        now = len(list((tmp_path / "parts.unfinished").glob("block-*.safetensors")))
        assert now >= finished
        finished = now
    if not parts.exists():
        last = _started(deep, parts)
        last.communicate()
        assert last.returncode == 0
    assert digests(parts) == digests(whole)
    assert not (tmp_path / "parts.unfinished").exists()


def _started(model: Path, out: Path) -> subprocess.Popen[str]:
    """A process that is about to quantize."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(model), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_another_run_is_not_mixed_in(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(_calibrate.Run, "job", _stop)
        with pytest.raises(KeyboardInterrupt):
            fewbits.quantize(deep, out, format="int4-g32", calibration=calibration())
    with pytest.raises(OutputError, match="another calibration"):
        fewbits.quantize(deep, out, format="int4-g32", calibration=calibration(text=text(seed=1)))
    with pytest.raises(OutputError, match="another output"):
        fewbits.quantize(deep, out, format="int3-g32", calibration=calibration())
    facts = json.loads((tmp_path / "out.unfinished" / "run.json").read_text())
    assert facts["calibration"] == Windows(text().ids[:6], "").digest


def _stop(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_two_at_once_are_refused(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, solve = tmp_path / "out", _calibrate.solve_block

    def meanwhile(work: Any, index: int, streams: Any) -> Any:
        monkeypatch.setattr(_calibrate, "solve_block", solve)
        with pytest.raises(OutputError, match="another process"):
            fewbits.quantize(deep, out, format="int4-g32", calibration=calibration())
        return solve(work, index, streams)

    monkeypatch.setattr(_calibrate, "solve_block", meanwhile)
    fewbits.quantize(deep, out, format="int4-g32", calibration=calibration())


def test_the_guard_names_the_block(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block with a far worse format is the one that is named, also where the next check comes after the last."""
    overrides = {r"layers\.3\.": "int2"}
    for checks in (6, 1):
        monkeypatch.setattr("fewbits.pipeline._guard.CHECKS", checks)
        with pytest.raises(QualityError, match=r"model\.layers\.3: once it is quantized"):
            fewbits.quantize(
                deep,
                tmp_path / f"out{checks}",
                format="int8",
                overrides=overrides,
                calibration=calibration(limit=1e-3),
            )
        assert not (tmp_path / f"out{checks}").exists()


def test_a_limit_that_is_passed_stops_the_run(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"model\.layers\.0.*past the limit of 0\.001"):
        fewbits.quantize(deep, tmp_path / "out", format="int2-g32", calibration=calibration(limit=0.001))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("all_windows", "stops"), [(0.0, False), (1.0, True)])
def test_a_glance_alone_stops_nothing(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_windows: float, stops: bool
) -> None:
    """Two windows past the limit call for all of them, and these decide."""
    monkeypatch.setattr(Guard, "measure", lambda self, index, held, windows=None: 1.0 if windows else all_windows)
    with pytest.raises(QualityError) if stops else nullcontext():
        fewbits.quantize(deep, tmp_path / "out", format="int8", calibration=calibration(limit=0.5))
    assert (tmp_path / "out").exists() != stops


def test_states_on_disk_give_the_same_bytes(deep: Path, tmp_path: Path) -> None:
    for name, memory in (("in-memory", 1 << 30), ("on-disk", 0)):
        fewbits.quantize(deep, tmp_path / name, format="int4-g32", calibration=calibration(memory=memory))
    assert digests(tmp_path / "in-memory") == digests(tmp_path / "on-disk")


def test_one_window_is_enough(deep: Path, tmp_path: Path) -> None:
    made = fewbits.quantize(deep, tmp_path / "out", format="int4-g32", calibration=calibration(text=text(windows=1)))
    assert made.calibration is not None
    assert made.calibration.held_out_kld is None


def test_nothing_to_calibrate(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no matrix that is to be quantized"):
        fewbits.quantize(deep, tmp_path / "out", format="fp16", calibration=calibration())


def test_gguf(tied: Path, tmp_path: Path) -> None:
    """Rows of queries and keys change places in GGUF; what was solved must follow."""
    out = tmp_path / "out.gguf"
    fewbits.quantize(tied, out, format="q4_0", calibration=calibration())
    assert fewbits.verify(out, against=tied, logits=False).passed


@pytest.mark.parametrize("on_disk", [False, True])
def test_activations_hold_what_was_put(tmp_path: Path, on_disk: bool) -> None:
    states = torch.randn(5, 3, 4)
    kept = Activations(5, 3, 4, tmp_path / "states" if on_disk else None)
    for start in (3, 0):
        kept.put(start, states[start : start + 3])
    assert torch.equal(kept.span(0, 5), states)
    assert torch.equal(kept[4], states[4])
    assert [(start, len(batch)) for start, batch in kept.batches(2)] == [(0, 2), (2, 2), (4, 1)]
    kept.close()
    assert not (tmp_path / "states").exists()


def test_inputs_rounded_as_they_come(deep: Path, tmp_path: Path) -> None:
    """Dynamic scales need no text; the ledger and the files agree on what is rounded."""
    out = tmp_path / "out"
    made = fewbits.quantize(deep, out, format="int8", inputs="int8-token")
    assert made.calibration is None
    assert {t.inputs for t in made.tensors if t.fate == "quantized"} == {"int8-token"}
    assert fewbits.verify(out, against=deep).passed


@pytest.mark.parametrize("kind", ["compressed-tensors", "fewbits"])
def test_static_scales_and_a_cache_in_8_bits(deep: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    made = fewbits.quantize(
        deep, out, format="int8", inputs="int8-static", cache="fp8", kind=kind, calibration=calibration()
    )
    scales = {t.name for t in made.tensors if t.source == "calibration"}
    assert len(scales) == 6 * (7 + 2)
    assert "model.layers.5.self_attn.k_scale" in scales
    assert fewbits.verify(out, against=deep).passed


def test_a_static_scale_is_the_observers(deep: Path, tmp_path: Path) -> None:
    """By hand for the first layer's queries: the largest input over the calibration windows, over 127."""
    out = tmp_path / "out"
    fewbits.quantize(
        deep, out, format="int8", inputs="int8-static", kind="fewbits", calibration=calibration(observer="minmax")
    )
    model = fewbits.load(deep)
    seen: list[float] = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.inference_mode():
        model(input_ids=text().ids[:6])
    scale = open_checkpoint(out)[1].read("model.layers.0.self_attn.q_proj.input_scale").codes
    assert float(scale) == pytest.approx(max(seen) / 127, rel=1e-6)


def test_inputs_that_cannot_be_rounded(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no layer's inputs can be rounded to int8-token"):
        fewbits.quantize(deep, tmp_path / "out", format="int4-g32", inputs="int8-token")
    with pytest.raises(UnsupportedError, match="it can be int8 or fp8"):
        fewbits.quantize(deep, tmp_path / "out", format="int8", cache="int4")


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_rotated_model_predicts_the_same(tied: Path, tmp_path: Path, name: str) -> None:
    """In floating point, with tied weights that come apart; what remains is float32's rounding, ε·√(operations)."""
    out = tmp_path / name
    made = fewbits.quantize(tied, out, format="fp32", method="rotate")
    assert not any(t.fate == "quantized" for t in made.tensors)
    assert fewbits.verify(out, against=tied, logits=False).passed
    with torch.inference_mode():
        original, ours = (fewbits.load(path)(input_ids=text().ids).logits for path in (tied, out))
    assert torch.allclose(ours, original, atol=2e-5 * float(original.abs().max()))


def test_transforms_and_a_solver_together(tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = fewbits.quantize(tied, out, format="int4-g32", method="rotate+awq+gptq", calibration=calibration())
    assert made.method == "rotate+awq+gptq"
    assert {t.transformed for t in made.tensors if t.fate == "quantized"} == {True}
    found = fewbits.verify(out, against=tied)
    assert found.passed
    assert any("exact transform" in note for note in found.notes)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq+rtn", "both choose codes"),
        ("gptq+awq", "the order is transforms, one solver, finishers"),
        ("gptq+gptq", "both choose codes"),
        ("nonsense+gptq", "'nonsense' is not known"),
    ],
)
def test_recipes_that_make_no_sense(deep: Path, tmp_path: Path, method: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        fewbits.quantize(deep, tmp_path / "out", method=method)


def test_finished_by_training(deep: Path, tmp_path: Path) -> None:
    """What tune changed is in the files: the divergence reported is that of the model they hold."""
    made = fewbits.quantize(deep, tmp_path / "out", format="int3-g32", method="gptq+tune", calibration=calibration())
    assert made.calibration is not None
    assert fewbits.verify(tmp_path / "out", against=deep).passed
    assert made.calibration.held_out_kld == pytest.approx(divergence(deep, tmp_path / "out"), rel=1e-4)


def divergence(original: Path, other: Path) -> float:
    """On the held-out windows, nats a token."""
    models = [fewbits.load(path, packed=False) for path in (original, other)]
    with torch.inference_mode():
        p, q = (model(input_ids=text().ids[6:]).logits[:, :-1].double().log_softmax(-1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_auto_keeps_the_best(deep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    auto = Auto(minutes=5, candidates=("rtn", "gptq", "rotate+rtn"), steps=2, batch=2)
    made = fewbits.quantize(deep, out, format="int3-g32", method=auto, calibration=calibration())
    tried = {trial.recipe: trial.held_out_kld for trial in made.trials}
    assert {"rtn", "gptq", "rotate+rtn"} < set(tried)
    assert made.calibration is not None
    assert made.calibration.held_out_kld == min(found for found in tried.values() if found is not None)
    assert made.calibration.held_out_kld == pytest.approx(divergence(deep, out), rel=1e-4)
    assert tried[made.method] == made.calibration.held_out_kld
    assert not (tmp_path / "out.unfinished").exists()
    assert fewbits.verify(out, against=deep).passed


def test_auto_within_no_time_runs_one_recipe(deep: Path, tmp_path: Path) -> None:
    auto = Auto(candidates=("rtn", "gptq"))
    made = fewbits.quantize(
        deep, tmp_path / "out", format="int3-g32", method=auto, minutes=1e-6, calibration=calibration()
    )
    assert made.method == "rtn"
    assert [trial.note is None for trial in made.trials] == [True, False]
    with pytest.raises(UnsupportedError, match="only method auto"):
        fewbits.quantize(deep, tmp_path / "other", method="rtn", minutes=1)


@pytest.mark.parametrize("kind", ["compressed-tensors", "fewbits"])
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_experts(tmp_path: Path, kind: str, method: str) -> None:
    """One by one as compressed-tensors has them, and fused as the fewbits kind keeps them: all of them quantized."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(source, "mixtral", num_local_experts=4, num_experts_per_tok=2, hidden_size=64, intermediate_size=64)
    made = fewbits.quantize(source, out, format="int4-g32", method=method, kind=kind, calibration=calibration())
    experts = [t for t in made.tensors if ".experts." in t.name]
    assert len(experts) == 2 * 4 * 3
    assert {t.fate for t in experts} == {"quantized"}
    assert made.calibration is not None
    assert made.calibration.held_out_kld == pytest.approx(divergence(source, out), rel=1e-3)


def test_text_unlike_the_calibration_text_is_warned_of(shared_models: Path, shared_text: Path, tmp_path: Path) -> None:
    """Calibrated on books; an encyclopedia is something else, other books are not."""
    model, out = shared_models / "books", tmp_path / "out"
    calibrated = fewbits.Calibration(text=shared_text / "books-calib.txt", windows=32, held_out=2)
    fewbits.quantize(model, out, format="int8", method="rtn", calibration=calibrated, prove=False)
    unlike, alike = (
        calibration_warning(out, model, calibration_windows(shared_text / name, model, 24))
        for name in ("wikitext2-valid.txt", "books-valid.txt")
    )
    assert unlike is not None
    assert "unlike the evaluation text" in unlike
    assert alike is None


def test_auto_needs_text_to_compare_on(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="auto compares recipes on held-out text"):
        fewbits.quantize(
            deep, tmp_path / "out", format="int4-g32", method="auto", calibration=calibration(text=text(windows=1))
        )


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    """/dev/full takes nothing; states that were not kept must not be read as if they had been."""
    kept = Activations(4, 64, 64, tmp_path / "states")
    assert kept._file is not None
    kept._file.close()
    kept._file = Path("/dev/full").open("r+b")  # noqa: SIM115
    with pytest.raises(OutputError, match="No space left"):
        kept.put(0, torch.ones(4, 64, 64))
    kept.close()
    short = Activations(2, 3, 4, tmp_path / "short")
    short.put(0, torch.ones(1, 3, 4))
    with pytest.raises(OutputError, match="shorter than what was written"):
        short.span(0, 2)
    short.close()


def test_auto_leaves_another_runs_unfinished_blocks_alone(deep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Journal(unfinished(out), {"method": "another"}, {}):
        (unfinished(out) / "block-00000.safetensors").touch()
    with pytest.raises(OutputError, match="unfinished run with another"):
        fewbits.quantize(
            deep, out, format="int3-g32", method=Auto(candidates=("rtn",), steps=1), calibration=calibration()
        )
    assert (unfinished(out) / "block-00000.safetensors").exists()


def held_out(out: Path, method: str | Recipe, written: Windows) -> float:
    """What a method leaves at 2 bits on windows that nothing was calibrated on, nats a token."""
    text = fewbits.Calibration(text=written, windows=16, held_out=4, limit=10.0)
    made = fewbits.quantize(BUNDLED, out, format="int2-g64", method=method, calibration=text, prove=False)
    assert made.calibration is not None
    assert made.calibration.held_out_kld is not None
    return made.calibration.held_out_kld


@pytest.fixture(scope="module")
def written() -> Windows:
    """Text by the bundled model: enough for the differences between methods to show."""
    return calibration_windows("self", BUNDLED, 20, 64)


@pytest.fixture(scope="module")
def rounded(written: Windows, tmp_path_factory: pytest.TempPathFactory) -> float:
    return held_out(tmp_path_factory.mktemp("rounded") / "out", "rtn", written)


@pytest.mark.parametrize("method", ["gptq", "gptq-fast", "signround", "awq+gptq", "rtn+tune"])
def test_methods_earn_their_time_on_a_real_model(method: str, rounded: float, written: Windows, tmp_path: Path) -> None:
    chosen = recipe_named(method)
    if isinstance(chosen.solver, SignRound):
        chosen = replace(chosen, solver=replace(chosen.solver, steps=30, batch=4))
    assert held_out(tmp_path / "out", chosen, written) < 6 / 7 * rounded
