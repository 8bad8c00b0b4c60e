"""Qwen3: Yang et al. 2025 (arXiv:2505.09388). Qwen2 with norms of queries and keys in place of biases."""

from __future__ import annotations

from fewbits.engine.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Norms of queries and keys are in the checkpoint."""

    model_type = "qwen3"
