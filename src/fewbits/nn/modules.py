"""Linear and embedding layers that hold their weight packed and decode it at every use.

The packed arrays are buffers of a small module of their own, `PackedWeight`, so that an embedding and an output layer
tied to it share one: moving, copying or pickling the model keeps them shared, as it does for a tied parameter.

Arrays of floating point (scales) are stored as integers of the same width: `model.half()` or `.to(bfloat16)` casts
every floating-point buffer, and a scale that is cast is another scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewbits.errors import UnsupportedError
from fewbits.formats import Format, QTensor
from fewbits.kernels import LowRank, Packed, embedding, linear

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype of each width in bytes."""


class PackedWeight(nn.Module):
    """The bytes of a matrix [out_features, in_features] in a format; the state dict has them under the arrays' names.

    `dtype` is the floating-point type that the matrix pretends to have; `.to(dtype)` changes it.
    """

    def __init__(
        self, format: Format, shape: tuple[int, ...], arrays: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.shape = format, shape
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        for name, array in arrays.items():
            self.register_buffer(name, stored(array))
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def of(cls, weight: QTensor, dtype: torch.dtype = torch.float32) -> PackedWeight:
        return cls(weight.format, weight.shape, weight.pack(), dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer("_like").dtype

    def view(self) -> Packed:
        """The weight as the kernels take it; shares memory with the buffers."""
        arrays = {name: getattr(self, name).view(dtype) for name, dtype in self._dtypes.items()}
        return Packed(self.format, self.shape, arrays)

    def multiply(self, x: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
        """x [..., in_features] by the transpose of the weight (`kernels.linear`)."""
        return linear(x, self.view(), bias, low_rank)

    def look_up(self, ids: Tensor) -> Tensor:
        """The rows that ids [...] ask for, in `dtype`."""
        return embedding(ids, self.view(), self.dtype)

    def as_parameters(self) -> None:
        """Make the arrays frozen parameters: torch's FSDP shares those out among processes, and buffers it does not.

        A single number cannot be shared out and stays a buffer.
        """
        for name in self._dtypes:
            array = getattr(self, name)
            if array.dim():
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(array, requires_grad=False))

    def decode(self) -> Tensor:
        """The whole matrix in `dtype`."""
        return self.view().rows(slice(0, self.shape[0]), self.dtype)

    def extra_repr(self) -> str:
        nbytes = self.format.nbytes(self.shape)
        bits_per_weight = 8 * nbytes / (self.shape[0] * self.shape[1])
        return f"{self.format}, {list(self.shape)}, {nbytes:,} bytes, {bits_per_weight:.3g} bits per weight"


def stored(array: Tensor) -> Tensor:
    """An array as a module's buffer: in integers of its width, which no cast of the model changes."""
    return array.contiguous().view(_BITS[array.dtype.itemsize])


class _Quantized(nn.Module):
    """A layer around a PackedWeight."""

    def __init__(self, store: PackedWeight) -> None:
        super().__init__()
        self.store = store

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, a fresh copy at every access, for code that reads it instead of calling the layer."""
        return self.store.decode()


class QuantizedLinear(_Quantized):
    """y = x · Wᵀ + bias for x [..., in_features], W packed and not trained; y has the dtype of x. What is trained may
    lie beside W, as s · B·A of low rank.
    """

    def __init__(self, store: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__(store)
        self.out_features, self.in_features = store.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
        return self.store.multiply(x, self.bias, low_rank)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(_Quantized):
    """Rows of a packed table [num_embeddings, embedding_dim], in the store's dtype."""

    def __init__(self, store: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__(store)
        self.num_embeddings, self.embedding_dim = store.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return self.store.look_up(ids)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def can_replace(module: nn.Module) -> bool:
    """Whether a layer is exactly a linear layer or an embedding lookup.

    A subclass may compute something else (Gemma's embedding scales its rows) or have its weight read by its parent
    (attention's output projection in torch), so it is left alone.
    """
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def replace(model: nn.Module, name: str, store: PackedWeight) -> None:
    """Swap the linear layer or embedding called `name` for a quantized one. A bias stays as it is.

    Raises UnsupportedError unless `can_replace`.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    if not can_replace(module):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__}; only a plain Linear or Embedding can hold packed weights, "
            "so decode this one"
        )
    new: nn.Module
    if isinstance(module, nn.Linear):
        new = QuantizedLinear(store)
        new.bias = module.bias
    else:
        new = QuantizedEmbedding(store, getattr(module, "padding_idx", None))
    setattr(model.get_submodule(parent), leaf, new.train(module.training))
