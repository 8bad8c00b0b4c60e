"""Gemma 1: norms that store w − 1, embeddings scaled by √hidden (llama.cpp does that itself), GELU gates."""

from __future__ import annotations

from typing import ClassVar

from fewbits.models.families._family import Config, Family


class Gemma(Family):
    """Tied embeddings always: llama.cpp's graph has no other output."""

    model_type = "gemma"
    arch = "gemma"
    causal_lm = "GemmaForCausalLM"
    defaults: ClassVar[Config] = {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    norm_offset = 1.0
    activation = ("hidden_act", "gelu_pytorch_tanh")

    def check(self, config: Config) -> None:
        super().check(config)
        if not config["tie_word_embeddings"]:
            self.refuse("tie_word_embeddings false", "its graph has no output matrix of its own")
