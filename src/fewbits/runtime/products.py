"""Products asked for one by one, for models whose steps somebody else runs (`nn/tiled.py`).

A program has all its matrices before it starts; here each is multiplied when it is called. All of a model's share one
pool of threads and one set of buffers, because a pool for each layer would be hundreds of threads, and buffers for each
would be larger than the layers. A call costs some microseconds beside the product: its two phases (inputs rounded to
INT8, then panels multiplied) are handed to threads that may have gone to sleep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.runtime.compiled import core_for, cores, kernel_weight
from fewbits.runtime.reference import Floats
from fewbits.runtime.tiles import Weight


class Products:
    """Threads that multiply with any number of matrices, one product at a time, whoever asks.

    threads: all cores by default. target: whose kernels, of `compiled.targets()`; the best this processor has. team: a
    capsule of a `Team` (csrc/pool.h), threads that somebody else has; by default there are own ones.
    Raises UnsupportedError where kernels were not compiled, or not for that target.
    """

    def __init__(self, threads: int | None = None, target: str = "", team: Any | None = None) -> None:
        core, target = core_for(target)
        self.core = core.Products(threads or cores(), target, team)

    def matrix(self, weight: Weight) -> Matrix:
        """A matrix that these threads multiply with."""
        return Matrix(self, weight)


class Matrix:
    """A weight [rows, columns] in tiles, ready to be multiplied; read only, so layers may share it."""

    def __init__(self, products: Products, weight: Weight) -> None:
        self.weight = weight
        self._core, self._held = products.core, kernel_weight(weight)

    def multiply(self, x: Floats, bias: Floats | None = None) -> Floats:
        """x · weightᵀ + bias: float32 [n, columns] -> [n, rows]. x is rounded to INT8 by 128 columns for `Tiles`.

        Raises MemoryError, with how much was asked for, where there is no room for the result.
        """
        out = np.empty((len(x), self.weight.rows), np.float32)
        self._core.multiply(self._held, x, bias, out)
        return out

    def look_up(self, which: NDArray[np.int64]) -> Floats:
        """Rows of the weight: int64 [n] -> float32 [n, columns]. Raises ValueError for a row that is not there."""
        out = np.empty((len(which), self.weight.columns), np.float32)
        self._core.look_up(self._held, which, out)
        return out
