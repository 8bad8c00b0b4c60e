"""How codes are chosen: the contracts of methods.

There are three kinds, and `a+b+c` on the command line puts them in this order:

- a `Transform` rewrites the model into one that computes the same and is easier to quantize (rotations, factors moved
  from a norm into the next matrix). Weights change, predictions do not;
- a `Solver` turns the matrices of one block into QTensors, in the formats that the plan gave them. Most look at one
  tensor at a time (rounding, HQQ, GPTQ): they derive from `TensorMethod` and implement `quantize`;
- a `Finisher` works on the whole quantized model in the end, and leaves the codes alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats import Format, QTensor
from fewbits.methods._parallel import in_parallel
from fewbits.methods.block import Block, States, Stats


class Method(ABC):
    """One way to choose codes, or to prepare for it. A frozen dataclass, so a value."""

    summary: ClassVar[str]
    """One sentence for `fewbits methods`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics of the inputs that the method cannot do without (see `fewbits.stats`)."""
    wants: ClassVar[tuple[str, ...]] = ()
    """Statistics that make it better, where the model runs on calibration text anyway."""
    runs: ClassVar[bool] = False
    """Whether it runs the block on calibration text, beyond what the statistics say."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The registry's key."""

    @property
    def calibrated(self) -> bool:
        """Whether the model has to run on calibration text."""
        return bool(self.needs) or self.runs


class Transform(Method):
    """Rewrites a block so that it computes the same and quantizes better."""

    rewrites: ClassVar[bool] = False
    """Whether it rewrites the whole model while that is read, and leaves nothing to do in a block."""

    @abstractmethod
    def transform(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> None:
        """Change the block's parameters in place. Raises UnsupportedError where the architecture does not allow it."""


class Solver(Method):
    """Turns the matrices of a block into QTensors."""

    @property
    def windows_run(self) -> float:
        """How many windows it runs through each block, back and forth counting as three: for the estimate of time."""
        return 0.0

    @property
    def in_order(self) -> bool:
        """Whether matrices are to be solved in the order in which the block uses them, each measured behind those
        before it; otherwise all are measured in the block as it was.
        """
        return False

    @abstractmethod
    def quantize_block(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> dict[str, QTensor]:
        """QTensors of the block's matrices, in the plan's formats.

        plan: matrix -> format, for every matrix of the block. stats: matrix -> statistic -> value, of those that were
        measured. Raises FormatError if a weight is NaN or Inf.
        """


class TensorMethod(Solver):
    """A solver that looks at one tensor at a time."""

    rowwise: ClassVar[bool] = True
    """Whether a row's codes depend on that row alone, so that a tensor can be done a few rows at a time."""
    shares: ClassVar[bool] = False
    """Whether matrices that read the same input are better solved together, and nothing beside them: then torch has
    enough to spread over its threads, and one input's statistics at a time take memory.
    """
    slab: ClassVar[int | None] = None
    """Weights of them that are solved at a time, if not a whole matrix."""

    @abstractmethod
    def quantize(self, w: Tensor, format: Format, stats: Mapping[str, Tensor]) -> QTensor:
        """Codes and params for w, floating point [..., N, K].

        stats: of the layer's inputs, such as `importance` [K] (the mean x²) or `hessian` [K, K]; each with a leading
        dimension of experts where w has one. Empty where nothing was measured.
        """

    @torch.no_grad()
    def quantize_block(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> dict[str, QTensor]:
        groups = _groups(block, plan, stats) if self.shares else [[name] for name in block.slots]
        tasks = [partial(self._solve, names, block, plan, stats) for names in groups]
        solved: dict[str, QTensor] = {}
        for found in [task() for task in tasks] if self.shares else in_parallel(tasks):
            solved |= found
        return {name: solved[name] for name in block.slots}

    def quantize_together(
        self, matrices: Sequence[Tensor], format: Format, stats: Sequence[Mapping[str, Tensor]]
    ) -> list[QTensor]:
        """The same for matrices that read the same input, each with its statistics."""
        return [self.quantize(w, format, found) for w, found in zip(matrices, stats, strict=True)]

    def _solve(self, names: list[str], block: Block, plan: Mapping[str, Format], stats: Stats) -> dict[str, QTensor]:
        """Matrices of the same input and format."""
        matrices, found = [block.matrix(name) for name in names], [stats.get(name, {}) for name in names]
        return dict(zip(names, self.quantize_together(matrices, plan[names[0]], found), strict=True))


@dataclass(frozen=True, eq=False)
class Quantized:
    """The whole quantized model, as finishers see it: about as much memory as its codes take, and one block.

    blocks: in order. A parameter that consists of quantized matrices alone may be on the meta device, because only its
    shape is used; the others are as the transforms left them. tensors: of each block, by the names of its matrices.
    free: of each block, parameters that may be changed, and the type that each is written in.
    inputs: what the first block reads, windows [T, H]; targets: what the *original's* last block returns for them.
    logits: predictions [B, T, vocab] made of what the last block returns [B, T, H], differentiable; originals: those
    that the original makes of what its own last block returns.
    """

    blocks: Sequence[Block]
    tensors: Sequence[Mapping[str, QTensor]]
    free: Sequence[Mapping[str, torch.dtype]]
    inputs: States
    targets: States
    logits: Callable[[Tensor], Tensor]
    originals: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Finished:
    """What became of it: the same tensors with other params, and the parameters that changed, in their written types.

    before, after: mean divergence from the original on text that was not trained on, in nats a token.
    """

    tensors: Sequence[Mapping[str, QTensor]]
    changed: Sequence[Mapping[str, Tensor]]
    before: float
    after: float


class Finisher(Method):
    """Works on the whole quantized model in the end."""

    runs: ClassVar[bool] = True

    @abstractmethod
    def finish(self, model: Quantized) -> Finished:
        """Change params and free parameters, leave codes alone. Never worse on held-out text than what came in."""


def _groups(block: Block, plan: Mapping[str, Format], stats: Stats) -> list[list[str]]:
    """Matrices that read the same input and have the same rowwise format, together; widest input first."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name in block.slots:
        w, format, found = block.matrix(name), plan[name], stats.get(name, {})
        shared = next(iter(found.values()), None)
        if shared is None or not format.rowwise:
            groups[name].append(name)
        else:
            groups[id(shared), format, w.shape[:-2]].append(name)
    return sorted(groups.values(), key=lambda names: -block.matrix(names[0]).shape[-1])
