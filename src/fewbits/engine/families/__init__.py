"""Architectures that the engine composes programs for, one short file each; everything else runs in transformers.

FAMILIES is the registry, `family_of` finds the one for a configuration. All are decoders of one shape (`_decoder`):
a file says how its family differs from that.
"""

from __future__ import annotations

from typing import Any

from fewbits.engine.families._decoder import Decoder
from fewbits.engine.families.gemma import Gemma
from fewbits.engine.families.gemma2 import Gemma2
from fewbits.engine.families.gemma3 import Gemma3
from fewbits.engine.families.llama import Llama
from fewbits.engine.families.mistral import Mistral
from fewbits.engine.families.mixtral import Mixtral
from fewbits.engine.families.phi3 import Phi3
from fewbits.engine.families.qwen2 import Qwen2
from fewbits.engine.families.qwen3 import Qwen3
from fewbits.engine.families.qwen_moe import Qwen2Moe, Qwen3Moe
from fewbits.engine.families.smollm3 import SmolLM3
from fewbits.errors import UnsupportedError

FAMILIES: tuple[Decoder, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Gemma(),
    Gemma2(),
    Gemma3(),
    Phi3(),
    SmolLM3(),
    Mixtral(),
    Qwen2Moe(),
    Qwen3Moe(),
)


def family_of(config: Any) -> Decoder:
    """The family of a transformers configuration. Raises UnsupportedError, with the reason, where there is none."""
    found = next((family for family in FAMILIES if family.model_type == config.model_type), None)
    if found is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UnsupportedError(f"model_type '{config.model_type}' is none of those composed here ({known})")
    trouble = found.trouble(config)
    if trouble is not None:
        raise UnsupportedError(f"this {config.model_type}: {trouble}")
    return found


__all__ = ["FAMILIES", "Decoder", "family_of"]
