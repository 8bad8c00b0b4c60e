"""Gemma 2: Riviere et al. 2024 (arXiv:2408.00118). Norms behind attention and gate, bounded scores, windows."""

from __future__ import annotations

import math
from typing import Any

from fewbits.engine.families._decoder import window_of_kind
from fewbits.engine.families.gemma import Gemma


class Gemma2(Gemma):
    """Gemma with two norms more in each layer, and bounds on scores and logits."""

    model_type = "gemma2"
    post_norms = True

    def trouble(self, config: Any) -> str | None:
        if getattr(config, "use_bidirectional_attention", False):
            return "tokens also see those behind them (use_bidirectional_attention)"
        return super().trouble(config)

    def activation_name(self, config: Any) -> str:
        return str(config.hidden_activation)

    def attention_scale(self, config: Any) -> float:
        return 1 / math.sqrt(config.query_pre_attn_scalar)

    def softcap(self, config: Any) -> float | None:
        cap = config.attn_logit_softcapping
        return None if cap is None else float(cap)

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_kind(config, layer)
