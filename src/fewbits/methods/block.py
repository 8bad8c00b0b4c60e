"""One block of the model as methods see it: matrices by name, and the function that they make together.

A block is a decoder layer in float32, in memory by itself. Its matrices [out_features, in_features] carry the names of
the output (an expert's `up_proj` has one, although the running model keeps it in a corner of a fused parameter); norms
and biases are parameters under their names in the block. `run` computes the block, with some matrices replaced if
wanted, so a method can differentiate through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.models import Link, Slot


class States(Protocol):
    """Hidden states of windows, [T, H] each, float32: a list of tensors, or something that reads them from a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


Stats = Mapping[str, Mapping[str, Tensor]]
"""Matrix name -> statistic -> value, as `fewbits.stats` has them; matrices that read the same have the same tensor."""


@dataclass(frozen=True)
class Block:
    """A block of the model.

    name: as in the running model, `model.layers.3`. parameters: of the block, by their names in it, changed in place
    by transforms. slots: matrix -> where it lies in them; only the matrices that are to be quantized.
    links: where a factor for each channel can move. call: the block's function of hidden states [B, T, H], given
    parameters that replace its own. inputs: what the block is given, one window [T, H] after the other; targets: what
    the original block makes of the original's hidden states. Both are on the CPU (or on disk), and empty where nothing
    was calibrated.
    """

    name: str
    parameters: Mapping[str, Tensor]
    slots: Mapping[str, Slot]
    call: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None
    inputs: States = ()
    targets: States = ()
    links: Sequence[Link] = field(default=())

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor]) -> Block:
        """A block that is nothing but these matrices: it cannot be run."""
        return cls("", matrices, {name: Slot(name) for name in matrices})

    @classmethod
    def around(
        cls,
        name: str,
        module: nn.Module,
        slots: Mapping[str, Slot],
        call: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        **more: Any,
    ) -> Block:
        """A block around a module; the other fields by their names."""
        return cls(name, dict(module.named_parameters()), slots, call, **more)

    @property
    def device(self) -> torch.device:
        """Where it is computed: where its parameters are, but for those without data."""
        return next(p.device for p in self.parameters.values() if not p.is_meta)

    def matrix(self, name: str) -> Tensor:
        """A matrix [N, K] (or [experts, N, K]), float32; it may share the parameter's memory."""
        slot = self.slots[name]
        return slot.take(self.parameters[slot.parameter])

    def matrices(self) -> dict[str, Tensor]:
        return {name: self.matrix(name) for name in self.slots}

    def put(self, name: str, w: Tensor) -> None:
        """Replace a matrix, in place."""
        slot = self.slots[name]
        with torch.no_grad():
            slot.put(self.parameters[slot.parameter], w)

    def run(self, x: Tensor, matrices: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the block makes of hidden states x [B, T, H] with some matrices replaced, differentiable in them."""
        if self.call is None:
            raise ValueError("this block is nothing but matrices; it cannot be run")
        return self.call(x, self._replaced(matrices or {}))

    def batch(self, sequence: States, indices: Sequence[int]) -> Tensor:
        """Windows of `inputs` or `targets`, [B, T, H] on the block's device."""
        return torch.stack([sequence[i] for i in indices]).to(self.device)

    def _replaced(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters that hold these matrices."""
        replaced: dict[str, Tensor] = {}
        for name, w in matrices.items():
            slot = self.slots[name]
            parameter = self.parameters[slot.parameter]
            if slot.expert is None and slot.rows is None:
                restored = slot.restored(w)
                replaced[slot.parameter] = restored.transpose(-1, -2) if slot.transposed else restored
                continue
            base = replaced.get(slot.parameter, parameter)
            replaced[slot.parameter] = _with(base, slot, slot.restored(w))
        return replaced


def _with(parameter: Tensor, slot: Slot, w: Tensor) -> Tensor:
    """The parameter with one slot replaced, differentiable in w."""
    changed = parameter.clone()
    slot._view(changed).copy_(w)
    return changed
