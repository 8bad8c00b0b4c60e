"""Programs of every family on the compiled runner: against the references, and against itself run in another way.

Results of the compiled runner do not depend on threads or on which rows are run together, so these comparisons are of
bits. The references add in another order, by the last bits of float32. Where such a number is then rounded (inputs to
INT8, keys and values to the cache's type) it may lie on the other side of a tie and its code be one step away. What
that does is bounded by what rounding does: `noise` is how far the references' logits are from those without any
rounding. Rounding moves every number by up to half a step, a tie one number by a step, so no logit may be further off
than twice the largest noise, and, as ties are few, all together not by half as much as noise is.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, A, B, keep, rows, two_texts
from tiny import save_model

from fewbits.engine.composing import compose
from fewbits.engine.tiling import tiled
from fewbits.formats import FORMATS, QTensor
from fewbits.runtime.compiled import CompiledRunner, compiled, targets
from fewbits.runtime.ops import Experts, Linear, Op, Program
from fewbits.runtime.reference import ReferenceRunner
from fewbits.runtime.runner import Runner
from fewbits.runtime.tiles import BLOCK, PANEL, Floats, Tiles, Weight, blocks, decode

pytestmark = pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")

TOLERANCE = 2 * 20 * 64**0.5 * 2.0**-24
"""Of the largest logit, as in test_families: both sides add 64 terms in 20 products one behind the other."""
BOTH = [targets()[0], "generic"] if targets() else []
SLOTS, CONTEXT = 2, 32
KV = ("f16", "int8", "int4")
GROUPS = {"int4-g32": 32, "q4_k": 256}
"""What the formats' columns must be multiples of."""


def quantized(name: str) -> Callable[[Weight], Weight]:
    """What makes a weight one of that format, and leaves alone those whose shape it does not hold."""
    format = FORMATS[name]

    def quantize(weight: Weight) -> Weight:
        if weight.columns % GROUPS[name]:
            return weight
        return tiled(QTensor(format, *format.plain(torch.from_numpy(decode(weight)))))

    return quantize


def widened(settings: dict[str, Any], group: int) -> dict[str, Any]:
    """Settings with every width that a group divides."""
    widths = {"hidden_size": max(32, group), "intermediate_size": max(64, group)}
    experts = {key: max(32, group) for key in settings if key.endswith("intermediate_size")}
    return settings | widths | experts


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Callable[..., Program]:
    """The program of a case, its weights as they are or in some format."""

    @lru_cache
    def made(case: str, format: str | None = None) -> Program:
        kind, settings = copy.deepcopy(CASES[case])
        folder: Path = tmp_path_factory.mktemp("models") / "m"
        save_model(folder, kind, **settings if format is None else widened(settings, GROUPS[format]))
        return compose(folder, keep if format is None else quantized(format)).program

    return made


def on(program: Program, kv: str = "f16", threads: int = 1, target: str = "") -> CompiledRunner:
    return CompiledRunner(program, SLOTS, CONTEXT, kv, threads, target)


def told(runner: Runner) -> np.ndarray:
    return np.concatenate(two_texts(runner))


def assert_agrees(found: np.ndarray, program: Program, kv: str) -> None:
    expected = told(ReferenceRunner(program, SLOTS, CONTEXT, kv))
    noise = np.abs(expected - told(ReferenceRunner(program, SLOTS, CONTEXT, "f32", exact=True)))
    off, order = np.abs(found - expected), TOLERANCE * np.abs(expected).max()
    assert off.max() <= order + 2 * noise.max()
    assert off.mean() <= order + noise.mean() / 2


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("format", [None, "int4-g32"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_what_the_references_do(case, format, target, program):
    assert_agrees(told(on(program(case, format), target=target)), program(case, format), "f16")


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2-moe"])
def test_two_levels_of_scales_compute_what_the_references_do(case, target, program):
    found = program(case, "q4_k")
    assert sum(isinstance(w, Tiles) for op in found.ops if isinstance(op, Linear) for w in op.weights) >= 8
    assert_agrees(told(on(found, target=target)), found, "f16")


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("case", ["mistral", "gemma2", "phi3", "qwen3-moe"])
def test_rounded_keys_and_values_do_too(case, kv, program):
    assert_agrees(told(on(program(case), kv)), program(case), kv)


def one_by_one(runner: Runner, slot: int, text: np.ndarray) -> np.ndarray:
    found = [runner.forward(text[i : i + 1], *rows(slot, i, i + 1), rows(0, 0, 1)[1]) for i in range(len(text))]
    return np.concatenate(found)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize(("case", "kv"), [("gemma2", "int8"), ("qwen2-moe", "f16"), ("mistral", "int4")])
@pytest.mark.parametrize("format", [None, "int4-g32"])
def test_rows_and_sequences_change_no_bit(case, format, kv, target, program):
    """Two texts together, each by itself in one call, and token after token."""
    together = two_texts(on(program(case, format), kv, target=target))
    for slot, text in enumerate((A, B)):
        slots, at = rows(slot, 0, len(text))
        assert np.array_equal(on(program(case, format), kv, target=target).forward(text, slots, at, at), together[slot])
        assert np.array_equal(one_by_one(on(program(case, format), kv, target=target), slot, text), together[slot])


@pytest.mark.parametrize("case", CASES)
def test_threads_change_no_bit(case, program):
    expected = told(on(program(case, "int4-g32")))
    for threads in (2, 3):
        assert np.array_equal(told(on(program(case, "int4-g32"), threads=threads)), expected)


def test_only_wanted_rows_come_back_in_their_order(program):
    runner, (slots, at) = on(program("mixtral")), rows(0, 0, len(A))
    every = runner.forward(A, slots, at, at)
    for wanted in ([3], [5, 0, 5], []):
        found = runner.forward(A, slots, at, np.array(wanted, np.int32))
        assert np.array_equal(found, every[wanted])
    assert runner.forward(*(at[:0],) * 4).shape == (0, runner.vocabulary)


@pytest.mark.parametrize("kv", KV)
def test_going_back_forgets_what_came_behind(kv, program):
    runner, (slots, at) = on(program("mistral"), kv), rows(0, 0, len(A))
    expected = runner.forward(A, slots, at, at)
    runner.forward(A[::-1].copy(), slots, at, at)
    runner.forward(A[:5], slots[:5], at[:5], at[:5])
    assert np.array_equal(runner.forward(A[5:], slots[5:], at[5:], at[: len(A) - 5]), expected[5:])
    runner.copy(0, 1, 7)
    assert np.array_equal(runner.forward(A[7:], slots[7:] + 1, at[7:], at[: len(A) - 7]), expected[7:])


def routed(program: Program, logits: list[float], top_k: int) -> Program:
    """The program with routers that give every row the same logits."""

    def changed(op: Op) -> Op:
        if isinstance(op, Experts):
            return dataclasses.replace(op, top_k=top_k)
        if isinstance(op, Linear) and op.outs in routers:
            columns = op.weights[0].columns
            nothing = Floats(len(logits), columns, "f32", np.zeros((1, blocks(columns) * BLOCK, PANEL), np.float32))
            return dataclasses.replace(op, weights=(nothing,), biases=(np.array(logits, np.float32),))
        return op

    routers = {(op.router,) for op in program.ops if isinstance(op, Experts)}
    return dataclasses.replace(program, ops=tuple(changed(op) for op in program.ops))


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize(
    ("logits", "top_k"),
    [([0.0, 3.0, 0.0, 0.0], 1), ([2.0, -90.0, 1.0, -90.0], 2), ([1.0] * 4, 2), ([1.0] * 4, 4)],
    ids=["all rows to one", "none to two", "a tie", "all rows to all"],
)
@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("format", [None, "int4-g32"])
def test_experts_with_all_rows_and_with_none(format, case, logits, top_k, target, program):
    found = routed(program(case, format), logits, top_k)
    assert_agrees(told(on(found, threads=2, target=target)), found, "f16")


BAD: dict[str, tuple[tuple[list[int], list[int], list[int], list[int]], str]] = {
    "token": (([400], [0], [0], [0]), "token 400 is not one of 0 … 399"),
    "token below": (([-1], [0], [0], [0]), "token -1 "),
    "slot": (([1], [2], [0], [0]), "slot 2 is not one of 0 … 1"),
    "position": (([1], [0], [CONTEXT], [0]), "position 32 is not one of 0 … 31"),
    "position below": (([1], [0], [-1], [0]), "position -1 "),
    "context overflow": (([1, 2], [0, 0], [31, 32], [0]), "position 32 "),
    "wanted": (([1], [0], [0], [1]), "wanted row 1 is not one of 0 … 0"),
    "gap": (([1, 2], [0, 0], [0, 2], [0]), "consecutive"),
    "lengths": (([1, 2], [0], [0, 1], [0]), "differ"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_there_is_refused_with_its_number(what, program):
    (tokens, slots, positions, wanted), message = BAD[what]
    found = dataclasses.replace(program("llama"))
    runner = on(found)
    tokens[:] = [found.vocabulary if token == 400 else token for token in tokens]
    message = message.replace("400", str(found.vocabulary)).replace("399", str(found.vocabulary - 1))
    before = told(runner)
    with pytest.raises(ValueError, match=message):
        runner.forward(*(np.array(x, np.int32) for x in (tokens, slots, positions, wanted)))
    assert np.array_equal(told(runner), before)


def test_impossible_runners_are_refused(program):
    with pytest.raises(ValueError, match=r"-1 threads"):
        on(program("llama"), threads=-1)
    with pytest.raises(MemoryError, match=r"\d{12,} bytes were asked for"):
        CompiledRunner(program("llama"), 1 << 20, 1 << 24)


def test_runners_of_several_threads_do_not_disturb_one_another(program):
    """Four Python threads, each with a runner of three; short programs, so that much of it is meeting."""
    cases = ("llama", "mixtral", "gemma2", "qwen3")
    expected = {case: told(on(program(case))) for case in cases}

    def often(case: str) -> bool:
        runner = on(program(case), threads=3)
        return all(np.array_equal(told(runner), expected[case]) for _ in range(15))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, cases))


def test_one_runner_may_be_called_by_several_threads(program):
    """One call after the other; each thread has a slot of its own."""
    runner, alone = on(program("mistral"), threads=2), on(program("mistral"))
    expected = {slot: one_by_one(alone, slot, text) for slot, text in enumerate((A, B))}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda slot: [one_by_one(runner, slot, (A, B)[slot]) for _ in range(10)], (0, 1))
        for slot, texts in enumerate(found):
            assert all(np.array_equal(text, expected[slot]) for text in texts)


def test_runners_end_while_their_threads_spin_or_sleep(program):
    for calls in (0, 1, 2):
        for _ in range(20):
            runner = on(program("llama"), threads=4)
            for _ in range(calls):
                one_by_one(runner, 0, A[:1])
            del runner
    gc.collect()
