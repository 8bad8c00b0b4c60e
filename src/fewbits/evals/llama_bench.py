"""llama.cpp's own benchmark as a peer: `llama-bench`, run with the same load in the same round as ours.

It is given prompt and new tokens and threads, and prints a JSON array with one object a test. We take `avg_ts`, tokens
a second: of the test with `n_prompt` and without `n_gen` the prefill, of the other one the decode. Before each test it
warms up by itself. Keys and values are its FP16 whatever ours are. Its threads wait as its authors mean them to: our
own commands let OpenMP's threads sleep instead of spin (torch's must), which makes llama.cpp's several times slower.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, UnsupportedError

NAME = "llama-bench"
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables that are set for torch, and not meant for llama.cpp."""


@dataclass(frozen=True)
class Rates:
    """What one run found: tokens a second, None for a test that was not asked for, and which build it was."""

    prefill: float | None
    decode: float | None
    build: str


@dataclass(frozen=True)
class LlamaBench:
    """The program, and the GGUF file that it runs."""

    program: Path
    model: Path

    def run(self, prompt_tokens: int, new_tokens: int, threads: int) -> Rates:
        """One run of both tests; 0 tokens leaves one out.

        Raises UnsupportedError, with its last lines, where it fails or prints something else than its JSON.
        """
        sizes = {"-p": prompt_tokens, "-n": new_tokens, "-t": threads, "-r": 1}
        options = [str(part) for pair in sizes.items() for part in pair]
        command = [str(self.program), "-m", str(self.model), *options, "-o", "json"]
        own = {name: value for name, value in os.environ.items() if name not in OURS}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=own, check=False)
        if done.returncode:
            raise UnsupportedError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:].strip()}")
        rates = parsed(done.stdout)
        if (prompt_tokens and rates.prefill is None) or (new_tokens and rates.decode is None):
            raise UnsupportedError(f"{' '.join(command)} left out a test that it was asked for; take another build")
        return rates


def found(model: Path, program: Path | None = None) -> LlamaBench:
    """The program at that path, or the one on PATH.

    Raises UnsupportedError where it is not there, CheckpointError where the model is not.
    """
    name = shutil.which(program or NAME)
    if name is None:
        place = "on PATH" if program is None else f"a program at {program}"
        raise UnsupportedError(
            f"{NAME} is not {place}; build it from llama.cpp (https://github.com/ggml-org/llama.cpp, "
            f"cmake --build build --target {NAME}) and name it with --{NAME} PATH"
        )
    if not model.is_file():
        raise CheckpointError(f"{model} is no file; {NAME} runs a GGUF file")
    return LlamaBench(Path(name), model)


def parsed(text: str) -> Rates:
    """The rates in what it printed. Raises UnsupportedError where that is not its JSON."""
    try:
        tests = json.loads(text)
        build = f"{NAME} {tests[0]['build_commit']}"
        return Rates(_rate(tests, without="n_gen"), _rate(tests, without="n_prompt"), build)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UnsupportedError(
            f"{NAME} printed no JSON array of tests ({type(error).__name__}: {error}): {text[:200]!r}; "
            "take a build that knows -o json"
        ) from error


def _rate(tests: list[dict[str, Any]], *, without: str) -> float | None:
    rates = [float(test["avg_ts"]) for test in tests if test[without] == 0]
    return rates[0] if rates else None
