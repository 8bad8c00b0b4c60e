"""Mistral: a Llama to llama.cpp, which has no sliding window for it (version 0.1 of the 7B model has one)."""

from __future__ import annotations

from typing import ClassVar

from fewbits.models.families._family import Config, Family


class Mistral(Family):
    """q and k interleaved. Where there is a sliding window, the file promises no more context than the window."""

    model_type = "mistral"
    arch = "llama"
    causal_lm = "MistralForCausalLM"
    defaults: ClassVar[Config] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    }
    interleaved = True

    def windows(self, config: Config) -> tuple[int | None, ...]:
        return (config["sliding_window"],) * int(config["num_hidden_layers"])
