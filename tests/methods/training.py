"""A block that can be run and trained: a gated MLP with a residual, two of its matrices in a fused parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.methods import Block
from fewbits.models import Slot

HIDDEN, INNER = 64, 96


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(windows: int = 6, length: int = 24, *, drift: float = 0.0, seed: int = 0) -> Block:
    """drift: how far its inputs are from those that the targets were made of. seed: of the weights."""
    parameters = {
        "gate_up": 0.15 * draw(2 * INNER, HIDDEN, seed=seed + 1),
        "down": 0.15 * draw(INNER, HIDDEN, seed=seed + 2),  # stored transposed
        "norm": 1 + 0.1 * draw(HIDDEN, seed=seed + 3),
    }

    def call(x: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        p = {**parameters, **replaced}
        normed = torch.nn.functional.rms_norm(x, (HIDDEN,), p["norm"])
        gate, up = torch.nn.functional.linear(normed, p["gate_up"]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        return x + torch.nn.functional.linear(inner, p["down"].T)

    slots = {
        "gate": Slot("gate_up", rows=(0, INNER)),
        "up": Slot("gate_up", rows=(INNER, 2 * INNER)),
        "down": Slot("down", transposed=True),
    }
    original = draw(windows, length, HIDDEN, seed=4) * torch.logspace(-0.5, 0.5, HIDDEN)
    inputs = original + drift * draw(windows, length, HIDDEN, seed=5)
    targets = call(original, {})
    return Block("block", parameters, slots, call, list(inputs), list(targets))
