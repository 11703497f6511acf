"""InferenceThreads compute the same bits in order, whatever their number, and leave the caller's threads alone."""

import os
import platform
import threading

import pytest
import torch

from distributed_rerank.runtime.devices import InferenceThreads, keep_freed_memory, one_order_of_sums, torch_threads

LAYER = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).requires_grad_(False)
PARTS = torch.randn(9, 33, 64, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("number", [2, 3])
def test_lanes_any_number_gives_the_bits_of_one(number):
    assert torch.equal(
        torch.stack(InferenceThreads(number).map(LAYER, PARTS)), torch.stack(InferenceThreads(1).map(LAYER, PARTS))
    )


def test_lanes_compute_with_one_thread_each_in_inference_mode():
    lanes = InferenceThreads(2)
    meet = threading.Barrier(2, timeout=30)

    def look(part: int) -> tuple[int, bool, int]:
        meet.wait()  # passes only if two lanes are at work
        return torch.get_num_threads(), torch.is_inference_mode_enabled(), part

    with torch_threads(2):
        assert lanes.map(look, range(4)) == [(1, True, part) for part in range(4)]
        assert torch.get_num_threads() == 2
        assert not torch.is_inference_mode_enabled()


def test_lanes_error_of_a_part_reaches_the_caller():
    for number in (1, 2):
        with pytest.raises(ZeroDivisionError):
            InferenceThreads(number).map(lambda part: 1 // part, [1, 0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept():
    """A tensor as large as the one freed before it costs no fresh pages."""
    import resource

    assert keep_freed_memory()
    for _ in range(5):  # the allocator's own pages
        torch.ones(5_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(5_000_000)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert pages < 20 * 20_000_000 / 4096 / 10, f"{pages} pages were fresh"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_is_told_to_sum_in_one_order_and_only_inside_the_block(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with one_order_of_sums(torch.device(device)):
        assert torch.are_deterministic_algorithms_enabled() == (device == "cuda")
        assert torch.utils.deterministic.fill_uninitialized_memory == (device == "cpu")  # pyright: ignore
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own word holds"
