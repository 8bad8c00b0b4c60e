"""Llama 1 to 3, and everything that is a Llama in its config.json."""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.models.base import Role
from fewbits.models.families._family import BLOCK, QKV_BIAS, Config, Family


class Llama(Family):
    """q and k interleaved; Llama 3's rope factors go into a tensor. Biases are optional everywhere."""

    model_type = "llama"
    arch = "llama"
    causal_lm = "LlamaForCausalLM"
    defaults: ClassVar[Config] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    block = (
        BLOCK
        | QKV_BIAS
        | {
            "self_attn.o_proj.bias": ("attn_output.bias", Role.BIAS),
            "mlp.gate_proj.bias": ("ffn_gate.bias", Role.BIAS),
            "mlp.up_proj.bias": ("ffn_up.bias", Role.BIAS),
            "mlp.down_proj.bias": ("ffn_down.bias", Role.BIAS),
        }
    )
    interleaved = True
    rope_types = Family.rope_types | {"llama3"}

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        biases = {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
        return super().restored(values, names) | biases
