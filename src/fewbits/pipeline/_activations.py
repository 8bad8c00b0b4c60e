"""Hidden states of all calibration windows: in memory, or in a file where they are too many.

What a block is given and what it returns are both n windows of [T, H] numbers, so a block's output can replace its
input one batch at a time. Past a limit the states lie in a file that is read and written a batch at a time (not mapped:
mapped pages count as memory once touched).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np
import torch
from torch import Tensor


class Activations(Sequence[Tensor]):
    """Windows [T, H] float32 on the CPU, by index; those of a file are read when asked for."""

    def __init__(self, windows: int, length: int, hidden: int, file: Path | None = None) -> None:
        """file: where to keep them, instead of in memory; it is created, and removed by `close`."""
        self.shape = (windows, length, hidden)
        self._path, self._file = file, None if file is None else _opened(file)
        self._memory = torch.empty(self.shape) if file is None else torch.empty(0)

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Tensor: ...  # type: ignore[override]
    def __getitem__(self, index: int | slice) -> Tensor:
        """One window [T, H], or a run of them [B, T, H]."""
        if self._file is None:
            return self._memory[index]
        rows = range(self.shape[0])[index] if isinstance(index, slice) else range(index, index + 1)
        data = np.empty((len(rows), *self.shape[1:]), np.float32)
        self._file.seek(rows.start * self._window_bytes)
        self._file.readinto(memoryview(data).cast("B"))  # type: ignore[attr-defined]
        found = torch.from_numpy(data)
        return found if isinstance(index, slice) else found[0]

    def put(self, start: int, states: Tensor) -> None:
        """Replace windows [start, start + B) by states [B, T, H]."""
        states = states.detach().float().cpu().contiguous()
        if self._file is None:
            self._memory[start : start + len(states)] = states
            return
        self._file.seek(start * self._window_bytes)
        self._file.write(memoryview(states.numpy()).cast("B"))

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(first window, [B, T, H]) for all of them."""
        for start in range(0, len(self), size):
            yield start, self[start : start + size]

    def close(self) -> None:
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    @property
    def _window_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * 4


def _opened(path: Path) -> BinaryIO:
    return path.open("w+b", buffering=0)
