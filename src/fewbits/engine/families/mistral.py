"""Mistral 7B: Jiang et al. 2023 (arXiv:2310.06825). Llama; its first version has windows in all layers."""

from __future__ import annotations

from typing import Any

from fewbits.engine.families._decoder import Decoder, window_of_all


class Mistral(Decoder):
    """Llama with a window."""

    model_type = "mistral"

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_all(config)
