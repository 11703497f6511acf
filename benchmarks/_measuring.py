"""What the benchmarks share: rows, tables, children with their time and memory, and the peak of a matrix product."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Square matrices whose product is timed for the peak."""
MB_PER_KIB = 1024 / 1e6
"""The kernel counts memory in units of 1,024 bytes."""


@dataclass(frozen=True)
class Row:
    """One figure: ours, the other side's where there is one, and what the comparison comes to."""

    name: str
    unit: str
    ours: float | None
    theirs: float | None = None
    ratio: float | None = None

    def rounded(self) -> "Row":
        """Four significant digits: more would be noise."""
        values = {name: getattr(self, name) for name in ("ours", "theirs", "ratio")}
        short = {name: None if value is None else float(f"{value:.4g}") for name, value in values.items()}
        return replace(self, **short)


def compared(name: str, unit: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Medians over the rounds of both sides; the ratio is that of the medians."""
    own, other = statistics.median(ours), statistics.median(theirs)
    return against(name, unit, own, other)


def against(name: str, unit: str, ours: float, theirs: float) -> Row:
    """A row of two figures and their ratio."""
    return Row(name, unit, ours, theirs, ours / theirs)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")


def finish(rows: Sequence[Row], file: Path | None) -> None:
    """Print the rows as a table and write them as JSON: a list of {name, unit, ours, theirs, ratio}."""
    rows = [row.rounded() for row in rows]
    cells = [("what", "unit", "ours", "theirs", "ratio")]
    cells += [(r.name, r.unit, *(_number(v) for v in (r.ours, r.theirs, r.ratio))) for r in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    print()
    for line in cells:
        left = "  ".join(cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
        print(f"{left}  {right}".rstrip())
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def describe_machine() -> str:
    """Processor, cores and what is else running, for the line above a table."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = torch.cpu.get_capabilities()
    units = [name for name in ("avx512_bf16", "amx_bf16") if flags.get(name)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    cpu = names[0] if names else platform.machine()
    return (
        f"{cpu}, {cores} cores, {' '.join(units) or 'no bf16 unit'}, {gpu}, torch {torch.__version__}, load {load:.1f}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@dataclass(frozen=True)
class Child:
    """What a finished child process printed last, as JSON, and its peak resident memory."""

    answer: dict[str, Any]
    peak_mb: float
    seconds: float


def run_child(command: Sequence[str | Path], *, environment: dict[str, str] | None = None) -> Child:
    """Run a program whose last line of output is a JSON object; ends this program with its errors if it fails."""
    started = time.perf_counter()
    arguments = [str(part) for part in command]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(_drain(process.stderr)), daemon=True)
    reader.start()
    try:
        output = _drain(process.stdout)
    except BaseException:
        process.terminate()
        raise
    reader.join()
    # wait4 and not wait: it alone tells the peak memory of this child.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {process.returncode}:\n{errors[0][-4000:]}")
    return Child(
        json.loads(output.strip().splitlines()[-1]), usage.ru_maxrss * MB_PER_KIB, time.perf_counter() - started
    )


def _drain(stream: Any) -> str:
    return stream.read()


class PeakMemory:
    """The most memory that this process and all its descendants hold at a time while the block runs, in MB.

    Their own pages are added up; what they map in common, Ray's object store and libraries, counts once. The peak of
    a short moment can be missed. (Proportional set sizes would be exact, but reading them slows the work down, as does
    looking twice a second: by 2 % on two cores.)
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self.peak_mb = 0.0
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, _together_mb(descendants(os.getpid())))
            if self._over.wait(self._every_s):
                return


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # A process may end while it is looked at; then it is none of ours any more.
            with _vanishing():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _together_mb(pids: Sequence[int]) -> float:
    own, store, files = 0.0, 0.0, 0.0
    for pid in pids:
        with _vanishing():
            status = dict(line.split(":", 1) for line in _lines(f"/proc/{pid}/status") if ":" in line)
            sizes = {
                name: int(status.get(name, "0").split()[0]) * MB_PER_KIB for name in ("RssAnon", "RssShmem", "RssFile")
            }
            own += sizes["RssAnon"]
            store, files = max(store, sizes["RssShmem"]), max(files, sizes["RssFile"])
    return own + store + files


@contextmanager
def _vanishing() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return


def photos_in(folder: Path, least: int, *, every: int) -> list[Path]:
    """Each `every`-th JPEG file of the folder, at most 1,000; ends the program where they are fewer than `least`."""
    photos = sorted(folder.rglob("*.jpg"))[::every][:1000]
    if len(photos) < least:
        sys.exit(f"{folder} holds {len(photos)} JPEG files; give a folder with more")
    return photos


def say(line: str) -> None:
    """Progress, on standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(work: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Units per second of `work`, which does some and says how many; called once to warm up, then for `seconds`."""
    work()
    synchronise(device)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        done += work()
        synchronise(device)
    return done / (time.perf_counter() - started)


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Floating-point operations per second of the fastest square matrix product, the yardstick of a model's share."""
    best = 0.0
    for side in SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, side: int = side) -> int:
            torch.mm(a, b)
            return 2 * side**3

        best = max(best, rate(multiply, seconds / len(SIDES[device.type]), device))
    return best
