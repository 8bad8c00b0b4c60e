"""Gemma 2: Gemma with four norms a block, soft caps on attention and logits, every other layer with a window."""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.models.families._family import BLOCK, SANDWICH, Config
from fewbits.models.families.gemma import Gemma


class Gemma2(Gemma):
    """llama.cpp fixes the order of windowed layers and derives the attention's scale from the model's size."""

    model_type = "gemma2"
    arch = "gemma2"
    causal_lm = "Gemma2ForCausalLM"
    defaults: ClassVar[Config] = {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "tie_word_embeddings": True,
    }
    block = BLOCK | SANDWICH
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    windowed = True
    needed: ClassVar[tuple[str, ...]] = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
    """What must not be null: llama.cpp falls back to values of its own."""
    pattern: ClassVar[int] = 2
    """Every pattern-th layer has no window."""
    largest: ClassVar[int] = 46
    """Layers of the 27B model, whose attention llama.cpp scales by 1/√(hidden_size / heads) instead of 1/√head_dim."""

    def check(self, config: Config) -> None:
        super().check(config)
        for key in self.needed:
            if not config[key]:
                self.refuse(f"{key} {config[key]}", "its graph has a value of its own where the file is silent")
        heads = int(config["num_attention_heads"])
        big = int(config["num_hidden_layers"]) == self.largest
        scale = config["hidden_size"] // heads if big else config["head_dim"]
        if config["query_pre_attn_scalar"] != scale:
            self.refuse(f"query_pre_attn_scalar {config['query_pre_attn_scalar']}", f"its graph computes with {scale}")
        found, fixed = self.windows(config), self.fixed_windows(config)
        if found != fixed:
            self.refuse(f"windows {found}", f"its graph leaves out the window in every {self.pattern}th layer")

    def fixed_windows(self, config: Config) -> tuple[int | None, ...]:
        """The order of windows that llama.cpp knows."""
        layers, window = int(config["num_hidden_layers"]), config["sliding_window"]
        return tuple(window if (i + 1) % self.pattern else None for i in range(layers))

    def windows(self, config: Config) -> tuple[int | None, ...]:
        kinds = config.get("layer_types")
        if kinds is None:
            return self.fixed_windows(config)
        return tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)

    def hyperparameters(self, config: Config) -> dict[str, Any]:
        own = {
            "attention.sliding_window": config["sliding_window"],
            "attn_logit_softcapping": config["attn_logit_softcapping"],
            "final_logit_softcapping": config["final_logit_softcapping"],
        }
        return super().hyperparameters(config) | {key: value for key, value in own.items() if value}

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        pattern = values.get("attention.sliding_window_pattern", self.pattern)
        if pattern != self.pattern:
            self.refuse(f"sliding_window_pattern {pattern}", f"its layers without a window are every {self.pattern}th")
        big = values["block_count"] == self.largest
        per_head = values["embedding_length"] // values["attention.head_count"]
        return super().restored(values, names) | {
            "query_pre_attn_scalar": per_head if big else values["attention.key_length"],
            "sliding_window": values.get("attention.sliding_window", 4096),
            "attn_logit_softcapping": values.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": values.get("final_logit_softcapping", 30.0),
        }
