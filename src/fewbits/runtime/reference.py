"""The ops in numpy, one function each: what the compiled kernels are compared with, and what runs without a compiler.

`ReferenceRunner` runs a program by them. With `exact` a product is one of floating-point numbers; without, its inputs
are first rounded as the kernels round them: x is cut into groups of `INPUT_GROUP` columns, each with the scale
max|x| / 127, and a code is x · (127 / max|x|) to the nearest integer, a tie to the even one. The kernels then multiply
integers, which is the same product up to the order of float32 sums.

Decoded matrices are kept, four bytes a weight, because decoding takes longer than the product it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import UnsupportedError
from fewbits.runtime.ops import (
    Activation,
    Add,
    Attend,
    Embed,
    Experts,
    Gate,
    Linear,
    Norm,
    Op,
    Program,
    Rotary,
    Select,
    Softcap,
)
from fewbits.runtime.runner import MOST_ROWS, Numbers
from fewbits.runtime.tiles import INPUT_GROUP, Tiles, Weight, decode

Floats: TypeAlias = NDArray[np.float32]
Kv: TypeAlias = Literal["f32", "f16", "int8", "int4"]

HIGHEST = {"int8": 127, "int4": 7}
"""The largest code of a key or value, by the type of the cache."""


def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean x² + eps) · weight over the last dimension."""
    mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    normed: Floats = x / np.sqrt(mean + np.float32(eps)) * weight
    return normed


def rounded(x: Floats) -> Floats:
    """x [rows, columns] as INT8 codes hold it, each `INPUT_GROUP` columns under a scale of their own."""
    found = np.empty_like(x)
    for start in range(0, x.shape[1], INPUT_GROUP):
        part = x[:, start : start + INPUT_GROUP]
        peak = np.abs(part).max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(peak > 0, np.rint(part * (np.float32(127) / peak)), np.float32(0))
        found[:, start : start + INPUT_GROUP] = codes * (peak / np.float32(127))
    return found


def coded(x: Floats, highest: int) -> Floats:
    """x as codes −highest … highest hold it, with one scale, max|x| / highest, over the last dimension."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(highest)
    with np.errstate(divide="ignore", invalid="ignore"):
        held: Floats = np.where(scale > 0, np.rint(x / scale), np.float32(0)) * scale
    return held


def silu(x: Floats) -> Floats:
    return x * sigmoid(x)


def sigmoid(x: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.maximum(x, np.float32(-80))))  # e^80 is still a float32
    return found


def gelu(x: Floats) -> Floats:
    """x · Φ(x), by the error function."""
    erf = np.frompyfunc(math.erf, 1, 1)
    doubled: Floats = x * (1 + erf(x * math.sqrt(0.5)).astype(np.float32))
    return np.float32(0.5) * doubled


def gelu_tanh(x: Floats) -> Floats:
    """x · Φ(x) by its usual approximation: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    doubled: Floats = x * (1 + np.tanh(inner))
    return np.float32(0.5) * doubled


ACTIVATIONS: dict[Activation, Callable[[Floats], Floats]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def rotated(x: Floats, positions: Numbers, rotary: Rotary) -> Floats:
    """x [rows, heads, head_dim] turned by each row's position: the first numbers of a head, halves against another."""
    half = len(rotary.frequencies)
    angles = positions[:, None, None].astype(np.float32) * rotary.frequencies
    cos, sin = np.cos(angles) * np.float32(rotary.factor), np.sin(angles) * np.float32(rotary.factor)
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def softmax(x: Floats) -> Floats:
    """Over the last dimension; −inf has no part in it."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    found: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return found


def softcapped(x: Floats, cap: float) -> Floats:
    capped: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return capped


def attention(op: Attend, q: Floats, keys: Floats, values: Floats, positions: Numbers) -> Floats:
    """q [rows, heads, head_dim] over keys and values [tokens, kv_heads, head_dim] of one sequence, from position 0."""
    repeats = op.heads // op.kv_heads
    queries = q.reshape(len(q), op.kv_heads, repeats, op.head_dim)
    scores = np.einsum("rgnd,tgd->grnt", queries, keys, optimize=True) * np.float32(op.scale)
    if op.softcap is not None:
        scores = softcapped(scores, op.softcap)
    behind = positions[:, None] - np.arange(len(keys))
    seen = (behind >= 0) & (behind < (len(keys) if op.window is None else op.window))
    weights = softmax(np.where(seen[None, :, None, :], scores, np.float32(-np.inf)))
    out: Floats = np.einsum("grnt,tgd->rgnd", weights, values, optimize=True)
    return out.reshape(len(q), -1)


@dataclass
class _Step:
    """The rows of one call, and the buffers they have filled so far."""

    tokens: Numbers
    slots: Numbers
    positions: Numbers
    wanted: Numbers
    buffers: dict[str, Floats] = field(default_factory=dict)

    def put(self, out: str, value: Floats, *, accumulate: bool = False) -> None:
        self.buffers[out] = self.buffers[out] + value if accumulate else value

    def sequences(self) -> Iterator[tuple[int, slice]]:
        """Each slot and its rows."""
        ends = [*np.flatnonzero(np.diff(self.slots)) + 1, len(self.slots)]
        start = 0
        for end in ends:
            yield int(self.slots[start]), slice(start, int(end))
            start = int(end)


class ReferenceRunner:
    """A `Runner` of numpy alone.

    kv: type of the cache: float32, float16, or 8- or 4-bit codes with a float32 scale per position and head (what they
    stand for is kept, in float32). exact: multiply as the module's docstring says.
    """

    def __init__(self, program: Program, slots: int, context: int, kv: Kv = "f16", *, exact: bool = False) -> None:
        if kv not in ("f32", "f16", *HIGHEST):
            raise UnsupportedError(f"kv '{kv}' is no type of a key-value cache; choose f32, f16, int8 or int4")
        self._program, self._exact, self._kv = program, exact, kv
        self.vocabulary, self.context, self.slots, self.most_rows = program.vocabulary, context, slots, MOST_ROWS
        shape = (program.layers, slots, context, program.kv_heads, program.head_dim)
        dtype = np.float16 if kv == "f16" else np.float32
        self._keys, self._values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self._decoded: dict[int, Floats] = {}
        self._last: dict[str, Floats] = {}  # buffers of the last call

    def forward(self, tokens: Numbers, slots: Numbers, positions: Numbers, wanted: Numbers) -> Floats:
        """See `Runner.forward`."""
        step = _Step(tokens, slots, positions, wanted)
        for op in self._program.ops:
            self._run(op, step)
        self._last = step.buffers
        return step.buffers["logits"]

    def states(self, rows: int) -> Floats:
        """See `Runner.states`."""
        return self._last[self._program.states][:rows]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Runner.copy`."""
        for kept in (self._keys, self._values):
            kept[:, target, :length] = kept[:, source, :length]

    @singledispatchmethod
    def _run(self, op: Op, step: _Step) -> None:
        raise UnsupportedError(f"{type(op).__name__} has no reference; add one to runtime/reference.py")

    @_run.register
    def _(self, op: Embed, step: _Step) -> None:
        step.put(op.out, self._matrix(op.table)[step.tokens] * np.float32(op.scale))

    @_run.register
    def _(self, op: Norm, step: _Step) -> None:
        step.put(op.out, norm(step.buffers[op.x], op.weight, op.eps), accumulate=op.accumulate)

    @_run.register
    def _(self, op: Linear, step: _Step) -> None:
        for weight, out, bias in zip(op.weights, op.outs, op.biases, strict=True):
            y = self._product(step.buffers[op.x], weight)
            step.put(out, y if bias is None else y + bias, accumulate=op.accumulate)

    @_run.register
    def _(self, op: Attend, step: _Step) -> None:
        q = self._heads(op, step, op.q, op.heads, op.q_norm)
        k = self._heads(op, step, op.k, op.kv_heads, op.k_norm)
        v = step.buffers[op.v].reshape(len(k), op.kv_heads, op.head_dim)
        found = [self._attended(op, slot, rows, q, k, v, step.positions) for slot, rows in step.sequences()]
        step.put(op.out, np.concatenate(found))

    @_run.register
    def _(self, op: Gate, step: _Step) -> None:
        step.put(op.out, ACTIVATIONS[op.activation](step.buffers[op.gate]) * step.buffers[op.up])

    @_run.register
    def _(self, op: Experts, step: _Step) -> None:
        probabilities, x = softmax(step.buffers[op.router]), step.buffers[op.x]
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, : op.top_k]
        shares = np.take_along_axis(probabilities, order, axis=-1)
        if op.normalise:
            shares = shares / shares.sum(axis=-1, keepdims=True)
        out = step.buffers[op.out].copy()
        for expert in range(len(op.gate)):
            rows, place = np.nonzero(order == expert)
            if len(rows):
                out[rows] += shares[rows, place, None] * self._expert(op, expert, x[rows])
        step.put(op.out, out)

    @_run.register
    def _(self, op: Add, step: _Step) -> None:
        x = step.buffers[op.x]
        if op.gate is not None:
            x = x * sigmoid(step.buffers[op.gate])
        step.put(op.out, x, accumulate=True)

    @_run.register
    def _(self, op: Select, step: _Step) -> None:
        step.put(op.out, step.buffers[op.x][step.wanted])

    @_run.register
    def _(self, op: Softcap, step: _Step) -> None:
        step.put(op.x, softcapped(step.buffers[op.x], op.cap))

    @staticmethod
    def _heads(op: Attend, step: _Step, name: str, heads: int, weight: Floats | None) -> Floats:
        """Queries or keys [rows, heads, head_dim], normed and rotated."""
        x = step.buffers[name].reshape(len(step.tokens), heads, op.head_dim)
        return rotated(x if weight is None else norm(x, weight, op.eps), step.positions, op.rotary)

    def _attended(
        self, op: Attend, slot: int, rows: slice, q: Floats, k: Floats, v: Floats, positions: Numbers
    ) -> Floats:
        """Append the rows of one sequence to its cache and attend over it."""
        start, end = int(positions[rows.start]), int(positions[rows.stop - 1]) + 1
        keys, values = self._keys[op.layer, slot], self._values[op.layer, slot]
        keys[start:end], values[start:end] = self._stored(k[rows]), self._stored(v[rows])
        seen_keys, seen_values = (kept[:end].astype(np.float32) for kept in (keys, values))
        return attention(op, q[rows], seen_keys, seen_values, positions[rows])

    def _stored(self, x: Floats) -> Floats:
        return coded(x, HIGHEST[self._kv]) if self._kv in HIGHEST else x

    def _expert(self, op: Experts, expert: int, x: Floats) -> Floats:
        gated = ACTIVATIONS[op.activation](self._product(x, op.gate[expert])) * self._product(x, op.up[expert])
        return self._product(gated, op.down[expert])

    def _product(self, x: Floats, weight: Weight) -> Floats:
        if isinstance(weight, Tiles) and not self._exact:
            x = rounded(x)
        return x @ self._matrix(weight).T

    def _matrix(self, weight: Weight) -> Floats:
        if id(weight) not in self._decoded:  # the program keeps the weight, so its id stays its own
            self._decoded[id(weight)] = decode(weight)
        return self._decoded[id(weight)]
