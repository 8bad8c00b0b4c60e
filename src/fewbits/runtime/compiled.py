"""Programs run by the compiled kernels (`csrc/`): the whole of a step in one call, on threads of their own.

Python composes the program once and holds the arrays; C++ keeps pointers into them. Results do not depend on how many
threads there are, nor on which rows are run together: every number is summed in one order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import UnsupportedError
from fewbits.extensions import extension
from fewbits.runtime.ops import Add, Attend, Embed, Experts, Gate, Linear, Norm, Op, Program, Select, Softcap
from fewbits.runtime.reference import Floats, Kv, ReferenceRunner
from fewbits.runtime.runner import MOST_ROWS, Numbers, Runner
from fewbits.runtime.tiles import Array, Direct, Offset, Scale, Stepped, Tiles, Weight, Zeros

PATIENCE = 2.0
"""Seconds of work after which more is expected."""
TARGET = "FEWBITS_TARGET"
"""Environment variable: the name of the target whose kernels run, of `targets()`; the best one if it is not set."""


def compiled() -> Any | None:
    """The extension module; None where there is none (`fewbits.extensions`)."""
    return extension("fewbits.runtime._runtime")


def targets() -> list[str]:
    """Kinds of processors whose kernels this one runs, the best first; none without compiled kernels."""
    core = compiled()
    return [] if core is None else list(core.targets())


def core_for(target: str) -> tuple[Any, str]:
    """The extension module, and the name of the target whose kernels run: "" for the best one.

    Raises UnsupportedError where there are no compiled kernels, or none of that target.
    """
    core = compiled()
    if core is None:
        raise UnsupportedError("the compiled kernels are not there; use runtime.reference, which needs none")
    target = target or os.environ.get(TARGET, "")
    if target and target not in core.targets():
        raise UnsupportedError(f"target '{target}' is not among this processor's: {', '.join(core.targets())}")
    return core, target


def runner(
    program: Program,
    slots: int,
    context: int,
    kv: Kv,
    threads: int | None,
    settle: Callable[[], None] | None = None,
) -> Runner:
    """The fastest runner of a program that there is. settle: see `CompiledRunner`."""
    if compiled() is None:
        return ReferenceRunner(program, slots, context, kv)
    return CompiledRunner(program, slots, context, kv, threads, settle=settle)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CompiledRunner:
    """A `Runner` of compiled kernels. threads: all cores by default; target: the best this processor has.

    settle: called once, after the first `PATIENCE` seconds of work, for what pays only if there is more to come.

    Raises UnsupportedError for a type of the cache or a target that is not there, MemoryError, with how much was asked
    for, where the cache or a buffer cannot be allocated.
    """

    def __init__(
        self,
        program: Program,
        slots: int,
        context: int,
        kv: Kv = "f16",
        threads: int | None = None,
        target: str = "",
        settle: Callable[[], None] | None = None,
    ) -> None:
        core, target = core_for(target)
        if kv not in ("f16", "int8", "int4"):
            raise UnsupportedError(f"kv '{kv}' is no type of a key-value cache; choose f16, int8 or int4")
        self.vocabulary, self.context, self.slots, self.most_rows = program.vocabulary, context, slots, MOST_ROWS
        self.threads = threads or cores()
        self._cache = core.KeyValues(kv, program.layers, slots, context, program.kv_heads, program.head_dim)
        self._program = core.Program(self.threads, target, self._cache)
        self._buffers = {name: self._program.buffer(width) for name, width in program.buffers.items()}
        self._weights: dict[int, Any] = {}
        self._settle, self._worked = settle, 0.0
        self.program = program  # whose arrays the kernels read
        for op in program.ops:
            self._add(op)

    @property
    def target(self) -> str:
        """Whose kernels run."""
        return str(self._program.target)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of all slots."""
        return int(self._cache.nbytes)

    def forward(self, tokens: Numbers, slots: Numbers, positions: Numbers, wanted: Numbers) -> NDArray[np.float32]:
        """See `Runner.forward`. Raises ValueError for a token, slot or position that there is not, or too many rows."""
        if len(tokens) > self.most_rows:
            raise ValueError(f"{len(tokens)} rows in one call; at most {self.most_rows} fit the buffers, so cut them")
        out = np.empty((len(wanted), self.vocabulary), np.float32)
        given = (np.ascontiguousarray(x, np.int32) for x in (tokens, slots, positions, wanted))
        begin = time.perf_counter()
        self._program.run(*given, self._buffers["logits"], out)
        self._worked += time.perf_counter() - begin
        if self._settle is not None and self._worked > PATIENCE:
            self._settle()
            self._settle = None
        return out

    def states(self, rows: int) -> NDArray[np.float32]:
        """See `Runner.states`. Raises ValueError for more rows than the last call was asked for."""
        out = np.empty((rows, self.program.buffers[self.program.states]), np.float32)
        self._program.read(self._buffers[self.program.states], out)
        return out

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Runner.copy`."""
        if length:
            self._cache.copy(source, target, length)

    @singledispatchmethod
    def _add(self, op: Op) -> None:
        raise UnsupportedError(f"{type(op).__name__} has no compiled form; add one to runtime/csrc/program.cpp")

    @_add.register
    def _(self, op: Embed) -> None:
        self._program.embed(self._weight(op.table), self._buffers[op.out], op.scale)

    @_add.register
    def _(self, op: Norm) -> None:
        self._program.norm(self._buffers[op.x], vector(op.weight), op.eps, self._buffers[op.out], op.accumulate)

    @_add.register
    def _(self, op: Linear) -> None:
        weights = [self._weight(weight) for weight in op.weights]
        outs = [self._buffers[out] for out in op.outs]
        biases = [None if bias is None else vector(bias) for bias in op.biases]
        self._program.linear(self._buffers[op.x], weights, outs, biases, op.accumulate)

    @_add.register
    def _(self, op: Attend) -> None:
        norms = (None if norm is None else vector(norm) for norm in (op.q_norm, op.k_norm))
        self._program.attend(
            [self._buffers[name] for name in (op.q, op.k, op.v, op.out)],
            *(op.layer, op.heads, op.kv_heads, op.head_dim, op.scale, op.softcap or 0.0, op.window or 0),
            *(op.rotary.frequencies.tolist(), op.rotary.factor, *norms, op.eps),
        )

    @_add.register
    def _(self, op: Gate) -> None:
        gate, up, out = (self._buffers[name] for name in (op.gate, op.up, op.out))
        self._program.gate(gate, up, out, op.activation)

    @_add.register
    def _(self, op: Experts) -> None:
        x, router, out = (self._buffers[name] for name in (op.x, op.router, op.out))
        stacks = ([self._weight(weight) for weight in stack] for stack in (op.gate, op.up, op.down))
        self._program.experts(x, router, out, *stacks, op.top_k, op.normalise, op.activation)

    @_add.register
    def _(self, op: Add) -> None:
        gate = None if op.gate is None else self._buffers[op.gate]
        self._program.add(self._buffers[op.x], self._buffers[op.out], gate)

    @_add.register
    def _(self, op: Select) -> None:
        self._program.select(self._buffers[op.x], self._buffers[op.out])

    @_add.register
    def _(self, op: Softcap) -> None:
        self._program.softcap(self._buffers[op.x], op.cap)

    def _weight(self, weight: Weight) -> Any:
        if id(weight) not in self._weights:  # the ops keep the weight, so its id stays its own
            self._weights[id(weight)] = kernel_weight(weight)
        return self._weights[id(weight)]


def vector(x: Floats) -> Floats:
    return np.ascontiguousarray(x, np.float32)


def kernel_weight(weight: Weight) -> Any:
    """A weight as the compiled kernels hold it: pointers into its arrays, which it keeps."""
    core = compiled()
    assert core is not None
    if not isinstance(weight, Tiles):
        scale = None if weight.scale is None else _bits(weight.scale.values)
        scale_kind = "" if weight.scale is None else _kind(weight.scale.values)
        values = _bits(weight.values)
        return core.Weight.floats(weight.rows, weight.columns, weight.kind, values, weight.group, scale, scale_kind)
    table = None if weight.table is None else np.ascontiguousarray(weight.table)
    sizes = (weight.rows, weight.columns, weight.bits, weight.group, weight.zero)
    made = core.Weight(*sizes, np.ascontiguousarray(weight.codes), table)
    _put(made, "scale", weight.scale)
    if weight.offset is not None:
        _put(made, "offset", weight.offset)
    return made


def _put(made: Any, name: str, params: Scale | Offset) -> None:
    match params:
        case Direct(values):
            getattr(made, f"{name}_numbers")(_bits(values), _kind(values))
        case Stepped(factor, steps, per):
            getattr(made, f"{name}_steps")(np.ascontiguousarray(steps), _bits(factor), per)
        case Zeros(values):
            made.offset_zeros(np.ascontiguousarray(values))


def _kind(values: Array) -> str:
    return {"float32": "f32", "float16": "f16", "uint16": "bf16"}[values.dtype.name]


def _bits(values: Array) -> Array:
    """The array, 16-bit floats as integers of that width."""
    return np.ascontiguousarray(values).view(np.uint16 if values.dtype.itemsize == 2 else values.dtype)
