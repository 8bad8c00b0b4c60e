"""Where a matrix lies in a module: a Piece seen from the running model instead of from the file.

A file may hold an expert's `up_proj` as a matrix of its own while the running model keeps the gates and ups of all
experts in one parameter; GGUF wants the rows of a projection in another order. Methods know nothing of this: they get
matrices [out_features, in_features] by the output's names, and a `Slot` says how to take one out of its parameter and
how to put it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fewbits.models.base import Piece, halved_order, interleaved_order


@dataclass(frozen=True)
class Slot:
    """A matrix in a parameter: narrowed to one expert, turned upright, narrowed to rows, those in interleaved heads.

    The fields mean what they mean in `Piece`; the steps are taken in the same order.
    """

    parameter: str
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    interleaved_heads: int | None = None

    def take(self, parameter: Tensor) -> Tensor:
        """The matrix, [N, K] (or [experts, N, K] of a whole fused parameter); a view where no row changes place."""
        w = self._view(parameter)
        if self.interleaved_heads is None:
            return w
        return w[interleaved_order(w.shape[0], self.interleaved_heads).to(w.device)]

    def put(self, parameter: Tensor, w: Tensor) -> None:
        """Write the matrix back, in place."""
        self._view(parameter).copy_(self.restored(w))

    def restored(self, w: Tensor) -> Tensor:
        """The matrix with its rows in the parameter's order."""
        if self.interleaved_heads is None:
            return w
        return w[halved_order(w.shape[0], self.interleaved_heads).to(w.device)]

    def narrowed(self, piece: Piece) -> Slot:
        """The slot of a piece of what lies in this one."""
        if (self.expert, self.rows) != (None, None):
            return replace(self, interleaved_heads=piece.interleaved_heads)
        return Slot(self.parameter, piece.expert, piece.transposed, piece.rows, piece.interleaved_heads)

    def _view(self, parameter: Tensor) -> Tensor:
        w = parameter if self.expert is None else parameter[self.expert]
        w = w.transpose(-1, -2) if self.transposed else w
        return w[slice(*self.rows)] if self.rows else w


@dataclass(frozen=True)
class Link:
    """A place where a factor for each channel can move between two neighbours without changing what they compute.

    producer: the parameter whose output channels are `consumers`' input channels; a norm's weight [C] or the weight
    [C, K] of a linear layer, whose bias beside it goes along (names within the block). consumers: the parameters
    [..., N, C·repeats], upright, of all linear layers that read it; they read nothing else.
    offset: what the norm adds to its stored weight (1 for Gemma). repeats: how many heads of the consumer read each
    head of the producer (grouped-query attention, value → output projection); head: size of one.
    expert: the one expert that the link is in, where both ends are fused parameters; rows [start, stop) of the
    producer's are then its output channels (the upper half of `gate_up_proj`).
    """

    kind: Literal["norm", "linear"]
    producer: str
    consumers: tuple[str, ...]
    offset: float = 0.0
    repeats: int = 1
    head: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None


Slots = Mapping[str, Slot]
