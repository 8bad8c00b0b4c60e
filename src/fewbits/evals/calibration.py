"""Text to calibrate on: what the model writes itself, or any text that `read_windows` reads.

`self` is the default, because it needs no download and cannot be unlike what the model knows: the method of Williams
and Aletras ("Self-calibration for language model quantization and pruning", 2024) and of LLM-QAT (Liu et al. 2023,
section 3.1). Every window starts with the token that begins a text, and every token is drawn at temperature 1.

On a model of 11.5 M weights that was trained on books, 128 windows of its own text did as well as 128 windows of other
books: mean KL divergence on a third text 0.0022 against 0.0024 with GPTQ at int4-g128; with another library's GPTQ
0.0031 against 0.0031, and 0.088 against 0.090 at int2-g64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from fewbits.checkpoint import open_checkpoint
from fewbits.engine import load
from fewbits.errors import UnsupportedError
from fewbits.evals.text import LENGTH, Windows, read_windows, self_text
from fewbits.evals.tokenizer import tokenizer_of

WINDOWS = 128
SELF = "self"


def calibration_windows(
    source: str | Path,
    model: str | Path,
    windows: int = WINDOWS,
    length: int = LENGTH,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Windows:
    """Up to `windows` windows of `length` tokens from a source: `self`, or what `read_windows` takes.

    model: folder of the original, whose tokenizer is used, or its GGUF file. Only `self` loads the
    model, whole and in float32, and frees it before it returns. seed: of what the model draws.
    Raises CheckpointError for a text that cannot be read or is too short, UnsupportedError where reading it needs a
    package that is missing, or `self` a token to begin with that the model does not have, or more memory than is free.
    """
    if str(source) == SELF:
        _require_room(Path(model), torch.device(device))
        found = self_text(load(model, device=device), windows, length, seed, progress)
    else:
        tokenizer = tokenizer_of(Path(model))
        found = read_windows(source, tokenizer, windows, length)
    return replace(found, source=str(source))


def _require_room(model: Path, device: torch.device) -> None:
    """Refuse, before anything is read, to load a model that would push everything else out of memory."""
    _, reader = open_checkpoint(model)
    needed = 4 * sum(entry.weights for entry in reader.entries.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UnsupportedError(
            f"{model}: to write its own calibration text it would be loaded whole, {needed / 1e9:.1f} GB in float32, "
            f"and {free / 1e9:.1f} GB are free; name a text: --calibration FILE"
        )
