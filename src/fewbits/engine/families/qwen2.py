"""Qwen2 and 2.5: Yang et al. 2024 (arXiv:2407.10671). Llama with biases on q, k and v, and windows in some layers."""

from __future__ import annotations

from typing import Any

from fewbits.engine.families._decoder import Decoder, window_of_kind


class Qwen2(Decoder):
    """Llama with windows in some layers; biases are in the checkpoint."""

    model_type = "qwen2"

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_kind(config, layer)
