"""Phi-3 and Phi-4-mini: Abdin et al. 2024 (arXiv:2404.14219). q, k and v lie in one matrix, gate and up in another."""

from __future__ import annotations

from typing import Any

from fewbits.engine.families._decoder import Composition, Decoder, window_of_all


class Phi3(Decoder):
    """Llama with joined matrices, which are cut into rows, and a window in every layer."""

    model_type = "phi3"

    def window(self, config: Any, layer: int) -> int | None:
        return window_of_all(config)

    def queries_keys_values(self, c: Composition, name: str) -> None:
        size = self.head_dim(c.config)
        q, kv = c.config.num_attention_heads * size, c.config.num_key_value_heads * size
        rows = {"q": range(q), "k": range(q, q + kv), "v": range(q + kv, q + 2 * kv)}
        c.linear("h", {out: (f"{name}.qkv_proj", part) for out, part in rows.items()})

    def gate_and_up(self, c: Composition, name: str) -> None:
        n = int(c.config.intermediate_size)
        rows = {"g": range(n), "u": range(n, 2 * n)}
        c.linear("h", {out: (f"{name}.gate_up_proj", part) for out, part in rows.items()})
