"""A linear layer with a low-rank correction beside it: y = base(x) + (x · Aᵀ) · Bᵀ.

It is what is left of a LoRA adapter when the model runs, and costs r/N + r/K of the layer's multiplications; the base
keeps its packed weight. The factors are parameters of the model's type that are not trained here (PEFT does that).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewbits.errors import CheckpointError


class LowRankLinear(nn.Module):
    """`base` for x [..., K], plus B·A of a [r, K] and b [N, r]; y has the dtype of x."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = (nn.Parameter(factor, requires_grad=False) for factor in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The sum as one matrix, for code that reads it instead of calling the layer."""
        found: Tensor = self.base.weight + (self.b @ self.a)  # type: ignore[operator]
        return found

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}"


def add_low_rank(model: nn.Module, name: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Put a correction beside the linear layer called `name`.

    Raises CheckpointError if the model has no such layer, or one of another size.
    """
    try:
        base = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"the adapter changes {name}, which the model does not have; it belongs to another model"
        ) from error
    size = [getattr(base, "out_features", None), getattr(base, "in_features", None)]
    if size != [len(b), a.shape[1]]:
        raise CheckpointError(
            f"the adapter changes {name} by a matrix of {[len(b), a.shape[1]]}, but that is a {type(base).__name__} of "
            f"{size}; it belongs to another model"
        )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, LowRankLinear(base, a.to(dtype), b.to(dtype)).train(base.training))
