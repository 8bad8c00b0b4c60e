"""How fast a model runs, beside what the machine can do at most, and beside llama.cpp.

The runner is called as the engine calls it, with tokens drawn at random: a prompt, then tokens one after the other from
an empty context, in one sequence and in several at once. Nothing is chosen from the logits, since neither does
llama-bench; before each measurement the same work is done once, or a part of it, untimed, as it does too.

Everything is measured once a round: ours, the limits of the machine and the peer alternate, so that whatever else the
machine does falls on all of them. Figures are medians over the rounds, ratios medians of each round's own ratio.

Two limits (the roofline: Williams, Waterman and Patterson 2009). Decoding reads every weight once a token, so its rate
times their bytes is at most the bandwidth of memory. A prompt multiplies each weight with every token, so its rate
times their operations is at most what the processor's integer instructions do. Reading of keys and values, attention,
norms and rounding of inputs count for nothing there: they are part of what keeps the share below one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewbits.engine.first_token import prefill
from fewbits.engine.opening import open_runner
from fewbits.errors import RequestError, UnsupportedError
from fewbits.evals.llama_bench import LlamaBench
from fewbits.results import Benchmark, Measured, Peer, Roofline, Together
from fewbits.runtime.compiled import CompiledRunner, compiled, cores
from fewbits.runtime.ops import Experts, Linear, Program, Select
from fewbits.runtime.reference import ReferenceRunner
from fewbits.runtime.runner import MOST_ROWS, Runner
from fewbits.runtime.tiles import Tiles, Weight

SEED = 0
FIRST_PROMPT = 16
"""Tokens of the prompt behind which the first token is timed."""
READ = 1 << 29
"""Bytes whose reading tells the bandwidth: more than most machines' caches."""
TRIES = 3
"""Measurements of a limit in a round."""

Say = Callable[[str], None]
Round = Mapping[str, float]


@dataclass(frozen=True)
class Load:
    """What is measured. sequences: how many are decoded together, one figure each.

    context: of each sequence, by default as many tokens as it takes. threads: one for each core by default.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    sequences: tuple[int, ...] = (1, 8)
    runs: int = 3
    context: int | None = None
    kv: str = "f16"
    threads: int | None = None

    def check(self) -> None:
        """Raise RequestError for numbers that cannot be measured."""
        for name in ("prompt_tokens", "new_tokens", "runs", "context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name.replace('_', ' ')}: {value} is not at least 1")
        for count in self.sequences:
            if not 1 <= count <= MOST_ROWS:
                raise RequestError(f"{count} sequences cannot be decoded together; ask for 1 to {MOST_ROWS}")
        for name, needed in (("the prompt has", self.prompt_tokens), ("there are to be", self.new_tokens)):
            if self.context is not None and needed > self.context:
                raise RequestError(f"{name} {needed} tokens, and the context holds {self.context}; ask for fewer")

    @property
    def tokens(self) -> int:
        """The context of each sequence."""
        return self.context or max(self.prompt_tokens, self.new_tokens, FIRST_PROMPT + 1)

    @property
    def slots(self) -> int:
        return max((1, *self.sequences))


def benchmark(path: Path, load: Load, against: LlamaBench | None = None, say: Say = lambda _: None) -> Benchmark:
    """Measure a checkpoint. say: told of every round, when it is over.

    Raises RequestError for numbers that cannot be measured, and as opening does; UnsupportedError where the peer fails.
    """
    load.check()
    runner, _ = open_runner(path, slots=load.slots, context=load.tokens, kv=load.kv, threads=load.threads, cache=True)
    meter, rounds = Meter(path, load, runner, against), list[Round]()
    for i in range(load.runs):
        rounds.append(meter.round())
        rates = f"prefill {rounds[-1]['prefill']:.1f}, decode {rounds[-1]['decode']:.1f} tokens/s"
        say(f"round {i + 1} of {load.runs}: {rates}")
    return meter.summary(rounds)


class Meter:
    """One checkpoint's measurements, all of them once in a `round`."""

    def __init__(self, path: Path, load: Load, runner: Runner, against: LlamaBench | None) -> None:
        self._path, self._load, self._runner, self._against = path, load, runner, against
        self._threads = runner.threads if isinstance(runner, CompiledRunner) else load.threads or cores()
        self._tokens = np.random.default_rng(SEED).integers(0, runner.vocabulary, load.tokens, np.int32)
        self._memory: Mapping[str, int | None] = {}
        self._build = ""

    def round(self) -> dict[str, float]:
        """Every figure once, by name."""
        found = {"prefill": self.prefill()}
        found |= {f"decode {n}": self.decode(n) for n in {1, *self._load.sequences}}
        found |= {"decode": found["decode 1"], "first": self._first_token()}
        return found | self._limits(found) | self._peer(found)

    def prefill(self) -> float:
        """Tokens of a prompt a second."""
        tokens = self._tokens[: self._load.prompt_tokens]
        prefill(self._runner, tokens)
        start = time.perf_counter()
        prefill(self._runner, tokens)
        return len(tokens) / (time.perf_counter() - start)

    def decode(self, sequences: int) -> float:
        """New tokens a second of so many sequences together, each from an empty context."""
        count = self._load.new_tokens
        self._steps(sequences, 1)
        start = time.perf_counter()
        self._steps(sequences, count)
        return sequences * count / (time.perf_counter() - start)

    def _steps(self, sequences: int, count: int) -> None:
        slots = np.arange(sequences, dtype=np.int32)
        for position in range(count):
            tokens = self._tokens[(position + slots) % len(self._tokens)]
            self._runner.forward(tokens, slots, np.full(sequences, position, np.int32), slots)

    def _first_token(self) -> float:
        """Seconds from the start of a process to its first token; what it has in memory is kept."""
        prompt = self._tokens[: max(1, min(FIRST_PROMPT, self._load.tokens - 1))]
        seconds, self._memory = first_token(self._path, prompt, self._load)
        return seconds

    def _limits(self, found: Round) -> dict[str, float]:
        if not isinstance(self._runner, CompiledRunner):
            return {}
        nbytes, operations = work(self._runner.program)
        peak, bandwidth = limits(self._runner.target, self._threads)
        parts = {"bandwidth part": found["decode"] * nbytes / bandwidth}
        parts |= {"integer part": found["prefill"] * operations / peak}
        return {"bandwidth": bandwidth, "integer peak": peak} | parts

    def _peer(self, found: Round) -> dict[str, float]:
        if self._against is None:
            return {}
        rates = self._against.run(self._load.prompt_tokens, self._load.new_tokens, self._threads)
        assert rates.prefill is not None
        assert rates.decode is not None
        self._build = rates.build
        ratios = {"prefill ratio": found["prefill"] / rates.prefill, "decode ratio": found["decode"] / rates.decode}
        return {"peer prefill": rates.prefill, "peer decode": rates.decode} | ratios

    def summary(self, rounds: Listed[Round]) -> Benchmark:
        """Medians of all rounds."""
        figures = {name: measured([found[name] for found in rounds]) for name in rounds[0]}
        load, runner = self._load, self._runner
        return Benchmark(
            model=str(self._path),
            runner=runner_name(runner),
            threads=self._threads,
            kv=load.kv,
            context=load.tokens,
            prompt_tokens=load.prompt_tokens,
            new_tokens=load.new_tokens,
            runs=load.runs,
            prefill=figures["prefill"],
            decode=figures["decode"],
            together=tuple(Together(n, figures[f"decode {n}"]) for n in load.sequences if n > 1),
            first_token_seconds=figures["first"],
            weight_memory=self._memory["weights"],
            other_memory=self._memory["other"],
            cache_bytes=runner.cache_bytes if isinstance(runner, CompiledRunner) else None,
            roofline=self._roofline(figures),
            peer=self._compared(figures),
        )

    def _roofline(self, figures: Mapping[str, Measured]) -> Roofline | None:
        if not isinstance(self._runner, CompiledRunner):
            return None
        nbytes, operations = work(self._runner.program)
        bandwidth = figures["bandwidth"], figures["bandwidth part"]
        return Roofline(nbytes, *bandwidth, operations, figures["integer peak"], figures["integer part"])

    def _compared(self, figures: Mapping[str, Measured]) -> Peer | None:
        if self._against is None:
            return None
        names = ("peer prefill", "peer decode", "prefill ratio", "decode ratio")
        return Peer(self._build, str(self._against.model), *(figures[name] for name in names))


def first_token(path: Path, prompt: NDArray[np.int32], load: Load) -> tuple[float, dict[str, int | None]]:
    """Seconds from the start of a process to its first token behind a prompt, and its memory (`engine.first_token`).

    Raises UnsupportedError, with the process' last line, where it fails.
    """
    command = [sys.executable, "-m", "fewbits.engine.first_token", str(path), "--kv", load.kv]
    command += ["--tokens", *(str(token) for token in prompt), "--prompt-tokens", str(load.prompt_tokens)]
    command += ["--context", str(load.tokens), *([] if load.threads is None else ["--threads", str(load.threads)])]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.perf_counter() - start
            rest = process.stdout.read()
        if process.returncode:
            errors.seek(0)
            last = errors.read().rstrip().rpartition("\n")[2]
            raise UnsupportedError(f"{path}: a process that opens it ended with {process.returncode}: {last}")
    return seconds, json.loads(rest)


def limits(target: str, threads: int) -> tuple[float, float]:
    """Integer operations a second, and bytes read from memory a second: the most of `TRIES`, since it is a limit."""
    core = compiled()
    assert core is not None
    peak = max(core.integer_peak(target, threads) for _ in range(TRIES))
    return peak, max(core.read_bandwidth(target, threads, READ) for _ in range(TRIES))


def measured(values: Listed[float]) -> Measured:
    return Measured(statistics.median(values), min(values), max(values))


def runner_name(runner: Runner) -> str:
    """Which code runs a model, in words."""
    if isinstance(runner, CompiledRunner):
        return f"compiled kernels for {runner.target}"
    return "references in numpy" if isinstance(runner, ReferenceRunner) else "transformers"


def work(program: Program) -> tuple[int, int]:
    """Bytes of weights that are read for a decoded token, and integer operations for a prompt's token.

    Behind `Select` only tokens go on whose logits are asked for, of a prompt the last one: what is multiplied there is
    no work of the others. Matrices of floating-point numbers are read, and not multiplied as integers. Of experts those
    count that a token is given to; the row of the embeddings is left out.
    """
    nbytes = operations = 0.0
    selected = False
    for op in program.ops:
        selected |= isinstance(op, Select)
        for weight, share in _multiplied(op):
            nbytes += share * weight.nbytes
            if isinstance(weight, Tiles) and not selected:
                operations += share * 2 * weight.rows * weight.columns
    return round(nbytes), round(operations)


def _multiplied(op: object) -> list[tuple[Weight, float]]:
    """The matrices of an op, each with the share of tokens that are multiplied with it."""
    match op:
        case Linear(weights=weights):
            return [(weight, 1.0) for weight in weights]
        case Experts(gate=gate, up=up, down=down, top_k=top_k):
            return [(weight, top_k / len(gate)) for weight in (*gate, *up, *down)]
        case _:
            return []
