"""From a checkpoint's path to a runner, and what its text side is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.errors import UnsupportedError
from fewbits.runtime.runner import Runner


def open_runner(
    path: Path, *, slots: int, context: int | None, kv: str, threads: int | None, cache: bool
) -> tuple[Runner, dict[str, Any]]:
    """A runner, and config, tokenizer (the text of tokenizer.json), tokenizer_config and generation_config."""
    from fewbits.engine.text_files import text_files
    from fewbits.engine.transformers_runner import TransformersRunner

    if kv != "f16":
        raise UnsupportedError(f"{path}: transformers keeps keys and values as they are, not in {kv}; leave kv at f16")
    files = text_files(path)
    runner = TransformersRunner(path, slots=slots, reason="nothing else is there yet", context=context, threads=threads)
    return runner, files
