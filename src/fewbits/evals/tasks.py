"""Benchmark tasks (multiple choice, mathematics, …) through EleutherAI's lm-evaluation-harness, an optional extra.

Task data sets are downloaded by the harness unless they are on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewbits.engine import load
from fewbits.errors import UnsupportedError
from fewbits.evals.tokenizer import tokenizer_of


def run_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The harness's results for each task: metric -> value, with its standard error.

    limit: examples per task, all if None. Raises UnsupportedError if lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnsupportedError("tasks need lm-eval, which is missing; run: pip install 'fewbits[eval]'") from error
    model = load(path, device=device, dtype=dtype, packed=False)
    tokenizer = tokenizer_of(Path(path))
    harness = HFLM(pretrained=model, tokenizer=tokenizer)
    results: dict[str, Any] = simple_evaluate(model=harness, tasks=list(tasks), limit=limit)["results"]
    return results
