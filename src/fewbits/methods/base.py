"""How codes are chosen: the contract of a method.

A method turns the weights of one block of the model into QTensors, in the formats that the plan gave them. Methods that
look at one tensor at a time (rounding, HQQ, GPTQ) implement `quantize` and are lifted to blocks by `TensorMethod`;
methods that trade weights of several layers against each other implement `quantize_block` themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fewbits.formats import Format, QTensor


class Method(ABC):
    """How codes are chosen. A frozen dataclass, so a value."""

    summary: ClassVar[str]
    """One sentence for `fewbits methods`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics of the inputs that the method cannot do without."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The registry's key."""

    @abstractmethod
    def quantize_block(
        self, block: Mapping[str, Tensor], plan: Mapping[str, Format], stats: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, QTensor]:
        """QTensors of the block's weights, in the plan's formats.

        block: name -> weight, floating point [out_features, in_features] (or [experts, ., .]).
        stats: name -> statistic -> value, for those statistics that were measured.
        Raises FormatError if a weight is NaN or Inf.
        """


class TensorMethod(Method):
    """A method that looks at one tensor at a time."""

    rowwise: ClassVar[bool] = True
    """Whether a row's codes depend on that row alone, so that a tensor can be done a few rows at a time."""

    @abstractmethod
    def quantize(self, w: Tensor, format: Format, *, importance: Tensor | None = None) -> QTensor:
        """Codes and params for w, floating point [..., N, K].

        importance: weight of each squared error, broadcastable to w ([K] for the mean x² of the inputs).
        """

    def quantize_block(
        self, block: Mapping[str, Tensor], plan: Mapping[str, Format], stats: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, QTensor]:
        return {
            name: self.quantize(w, plan[name], importance=stats.get(name, {}).get("importance"))
            for name, w in block.items()
        }
