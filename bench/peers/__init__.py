"""Quantizers beside each other, each in a virtual environment of its own: one file a peer, run by `run`.

The runners are `harness.main`'s; this file must not import any of them, nor anything that a peer's environment lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MODULES = {
    "fewbits": "ours",
    "llm-compressor": "llm_compressor",
    "gptqmodel": "gptqmodel",
    "auto-round": "autoround",
    "hqq": "hqq",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}


@dataclass(frozen=True)
class Order:
    """Whom to run, how, and at which width. options: the runner's."""

    who: str
    bits: int
    group: int
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one process reported. process_seconds: from start to end, imports, loading and saving included."""

    package: str
    seconds: float
    cpu_seconds: float
    peak_mb: float
    process_seconds: float


class RunError(Exception):
    """A runner ended with an error; the message is the last of what it printed."""


def run(order: Order, python: str, model: Path, out: Path, ids: Path, *, save: bool = True) -> Run:
    """Run one order to its end in a process of its own, in an empty folder. Raises RunError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        done = subprocess.run(
            command(order, python, model.resolve(), out.resolve(), ids.resolve(), save=save),
            cwd=scratch,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
    reports = [line for line in done.stdout.splitlines() if line.startswith('{"package"')]
    if done.returncode or not reports:
        raise RunError("\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]))
    return Run(**json.loads(reports[-1]), process_seconds=seconds)


def command(order: Order, python: str, model: Path, out: Path, ids: Path, *, save: bool) -> list[str]:
    given = [part for name, value in order.options.items() for part in ("--option", f"{name}={value}")]
    width = ["--bits", str(order.bits), "--group", str(order.group), "--ids", str(ids)]
    module = f"peers.{MODULES[order.who]}"
    return [python, "-m", module, str(model), str(out), *width, *given, *([] if save else ["--no-save"])]


def environment() -> dict[str, str]:
    """Offline, with this package to import, and with as many GPTQModel workers as there are cores."""
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": str(os.cpu_count() or 1),
    }


def pythons(given: list[str]) -> dict[str, str]:
    """NAME=PATH options as a table, and our own interpreter. Raises SystemExit for a name that is no peer's."""
    found = {"fewbits": sys.executable} | dict(option.split("=", 1) for option in given)
    unknown = sorted(found.keys() - MODULES.keys())
    if unknown:
        raise SystemExit(f"--peer {unknown[0]}: not known; there are {', '.join(sorted(MODULES.keys() - {'fewbits'}))}")
    return found
