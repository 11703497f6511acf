"""A kernel's work divided among threads. Layer 1."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def divide(n_units: int, run: Callable[[int, int], None]) -> None:
    """Calls `run(begin, end)` for ranges of the units on as many threads as torch uses; `ctypes` lets them run side by
    side. The threads are kept."""
    n_threads = max(1, min(torch.get_num_threads(), n_units))
    bounds = [n_units * part // n_threads for part in range(n_threads + 1)]
    others = [_pool(n_threads).submit(run, *bounds[part : part + 2]) for part in range(1, n_threads)]
    run(*bounds[:2])
    for other in others:
        other.result()


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads - 1, "kernel")
