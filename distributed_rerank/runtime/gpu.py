"""What a GPU needs besides the computation: copies beside it, batches that fit its memory, errors in one line."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from distributed_rerank.errors import BadInput

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Copied:
    """A tensor whose copy may not be complete yet."""

    _tensor: Tensor
    _device: torch.device
    _complete: Any
    """The event after the copy; None where there is nothing to wait for."""
    _cuda: Any

    def on_device(self) -> Tensor:
        """The tensor, for what the current stream computes from now on; the host does not wait."""
        if self._complete is not None:
            computing = self._cuda.current_stream(self._device)
            computing.wait_event(self._complete)
            # Without this the memory could go to the next copy while the computation still reads it.
            self._tensor.record_stream(computing)
        return self._tensor

    def on_host(self) -> Tensor:
        """The tensor, once the copy is complete."""
        if self._complete is not None:
            self._complete.synchronize()
        return self._tensor


class Copier:
    """Copies tensors between the memory of the host and a device, which computes meanwhile.

    To a GPU they go on a stream of its own and from pinned memory. On a CPU a copy is the tensor itself.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        """`streams` has `Stream`, `stream` and `current_stream` as torch.cuda has, which is the default."""
        self._device = device
        self._cuda: Any = torch.cuda if streams is None else streams
        self._stream = None if device.type == "cpu" else self._cuda.Stream(device)

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, ready for the stream that computes now."""
        return self.to_device(tensor).on_device()

    def to_device(self, tensor: Tensor) -> Copied:
        """Begin to copy `tensor` to the device."""
        if self._stream is None:
            return self._copied(tensor, None)
        with self._cuda.stream(self._stream):
            return self._copied(self._pinned(tensor).to(self._device, non_blocking=True), self._stream)

    def to_host(self, tensor: Tensor) -> Copied:
        """Begin to copy `tensor` to the host, after what the current stream still has to do and no later."""
        if self._stream is None:
            return self._copied(tensor, None)
        host = self.host_memory(tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True)
        return self._copied(host, self._cuda.current_stream(self._device))

    def _copied(self, tensor: Tensor, stream: Any) -> Copied:
        return Copied(tensor, self._device, None if stream is None else stream.record_event(), self._cuda)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor on the host from which this copies without a step between: pinned for a GPU."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._pins)

    @property
    def _pins(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_available()

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pins and not tensor.is_pinned() else tensor


class MicroBatch:
    """How many rows go through a network in one call; halved once where a GPU's memory cannot hold them.

    On a CPU the size never changes, so neither do the bits.
    """

    def __init__(self, size: int, flag: str) -> None:
        self.size = size
        self._flag = flag
        self._is_halved = False

    def run(self, compute: Callable[[slice], T], rows: slice) -> list[T]:
        """`compute` of the rows, in two halves where they do not fit; BadInput where halves do not fit either."""
        with errors_in_one_line(self._flag):
            try:
                return [compute(rows)]
            except torch.OutOfMemoryError:
                n_rows = rows.stop - rows.start
                if n_rows < 2:
                    raise
                self._halve(n_rows)
            # Outside of `except`, whose traceback holds the tensors of the call that failed.
            torch.cuda.empty_cache()
            middle = rows.start + (n_rows + 1) // 2
            return [compute(slice(rows.start, middle)), compute(slice(middle, rows.stop))]

    def _halve(self, n_rows: int) -> None:
        if self._is_halved:
            return
        self._is_halved, self.size = True, max(1, self.size // 2)
        logger.warning(
            "the GPU's memory cannot hold %d rows at a time: going on with %d; %s %d avoids this", n_rows, self.size,
            self._flag, self.size,
        )  # fmt: skip


@contextmanager
def errors_in_one_line(flag: str) -> Iterator[None]:
    """An error of the GPU inside the block becomes BadInput that names it and the option to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BadInput(f"the GPU's memory is too small ({first_line(error)}); lower {flag}") from error
    except torch.AcceleratorError as error:
        raise BadInput(
            f"the GPU failed ({first_line(error)}); start again; if it stays, lower {flag} or give --use-gpu False"
        ) from error


def first_line(error: Exception) -> str:
    """The first sentence of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
