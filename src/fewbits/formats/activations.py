"""What the inputs of a linear layer are rounded to: INT8 or FP8 E4M3, with one scale per token or per tensor.

    x ≈ scale · code,   scale = max|x| / 127 (INT8) or max|x| / 448 (E4M3)

*Dynamic* scales are computed for each input as it comes: per token (one for each row) or per tensor. A *static* scale
was fixed from samples beforehand (`fewbits.stats.observers`), one for all inputs of a layer: nothing is left to measure
at run time, but what exceeds the samples' range is clipped, and a single large channel takes the levels from all
others. Trade-offs and the case for per-token scales: Yao et al. 2022 (ZeroQuant, arXiv:2206.01861), section 4.2;
Xiao et al. 2023 (SmoothQuant, arXiv:2211.10438), section 2; FP8: Micikevicius et al. 2022 (arXiv:2209.05433).

All are symmetric: that is what vLLM's kernels multiply, and a zero-point would buy half a bit at best for inputs behind
a norm, whose signs are balanced. The code of the largest |x| is ±127; −128 only takes what a static scale clips.
(compressed-tensors' own simulation divides by 127.5 instead, and clips the largest; vLLM's kernels divide by 127.)

Scales are float32 [..., 1] per token and [1] per tensor. A scale is never below the smallest normal float32, so that a
row of zeros has codes of zero. NaN and Inf make the scale NaN or Inf, and so they stay visible in the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.affine import Affine
from fewbits.formats.base import Format
from fewbits.formats.minifloat import E4M3_MAX, Fp8
from fewbits.formats.ternary import Ternary

SMALLEST = torch.finfo(torch.float32).tiny
UNSEEN = torch.finfo(torch.float32).eps
"""The static scale of an input that was zero in every sample; any would do, and this is compressed-tensors' choice."""


@dataclass(frozen=True)
class ActivationFormat:
    """Codes of `element` type, and where their scale comes from: each token, each tensor, or samples (static)."""

    element: Literal["int8", "fp8"]
    scope: Literal["token", "tensor", "static"]

    @property
    def name(self) -> str:
        """The registry's key."""
        return f"{self.element}-{self.scope}"

    @property
    def static(self) -> bool:
        return self.scope == "static"

    @property
    def summary(self) -> str:
        """One phrase, for `fewbits formats`."""
        element = "8-bit integers" if self.element == "int8" else "FP8 E4M3"
        scope = {"token": "a scale per token", "tensor": "a scale per input", "static": "one scale from samples"}
        return f"{element}, {scope[self.scope]}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.element == "int8" else torch.float8_e4m3fn

    @property
    def highest(self) -> float:
        """The code of max|x|."""
        return 127.0 if self.element == "int8" else E4M3_MAX

    def scale_of(self, peak: Tensor) -> Tensor:
        """The scale, float32, at which |x| = peak has the highest code."""
        return (peak.float() / self.highest).clamp_min(SMALLEST)

    def dynamic_scale(self, x: Tensor) -> Tensor:
        """The scale that x [..., K] asks for: [..., 1] per token, else [1]."""
        peak = x.abs().amax(-1, keepdim=True) if self.scope == "token" else x.abs().amax().reshape(1)
        return self.scale_of(peak)

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes, scale) of x, floating point [..., K] and not empty; codes have its shape and are int8 or e4m3.

        scale: as `dynamic_scale` returns it; computed where None is given. Raises FormatError if it is static and
        missing.
        """
        if scale is None:
            if self.static:
                raise FormatError(f"{self.name}: the scale is fixed from samples, so it must be given")
            scale = self.dynamic_scale(x)
        t = x.float() / scale  # a division, as engines do it: times the inverse falls on the other side of some ties
        if self.element == "int8":
            return t.round_().clamp_(-128, 127).to(torch.int8), scale
        return t.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The numbers, float32, that codes stand for."""
        return codes.float() * scale

    def weight_trouble(self, weight: Format) -> str | None:
        """Why a product with weights in this format cannot be made of codes alone; None if it can."""
        needed = "integers" if self.element == "int8" else "FP8 E4M3"
        fits = (
            isinstance(weight, Affine | Ternary)
            if self.element == "int8"
            else isinstance(weight, Fp8) and weight.exponent == 4
        )
        if not fits:
            return f"{self.name} inputs are multiplied by {needed}, not {weight}; choose weights of that type"
        if getattr(weight, "group", "row") not in ("row", "tensor"):
            return (
                f"{self.name} inputs need one weight scale per row or tensor, which can be taken out of the sum; "
                f"{weight} has one per group"
            )
        return None

    def __str__(self) -> str:
        return self.name


_ELEMENTS: tuple[Literal["int8", "fp8"], ...] = ("int8", "fp8")
_SCOPES: tuple[Literal["token", "tensor", "static"], ...] = ("token", "tensor", "static")

ACTIVATIONS: dict[str, ActivationFormat] = {
    format.name: format for format in (ActivationFormat(element, scope) for element in _ELEMENTS for scope in _SCOPES)
}
"""Every activation format by its name."""


def activation_named(name: str) -> ActivationFormat:
    """The activation format of that name. Raises FormatError if there is none."""
    if name not in ACTIVATIONS:
        raise FormatError(f"activation format '{name}' is not known; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
