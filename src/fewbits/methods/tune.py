"""Tuning: the scales of the whole quantized model, and its norms, are trained against the original's predictions.

Solvers see one block and the squared error of its outputs. What counts in the end is the divergence of the predictions,

    KL(p ‖ q) = Σ_t p(t) · (ln p(t) − ln q(t)),      p the original's, q the quantized model's,

and with the codes fixed that can be minimised end to end: a number is its code's level times a scale, so a scale's
gradient is a sum over its group (`fake_quant`), and there are only as many of them as groups. Scales are what PEQA
trains (Kim et al. 2023, arXiv:2305.14152) and the second stage of EfficientQAT (Chen et al. 2024, arXiv:2407.11062,
section 3.3); the divergence as the loss is that of LLM-QAT (Liu et al. 2023, arXiv:2305.17888). Formats whose scales
are too coarse to be moved a little (powers of two, FP8, double quantization) keep theirs. AdamW without decay on
relative changes, so that one rate fits all; it falls to 0 along half a cosine.

Memory: codes, five float32 numbers a scale, the hidden states between blocks for one step, and one decoded block with
its activations, because the backward pass runs each block again instead of keeping what happened in it. The original is
known by the hidden states that its last block returned; predictions are made of them a window at a time. In training
they are multiplied as the blocks are (`products`), on held-out text in float32.

Part of the text is held out of the training. The model is measured on it now and then, with numbers as they will be
stored, and the best one is returned: the one that came, if none is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Float, QTensor
from fewbits.methods._windows import batches
from fewbits.methods.base import Finished, Finisher, Quantized
from fewbits.methods.block import Block
from fewbits.methods.fake_quant import Choice, Rescaling
from fewbits.methods.products import product_type, products_in

CHECKS = 5
"""How often the model is measured on held-out text."""


@dataclass(frozen=True)
class Tune(Finisher):
    """End-to-end training of scales and norms.

    steps: of training. batch: windows a step. rate, norm_rate: AdamW's, of relative changes; a rate of 0 leaves scales
    or norms alone. held_out: share of the windows that is measured on. seed: of the order of windows.
    """

    steps: int = 100
    batch: int = 8
    rate: float = 3e-3
    norm_rate: float = 1e-3
    held_out: float = 0.125
    seed: int = 0

    summary: ClassVar[str] = "afterwards: scales and norms trained end to end against the original's predictions"

    @property
    def name(self) -> str:
        return "tune"

    @torch.no_grad()
    def finish(self, model: Quantized) -> Finished:
        """Raises UnsupportedError where there are fewer than two windows: one to train on, one to hold out."""
        held, trained = _divided(len(model.inputs), self.held_out)
        student = Student(model, norms=self.norm_rate > 0, scales=self.rate > 0)
        best, start = student.state(), student.divergence(held, self.batch)
        least = start
        optimizer = self._optimizer(student)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._cosine)
        order = batches(len(trained), self.batch, self.seed)
        for step, windows in zip(range(1, self.steps + 1), order, strict=False):
            student.differentiate([trained[i] for i in windows])
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // CHECKS) == 0 or step == self.steps:
                found = student.divergence(held, self.batch)
                if found < least:
                    best, least = student.state(), found
        return student.finished(best, start, least)

    def _optimizer(self, student: Student) -> torch.optim.Optimizer:
        groups = [{"params": student.scales, "lr": self.rate}, {"params": student.norms, "lr": self.norm_rate}]
        trained = [group for group in groups if group["params"]]
        if not trained:
            raise UnsupportedError("tune: no scale of this model can be moved and no norm may be; leave it out")
        return torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)

    def _cosine(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


@dataclass(frozen=True)
class State:
    """What a model was at one moment: of each block the codes and params, and the free parameters as written."""

    choices: Sequence[Mapping[str, Choice]]
    norms: Sequence[Mapping[str, Tensor]]


class Student:
    """The quantized model on its way. scales, norms: what is trained, relative changes, float32; zero at the start."""

    def __init__(self, model: Quantized, *, norms: bool, scales: bool) -> None:
        self._model = model
        formats = (q.format for tensors in model.tensors for q in tensors.values())
        self._dtype = product_type(formats, model.blocks[0].device)
        self._blocks = [
            Part(block, tensors, free if norms else {})
            for block, tensors, free in zip(model.blocks, model.tensors, model.free, strict=True)
        ]
        self.scales = [change for part in self._blocks for change in part.scales()] if scales else []
        self.norms = [change for part in self._blocks for change in part.changes.values()]

    def state(self) -> State:
        return State([part.choices() for part in self._blocks], [part.written() for part in self._blocks])

    def divergence(self, windows: Sequence[int], batch: int) -> float:
        """Mean divergence from the original on these windows, in nats a token."""
        total = 0.0
        for start in range(0, len(windows), batch):
            states, some = list[Tensor](), windows[start : start + batch]
            x = self._forward(some, states)
            total += sum(self._compare(x[i : i + 1], window)[0] for i, window in enumerate(some))
        return total / len(windows)

    def differentiate(self, windows: Sequence[int]) -> None:
        """Set the gradients, of the mean divergence on these windows, of everything that is trained."""
        states: list[Tensor] = []
        x = self._forward(windows, states)
        slopes = [self._compare(x[i : i + 1], window, slope=True)[1] for i, window in enumerate(windows)]
        slope = torch.cat(slopes).div_(len(windows))
        for part in reversed(self._blocks):
            slope = part.backward(states.pop(), slope)

    def finished(self, state: State, before: float, after: float) -> Finished:
        tensors = [part.tensors(choices) for part, choices in zip(self._blocks, state.choices, strict=True)]
        return Finished(tensors, state.norms, before, after)

    def _forward(self, windows: Sequence[int], states: list[Tensor]) -> Tensor:
        """What the last block returns; what every block read is added to `states`."""
        x = self._blocks[0].block.batch(self._model.inputs, windows)
        for part in self._blocks:
            states.append(x)
            x = part.forward(x)
        return x

    def _compare(self, x: Tensor, window: int, *, slope: bool = False) -> tuple[float, Tensor]:
        """Mean divergence of one window's predictions, and its gradient by x [1, T, H] if wanted."""
        target = self._blocks[0].block.batch(self._model.targets, [window])
        with torch.set_grad_enabled(slope), products_in(self._dtype if slope else torch.float32, target.device):
            x = x.detach().requires_grad_(slope)
            p = self._model.originals(target).float().log_softmax(-1)
            q = self._model.logits(x).float().log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1).mean()
            return float(divergence.detach()), torch.autograd.grad(divergence, x)[0] if slope else x


class Part:
    """One block of a student. changes: of its free parameters, in units of their root mean square."""

    def __init__(self, block: Block, tensors: Mapping[str, QTensor], free: Mapping[str, torch.dtype]) -> None:
        self.block = block
        self._dtype = product_type((q.format for q in tensors.values()), block.device)
        self._kept = {name: q for name, q in tensors.items() if isinstance(q.format, Float)}
        self._matrices = {name: Rescaling(q) for name, q in tensors.items() if name not in self._kept}
        self._free = dict(free)
        self._start = {name: block.parameters[name].detach().float().clone() for name in free}
        self._unit = {name: p.square().mean().sqrt() for name, p in self._start.items()}
        self.changes = {name: torch.zeros_like(p) for name, p in self._start.items()}

    def scales(self) -> list[Tensor]:
        return [matrix.change for matrix in self._matrices.values() if matrix.change is not None]

    def choices(self) -> dict[str, Choice]:
        for matrix in self._matrices.values():
            matrix.weights()
        return {name: matrix.choice for name, matrix in self._matrices.items()}

    def written(self) -> dict[str, Tensor]:
        """The free parameters in the types that they are written in."""
        return {
            name: (p + self.changes[name] * self._unit[name]).to(self._free[name]) for name, p in self._start.items()
        }

    def tensors(self, choices: Mapping[str, Choice]) -> dict[str, QTensor]:
        return self._kept | {name: self._matrices[name].tensor(choice) for name, choice in choices.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, self._decoded() | self._norms())

    def backward(self, x: Tensor, slope: Tensor) -> Tensor:
        """Set the gradients, given what the block read and the loss's gradient by what it returned; that by x."""
        replaced = self._decoded() | self._norms()
        inputs = [x, *replaced.values()]
        for tensor in inputs:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(self._call(x, replaced), inputs, slope, allow_unused=True)
        slopes = dict(zip(replaced, found[1:], strict=True))
        for name, change in self.changes.items():
            change.grad = _or_zero(slopes[name], change) * self._unit[name]
        for name, matrix in self._matrices.items():
            slot = self.block.slots[name]
            gradient = slopes[slot.parameter]
            if matrix.change is not None:  # an expert may have got no token of these windows
                matrix.change.grad = None if gradient is None else matrix.slope(slot.take(gradient))
        assert found[0] is not None
        return found[0]

    def _call(self, x: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        assert self.block.call is not None
        with products_in(self._dtype, self.block.device):
            return self.block.call(x, replaced).float()

    def _norms(self) -> dict[str, Tensor]:
        return {name: p.float() for name, p in self.written().items()}

    def _decoded(self) -> dict[str, Tensor]:
        """Whole parameters with every quantized matrix in them decoded."""
        whole: dict[str, Tensor] = {}
        numbers = {name: q.dequantize for name, q in self._kept.items()}
        for name, decode in (numbers | {name: m.weights for name, m in self._matrices.items()}).items():
            slot = self.block.slots[name]
            if slot.parameter not in whole:
                whole[slot.parameter] = _room(self.block.parameters[slot.parameter], self._dtype, self.block.device)
            slot.put(whole[slot.parameter], decode())
        return whole


def _room(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a parameter to write matrices into; without numbers where it has none."""
    if parameter.is_meta:
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    return parameter.detach().to(device, dtype, copy=True)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _divided(windows: int, share: float) -> tuple[list[int], list[int]]:
    """Windows to hold out, spread evenly over the text, and those to train on."""
    if windows < 2:
        raise UnsupportedError(f"tune holds some text out of training; {windows} window is too few, give 2 or more")
    every = max(2, round(1 / share))
    held = list(range(0, windows, every))
    return held, [i for i in range(windows) if i % every]


TUNE = (Tune(),)
