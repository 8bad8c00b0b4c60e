"""AdamW whose two moments take a byte each instead of four.

Each block of 256 numbers of a moment is divided by its largest magnitude and rounded to the nearest of 256 levels
(Dettmers et al. 2022, arXiv:2110.02861). They are spread over seven decades, because what a moment holds differs by
orders of magnitude within a block: the decade below 1 has the most, each further one half as many, at the middles of
equal parts of it; 0 and the largest magnitude itself are levels too. The mean of gradients needs a sign; the mean of
their squares does not, and has twice as many levels in each decade. It is never rounded to 0, since the step divides by
its root.

A step decodes the moments of one parameter, changes them as torch's AdamW does, and rounds them again. Parameters of up
to SMALL numbers (norms, biases, scales) keep theirs in FP32: they would save nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
SMALL = 4096
DECADES = 7
CODES = ("mean_codes", "square_codes")


def levels(*, signed: bool) -> Tensor:
    """The 256 levels in ascending order, from −1 or 0 to 1."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        middles = 0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
        spread = (middles * 10.0 ** (decade - DECADES + 1)).tolist()
        found += [*spread, *(-level for level in spread)] if signed else spread
    return torch.tensor(sorted(found), dtype=torch.float32)


class Blocks:
    """One of the two codes: numbers to (codes uint8 [n], scales float32 [blocks]) and back."""

    def __init__(self, *, signed: bool) -> None:
        self.levels = levels(signed=signed)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.floor = 0 if signed else 1  # the least code of a number that is not 0

    def round(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rows = _rows(numbers.flatten())
        scales = rows.abs().amax(1)
        units = rows / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(units, self.middles.to(units.device))
        codes = torch.where(units == 0, codes, codes.clamp_min(self.floor))
        return codes.to(torch.uint8).flatten()[: numbers.numel()], scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        units = _rows(self.levels.to(codes.device)[codes.int()])
        return (units * scales[:, None]).flatten()[: len(codes)]


def _rows(numbers: Tensor) -> Tensor:
    """[blocks, BLOCK], filled up with zeros."""
    return pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)


MEAN, SQUARE = Blocks(signed=True), Blocks(signed=False)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits. lr, betas, eps, weight_decay: as torch's AdamW has them."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _change(parameter, self.state[parameter], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state. torch casts it to the parameters' type, in which codes are still whole numbers."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].to(torch.uint8) for name in CODES if name in state})


def _change(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of one parameter."""
    gradient = parameter.grad.float().flatten()  # type: ignore[union-attr]
    mean, square = _moments(state, gradient)
    first, second = group["betas"]
    state["step"] = count = int(state.get("step", 0)) + 1
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    divisor = square.sqrt().div_((1 - second**count) ** 0.5).add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_((mean / divisor).mul_(group["lr"] / (1 - first**count)).view_as(parameter).to(parameter.dtype))
    _keep(state, mean, square)


def _moments(state: dict[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments as float32 [n]; zeros before the first step."""
    if "mean" in state:
        return state["mean"], state["square"]
    if "mean_codes" in state:
        mean = MEAN.decode(state["mean_codes"], state["mean_scales"])
        return mean, SQUARE.decode(state["square_codes"], state["square_scales"])
    return torch.zeros_like(gradient), torch.zeros_like(gradient)


def _keep(state: dict[str, Any], mean: Tensor, square: Tensor) -> None:
    if len(mean) <= SMALL:
        state["mean"], state["square"] = mean, square
        return
    state["mean_codes"], state["mean_scales"] = MEAN.round(mean)
    state["square_codes"], state["square_scales"] = SQUARE.round(square)
