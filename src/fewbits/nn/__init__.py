"""Quantized torch modules: what the linear layers and embeddings of a transformers model are swapped into."""

from __future__ import annotations

from fewbits.nn.modules import PackedWeight, QuantizedEmbedding, QuantizedLinear, can_replace, replace

__all__ = ["PackedWeight", "QuantizedEmbedding", "QuantizedLinear", "can_replace", "replace"]
