"""What the tests of the jobs share beside fixtures: flags, files to compare, processes to find."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

EXTRACTOR = ["--extractor", "test_resnet", "--extractor-weights", "none", "--image-size", "32"]
SMALL_BLOCKS = ["--images-per-block", "6", "--queries-per-block", "4"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on workers, order, or interruptions."""
    names = ("metrics.json", "per_query.parquet", "reranked.parquet", "rejects.parquet")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def wait_until(is_true: Callable[[], object], seconds: float = 120) -> bool:
    """Whether it became true in time; a folder that goes while `glob` looks through it is looked through again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if is_true():
                return True
        time.sleep(0.01)
    return False


def descendants(pid: int) -> dict[int, str]:
    """The processes below `pid` with their titles, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = list(children.get(pid, []))
    while todo:
        child = todo.pop()
        found[child] = title_of(child)
        todo += children.get(child, [])
    return found


def title_of(pid: int) -> str:
    """The command line of a process; "" where it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill_by_pid(pids: list[int], number: int) -> None:
    """Sends the signal to those that still run."""
    for pid in pids:
        if is_running(pid):
            os.kill(pid, number)
