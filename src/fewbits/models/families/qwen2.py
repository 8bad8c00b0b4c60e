"""Qwen 1.5, 2 and 2.5: biases on q, k and v; rotated halves as in transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.models.families._family import BLOCK, QKV_BIAS, Config, Family


class Qwen2(Family):
    """llama.cpp has no sliding window for it: where one is used, the file promises no more context than the window."""

    model_type = "qwen2"
    arch = "qwen2"
    causal_lm = "Qwen2ForCausalLM"
    defaults: ClassVar[Config] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
    }
    block = BLOCK | QKV_BIAS

    def check(self, config: Config) -> None:
        super().check(config)
        if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
            self.refuse(f"head_dim {config['head_dim']}", "its graph wants hidden_size / num_attention_heads")

    def windows(self, config: Config) -> tuple[int | None, ...]:
        layers = int(config["num_hidden_layers"])
        if not config["use_sliding_window"] or not config["sliding_window"]:
            return (None,) * layers
        kinds = config.get("layer_types") or [
            "sliding_attention" if i >= config["max_window_layers"] else "full_attention" for i in range(layers)
        ]
        return tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        return super().restored(values, names) | {"use_sliding_window": False}
