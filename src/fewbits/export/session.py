"""An ONNX file run by onnxruntime on the CPU.

As onnxruntime does by default, or `exact`: each operator by its definition. The two differ by more than the order of
sums. Level 2 of onnxruntime's optimizations turns DequantizeLinear + MatMul into MatMulNBits, which by default rounds
the inputs to 8 bits (`session.qdq_matmulnbits_accuracy_level`, 4), in blocks. That is faster, and it is another
model; so the exact one proves the file, and how far the other is from it is said beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import VerificationError

QUIET = 3  # errors alone


class Session:
    """A loaded file; called with inputs by name, int64, it returns its output, or raises VerificationError."""

    def __init__(self, path: Path, *, exact: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = QUIET
        if exact:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.exact, self._path = exact, path
        self._session = self._tried(
            lambda: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(each.name for each in self._session.get_inputs())

    @property
    def output(self) -> str:
        return str(self._session.get_outputs()[0].name)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        given = {name: inputs[name].numpy().astype(np.int64) for name in self.inputs}
        found: Tensor = torch.from_numpy(self._tried(lambda: self._session.run(None, given)[0]))
        return found

    def _tried(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever it is, the user's program would meet it as well
            raise VerificationError(f"{self._path.name}: onnxruntime cannot run it: {error}") from error
