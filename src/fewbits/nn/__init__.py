"""Quantized torch modules: what the linear layers and embeddings of a transformers model are swapped into."""

from __future__ import annotations

from fewbits.kernels import LowRank
from fewbits.nn.experts import PackedExperts
from fewbits.nn.low_rank import LowRankLinear, add_low_rank
from fewbits.nn.modules import PackedWeight, QuantizedEmbedding, QuantizedLinear, can_replace, replace, stored
from fewbits.nn.tiled import TiledEmbedding, TiledLinear, replace_tiled
from fewbits.nn.w8a8 import W8A8Linear, replace_w8a8

__all__ = [
    "LowRank",
    "LowRankLinear",
    "PackedExperts",
    "PackedWeight",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "TiledEmbedding",
    "TiledLinear",
    "W8A8Linear",
    "add_low_rank",
    "can_replace",
    "replace",
    "replace_tiled",
    "replace_w8a8",
    "stored",
]
