"""How codes are chosen. METHODS is the registry: a new method is one file that ends in a tuple, and one line here."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format, QTensor, format_named
from fewbits.methods.auto import AUTO
from fewbits.methods.awq import AWQ
from fewbits.methods.base import Finished, Finisher, Method, Quantized, Solver, TensorMethod, Transform
from fewbits.methods.block import Block
from fewbits.methods.gptq import GPTQS
from fewbits.methods.hqq import HQQS
from fewbits.methods.recipe import Recipe, recipe
from fewbits.methods.rotate import ROTATE
from fewbits.methods.rtn import RTN
from fewbits.methods.signround import SIGNROUND
from fewbits.methods.smoothquant import SMOOTHQUANT
from fewbits.methods.tune import TUNE

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *RTN,
        *HQQS,
        *GPTQS,
        *AWQ,
        *SMOOTHQUANT,
        *ROTATE,
        *SIGNROUND,
        *TUNE,
        *AUTO,
    )
}


def method_named(name: str) -> Method:
    """The method of that name. Raises UnsupportedError if there is none."""
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=3) or list(METHODS)
        raise UnsupportedError(f"method '{name}' is not known; did you mean {', '.join(close)}? See `fewbits methods`")
    return METHODS[name]


def recipe_named(text: str) -> Recipe:
    """The recipe that a method's name, or several joined by +, stands for. Raises UnsupportedError if there is none."""
    for name in text.split("+"):
        method_named(name)
    return recipe(text, METHODS, RTN[0])


@torch.no_grad()
def quantize_tensor(
    x: Tensor, format: str | Format, *, method: str = "rtn", importance: Tensor | None = None
) -> QTensor:
    """One tensor, floating point [..., out_features, in_features], in a format.

    importance: weight of each squared error, broadcastable to x ([in_features] for the mean x² of the layer's inputs).
    Raises FormatError if x holds NaN or Inf or the format cannot hold its shape.
    """
    chosen = method_named(method)
    if not isinstance(chosen, TensorMethod):
        raise UnsupportedError(f"method {chosen.name} works on whole blocks; a single tensor can take rtn")
    stats = {} if importance is None else {"importance": importance}
    return chosen.quantize(x, format if isinstance(format, Format) else format_named(format), stats)


__all__ = [
    "METHODS",
    "Block",
    "Finished",
    "Finisher",
    "Method",
    "Quantized",
    "Recipe",
    "Solver",
    "TensorMethod",
    "Transform",
    "method_named",
    "quantize_tensor",
    "recipe_named",
]
