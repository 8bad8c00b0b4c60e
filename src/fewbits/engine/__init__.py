"""Running models: a checkpoint of any kind becomes a transformers model whose layers hold packed weights."""

from __future__ import annotations

from fewbits.engine.loading import load
from fewbits.engine.skeleton import configuration, is_causal

__all__ = ["configuration", "is_causal", "load"]
