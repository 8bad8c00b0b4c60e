"""Independent pieces of work on all cores.

torch splits one operation over its threads, which pays for large ones only; solving a matrix is thousands of small
ones. So matrices are spread over threads instead, and each runs torch on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fewbits.kernels.threads import workers

T = TypeVar("T")


def in_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the tasks, in their order; as many at a time as torch has threads. The first error is raised."""
    threads = min(len(tasks), torch.get_num_threads())
    if threads <= 1:
        return [task() for task in tasks]
    with workers(threads) as pool:
        return list(pool.map(lambda task: task(), tasks))
