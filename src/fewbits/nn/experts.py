"""Quantized weights of a mixture's experts: one packed matrix [out_features, in_features] an expert.

transformers keeps the same matrix of all experts in one parameter [experts, ., .] and multiplies slices of it. A
`PackedExperts` stands in that parameter's place, under its name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fewbits.nn.modules import PackedWeight


class PackedExperts(nn.ModuleList):
    """The packed matrices of all experts, which share a shape.

    transposed: the parameter that they stand for has each of them as [in_features, out_features].
    """

    def __init__(self, weights: Iterable[PackedWeight], *, transposed: bool = False) -> None:
        super().__init__(weights)
        self.transposed = transposed

    def multiply(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, in_features] by the transpose of one expert's matrix."""
        return self.store(expert).multiply(x, bias)

    def store(self, expert: int) -> PackedWeight:
        found = self[expert]
        assert isinstance(found, PackedWeight)
        return found

    def extra_repr(self) -> str:
        return f"{len(self)} experts, transposed={self.transposed}"
