"""Running models: a checkpoint of any kind becomes a transformers model whose layers hold packed weights."""

from __future__ import annotations

from fewbits.engine.cache import attentions, watched_caches
from fewbits.engine.float32 import fast_float32
from fewbits.engine.layers import LayeredModel
from fewbits.engine.loading import load
from fewbits.engine.skeleton import is_causal
from fewbits.engine.weights import open_weights

__all__ = ["LayeredModel", "attentions", "fast_float32", "is_causal", "load", "open_weights", "watched_caches"]
