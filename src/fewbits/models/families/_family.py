"""What llama.cpp has to be told about a decoder-only family, and how its tensors are named there.

All these families are the same transformer with small differences, so the base class holds what they share and a
family's own file holds only the differences: its name in config.json, its name in GGUF, the defaults that its
configuration class fills in when config.json leaves a key out, whether q and k are interleaved, what its norms store,
and checks for whatever llama.cpp's graph of that family takes for granted. The reference is llama.cpp itself: its
converter (conversion/) for names and transforms, src/models/*.cpp for what is taken for granted.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from fewbits.errors import UnsupportedError
from fewbits.models.base import Role
from fewbits.models.families._rope import rope_hyperparameters, rope_parameters

Config = Mapping[str, Any]
Names = dict[str, tuple[str, Role]]
"""Name in transformers -> name in GGUF, role."""

OUTSIDE: Names = {
    "model.embed_tokens.weight": ("token_embd.weight", Role.EMBEDDING),
    "model.norm.weight": ("output_norm.weight", Role.NORM),
    "lm_head.weight": ("output.weight", Role.OUTPUT),
}
BLOCK: Names = {
    "input_layernorm.weight": ("attn_norm.weight", Role.NORM),
    "self_attn.q_proj.weight": ("attn_q.weight", Role.LINEAR),
    "self_attn.k_proj.weight": ("attn_k.weight", Role.LINEAR),
    "self_attn.v_proj.weight": ("attn_v.weight", Role.LINEAR),
    "self_attn.o_proj.weight": ("attn_output.weight", Role.LINEAR),
    "post_attention_layernorm.weight": ("ffn_norm.weight", Role.NORM),
    "mlp.gate_proj.weight": ("ffn_gate.weight", Role.LINEAR),
    "mlp.up_proj.weight": ("ffn_up.weight", Role.LINEAR),
    "mlp.down_proj.weight": ("ffn_down.weight", Role.LINEAR),
}
QKV_BIAS: Names = {
    "self_attn.q_proj.bias": ("attn_q.bias", Role.BIAS),
    "self_attn.k_proj.bias": ("attn_k.bias", Role.BIAS),
    "self_attn.v_proj.bias": ("attn_v.bias", Role.BIAS),
}
QK_NORM: Names = {
    "self_attn.q_norm.weight": ("attn_q_norm.weight", Role.NORM),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", Role.NORM),
}
SANDWICH: Names = {
    "post_attention_layernorm.weight": ("post_attention_norm.weight", Role.NORM),
    "pre_feedforward_layernorm.weight": ("ffn_norm.weight", Role.NORM),
    "post_feedforward_layernorm.weight": ("post_ffw_norm.weight", Role.NORM),
}
"""Gemma 2 and 3 put a norm before and after each half of a block."""


class Family(ABC):
    """A family that llama.cpp runs. Every method but `filled` wants a configuration that `filled` returned."""

    model_type: ClassVar[str]
    """Its name in config.json."""
    arch: ClassVar[str]
    """Its name in GGUF: general.architecture, and the prefix of every hyper-parameter."""
    causal_lm: ClassVar[str]
    """Its class in transformers."""
    defaults: ClassVar[Config]
    """What transformers fills in for a key that config.json lacks."""
    block: ClassVar[Names] = BLOCK
    interleaved: ClassVar[bool] = False
    """Whether llama.cpp rotates neighbouring rows of q and k, where transformers rotates the halves of a head."""
    norm_offset: ClassVar[float] = 0.0
    """What the model adds to a norm's weight before multiplying; llama.cpp wants it added already."""
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    """Key in config.json and the only value that llama.cpp's graph computes."""
    rope_types: ClassVar[frozenset[str]] = frozenset({"default", "linear", "yarn"})
    windowed: ClassVar[bool] = False
    """Whether llama.cpp's graph of this family has sliding-window attention."""

    def filled(self, config: Config) -> dict[str, Any]:
        """config with the family's defaults for what it leaves out, and the two values derived from others."""
        full = {**self.defaults, **config}
        full["num_key_value_heads"] = full.get("num_key_value_heads") or full["num_attention_heads"]
        full["head_dim"] = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
        return full

    def check(self, config: Config) -> None:
        """Raise UnsupportedError where llama.cpp would compute something else than this configuration says."""
        key, computed = self.activation
        if config.get(key, computed) != computed:
            self.refuse(f"{key} '{config[key]}'", f"its graph computes {computed}")
        if float(config.get("partial_rotary_factor") or 1.0) != 1.0:
            self.refuse(f"partial_rotary_factor {config['partial_rotary_factor']}", "its graph rotates whole heads")
        if config.get("use_bidirectional_attention"):
            self.refuse("use_bidirectional_attention", "its graph is causal")
        kind = rope_parameters(config)["rope_type"]
        if kind not in self.rope_types:
            self.refuse(f"rope type '{kind}'", f"it knows {', '.join(sorted(self.rope_types))} for this family")

    def refuse(self, what: str, why: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.model_type}: {what} cannot be written to GGUF, because llama.cpp cannot run it ({why}); "
            "write compressed-tensors instead"
        )

    def windows(self, config: Config) -> tuple[int | None, ...]:
        """Of each layer, the size of its sliding window in tokens, None where it sees everything."""
        return (None,) * int(config["num_hidden_layers"])

    def context_length(self, config: Config) -> int:
        """Tokens up to which llama.cpp computes what the model computes.

        Where its graph lacks the model's sliding window, that is the window's size: up to there it hides nothing.
        """
        longest = int(config["max_position_embeddings"])
        smallest = min((window for window in self.windows(config) if window), default=longest)
        return longest if self.windowed else min(longest, smallest)

    def hyperparameters(self, config: Config) -> dict[str, Any]:
        """GGUF's keys, without the architecture's prefix."""
        return {
            "vocab_size": int(config["vocab_size"]),
            "block_count": int(config["num_hidden_layers"]),
            "context_length": self.context_length(config),
            "embedding_length": int(config["hidden_size"]),
            "feed_forward_length": int(config["intermediate_size"]),
            "attention.head_count": int(config["num_attention_heads"]),
            "attention.head_count_kv": int(config["num_key_value_heads"]),
            "attention.key_length": int(config["head_dim"]),
            "attention.value_length": int(config["head_dim"]),
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.dimension_count": int(config["head_dim"]),
        } | rope_hyperparameters(rope_parameters(config), int(config["max_position_embeddings"]))

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        """The family's own keys of config.json from GGUF's keys (without prefix) and tensor names."""
        key, computed = self.activation
        return {key: computed}

    def heads_of(self, name: str, config: Config) -> int | None:
        """Heads whose rows are interleaved in this parameter (its name within a block); None for most."""
        if not self.interleaved or not name.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
            return None
        return int(config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
