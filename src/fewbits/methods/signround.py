"""SignRound: a block's rounding and scales are trained so that the block returns what the original returns.

Cheng et al. 2023, arXiv:2309.05516 (the method of AutoRound). Every weight may be shifted by up to half a level before
it is rounded, every scale may move (`fake_quant`), and what is minimised is

    mean (block(x̂; Ŵ) − block(x; W))²

over windows of calibration text, x̂ being what comes out of the quantized blocks before and x what comes out of the
original ones: so each block also makes up for those before it. All matrices of the block are trained at once; this is
what methods that look at one layer's error cannot do. Steps go by the sign of the gradient alone: a shift is bounded,
so what counts is that it can get anywhere in its range, which `steps` moves of a rate that falls linearly to 0 allow.

It starts at the codes and scales of another solver. Rounding to nearest at searched scales is the default, because it
leaves every weight the choice of its two neighbours; from GPTQ's codes, which lie further away, the block's error falls
less far, and so does the divergence.

Windows differ in how hard they are by more than steps differ in how good they are. So a step is judged by its error
over that of the start on the same windows, and the best step's codes are kept, exactly as they were run; if over all
windows they are no better than the start, the start is the result.

Cost: a step is a forward and a backward pass of the block over `batch` windows, in BF16 where that is fast
(`products`), plus a dozen elementwise operations a weight. Memory: 29 bytes a weight of the block beside the block
itself, and the activations of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format, QTensor
from fewbits.methods._windows import batches
from fewbits.methods.base import Solver
from fewbits.methods.block import Block, Stats
from fewbits.methods.fake_quant import Choice, Rounding
from fewbits.methods.products import product_type, products_in
from fewbits.methods.rtn import RoundToNearest

START = RoundToNearest()


@dataclass(frozen=True)
class SignRound(Solver):
    """Signed gradient descent on the rounding and the scales of a block.

    steps: of descent. batch: windows of calibration text a step. rate, scale_rate: how far a shift (in
    levels) and a scale (relative) can get in all, doubled. start: the solver whose codes and scales are improved.
    seed: of the order of windows.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 1.0
    scale_rate: float = 0.2
    start: Solver = START
    seed: int = 0

    summary: ClassVar[str] = "rounding and scales trained by signed gradients, so that each block's outputs fit"
    needs: ClassVar[tuple[str, ...]] = ("importance",)
    runs: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "signround"

    @property
    def windows_run(self) -> float:
        return 3.0 * self.steps * self.batch

    @torch.no_grad()
    def quantize_block(self, block: Block, plan: Mapping[str, Format], stats: Stats) -> dict[str, QTensor]:
        """Raises UnsupportedError for a block that cannot be run on calibration text."""
        solved = self.start.quantize_block(block, plan, stats)
        if block.call is None or not len(block.inputs) or len(block.inputs) != len(block.targets):
            raise UnsupportedError("signround runs each block on calibration text, and there is none; use rtn or hqq")
        trained = {name: q for name, q in solved.items() if not isinstance(q.format, Float)}
        return solved | (self._trained(block, trained) if trained and self.steps else {})

    def _trained(self, block: Block, start: Mapping[str, QTensor]) -> dict[str, QTensor]:
        roundings = {name: Rounding(block.matrix(name), q) for name, q in start.items()}
        descent = Descent(block, roundings, product_type((q.format for q in start.values()), block.device))
        before = descent.errors_of_all(self.batch)
        best, least = descent.choices(), 1.0
        order = batches(len(before), self.batch, self.seed)
        for step, windows in zip(range(self.steps), order, strict=False):
            share = (1 - step / self.steps) / self.steps
            errors = descent.step(windows, self.rate * share, self.scale_rate * share)
            ratio = float(errors.sum() / before[windows].sum())
            if ratio < least:
                best, least = descent.last, ratio
        descent.put(best)
        if not float(descent.errors_of_all(self.batch).sum()) < float(before.sum()):
            return dict(start)
        return {name: rounding.tensor(best[name]) for name, rounding in roundings.items()}


class Descent:
    """A block whose matrices are being rounded anew at every step."""

    def __init__(self, block: Block, roundings: Mapping[str, Rounding], dtype: torch.dtype) -> None:
        self._block, self._roundings, self._dtype = block, roundings, dtype
        names = dict.fromkeys(block.slots[name].parameter for name in roundings)
        self._leaves = {name: block.parameters[name].detach().to(dtype, copy=True) for name in names}
        self._round()
        self.last = self.choices()
        """What the last step's error was measured with."""

    def choices(self) -> dict[str, Choice]:
        return {name: rounding.choice for name, rounding in self._roundings.items()}

    def put(self, choices: Mapping[str, Choice]) -> None:
        """Let the block have these weights."""
        for name, rounding in self._roundings.items():
            self._fill(name, rounding.tensor(choices[name]).dequantize())

    def errors(self, windows: Sequence[int]) -> Tensor:
        """Mean squared error of the block's outputs, by window."""
        assert self._block.call is not None
        x, target = (self._block.batch(kept, windows) for kept in (self._block.inputs, self._block.targets))
        with products_in(self._dtype, self._block.device):
            y = self._block.call(x, self._leaves)
        return (y.float() - target).square().mean((1, 2))

    def errors_of_all(self, batch: int) -> Tensor:
        """The same for every window, so many at a time."""
        windows = range(len(self._block.inputs))
        return torch.cat([self.errors(windows[i : i + batch]) for i in windows[::batch]]).cpu()

    def step(self, windows: Sequence[int], rate: float, scale_rate: float) -> Tensor:
        """One step of descent on these windows; their errors before it."""
        leaves = list(self._leaves.values())
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad():
            errors = self.errors(windows)
            found = torch.autograd.grad(errors.sum(), leaves, allow_unused=True)
        for leaf in leaves:
            leaf.requires_grad_(False)
        self.last = self.choices()
        self._descend(dict(zip(self._leaves, found, strict=True)), rate, scale_rate)
        self._round()
        return errors.detach().cpu()

    def _descend(self, gradients: Mapping[str, Tensor | None], rate: float, scale_rate: float) -> None:
        for name, rounding in self._roundings.items():
            slot = self._block.slots[name]
            gradient = gradients[slot.parameter]
            if gradient is not None:  # an expert may have got no token of these windows
                rounding.descend(slot.take(gradient), rate, scale_rate)

    def _round(self) -> None:
        for name, rounding in self._roundings.items():
            self._fill(name, rounding.weights())

    def _fill(self, name: str, w: Tensor) -> None:
        slot = self._block.slots[name]
        slot.put(self._leaves[slot.parameter], w)


SIGNROUND = (SignRound(),)
