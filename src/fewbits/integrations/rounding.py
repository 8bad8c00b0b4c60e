"""A matrix in memory into packed arrays, a slab of a million weights at a time on every core.

So beside the matrix there is never more than its packed form and a few megabytes a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.engine.tiled_weight import TiledWeight
from fewbits.errors import UnsupportedError
from fewbits.formats import Format
from fewbits.kernels.threads import workers
from fewbits.methods import TensorMethod, method_named

SLAB = 1 << 20
"""Weights of a slab: 4 MB as FP32."""


@dataclass(frozen=True)
class Rounded:
    """A packed matrix. error: ‖w − ŵ‖ / ‖w‖."""

    weight: TiledWeight
    error: float


def solver_named(name: str) -> TensorMethod:
    """The method of that name. Raises UnsupportedError if it needs more than the tensor."""
    method = method_named(name)
    if not isinstance(method, TensorMethod) or method.needs:
        raise UnsupportedError(
            f"method {name} needs a text or whole blocks; quantize the folder with `fewbits quantize --method {name}` "
            "and load that, or take rtn, rtn-plain or hqq here"
        )
    return method


@torch.no_grad()
def rounded(w: Tensor, format: Format, method: TensorMethod, dtype: torch.dtype) -> Rounded:
    """w, floating point [out_features, in_features] on any device, in a format.

    dtype: what the weight pretends to be. Raises FormatError for NaN, Inf, or a shape that the format cannot hold.
    """
    shape = (w.shape[0], w.shape[1])
    format.check(shape)
    specs = format.arrays(shape)
    arrays = {name: torch.empty(spec.shape, dtype=spec.dtype, device=w.device) for name, spec in specs.items()}

    def one(rows: slice) -> tuple[float, float]:
        part = w[rows].float()
        quantized = method.quantize(part, format, {})
        for name, array in quantized.pack().items():
            arrays[name][rows if format.rowwise else ...] = array
        return float(quantized.dequantize().sub_(part).square().sum()), float(part.square().sum())

    slabs = list(_slabs(shape, whole=not (format.rowwise and method.rowwise)))
    if len(slabs) == 1 or w.device.type != "cpu":
        squares = [one(rows) for rows in slabs]
    else:
        with workers(torch.get_num_threads()) as pool:
            squares = list(pool.map(one, slabs))
    lost, norm = (sum(each) for each in zip(*squares, strict=True))
    return Rounded(TiledWeight(format, shape, arrays, dtype), (lost / norm) ** 0.5 if norm else 0.0)


def _slabs(shape: tuple[int, int], *, whole: bool) -> Iterator[slice]:
    step = shape[0] if whole else max(1, SLAB // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
