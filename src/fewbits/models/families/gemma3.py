"""Gemma 3, text only: Gemma 2 without soft caps, with norms on q and k, and two rotary bases.

Five of six layers have a window and rotate with a base of their own; scaled positions are for the sixth.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.models.families._family import BLOCK, QK_NORM, SANDWICH, Config
from fewbits.models.families._rope import restored_rope, rope_parameters
from fewbits.models.families.gemma2 import Gemma2


class Gemma3(Gemma2):
    """The language model of its own (`gemma3_text`); the ones with eyes keep theirs in a second file."""

    model_type = "gemma3_text"
    arch = "gemma3"
    causal_lm = "Gemma3ForCausalLM"
    defaults: ClassVar[Config] = {
        **Gemma2.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }
    block = BLOCK | SANDWICH | QK_NORM
    needed = ()
    pattern = 6
    largest = 62

    def check(self, config: Config) -> None:
        super().check(config)
        if config["attn_logit_softcapping"]:
            self.refuse(f"attn_logit_softcapping {config['attn_logit_softcapping']}", "its graph caps logits only")
        if rope_parameters(config, "sliding_attention")["rope_type"] != "default":
            self.refuse("scaled rotation in layers with a window", "its graph scales only the layers without")

    def windows(self, config: Config) -> tuple[int | None, ...]:
        every = config.get("sliding_window_pattern") or self.pattern
        kinds = config.get("layer_types") or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(config["num_hidden_layers"])
        ]
        return tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)

    def hyperparameters(self, config: Config) -> dict[str, Any]:
        return super().hyperparameters(config) | {
            "rope.freq_base_swa": rope_parameters(config, "sliding_attention")["rope_theta"]
        }

    def restored(self, values: Config, names: frozenset[str]) -> dict[str, Any]:
        local = {"rope_type": "default", "rope_theta": values.get("rope.freq_base_swa", 10_000.0)}
        rope = {"full_attention": restored_rope(values, None), "sliding_attention": local}
        return super().restored(values, names) | {
            "rope_parameters": rope,
            "sliding_window": values.get("attention.sliding_window"),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": values.get("final_logit_softcapping"),
        }
