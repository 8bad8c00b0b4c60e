"""How far apart two float32 runs of a model may be that sum in another order: measured on the model itself.

A sum of K products is off by about √K · 2⁻²⁴ of the products' size in whatever order it is made (Higham and Mary 2019,
"A new approach to probabilistic rounding error analysis", theorem 2.4); what such an error becomes behind twenty layers
depends on the layers. So it is let in: every layer's output is shifted by random numbers of FACTOR times that size, in
root mean square, and the outputs that come of it are compared with those of the model as it is. Roundings of inputs
to 8 bits that fall to the other side of a tie are in it as well; in a deep model one of them moves others, until any
cause makes about the same difference, of which a classifier shows but a few numbers. So the limit is MARGIN times the
largest of a few such runs. FACTOR leaves room for what is not a layer: attention, softmax and activation functions,
whose errors are of one or two units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 4.0
MARGIN = 4.0
RUNS = 3
UNIT = 2.0**-24


def rounding(model: nn.Module, run: Callable[[], Tensor]) -> float:
    """The relative difference, by the norm, that rounding may make to what `run` returns, which calls the model."""
    plain = run()
    return MARGIN * max(relative(_shifted(model, run, seed), plain) for seed in range(RUNS))


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((found - expected).norm() / expected.norm())


def _shifted(model: nn.Module, run: Callable[[], Tensor], seed: int) -> Tensor:
    with _shifts(model, torch.Generator().manual_seed(seed)):
        return run()


@contextmanager
def _shifts(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    def shift(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else output
        terms = max(output.shape[-1], first.shape[-1] if first.is_floating_point() and first.dim() else 1)
        size = FACTOR * UNIT * terms**0.5 * output.square().mean(-1, keepdim=True).sqrt()
        return output + size * torch.randn(output.shape, generator=generator)

    leaves = [m for m in model.modules() if not any(True for _ in m.children()) or hasattr(m, "store")]
    hooks = [module.register_forward_hook(shift) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
