"""The families that GGUF can hold, by their name in config.json. A new one is one file and one line."""

from __future__ import annotations

from fewbits.models.families._family import Family
from fewbits.models.families.gemma import Gemma
from fewbits.models.families.gemma2 import Gemma2
from fewbits.models.families.gemma3 import Gemma3
from fewbits.models.families.llama import Llama
from fewbits.models.families.mistral import Mistral
from fewbits.models.families.qwen2 import Qwen2
from fewbits.models.families.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llama(),
        Mistral(),
        Qwen2(),
        Qwen3(),
        Gemma(),
        Gemma2(),
        Gemma3(),
    )
}

__all__ = ["FAMILIES", "Family"]
