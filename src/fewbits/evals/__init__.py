"""How good a model still is: divergence from its original, perplexity, tasks."""

from __future__ import annotations

from fewbits.evals.calibration import calibration_windows
from fewbits.evals.divergence import kl_divergence
from fewbits.evals.evaluation import Progress, evaluate
from fewbits.evals.reference import model_identity
from fewbits.evals.tasks import run_tasks
from fewbits.evals.text import Windows, read_windows, self_text
from fewbits.evals.unlikeness import Unlikeness, unlikeness

__all__ = [
    "Progress",
    "Unlikeness",
    "Windows",
    "calibration_windows",
    "evaluate",
    "kl_divergence",
    "model_identity",
    "read_windows",
    "run_tasks",
    "self_text",
    "unlikeness",
]
