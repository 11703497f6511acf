"""What a step computes with: the device, the number of threads, and arrays that cross process borders without
a copy. Layer 3."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def pick_device() -> torch.device:
    """The GPU where this process sees one (a Ray worker sees the one it holds), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Compute with `number` threads inside the block; the caller's setting comes back afterwards.

    The number decides how sums are split and thus their last bits, so it comes from the config of a step,
    never from the machine or from the number of workers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def array_of(tensor: Tensor) -> np.ndarray:
    """The tensor as a numpy array on the CPU; bfloat16, which numpy lacks, as its bits in int16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tensor_of(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the memory of `array`, which must not be written to; `dtype` bfloat16 reads int16 back as
    it.

    Arrays from Ray's object store are read-only, and torch warns about each of them although nothing writes
    here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
