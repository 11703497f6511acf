import io
import sys
from collections.abc import Iterator

import pytest

from distributed_rerank.procedures.progress import progress


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
