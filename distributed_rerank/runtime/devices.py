"""The device, threads and memory of this process, and arrays that cross process borders without a copy."""

import ctypes
import functools
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


def pick_device() -> torch.device:
    """The GPU where this process sees one (a Ray worker sees the one it holds), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # or float32 convolutions would round their factors to 10 bits
    return torch.device("cuda")


@contextmanager
def one_order_of_sums(device: torch.device) -> Iterator[None]:
    """Inside the block a GPU adds gradients up in one order, so that training twice gives the same bits.

    Where torch has no such kernel it says so and takes the usual one. A CPU needs none of it.
    """
    if device.type == "cpu":
        yield
        return
    # Read when the first matrix product is computed: without it products of several streams share their memory.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled: Any = torch.utils.deterministic  # type checkers do not see its setting
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, filled.fill_uninitialized_memory = filled.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filled.fill_uninitialized_memory = fills


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Compute with `number` threads inside the block; the caller's setting comes back afterwards.

    The number decides how sums are split and thus their last bits, so it comes from a config, never from the machine or
    from the number of workers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Part = TypeVar("Part")
Result = TypeVar("Result")


class InferenceThreads:
    """Threads that compute side by side, each on parts of its own with one thread of torch.

    A model's operations are too short to be divided among threads: two such threads do 1.1 (float32) to 1.3 times
    (bfloat16) what two threads of torch do on the same part. The last bits of a result do not depend on their number.
    """

    def __init__(self, number: int) -> None:
        keep_freed_memory()
        self._number = number
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
        """`function` of each part in torch's inference mode, in the order of the parts."""
        infer = torch.inference_mode()(function)
        with torch_threads(1):
            if self._number == 1:
                return list(map(infer, parts))
            if self._pool is None:
                # Kept: torch builds its kernels' descriptions anew for each thread.
                self._pool = ThreadPoolExecutor(self._number, initializer=torch.set_num_threads, initargs=(1,))
            return list(self._pool.map(infer, parts))


@functools.cache
def keep_freed_memory() -> bool:
    """Tell this process's allocator to keep freed memory for the next tensor; False where it cannot be told.

    glibc gives large blocks back to the system at once and gets fresh pages for the next operation, which must be
    cleared: a fifth of the time of a vision transformer on a CPU. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    # One arena, since those of other threads give memory back whatever the threshold is.
    options = {arena_max: 1, mmap_threshold: 32 * 2**20, trim_threshold: 2**31 - 1}
    return all(mallopt(option, value) == 1 for option, value in options.items())


def array_of(tensor: Tensor) -> np.ndarray:
    """The tensor as a numpy array on the CPU; bfloat16, which numpy lacks, as its bits in int16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tensor_of(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the memory of `array`, which must not be written to; `dtype` bfloat16 reads int16 back as it.

    Arrays from Ray's object store are read-only, and torch warns about each of them although nothing writes here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
