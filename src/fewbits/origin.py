"""Where a result comes from: the command that runs, and the versions of what it runs on.

The command line says what it was called with (`running`), and ledgers and reports write it down; a result of a Python
program has no command.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fewbits", "torch", "transformers", "safetensors", "compressed-tensors", "gguf", "numpy")

_command: ContextVar[str | None] = ContextVar("command", default=None)


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """Inside, `command()` is `fewbits` with these arguments."""
    token = _command.set(shlex.join(["fewbits", *arguments]))
    try:
        yield
    finally:
        _command.reset(token)


def command() -> str | None:
    """The command that runs, as a shell reads it; None outside the command line."""
    return _command.get()


def versions() -> dict[str, str]:
    """Name -> version: Python, the packages that results depend on, the system and the processor."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # reading its files does without
            continue
    return found | {"system": f"{platform.system()} {platform.machine()}", "processor": processor()}


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    return _model() or platform.processor() or platform.machine()


def _model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
