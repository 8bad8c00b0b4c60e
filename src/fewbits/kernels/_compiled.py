"""The compiled kernels that work on torch's tensors and its threads."""

from __future__ import annotations

from typing import Any

from fewbits.extensions import extension


def compiled() -> Any | None:
    """The extension module; None where there is none (`fewbits.extensions`)."""
    return extension("fewbits.kernels._core")
