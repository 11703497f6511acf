import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayTaskError

from distributed_rerank.cluster import fan_out as fan_outs
from distributed_rerank.cluster.fan_out import fan_out, start_workers
from distributed_rerank.cluster.session import Session
from distributed_rerank.errors import BadInput

pytestmark = pytest.mark.ray
SessionOf = Callable[[int], Session]


def calls(values: Iterable[int]) -> Iterator[tuple[int, tuple[int]]]:
    """One call for each value, its number as the key."""
    return ((number, (value,)) for number, value in enumerate(values))


def _wait_until_free(n_cpus: int) -> None:
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < n_cpus and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_fan_out_more_tasks_than_workers_computes_each_once(session_of: SessionOf, num_workers: int) -> None:
    class Squarer:
        def square(self, value: int) -> int:
            return value * value

    with start_workers(session_of(num_workers), Squarer) as workers:
        results = list(fan_out(workers, "square", calls(range(3 * 4 + 1))))
    assert sorted(results) == [(n, n * n) for n in range(13)]


def test_fan_out_first_value_stays_in_the_object_store(session_of: SessionOf) -> None:
    class Splitter:
        def split(self, value: int) -> tuple[bytes, int]:
            return b"x" * value, value

    with start_workers(session_of(2), Splitter) as workers:
        found = dict(fan_out(workers, "split", calls(range(5)), leaves_first=True))
        assert sorted(found) == list(range(5))
        for number, (reference, value) in found.items():
            assert value == number
            assert isinstance(reference, ray.ObjectRef)
            assert ray.get(reference) == b"x" * number


def test_fan_out_tasks_are_drawn_only_as_workers_become_free(session_of: SessionOf) -> None:
    class Echo:
        def echo(self, value: int) -> int:
            return value

    drawn: list[int] = []

    def drawn_calls() -> Iterator[tuple[int, tuple[int]]]:
        for number in range(20):
            drawn.append(number)
            yield number, (number,)

    with start_workers(session_of(2), Echo) as workers:
        results = fan_out(workers, "echo", drawn_calls(), in_flight=2)
        next(results)
        assert len(drawn) <= 2 * 2 + 1
        assert len(list(results)) == 19


def test_fan_out_bad_input_of_a_worker_arrives_as_one_line(session_of: SessionOf) -> None:
    class Refuses:
        def work(self, value: int) -> int:
            raise BadInput(f"value={value} is wrong; give another")

    class Unmakeable:
        def __init__(self) -> None:
            raise BadInput("precision=bf16 is not supported here; use fp32")

    with start_workers(session_of(1), Refuses) as workers, pytest.raises(BadInput) as caught:
        list(fan_out(workers, "work", calls([7])))
    assert str(caught.value) == "value=7 is wrong; give another"
    assert not isinstance(caught.value, RayTaskError)
    with start_workers(session_of(1), Unmakeable) as workers, pytest.raises(BadInput, match="bf16"):
        list(fan_out(workers, "work", calls([7])))


def test_fan_out_bug_of_a_worker_raises_here_and_leaves_no_worker(session_of: SessionOf) -> None:
    class Buggy:
        def work(self, value: int) -> float:
            return 1 / value

    with start_workers(session_of(8), Buggy) as workers, pytest.raises(ZeroDivisionError):
        list(fan_out(workers, "work", calls([1, 0, 2])))
    _wait_until_free(8)
    assert ray.available_resources()["CPU"] == 8


def test_fan_out_killed_worker_changes_no_result(session_of: SessionOf, tmp_path: Path) -> None:
    class Slow:
        def work(self, value: int) -> int:
            (tmp_path / f"started_{os.getpid()}").touch()
            time.sleep(0.1)
            return value + 1

    class Killer:
        def __init__(self) -> None:
            self.killed: list[int] = []

        def strike(self) -> None:
            pids = [int(path.name.partition("_")[2]) for path in tmp_path.glob("started_*")]
            if not self.killed and pids:
                os.kill(pids[0], signal.SIGKILL)
                self.killed.append(pids[0])

    killer, results = Killer(), []
    with start_workers(session_of(2), Slow) as workers:
        for number, value in fan_out(workers, "work", calls(range(12))):
            results.append((number, value))
            killer.strike()
    assert killer.killed
    assert len(list(tmp_path.glob("started_*"))) == 3
    assert sorted(results) == [(n, n + 1) for n in range(12)]


def test_fan_out_stopped_worker_is_replaced_and_its_calls_run_again(
    session_of: SessionOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is stopped, not dead, tells nobody."""
    monkeypatch.setattr(fan_outs, "_LEAST_S", 3.0)

    class Slow:
        def work(self, value: int) -> int:
            (tmp_path / f"started_{os.getpid()}").touch()
            time.sleep(0.05)
            return value + 1

    stopped: list[int] = []
    results = []
    with start_workers(session_of(2), Slow) as workers:
        for number, value in fan_out(workers, "work", calls(range(40))):
            results.append((number, value))
            pids = sorted(int(path.name.partition("_")[2]) for path in tmp_path.glob("started_*"))
            if not stopped and len(pids) == 2:
                os.kill(pids[0], signal.SIGSTOP)
                stopped.append(pids[0])
    assert stopped
    assert sorted(results) == [(n, n + 1) for n in range(40)]
    assert "a worker does not answer and is replaced" in caplog.text
    deadline = time.monotonic() + 30
    while Path(f"/proc/{stopped[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{stopped[0]}").exists(), "the stopped process is still there"
