"""Qwen2-MoE (arXiv:2407.10671, section 2.2.2) and Qwen3-MoE (arXiv:2505.09388): experts, though not in all layers.

Qwen2-MoE has a shared expert beside them, which every token goes through, weighed by a gate of its own.
"""

from __future__ import annotations

from typing import Any

from fewbits.engine.families._decoder import ACTIVATIONS, Composition, window_of_all, window_of_kind
from fewbits.engine.families.mixtral import Mixtral
from fewbits.runtime.ops import Add, Gate


class Qwen3Moe(Mixtral):
    """Mixtral's experts in some layers, a dense gate in the others."""

    model_type = "qwen3_moe"

    def feed_forward(self, c: Composition, name: str, layer: int, x: str) -> None:
        if not self.sparse(c.config, layer):
            super(Mixtral, self).feed_forward(c, name, layer, x)
            return
        self.experts(c, name, x, count=int(c.config.num_experts), normalise=bool(c.config.norm_topk_prob))

    def sparse(self, config: Any, layer: int) -> bool:
        """Whether a layer has experts."""
        chosen = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        return chosen and config.num_experts > 0

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_all(config)


class Qwen2Moe(Qwen3Moe):
    """With a shared expert, and windows by layer."""

    model_type = "qwen2_moe"

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_kind(config, layer)

    def feed_forward(self, c: Composition, name: str, layer: int, x: str) -> None:
        super().feed_forward(c, name, layer, x)
        if not self.sparse(c.config, layer):
            return
        shared = f"{name}.shared_expert"
        c.linear("h", {"e": (f"{shared}.gate_proj", None), "f": (f"{shared}.up_proj", None)})
        c.add(Gate("e", "f", "e", ACTIVATIONS[self.activation_name(c.config)]))
        c.linear("e", {"s": (f"{shared}.down_proj", None)})
        c.linear("h", {"w": (f"{name}.shared_expert_gate", None)})
        c.add(Add("s", x, "w"))
