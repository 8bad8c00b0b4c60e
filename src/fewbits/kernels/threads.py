"""Threads of Python that run torch, each on one core.

torch splits an operation over its threads, which pays for large ones only; thousands of small ones are better spread
over threads of Python. How many threads torch takes is a number of each thread of Python, but one that has not asked
yet takes the number that was set last, by whatever thread. A pool whose threads set 1 so leaves the main thread, or
any that is made later, with one core for good, unless it is put right.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from fewbits.kernels._compiled import compiled


def team() -> Any | None:
    """The threads that torch works on, for products between its own (`runtime.Products`); None where they are not to
    be had.
    """
    core = compiled()
    return None if core is None else core.openmp_team


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads with one core each; outside of them torch goes on with as many as before."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
