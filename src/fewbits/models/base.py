"""What an architecture looks like from outside: the role of each parameter, and how it goes into another file.

Nothing here holds weights. A `Piece` says which part of which source parameter becomes which tensor of the output; the
pipeline follows it, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Role(Enum):
    """What a parameter does, as far as quantization cares."""

    LINEAR = "linear"  # weight of a linear layer [out_features, in_features]
    EXPERTS = "experts"  # fused weights of all experts, 3-D
    ROUTER = "router"  # chooses experts: tiny, and every error in it changes which weights are used
    EMBEDDING = "embedding"  # token embeddings
    OUTPUT = "output"  # the projection to the vocabulary
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"  # buffers, convolutions, anything that is not a matrix product


@dataclass(frozen=True)
class Piece:
    """One tensor of the output and where in the source it comes from.

    The source parameter is read, then narrowed: to one `expert` of a fused [E, ., .] tensor, `transposed` if the
    source stores [in_features, out_features], to `rows` [start, stop) of it; then its rows are permuted within each of
    `interleaved_heads` heads (see `interleaved_order`), and `added` is added to every value (1.0 for Gemma's norms:
    the model multiplies by 1 + w, so w is what transformers stores and 1 + w what GGUF stores). shape is the result's.
    """

    name: str
    source: str
    role: Role
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    interleaved_heads: int | None = None
    added: float = 0.0

    def row_order(self) -> Tensor | None:
        """Source row (after narrowing) of each row of the result, int64; None where the order stays."""
        return None if self.interleaved_heads is None else interleaved_order(self.shape[0], self.interleaved_heads)


@dataclass(frozen=True)
class Restored:
    """One parameter of a transformers model and where in a GGUF file it comes from: a Piece walked backwards.

    Rows of the stored tensor `source` are taken out of their interleaving in `interleaved_heads` heads (rows of
    quantized codes and scales as well as numbers: both keep to their row), and `added` is added to every value.
    """

    source: str
    interleaved_heads: int | None = None
    added: float = 0.0

    def row_order(self, rows: int) -> Tensor | None:
        """Stored row of each of the parameter's rows, int64; None where the order stays."""
        return None if self.interleaved_heads is None else halved_order(rows, self.interleaved_heads)


def interleaved_order(rows: int, heads: int) -> Tensor:
    """Order that puts the two halves of each head's rows next to each other: `w[order]`, int64 [rows].

    Row i of a head's first half and row i of its second become neighbours. Rotary embeddings turn them as one pair:
    transformers finds the two half a head apart, llama.cpp's Llama side by side.
    """
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(rows)


def halved_order(rows: int, heads: int) -> Tensor:
    """The inverse of interleaved_order: `w[interleaved_order(n, h)][halved_order(n, h)]` is w."""
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(rows)


@dataclass(frozen=True)
class Architecture:
    """A model's parameters by role.

    family is the name of a known family (`llama`, `qwen2` …) or None: then the roles come from building the model
    without weights. tied maps a parameter that shares another's storage (and is absent from the file or a copy in it)
    to that other one.
    """

    family: str | None
    roles: Mapping[str, Role]
    tied: Mapping[str, str]
