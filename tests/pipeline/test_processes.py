"""Two processes that train together come to what one comes to, and fail, stop and write as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import fewbits
from fewbits.errors import UnsupportedError
from fewbits.pipeline import _qlora
from fewbits.pipeline._journal import unfinished
from fewbits.pipeline._qlora import Qlora, train_qlora
from fewbits.results import AdapterTraining
from fewbits.train import Length

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
SCRIPT = Path(__file__).with_name("two_processes.py")
SHARDED = {  # what `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy …` says
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
}
STEPS, RATE = 3, Qlora().rate


def samples(folder: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i + 1}."} for i in range(40)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_two(folder: Path, **more: str) -> list[dict[str, Any]]:
    """What the script found in each process."""
    samples(folder)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two(folder)


def in_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterTraining:
    """One process that takes as many windows at a time as two."""
    monkeypatch.setattr(_qlora, "multiplies_bf16", lambda device: False)
    qlora = Qlora(length=Length(None, STEPS), window=32, batch=2, rank=4)
    return train_qlora(TINY, folder / "one", data=samples(folder), qlora=qlora)


def require_same(found: Path, expected: Path) -> None:
    """Adapters of the same windows.

    A gradient is a sum over some hundred tokens, in another order, so it may differ by a hundred roundings of 2⁻²⁴; in
    numbers that nearly cancel, by a hundred times as much of what is left. AdamW divides a gradient by its own size, so
    that is the share of a step of `RATE` that may be another one. (Gradients that are not averaged miss whole steps.)
    """
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys()
    within = STEPS * RATE * 100 * 100 * 2**-24
    assert max(_distance(a[name], b[name]) for name in a) <= within


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_two_processes_come_to_what_one_comes_to(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = two
    one = in_one(tmp_path, monkeypatch)
    require_same(folder / "averaged", tmp_path / "one")
    for each in found:
        result = each["averaged"]
        assert (result["steps"], result["tokens"]) == (one.steps, one.tokens)
        assert result["before"] == pytest.approx(one.before, rel=1e-5)
        assert result["after"] == pytest.approx(one.after, rel=1e-5)
    assert not unfinished(folder / "averaged").exists()


def test_what_one_process_finds_stops_both(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (main, other) = two
    assert main["there already"]["error"] == "OutputError"
    assert other["there already"]["error"] == "ElsewhereError"
    assert other["no number"]["error"] == "QualityError"
    assert "the loss is nan at step" in other["no number"]["message"]
    assert main["no number"]["error"] == "ElsewhereError"
    assert not (folder / "none").exists()


def test_ctrl_c_in_one_process_stops_both_and_both_go_on(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """To the same bytes as without."""
    folder, found = two
    assert [each["interrupted"]["steps"] for each in found] == [STEPS, STEPS]
    weights = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("averaged", "interrupted")]
    assert weights[0] == weights[1]


def test_both_end_by_the_same_clock(two: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = two
    assert [each["minutes"]["steps"] for each in found] == [1, 1]


def test_quantization_aware_training_in_two(two: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (main, other) = two
    assert main["qat"] == other["qat"]
    assert (main["qat"]["steps"], main["qat"]["tokens"]) == (2, 2 * 2 * 32)
    assert fewbits.load(folder / "qat").lm_head.weight.isfinite().all()


def test_a_sharded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process keeps half of the packed bytes, but for rows that two do not divide."""
    found = in_two(tmp_path, **SHARDED)
    in_one(tmp_path, monkeypatch)
    require_same(tmp_path / "sharded", tmp_path / "one")
    whole = found[0]["sharded"]["whole"]
    assert sum(each["sharded"]["here"] for each in found) == whole > 0
    assert all(each["sharded"]["here"] <= 0.51 * whole for each in found)
    assert "accelerators only" in found[0]["refused"]["message"]
    assert "leave --use_fsdp out" in found[0]["qat"]["message"]
    assert found[1]["qat"]["error"] == "ElsewhereError"


def test_an_environment_that_does_not_say_how_they_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UnsupportedError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        train_qlora(TINY, tmp_path / "out", data=samples(tmp_path), qlora=replace(Qlora(), batch=1))
