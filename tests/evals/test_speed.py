"""Speed: what is counted and called, by hand; how llama-bench is read, by what it printed; never how fast it was."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from toy import Toy

import fewbits
from fewbits.engine.first_token import prefill
from fewbits.errors import CheckpointError, RequestError, UnsupportedError
from fewbits.evals import speed
from fewbits.evals.llama_bench import LlamaBench, Rates, found, parsed
from fewbits.evals.speed import Load, Meter, benchmark, first_token, measured, runner_name, work
from fewbits.results import Benchmark, Measured
from fewbits.runtime.compiled import compiled
from fewbits.runtime.ops import Embed, Experts, Linear, Norm, Program, Select
from fewbits.runtime.tiles import Direct, Floats, Tiles

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
RECORDED = (Path(__file__).parent / "llama_bench.json").read_text(encoding="utf-8")
SMALL = Load(prompt_tokens=24, new_tokens=3, sequences=(1, 2), runs=1, threads=1)


def tiles(rows: int, columns: int) -> Tiles:
    """4 bits in groups of 32: half a byte a weight, and 2 bytes a group of a row."""
    blocks = columns // 32
    scale = Direct(np.ones((rows // 16, blocks, 16), np.float16))
    return Tiles(rows, columns, 4, 32, 8, np.zeros((rows // 16, blocks, 256), np.uint8), scale)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def peer(tmp_path: Path) -> LlamaBench:
    """A program that prints what llama-bench once did, and writes down what it was asked."""
    (tmp_path / "recorded.json").write_text(RECORDED)
    program = script(tmp_path / "llama-bench", f'echo "$@" >> {tmp_path}/asked; cat {tmp_path}/recorded.json')
    (tmp_path / "model.gguf").touch()
    return found(tmp_path / "model.gguf", program)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled model, where its cache may lie beside it; bandwidth from 4 MB, since nobody looks at it."""
    monkeypatch.setattr(speed, "READ", 1 << 22)
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


# what is counted


def test_work_by_hand() -> None:
    """512 weights a matrix: 256 bytes of codes and 16 scales, 1024 operations; half of them behind the selection."""
    inner, last = tiles(16, 32), tiles(16, 32)
    wide = Floats(16, 32, "f16", np.zeros((1, 32, 16), np.float16))
    ops = (
        Embed(wide, "x"),
        Norm("x", np.ones(32, np.float32), 1e-5, "h"),
        Linear("h", (inner, wide), ("q", "r"), (None, None)),
        Select("x", "y"),
        Linear("y", (last,), ("logits",), (None,)),
    )
    program = Program(ops, {"logits": 16}, 16, 1, 1, 16)
    each = 16 * 32 // 2 + 16 * 2
    assert work(program) == (2 * each + 16 * 32 * 2, 2 * 16 * 32)


def test_work_of_experts() -> None:
    """Two of four: half of three matrices for each."""
    stack = tuple(tiles(32, 32) for _ in range(4))
    program = Program((Experts("h", "r", "x", stack, stack, stack, top_k=2),), {"logits": 16}, 16, 1, 1, 16)
    assert work(program) == (2 * 3 * stack[0].nbytes, 2 * 3 * 2 * 32 * 32)


def test_a_prompt_goes_in_as_few_calls_as_it_takes() -> None:
    """For the last row's logits alone."""
    runner, seen = Toy(context=32, most_rows=8), []
    forward = runner.forward
    runner.forward = lambda *given: seen.append(given[3].tolist()) or forward(*given)
    prefill(runner, np.arange(20, dtype=np.int32) % 8)
    assert runner.calls == [8, 8, 4]
    assert seen == [[], [], [3]]
    assert runner.cache[0, :20].tolist() == [i % 8 for i in range(20)]


def test_decoding_starts_from_an_empty_context() -> None:
    """A row of each sequence, position after position, behind one step that is not timed."""
    runner = Toy(context=32, slots=3)
    assert Meter(Path("toy"), Load(8, 5, (3,)), runner, None).decode(3) > 0
    assert runner.calls == [3] * (1 + 5)
    assert (runner.cache[:, :5] >= 0).all()
    assert (runner.cache[:, 5:] == -1).all()


def test_medians() -> None:
    assert measured([3.0, 1.0, 2.0]) == Measured(2.0, 1.0, 3.0)
    assert runner_name(Toy()) == "transformers"


# benchmarks


@pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")
def test_a_benchmark(tiny: Path, peer: LlamaBench) -> None:
    """Each figure follows from others, or from the model's sizes: 4 layers of hidden 256 and 768 behind the gate."""
    lines: list[str] = []
    b = benchmark(tiny, SMALL, peer, lines.append)
    assert b.runner.startswith("compiled kernels for ")
    assert (b.threads, b.runs, b.context, len(lines)) == (1, 1, 24, 1)
    assert [together.sequences for together in b.together] == [2]
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    layer = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 768
    assert b.roofline is not None
    assert b.roofline.bytes_per_token == 2 * (4 * layer + 256 * vocabulary)
    assert b.roofline.operations_per_token == 0  # FP16 does not run on integers
    reached = b.decode.median * b.roofline.bytes_per_token / b.roofline.read_bandwidth.median
    assert b.roofline.bandwidth_part.median == pytest.approx(reached)
    assert b.cache_bytes == 2 * 2 * (4 * 2 * 64 * 2 * 64)  # 24 positions are kept in a block of 64
    assert b.first_token_seconds.median > 0
    assert b.other_memory is None or b.other_memory > b.cache_bytes
    assert b.weight_memory is None or b.weight_memory >= b.roofline.bytes_per_token
    assert b.peer is not None
    assert (b.peer.prefill.median, b.peer.decode.median) == tuple(test["avg_ts"] for test in json.loads(RECORDED))
    assert b.peer.decode_ratio.median == pytest.approx(b.decode.median / b.peer.decode.median)
    assert "-p 24 -n 3 -t 1 -r 1 -o json" in (peer.program.parent / "asked").read_text()


def test_medians_over_rounds(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round runs everything once; ratios are medians of each round's own, not the ratio of medians."""
    ours, theirs = iter([10.0, 20.0, 60.0]), iter([10.0, 40.0, 15.0])
    monkeypatch.setattr(Meter, "prefill", lambda _: 1.0)
    monkeypatch.setattr(Meter, "decode", lambda *_: next(ours))
    monkeypatch.setattr(speed, "first_token", lambda *_: (0.5, {"weights": None, "other": None}))
    monkeypatch.setattr(LlamaBench, "run", lambda *_: Rates(1.0, next(theirs), "a build"))
    b = benchmark(tiny, Load(8, 2, (1,), runs=3), LlamaBench(Path("program"), Path("model")))
    assert b.decode == Measured(20, 10, 60)
    assert b.peer is not None
    assert b.peer.decode == Measured(15, 10, 40)
    assert b.peer.decode_ratio == Measured(1, 0.5, 4)


def test_references_say_so_and_have_no_limits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_COMPILED", "0")
    monkeypatch.setattr("fewbits.runtime.compiled.compiled", lambda: None)
    b: Benchmark = benchmark(tiny, Load(4, 1, (1,), runs=1))
    assert b.runner == "references in numpy"
    assert (b.roofline, b.cache_bytes, b.peer, b.together) == (None, None, None, ())
    assert b.prefill.median > 0


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(prompt_tokens=600, context=512), "the prompt has 600 tokens, and the context holds 512"),
        (Load(prompt_tokens=8, new_tokens=65, context=64), "there are to be 65 tokens, and the context holds 64"),
        (Load(prompt_tokens=0), "prompt tokens: 0 is not at least 1"),
        (Load(runs=0), "runs: 0 is not at least 1"),
        (Load(sequences=(1, 513)), "513 sequences cannot be decoded together; ask for 1 to 512"),
    ],
)
def test_what_cannot_be_measured(load: Load, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        benchmark(TINY, load)


def test_a_prompt_longer_than_the_model_was_made_for(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="made for 1024 tokens, and a context of 1025"):
        benchmark(tiny, Load(prompt_tokens=1025))


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"ended with 1: .*nowhere"):
        first_token(tmp_path / "nowhere", np.zeros(2, np.int32), SMALL)


# llama-bench


def test_what_llama_bench_printed() -> None:
    tests = json.loads(RECORDED)
    assert [(test["n_prompt"], test["n_gen"]) for test in tests] == [(32, 0), (0, 8)]
    rates = parsed(RECORDED)
    assert (rates.prefill, rates.decode) == (tests[0]["avg_ts"], tests[1]["avg_ts"])
    assert rates.build == f"llama-bench {tests[0]['build_commit']}"
    assert parsed(json.dumps(tests[1:])).prefill is None
    for wrong in ("", "error: no model", "[]", '{"avg_ts": 1}', '[{"build_commit": "x"}]'):
        with pytest.raises(UnsupportedError, match="printed no JSON array of tests"):
            parsed(wrong)


def test_llama_bench_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.gguf"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"not on PATH; build it from llama\.cpp .* --llama-bench PATH"):
        found(model)
    with pytest.raises(UnsupportedError, match=r"not a program at .*nothing; build it"):
        found(model, tmp_path / "nothing")
    script(tmp_path / "llama-bench", "exit 3")
    with pytest.raises(CheckpointError, match=r"model\.gguf is no file"):
        found(model)
    model.touch()
    assert found(model).program == tmp_path / "llama-bench"


def test_llama_bench_waits_as_its_authors_mean(
    peer: LlamaBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # what the command line sets for torch
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    seen = '"${OMP_WAIT_POLICY-none} ${GOMP_SPINCOUNT-none}"'
    script(peer.program, f"echo {seen} >> {tmp_path}/seen; cat {tmp_path}/recorded.json")
    peer.run(8, 8, 1)
    assert (tmp_path / "seen").read_text() == "none none\n"


def test_llama_bench_leaves_a_test_out(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(json.loads(RECORDED)[:1]))
    bench = LlamaBench(script(tmp_path / "llama-bench", f"cat {tmp_path}/one.json"), tmp_path / "model.gguf")
    assert bench.run(32, 0, 1).decode is None
    with pytest.raises(UnsupportedError, match="left out a test"):
        bench.run(32, 8, 1)


def test_llama_bench_fails(tmp_path: Path) -> None:
    program = script(tmp_path / "llama-bench", "echo 'failed to load model' >&2; exit 3")
    with pytest.raises(UnsupportedError, match="ended with 3: failed to load model"):
        LlamaBench(program, tmp_path / "model.gguf").run(8, 8, 1)
