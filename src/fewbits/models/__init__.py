"""What an architecture looks like: the role of each tensor, fused experts cut apart, GGUF's names, the cache's shape.

Nothing here holds weights or opens weight files.
"""

from __future__ import annotations

from fewbits.models._modules import model_class, module_roles, targets_of
from fewbits.models.base import Architecture, Piece, Restored, Role, halved_order, interleaved_order
from fewbits.models.cache import CacheShape, cache_shape
from fewbits.models.describe import EMBEDDING, OUTPUT, describe
from fewbits.models.experts import unfused
from fewbits.models.families import FAMILIES
from fewbits.models.gguf import (
    from_gguf,
    gguf_dropped,
    gguf_extras,
    gguf_metadata,
    gguf_pieces,
    gguf_supported,
)
from fewbits.models.gguf_tokenizer_back import restored_tokenizer
from fewbits.models.links import Flow, head_size, links, residual
from fewbits.models.slots import Link, Slot, Slots

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "OUTPUT",
    "Architecture",
    "CacheShape",
    "Flow",
    "Link",
    "Piece",
    "Restored",
    "Role",
    "Slot",
    "Slots",
    "cache_shape",
    "describe",
    "from_gguf",
    "gguf_dropped",
    "gguf_extras",
    "gguf_metadata",
    "gguf_pieces",
    "gguf_supported",
    "halved_order",
    "head_size",
    "interleaved_order",
    "links",
    "model_class",
    "module_roles",
    "residual",
    "restored_tokenizer",
    "targets_of",
    "unfused",
]
