"""SmolLM3: Hugging Face 2025 (huggingface.co/blog/smollm3). Llama whose every fourth layer has no rotary angles, after
Yang et al. 2025 (arXiv:2501.18795).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.engine.families._decoder import Decoder, window_of_kind
from fewbits.engine.parameters import Parameters
from fewbits.runtime.ops import Rotary


class SmolLM3(Decoder):
    """Llama with some layers that know no positions."""

    model_type = "smollm3"

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_kind(config, layer) if config.use_sliding_window else None

    def rotary(self, parameters: Parameters, layer: int) -> Rotary:
        if parameters.config.no_rope_layers[layer]:
            return super().rotary(parameters, layer)
        return Rotary(np.zeros(0, np.float32))
