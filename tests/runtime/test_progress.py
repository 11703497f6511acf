import io
import logging
import sys
from collections.abc import Iterator

import pytest

from distributed_rerank.runtime.progress import progress


class Terminal(io.StringIO):
    """What standard error is at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_progress_passes_results_through(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([3, 1, 2], total=3, title="work")) == [3, 1, 2]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_progress_closes_what_it_shows_as_soon_as_nobody_wants_it(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two results: the error keeps the frames, so that nothing is freed by itself."""
    monkeypatch.setattr(sys, "stderr", stream)
    closed = []

    def work() -> Iterator[int]:
        try:
            yield from range(3)
        finally:
            closed.append(True)

    def interrupted(results: Iterator[int]) -> None:
        for result in progress(results, total=3, title="work"):
            if result == 1:
                raise KeyboardInterrupt

    results = work()
    with pytest.raises(KeyboardInterrupt) as held:
        interrupted(results)
    assert closed == [True]
    assert held.value.__traceback__ is not None


def test_progress_does_not_take_the_start_of_workers_for_their_speed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = 0.0

    def work() -> Iterator[int]:
        nonlocal now
        now += 20  # until they have started
        for result in range(5):
            now += 6
            yield result

    with caplog.at_level(logging.INFO):
        assert list(progress(work(), total=5, title="work", clock=lambda: now)) == [0, 1, 2, 3, 4]
    assert caplog.messages == [
        "work: 1 of 5 blocks",
        "work: 3 of 5 blocks, about 12 s left",
        "work: 5 of 5 blocks, about 0 s left",
        "work: 5 blocks in 50.0 s",
    ]
