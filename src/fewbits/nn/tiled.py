"""Linear layers and embeddings on the compiled kernels of `runtime`: their weight lies in tiles, as those read it.

A `QuantizedLinear` decodes its weight to float at every use, which for one token is many times the work of the
product itself. Here integers are multiplied: x is rounded to INT8, 128 columns of a row at a scale of their own, which
moves each of its numbers by at most 1/254 of the largest of the 128 (`runtime/tiles.py`). In exchange the layer is for
inference on a CPU alone. A `Matrix` is no buffer: it is not in the state dict, moving or casting the model leaves it
where and as it is, and layers that are tied share one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.errors import UnsupportedError
from fewbits.nn.modules import QuantizedEmbedding, QuantizedLinear
from fewbits.runtime.products import Matrix
from fewbits.runtime.tiles import decode


class _Tiled(nn.Module):
    """A layer around a matrix. dtype: what the weight pretends to be, and an embedding's rows are."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("_like").dtype

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, a fresh copy at every access, for code that reads it instead of calling the layer."""
        return torch.from_numpy(decode(self.matrix.weight)).to(self.dtype)


class TiledLinear(_Tiled):
    """y = x · Wᵀ + bias for x [..., in_features] on the CPU; y has the dtype of x. Inference: there are no gradients.

    Raises UnsupportedError for an x on another device.
    """

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(matrix, dtype)
        self.out_features, self.in_features = matrix.weight.rows, matrix.weight.columns
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        _require_cpu(x)
        rows = x.detach().float().reshape(-1, self.in_features).contiguous()
        bias = None if self.bias is None else self.bias.detach().float().numpy()
        y = torch.from_numpy(self.matrix.multiply(rows.numpy(), bias))
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.matrix.weight.nbytes:,} bytes in tiles"


class TiledEmbedding(_Tiled):
    """Rows of a table [num_embeddings, embedding_dim] that is tied to a `TiledLinear`, in `dtype`."""

    def __init__(self, matrix: Matrix, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(matrix, dtype)
        self.num_embeddings, self.embedding_dim = matrix.weight.rows, matrix.weight.columns
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        _require_cpu(ids)
        found = self.matrix.look_up(ids.reshape(-1).long().numpy())
        return torch.from_numpy(found).view(*ids.shape, self.embedding_dim).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def replace_tiled(model: nn.Module, name: str, matrix: Matrix) -> None:
    """Swap the quantized layer called `name` for one on a matrix that holds the same numbers. A bias stays as it is.

    Raises UnsupportedError unless it is a QuantizedLinear or a QuantizedEmbedding.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, _in_place_of(module, name, matrix).train(module.training))


def _in_place_of(module: nn.Module, name: str, matrix: Matrix) -> nn.Module:
    if isinstance(module, QuantizedLinear):
        return TiledLinear(matrix, module.bias, module.store.dtype)
    if isinstance(module, QuantizedEmbedding):
        return TiledEmbedding(matrix, module.padding_idx, module.store.dtype)
    raise UnsupportedError(f"{name} is a {type(module).__name__}; only a quantized Linear or Embedding has tiles")


def _require_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise UnsupportedError(f"the input is on '{x.device}'; layers in tiles run on the CPU alone, so move it there")
