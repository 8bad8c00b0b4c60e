"""Qwen 3: Qwen 2 without biases, with a norm on each head of q and k, and heads of any size."""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.models.families._family import BLOCK, QK_NORM, QKV_BIAS, Config, Family
from fewbits.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Biases on q, k and v are optional, as llama.cpp has it."""

    model_type = "qwen3"
    arch = "qwen3"
    causal_lm = "Qwen3ForCausalLM"
    defaults: ClassVar[Config] = {**Qwen2.defaults, "head_dim": 128}
    block = BLOCK | QKV_BIAS | QK_NORM

    def check(self, config: Config) -> None:
        Family.check(self, config)

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        return super().restored(values, names) | {"attention_bias": "blk.0.attn_q.bias" in names}
