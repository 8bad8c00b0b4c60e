"""What an architecture looks like from outside: the role of each parameter, and how it goes into another file.

Nothing here holds weights. A `Piece` says which part of which source parameter becomes which tensor of the output; the
pipeline follows it, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


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
    `interleaved_heads` heads (GGUF's Llama stores the two halves of each rotary head interleaved: row i of the first
    half and row i of the second become neighbours), and `added` is added to every value (Gemma's norms store w − 1).
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
