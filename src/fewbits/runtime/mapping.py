"""A file mapped into memory, which compiled kernels move into huge pages while it is used (`csrc/mapping.h`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.runtime.compiled import compiled


class Mapping:
    """The bytes of a file, uint8, read-only. Raises OSError where it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        core = compiled()
        self._mapped: Any = None if core is None else core.Mapping(str(path))
        self.bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r") if self._mapped is None else self._mapped.bytes()

    @property
    def moved(self) -> int:
        """Bytes that lie in huge pages by now."""
        return 0 if self._mapped is None else int(self._mapped.moved)

    def move(self) -> None:
        """Move as much as there is memory for into huge pages: about two seconds a gigabyte, on another thread."""
        if self._mapped is not None:
            self._mapped.move()

    def wait(self) -> None:
        """Wait until nothing is being moved."""
        if self._mapped is not None:
            self._mapped.wait()
