"""Hidden states of all calibration windows: in memory, or in a file where they are too many.

What a block is given and what it returns are both n windows of [T, H] numbers, so a block's output can replace its
input one batch at a time. Past a limit the states lie in a file that is read and written a batch at a time (not mapped:
mapped pages count as memory once touched).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbits.checkpoint._writer import disk_errors
from fewbits.errors import OutputError


class Activations:
    """Windows [T, H] float32 on the CPU, by index; those of a file are read when asked for."""

    def __init__(self, windows: int, length: int, hidden: int, file: Path | None = None) -> None:
        """file: where to keep them instead of in memory; it is created, and removed by `close`."""
        self.shape = (windows, length, hidden)
        self._path = file
        self._file = None if file is None else file.open("w+b")  # buffered: a raw file may write less than it is given
        self._memory = torch.empty(self.shape if file is None else 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """One window [T, H]."""
        return self.span(index, index + 1)[0]

    def span(self, start: int, stop: int) -> Tensor:
        """Windows [start, stop), [B, T, H]."""
        stop = min(stop, len(self))
        if self._file is None:
            return self._memory[start:stop]
        data = np.empty((stop - start, *self.shape[1:]), np.float32)
        self._file.seek(start * self._window_bytes)
        if self._file.readinto(data.view(np.uint8).reshape(-1).data) != data.nbytes:
            raise OutputError(
                f"{self._path}: shorter than what was written to it; leave the folder alone while it is used"
            )
        return torch.from_numpy(data)

    def put(self, start: int, states: Tensor) -> None:
        """Replace windows [start, start + B) by states [B, T, H]."""
        states = states.detach().float().cpu().contiguous()
        if self._file is None:
            self._memory[start : start + len(states)] = states
            return
        with disk_errors(self._path or Path()):
            self._file.seek(start * self._window_bytes)
            self._file.write(states.numpy().view(np.uint8).reshape(-1).data)
            self._file.flush()

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(first window, [B, T, H]) for all of them."""
        for start in range(0, len(self), size):
            yield start, self.span(start, start + size)

    def close(self) -> None:
        """Free them; a file is removed."""
        self._memory = torch.empty(0)
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    @property
    def _window_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * 4
