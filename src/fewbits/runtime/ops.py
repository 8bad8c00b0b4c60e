"""The ops that a language model is composed of, as values; a `Program` is a list of them.

An op reads and writes *buffers*: float32 [rows, width], named by strings. A row is a token of the step being run; in
the output of a `Select`, and in what is made of it, one of the tokens whose logits were asked for. Programs are
composed once, in Python, when a model is opened, and then run token after token without coming back to Python
(`csrc/`), or op by op by the references beside them (`reference.py`).

Offsets of one that some architectures add to norm weights, and factors that they multiply embeddings with, are folded
into the numbers here when a program is composed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fewbits.runtime.tiles import Weight

Vector: TypeAlias = NDArray[np.float32]
Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, eq=False)
class Embed:
    """out[r] = scale · table[token of row r]."""

    table: Weight
    out: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Norm:
    """out = x / sqrt(mean x² + eps) · weight, or added to out: Zhang & Sennrich 2019 (arXiv:1910.07467)."""

    x: str
    weight: Vector
    eps: float
    out: str
    accumulate: bool = False


@dataclass(frozen=True, eq=False)
class Linear:
    """outs[i] = x · weights[i]ᵀ + biases[i], or added to outs[i]. x is rounded to INT8 by group for `Tiles`."""

    x: str
    weights: tuple[Weight, ...]
    outs: tuple[str, ...]
    biases: tuple[Vector | None, ...]
    accumulate: bool = False


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary angles: frequencies float32 [rotated / 2], in radians a position; `factor` multiplies cosine and sine.

    The first `2 · len(frequencies)` numbers of a head are rotated, halves against one another (Hugging Face's order);
    the others stay.
    """

    frequencies: Vector
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Attend:
    """Attention of new tokens over those of their sequence, with grouped queries; appends to the cache of `layer`.

    q [rows, heads · head_dim], k and v [rows, kv_heads · head_dim] -> out [rows, heads · head_dim]. In this order:
    q and k are normed head by head where q_norm and k_norm are given, rotated, and k and v stored in the cache in its
    type; scores are scale · q·k, capped as softcap · tanh(scores / softcap); a token sees itself and the tokens before
    it, the last `window` of them all told.
    """

    q: str
    k: str
    v: str
    out: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary
    window: int | None = None
    softcap: float | None = None
    q_norm: Vector | None = None
    k_norm: Vector | None = None
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class Gate:
    """out = activation(gate) · up, elementwise."""

    gate: str
    up: str
    out: str
    activation: Activation = "silu"


@dataclass(frozen=True, eq=False)
class Experts:
    """out += Σ over each row's `top_k` experts of probability · down(activation(gate(x)) · up(x)).

    router: buffer of logits [rows, experts]. The probabilities are the softmax over all experts, divided by their sum
    over those chosen where `normalise`.
    """

    x: str
    router: str
    out: str
    gate: tuple[Weight, ...]
    up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    top_k: int
    normalise: bool = True
    activation: Activation = "silu"


@dataclass(frozen=True, eq=False)
class Add:
    """out += factor · x; where `gate` is given, factor is sigmoid of its single column."""

    x: str
    out: str
    gate: str | None = None


@dataclass(frozen=True, eq=False)
class Select:
    """out = the rows of x whose logits were asked for."""

    x: str
    out: str


@dataclass(frozen=True, eq=False)
class Softcap:
    """x = cap · tanh(x / cap)."""

    x: str
    cap: float


Op: TypeAlias = Embed | Norm | Linear | Attend | Gate | Experts | Add | Select | Softcap


@dataclass(frozen=True, eq=False)
class Program:
    """What turns tokens into logits.

    buffers: width of each by name; `logits` is the last one written, [rows asked for, vocabulary].
    layers, kv_heads, head_dim: of the cache, the same in all layers.
    """

    ops: tuple[Op, ...]
    buffers: dict[str, int]
    vocabulary: int
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def states(self) -> str:
        """The buffer that logits are made of, of the rows that are asked for."""
        return next(op.x for op in reversed(self.ops) if isinstance(op, Linear))
