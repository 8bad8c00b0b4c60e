"""The order in which windows of calibration text are trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def batches(windows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Windows for one step after the other, without end: every one once, in an order drawn by lot, then again."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    size = min(max(1, size), windows)
    while True:
        if len(left) < size:
            left += torch.randperm(windows, generator=generator).tolist()
        yield left[:size]
        left = left[size:]
