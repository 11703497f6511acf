"""The logic of the GPU path, as far as a CPU can run it: order of copies, batches halved, errors in one line."""

import logging
from contextlib import contextmanager
from itertools import chain

import pytest
import torch

from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.gpu import Copier, MicroBatch, errors_in_one_line

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore words")


class Streams:
    """Streams as torch.cuda has them, which write down what is asked of them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.now = "computing"
        outer = self

        class Event:
            def __init__(self, name: str) -> None:
                self.name = name

            def synchronize(self) -> None:
                outer.events.append(f"host waits for {self.name}")

        class Stream:
            def __init__(self, device: object = None, name: str = "copies") -> None:
                self.name = name

            def record_event(self) -> Event:
                return Event(self.name)

            def wait_event(self, event: Event) -> None:
                outer.events.append(f"{self.name} waits for {event.name}")

        self.Stream = Stream

    @contextmanager
    def stream(self, stream: object):
        before, self.now = self.now, stream.name  # pyright: ignore
        yield
        self.now = before

    def current_stream(self, device: object):
        return self.Stream(name=self.now)


class Recorded(torch.Tensor):
    """A tensor that notes on which stream it is copied and who keeps it."""

    streams: Streams

    def pin_memory(self, device=None):
        return self

    def to(self, *args, **options):
        assert options == {"non_blocking": True}
        self.streams.events.append(f"copied on {self.streams.now}")
        return self

    def record_stream(self, stream) -> None:
        self.streams.events.append(f"kept for {stream.name}")


def test_copy_runs_on_its_own_stream_and_the_computation_waits_for_it() -> None:
    streams = Streams()
    tensor = torch.arange(3).as_subclass(Recorded)
    tensor.streams = streams
    copied = Copier(torch.device("cuda"), streams)(tensor)
    assert streams.events == ["copied on copies", "computing waits for copies", "kept for computing"]
    assert copied.tolist() == [0, 1, 2]


def test_computation_waits_for_a_copy_only_when_it_needs_it() -> None:
    streams = Streams()
    tensor = torch.arange(3).as_subclass(Recorded)
    tensor.streams = streams
    copied = Copier(torch.device("cuda"), streams).to_device(tensor)
    assert streams.events == ["copied on copies"]
    assert copied.on_device().tolist() == [0, 1, 2]
    assert streams.events[1:] == ["computing waits for copies", "kept for computing"]


def test_host_waits_for_a_result_only_when_it_reads_it() -> None:
    streams = Streams()
    copied = Copier(torch.device("cuda"), streams).to_host(torch.arange(3))
    assert streams.events == []
    assert copied.on_host().tolist() == [0, 1, 2]
    assert streams.events == ["host waits for computing"]


def test_copy_on_a_cpu_is_the_tensor_itself() -> None:
    tensor, copier = torch.arange(3), Copier(torch.device("cpu"))
    assert copier(tensor) is tensor
    assert copier.to_device(tensor).on_device() is tensor
    assert copier.to_host(tensor).on_host() is tensor


def test_batch_that_does_not_fit_is_halved_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    batch, calls = MicroBatch(8, "--pairs-per-batch"), []

    def compute(rows: slice) -> list[int]:
        calls.append(rows)
        if rows.stop - rows.start > 4:
            raise FULL
        return list(range(rows.start, rows.stop))

    with caplog.at_level(logging.WARNING):
        assert list(chain.from_iterable(batch.run(compute, slice(0, 8)))) == list(range(8))
        assert list(chain.from_iterable(batch.run(compute, slice(8, 15)))) == list(range(8, 15))
    assert batch.size == 4
    assert calls[1:3] == [slice(0, 4), slice(4, 8)]
    assert [record.message for record in caplog.records] == [
        "the GPU's memory cannot hold 8 rows at a time: going on with 4; --pairs-per-batch 4 avoids this"
    ]


def test_batch_that_never_fits_is_one_line_with_the_option_to_lower() -> None:
    def compute(rows: slice) -> None:
        raise FULL

    with pytest.raises(BadInput) as error:
        MicroBatch(8, "--pairs-per-batch").run(compute, slice(0, 8))
    expected = (
        "the GPU's memory is too small (CUDA out of memory. Tried to allocate 20.00 GiB); lower --pairs-per-batch"
    )
    assert str(error.value) == expected


def test_other_error_of_the_gpu_is_one_line_and_other_errors_stay() -> None:
    with pytest.raises(BadInput, match=r"the GPU failed \(CUDA error: an illegal memory access\); start again; "):
        with errors_in_one_line("--encode-batch"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access\ntrace")
    with pytest.raises(ZeroDivisionError), errors_in_one_line("--encode-batch"):
        1 / 0  # noqa: B018
