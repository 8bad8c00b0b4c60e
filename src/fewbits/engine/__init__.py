"""Running models: an engine for text on a plain CPU, and checkpoints of any kind as transformers models.

Names are imported on first use: an engine that starts for the second time needs neither torch nor transformers, which
take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.engine.batch import Batch
    from fewbits.engine.cache import attentions, watched_caches
    from fewbits.engine.engine import Engine
    from fewbits.engine.float32 import fast_float32
    from fewbits.engine.layers import LayeredModel
    from fewbits.engine.loading import load
    from fewbits.engine.sampling import Sampling
    from fewbits.engine.sequences import Piece
    from fewbits.engine.skeleton import is_causal
    from fewbits.engine.text import Text
    from fewbits.engine.weights import open_weights

_MODULES = {
    "Batch": "batch",
    "Engine": "engine",
    "LayeredModel": "layers",
    "Piece": "sequences",
    "Sampling": "sampling",
    "Text": "text",
    "attentions": "cache",
    "fast_float32": "float32",
    "is_causal": "skeleton",
    "load": "loading",
    "open_weights": "weights",
    "watched_caches": "cache",
}

__all__ = [
    "Batch",
    "Engine",
    "LayeredModel",
    "Piece",
    "Sampling",
    "Text",
    "attentions",
    "fast_float32",
    "is_causal",
    "load",
    "open_weights",
    "watched_caches",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fewbits.engine' has no attribute '{name}'")
    return getattr(import_module(f"fewbits.engine.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
