"""A lock on a file, held by one process at a time (or shared by several) and freed by the kernel when it ends.

A killed process therefore leaves no lock that must be cleaned up, only a file that the next one takes
over. The locks hold between threads, between processes, and between the clients of an NFS server.
"""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout


class Lock:
    """A lock that this process holds, from `take` or `wait_for`, until `release`, its block's end or its own end."""

    def __init__(self, path: Path, held: FileLock) -> None:
        self._path = path
        self._held = held

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock file and let another process take the lock; a second call does nothing."""
        if self._held.is_locked:
            # Removed while the lock is held: whoever waits for the removed file sees that and tries again.
            self._path.unlink(missing_ok=True)
            self._held.release()


class SharedLock:
    """A lock that several hold at a time, while nobody holds it alone; from `share` until `release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give up this share; call it once."""
        os.close(self._descriptor)


def share(path: Path) -> SharedLock | None:
    """A share of the lock of the file `path`, which is made if absent; None where somebody holds it alone.

    Raises OSError as `take` does.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_at(path, descriptor):
            return SharedLock(descriptor)
        os.close(descriptor)  # who held it alone has removed the file meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies there now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def take(path: Path) -> Lock | None:
    """The lock of the file `path`, which is made if absent; None where another process or thread holds it.

    Raises OSError where the file cannot be made or the file system has no locks.
    """
    return _acquire(path, seconds=0.0)


def wait_for(path: Path) -> Lock:
    """As `take`, but blocks until the lock is free."""
    lock = _acquire(path, seconds=-1.0)
    assert lock is not None, "a lock that is waited for is held in the end"
    return lock


def holder_of(path: Path) -> str:
    """Who holds the lock of `path`, such as "process 12 on host-a"; "another process" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"


def _acquire(path: Path, seconds: float) -> Lock | None:
    held = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire(timeout=seconds)
    except Timeout:
        return None
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return Lock(path, held)
