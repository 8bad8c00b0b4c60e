"""The compiled parts of the package, where it was built with a C++ compiler."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from typing import Any

log = logging.getLogger(__name__)

SWITCH = "FEWBITS_COMPILED"
"""Environment variable: `0` leaves the compiled kernels alone, so that their references run."""


@lru_cache
def extension(name: str) -> Any | None:
    """The extension module of that name; None, said once, where it was not built or is switched off."""
    if os.environ.get(SWITCH) == "0":
        log.warning("compiled kernels are switched off (%s=0): the slower references run", SWITCH)
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        log.warning(
            "no compiled kernels, the slower references run: %s; install fewbits with a C++20 compiler and CMake", error
        )
        return None
