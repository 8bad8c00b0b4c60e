"""A linear layer that rounds its input and multiplies codes by codes (`kernels.int8_linear`, `kernels.fp8_linear`).

The weight takes a byte each, also where its format has fewer bits: those are what the product reads. Symmetric integers
are kept as they are, asymmetric ones shifted by 128, zero-points with them, so that they fit int8.

As in `PackedWeight`, scales and E4M3 codes are buffers of integers of the same width: `model.half()` casts every
floating-point buffer, and a scale that is cast is another scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import ActivationFormat, Affine, QTensor
from fewbits.kernels import fp8_linear, int8_linear

SHIFT = 128


class W8A8Linear(nn.Module):
    """y = x · Wᵀ + bias for x [..., in_features], both rounded; y has the dtype of x. Inference: W is not trained.

    inputs: what x is rounded to; input_scale: float32 with one number, if that is static. Raises FormatError if the two
    formats cannot be multiplied, or a static scale is missing.
    """

    def __init__(
        self,
        weight: QTensor,
        inputs: ActivationFormat,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        trouble = inputs.weight_trouble(weight.format)
        if trouble or inputs.static != (input_scale is not None):
            raise FormatError(trouble or f"{inputs}: a static scale is needed, and a dynamic one cannot be given")
        self.format, self.inputs = weight.format, inputs
        self.out_features, self.in_features = weight.shape
        zero = weight.params.get("zero")
        shift = SHIFT if isinstance(weight.format, Affine) and not weight.format.symmetric else 0
        self._keep("codes", weight.codes.to(torch.int16).sub_(shift).to(torch.int8) if shift else weight.codes)
        self._keep("scale", weight.params["scale"].float().reshape(-1))
        self._keep("zero", None if zero is None else zero.reshape(-1).to(torch.int16) - shift)
        self._keep("input_scale", None if input_scale is None else input_scale.float().reshape(1))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.inputs.quantize(x, self._floats("input_scale"))
        weight, w_scale = self.get_buffer("codes"), self._floats("scale")
        assert w_scale is not None
        if self.inputs.element == "fp8":
            y = fp8_linear(codes, scale, weight.view(torch.float8_e4m3fn), w_scale, self.bias)
        else:
            y = int8_linear(codes, scale, weight, w_scale, self._buffers["zero"], self.bias)
        return y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, a fresh copy at every access, for code that reads it instead of calling the layer."""
        codes, scale, zero = self.get_buffer("codes"), self._floats("scale"), self._buffers["zero"]
        assert scale is not None
        numbers = codes.view(torch.float8_e4m3fn).float() if self.inputs.element == "fp8" else codes.float()
        centred = numbers if zero is None else numbers - zero[:, None]
        return (centred * scale[:, None]).to(self.get_buffer("_like").dtype)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.format} weights, {self.inputs} inputs"

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.view(torch.int32)
        self.register_buffer(name, None if tensor is None else tensor.contiguous())

    def _floats(self, name: str) -> Tensor | None:
        stored = self._buffers[name]
        return None if stored is None else stored.view(torch.float32)


def replace_w8a8(model: nn.Module, name: str, layer: W8A8Linear) -> None:
    """Swap the linear layer called `name` for one that rounds its input. A bias stays as it is.

    Raises UnsupportedError unless it is exactly a linear layer.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise UnsupportedError(
            f"{name} is a {type(module).__name__}; only a plain Linear can round its input to {layer.inputs}, so "
            "quantize its weight alone"
        )
    layer.bias = module.bias
    setattr(model.get_submodule(parent), leaf, layer.train(module.training))
