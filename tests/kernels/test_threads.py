"""Pools of threads with one core each, and the number of threads of everybody else."""

from __future__ import annotations

from threading import Thread

import torch

from fewbits.kernels.threads import workers


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_only_the_pool_has_one_core():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with workers(2) as pool:
            assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == 3  # 1, if the last number that was set had been the pool's
    finally:
        torch.set_num_threads(before)
