"""How large a model's key-value cache is: what a context costs in memory beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.errors import UnsupportedError
from fewbits.models.families import FAMILIES

OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
"""GPT-2's words, which some later configurations took over."""


@dataclass(frozen=True)
class CacheShape:
    """Of each layer, kv_heads keys and values of head_dim numbers per token that it still sees.

    windows has each layer's sliding window in tokens, None where it sees everything.
    """

    layers: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    def numbers(self, context: int) -> int:
        """Keys and values kept after `context` tokens."""
        tokens = sum(context if window is None else min(context, window) for window in self.windows)
        return 2 * tokens * self.kv_heads * self.head_dim


def cache_shape(config: Mapping[str, Any]) -> CacheShape:
    """The cache of a decoder with this config.json. Raises UnsupportedError where it does not say how many heads."""
    text = {**config, **(config.get("text_config") or {})}
    text |= {name: text[old] for old, name in OLD_NAMES.items() if old in text}
    family = FAMILIES.get(str(text.get("model_type")))
    full = family.filled(text) if family else text
    missing = [key for key in ("num_hidden_layers", "num_attention_heads", "hidden_size") if key not in full]
    if missing:
        raise UnsupportedError(f"config.json of '{text.get('model_type')}' has no {', '.join(missing)}: cache unknown")
    layers, heads = int(full["num_hidden_layers"]), int(full["num_attention_heads"])
    return CacheShape(
        layers=layers,
        kv_heads=int(full.get("num_key_value_heads") or heads),
        head_dim=int(full.get("head_dim") or full["hidden_size"] // heads),
        windows=family.windows(full) if family else _windows(full, layers),
    )


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Windows of a model outside the known families: transformers writes the kind of each layer into config.json."""
    kinds = config.get("layer_types") or ["full_attention"] * layers
    return tuple(config.get("sliding_window") if kind == "sliding_attention" else None for kind in kinds)
