"""Gemma 3, its text models: Kamath et al. 2025 (arXiv:2503.19786). Layers with and without a window have angles of
their own, and norms of queries and keys replace the bound on scores.
"""

from __future__ import annotations

from typing import Any

from fewbits.engine.families.gemma2 import Gemma2
from fewbits.engine.parameters import Parameters
from fewbits.runtime.ops import Rotary


class Gemma3(Gemma2):
    """Gemma 2 with rotary angles by the kind of layer. transformers has a bound on scores here, and does not use it."""

    model_type = "gemma3_text"

    def softcap(self, config: Any) -> float | None:
        return None

    def rotary(self, parameters: Parameters, layer: int) -> Rotary:
        return parameters.rotary(str(parameters.config.layer_types[layer]))
