"""Gemma: Mesnard et al. 2024 (arXiv:2403.08295). Norm weights count from one, embeddings are scaled by √hidden_size."""

from __future__ import annotations

import math
from typing import Any

from fewbits.engine.families._decoder import Decoder


class Gemma(Decoder):
    """Llama with norms around one and scaled embeddings."""

    model_type = "gemma"
    norm_offset = 1.0

    def embed_scale(self, config: Any) -> float:
        return math.sqrt(config.hidden_size)
