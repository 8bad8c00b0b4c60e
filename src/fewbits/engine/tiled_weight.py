"""A packed weight that lies in tiles while a model only runs, and is packed again when anything else is asked of it.

From packed arrays a product decodes the whole weight, which for a row or two is many times the work of the product
itself; from tiles (`runtime/tiles.py`) integers are multiplied. To keep both would double the memory. Codes are the
same in both, so either can be made of the other: the first product of a model in eval mode that needs no gradient takes
the codes into tiles, and training, another device, another type or a copy takes them back, bit for bit. Params that the
tiles have in another form (double quantization) stay as they are beside them.

In tiles a product rounds its inputs to INT8 by 128 columns (`nn/tiled.py`), and NF4's levels to a grid within a byte
(`tiling`). Whoever asks for numbers instead (`decode`, the state dict, a file) gets those of the packed arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbits.engine.tiling import codes_from, multiplies_codes, scales_from, tiled_packed
from fewbits.formats import Format, QTensor
from fewbits.kernels import LowRank, Packed, product_dtype
from fewbits.kernels.threads import team
from fewbits.nn import PackedWeight, stored
from fewbits.runtime.compiled import compiled
from fewbits.runtime.products import Matrix, Products
from fewbits.runtime.tiles import Array, Direct, Tiles

SCALE = "scale"
"""The array of scales, as formats that have one call it."""


class TiledWeight(PackedWeight):
    """The bytes of a matrix, in tiles from the first product on that is for inference on the CPU."""

    def __init__(
        self, format: Format, shape: tuple[int, ...], arrays: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(format, shape, arrays, dtype)
        self._matrix: Matrix | None = None
        self._moved: dict[str, Array] = {}  # arrays whose numbers are in the tiles, and what lies there
        self._codes = next(iter(arrays)) if _has_tiles(format, shape) else None

    @classmethod
    def of_packed(cls, packed: PackedWeight) -> TiledWeight:
        """The same weight; shares memory with the other."""
        return cls(packed.format, packed.shape, packed.view().arrays, packed.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
        if self.training or _trains(x, low_rank):
            self.settle()
            return super().multiply(x, bias, low_rank)
        matrix = self._in_tiles(x.device)
        if matrix is None:
            return super().multiply(x, bias, low_rank)
        rows = x.detach().float().reshape(-1, self.shape[1]).contiguous()
        added = None if bias is None else bias.detach().float().numpy()
        y = (
            torch.from_numpy(matrix.multiply(rows.numpy(), added))
            .view(*x.shape[:-1], self.shape[0])
            .to(product_dtype(x))
        )
        if low_rank is not None:
            a, b = (factor.to(y.dtype) for factor in (low_rank.a, low_rank.b))
            y += linear(linear(x.to(y.dtype), a), b).mul_(low_rank.scale)
        return y

    def look_up(self, ids: Tensor) -> Tensor:
        if self._matrix is None or self.training:
            self.settle()
            return super().look_up(ids)
        found = self._matrix.look_up(ids.reshape(-1).long().numpy())
        return torch.from_numpy(found).view(*ids.shape, self.shape[1]).to(self.dtype)

    def view(self) -> Packed:
        """The weight as the kernels take it. Of a weight in tiles it is a fresh copy."""
        if self._matrix is None:
            return super().view()
        assert isinstance(self._matrix.weight, Tiles)
        return Packed.of(self._unpacked(self._matrix.weight))

    def settle(self) -> None:
        """Be packed again, if it is in tiles."""
        if self._matrix is not None:
            arrays = self.view().arrays
            for name in self._moved:
                self._buffers[name] = stored(arrays[name])
            self._matrix, self._moved = None, {}

    def _in_tiles(self, device: torch.device) -> Matrix | None:
        """The weight in tiles; None where it has to stay packed."""
        if self._matrix is None and self._codes in self._buffers and device.type == "cpu":
            packed = super().view()
            made = tiled_packed(packed)
            assert isinstance(made, Tiles)
            assert self._codes is not None
            self._moved = {self._codes: made.codes}
            if SCALE in packed.arrays and _holds(made, packed.arrays[SCALE]):
                assert isinstance(made.scale, Direct)
                self._moved[SCALE] = made.scale.values
            for name, array in self._moved.items():
                self._buffers[name] = torch.from_numpy(array)  # so that the model's buffers are what it takes
            self._matrix = _products(torch.get_num_threads()).matrix(made)
        return self._matrix

    def _unpacked(self, weight: Tiles) -> QTensor:
        """Codes, and scales that they hold, from the tiles; the other params from the arrays that were left."""
        specs = self.format.arrays(self.shape)
        arrays = {
            name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items() if name in self._moved
        }
        if SCALE in arrays:
            arrays[SCALE] = _scale(weight, arrays[SCALE])
        arrays |= {n: getattr(self, n).view(dtype) for n, dtype in self._dtypes.items() if n not in self._moved}
        params = QTensor.from_arrays(self.format, arrays, self.shape).params
        return QTensor(self.format, codes_from(self.format, weight), params)

    def _apply(self, fn: Any, recurse: bool = True) -> TiledWeight:
        self.settle()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._matrix is not None:
            destination |= {prefix + name: stored(array) for name, array in self.view().arrays.items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which tiles have none of."""
        self.settle()
        return self.__dict__


def _has_tiles(format: Format, shape: tuple[int, ...]) -> bool:
    """Whether products can be made of codes in tiles, and codes lie in an array of their own, which is the first."""
    return compiled() is not None and len(format.arrays(shape)) > 1 and multiplies_codes(format)


def _scale(weight: Tiles, like: Tensor) -> Tensor:
    """The scales that tiles hold, in the type and shape of the packed array."""
    found = scales_from(weight)
    assert found is not None
    return found.to(like.dtype).reshape(like.shape)


def _holds(weight: Tiles, scale: Tensor) -> bool:
    """Whether the scales in the tiles are bit for bit those of the packed array."""
    found = scales_from(weight)
    if found is None or found.numel() != scale.numel():
        return False
    return torch.equal(stored(_scale(weight, scale)), stored(scale))


@lru_cache
def _products(threads: int) -> Products:
    """Torch's threads, for all weights of the process."""
    return Products(threads, team=team())


def _trains(x: Tensor, low_rank: LowRank | None) -> bool:
    factors = () if low_rank is None else (low_rank.a, low_rank.b)
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))
