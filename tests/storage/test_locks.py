"""One holder at a time among threads and processes; a dead holder's lock is free at once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distributed_rerank.storage import locks

HOLD = """
import sys
from pathlib import Path
from distributed_rerank.storage import locks
lock = locks.take(Path(sys.argv[1]))
print("held" if lock is not None else "refused", flush=True)
sys.stdin.read()
"""
COUNT = """
import sys
from pathlib import Path
from distributed_rerank.storage import locks
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(50):
    with locks.wait_for(lock):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def _start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_lock_of_another_process_is_refused_named_and_free_after_its_kill(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    holder = _start(HOLD, path)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert locks.take(path) is None
        assert locks.holder_of(path).startswith(f"process {holder.pid} on ")
        holder.send_signal(signal.SIGKILL)
    lock = locks.take(path)
    assert lock is not None
    assert locks.holder_of(path).startswith(f"process {os.getpid()} on ")
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_lock_is_held_against_another_thread_and_released_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    found: list[object] = []
    with locks.wait_for(path) as lock:
        thread = threading.Thread(target=lambda: found.append(locks.take(path)))
        thread.start()
        thread.join()
    assert found == [None]
    with locks.wait_for(path):
        lock.release()  # released before: it must not free the new holder's lock
        assert locks.take(path) is None


def test_lock_of_the_parent_is_not_held_by_a_forked_child(tmp_path: Path) -> None:
    """A process that data loading forks must not keep the folder of a killed driver locked."""
    path = tmp_path / "a.lock"
    lock = locks.take(path)
    assert lock is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    lock.release()
    again = locks.take(path)
    os.close(writing)
    os.waitpid(child, 0)
    assert again is not None
    again.release()


def test_lock_under_contention_of_processes_never_has_two_holders(tmp_path: Path) -> None:
    """Each removes the file when it releases, which must not let two in by two files of one name."""
    (tmp_path / "counter").write_text("0")
    workers = [_start(COUNT, tmp_path / "a.lock", tmp_path / "counter") for _ in range(4)]
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    assert (tmp_path / "counter").read_text() == "200"
    assert not (tmp_path / "a.lock").exists()


def test_lock_in_a_folder_below_a_file_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        locks.take(tmp_path / "file" / "a.lock")
