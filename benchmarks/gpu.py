"""Measure the project on a GPU in one command of at most eight minutes: is it right, how fast, how busy?

    bash benchmarks/gpu.sh [--parts NAME ...]     # on the GPU machine: installs what is missing, then runs this
    python benchmarks/gpu.py --quick              # on any machine: tiny sizes, shows that every part runs

Each part is a process of its own with its own time limit. Figures are printed and written to OUT/rows.jsonl as they
come, and to OUT/results.json with the parts' tracebacks; a part that fails or times out loses only itself. The exit
code is 0 if every part ended well, else 1.
"""

import argparse
import faulthandler
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 6.0
"""From the signal that ends a part to the one that kills it; Ray stops its processes meanwhile."""
WRITING_S = 0.5
"""For the tracebacks of all threads."""
QUICK_LIMIT_S = 300.0
"""Of every part with --quick: a busy machine must not fail."""
LEAST_S = 5.0
"""A part with less time left is not started."""
KEPT_CHARACTERS = 40_000
"""Of what a failed part wrote on standard error."""


@dataclass(frozen=True)
class Part:
    """A function of a module, and the seconds that it may take."""

    module: str
    function: str
    limit_s: float


PARTS = {
    "machine": Part("_gpu_parts_check", "machine", 45),
    "correctness": Part("_gpu_parts_check", "correctness", 100),
    "pairs": Part("_gpu_parts_speed", "pairs", 130),
    "ray-score": Part("_gpu_parts_ray", "ray_score", 75),
    "search": Part("_gpu_parts_speed", "search", 45),
    "embed": Part("_gpu_parts_speed", "embed", 70),
    "token": Part("_gpu_parts_speed", "token", 65),
    "profile": Part("_gpu_parts_speed", "profile", 45),
    "ray-train": Part("_gpu_parts_ray", "ray_train", 60),
    "training": Part("_gpu_parts_speed", "training", 45),
    "ray-embed": Part("_gpu_parts_ray", "ray_embed", 60),
}
"""In the order of their worth: where the time is up, the last ones are lost."""


@dataclass
class Result:
    """How a part ended."""

    status: str
    """ok, failed, timed out, or not started."""
    seconds: float = 0.0
    traceback: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_part(name: str, arguments: argparse.Namespace, work: Path, limit_s: float) -> Result:
    """The part in a process of its own, ended with all its children after `limit_s`."""
    if limit_s < min(LEAST_S, arguments.limit.get(name, LEAST_S)):
        return Result("not started", traceback="no time was left (--total)")
    command = [sys.executable, __file__, "--child", name, "--work", str(work), "--out", str(arguments.out)]
    command += ["--quick"] if arguments.quick else []
    errors = work / f"{name}.stderr"
    environment = dict(os.environ)
    if arguments.jobs > 1:  # threads of two parts on the same cores wait for each other
        environment["OMP_NUM_THREADS"] = "1"
    started = time.perf_counter()
    with errors.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, env=environment)
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            end_process(process)
    text = errors.read_text(errors="replace")
    return Result(status, round(time.perf_counter() - started, 1), "" if status == "ok" else text[-KEPT_CHARACTERS:])


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it still runs, and all that it has started."""
    from _measuring import descendants

    if process.poll() is not None:
        return
    started = descendants(process.pid)
    process.send_signal(signal.SIGUSR1)
    time.sleep(WRITING_S)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for pid in started:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


class Report:
    """What is known so far, written anew after every part."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._out: Path = arguments.out
        self._is_quick: bool = arguments.quick
        self._lock = threading.Lock()
        self.results: dict[str, Result] = {}
        self._out.mkdir(parents=True, exist_ok=True)
        self.rows_file.write_text("")

    @property
    def rows_file(self) -> Path:
        """Every figure, one line each, in the order in which they came."""
        return self._out / "rows.jsonl"

    def add(self, name: str, result: Result) -> None:
        """Take the result of a part, with the rows that it left, and write everything."""
        with self._lock:
            result.rows = [row for row in self.rows() if row["part"] == name]
            self.results[name] = result
            content = {"quick": self._is_quick, "parts": {key: asdict(value) for key, value in self.results.items()}}
            unfinished = self._out / "results.json.part"
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(self._out / "results.json")
            print(f"== {name}: {result.status}, {result.seconds:g} s", flush=True)
            if result.status != "ok":
                print(result.traceback, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """The figures so far. A line that a killed part left unfinished is none."""
        rows = []
        for line in self.rows_file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logging.warning("no figure: %s", line)
        return rows

    def summary(self) -> str:
        """What was wanted beside what was found, then how every part ended."""
        from _gpu_measure import number

        lines = ["", "wanted figures"]
        for row in self.rows():
            if row["wanted"] is not None:
                kind, bound = row["wanted"]
                found, verdict = number(row["value"]), row["verdict"] or "no verdict: not a GPU at full size"
                lines.append(f"  {row['name']}: {found} {row['unit']}, wanted {kind} {number(bound)}: {verdict}")
        lines += ["parts", *(f"  {name}: {r.status}, {r.seconds:g} s" for name, r in self.results.items())]
        return "\n".join(lines)


def run_child(arguments: argparse.Namespace) -> int:
    """One part in this process; the exit code says whether all of it went well."""
    # The parent's question when the time is up: where every thread stands is all that a time-out leaves.
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    import torch
    from _gpu_measure import Context

    part = PARTS[arguments.child]
    context = Context(
        part=arguments.child,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        is_quick=arguments.quick,
        work=arguments.work,
        rows_file=arguments.out / "rows.jsonl",
    )
    getattr(importlib.import_module(part.module), part.function)(context)
    context.memory()
    for failure in context.failures:
        print(failure, file=sys.stderr)
    return 1 if context.failures else 0


def run_all(arguments: argparse.Namespace) -> Report:
    """All parts that are asked for, `--jobs` at a time, within `--total` seconds."""
    report = Report(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rerank-gpu-") as work, ThreadPoolExecutor(arguments.jobs) as pool:

        def run(name: str) -> None:
            left = arguments.total - GRACE_S - (time.perf_counter() - started)
            usual = QUICK_LIMIT_S if arguments.quick else PARTS[name].limit_s
            try:
                result = run_part(name, arguments, Path(work), min(arguments.limit.get(name, usual), left))
            except OSError as error:
                result = Result("failed", traceback=f"{type(error).__name__}: {error}")
            report.add(name, result)

        list(pool.map(run, arguments.parts))
    return report


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; the ones of a child are for this script alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every part runs, measures nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder for rows.jsonl and results.json")
    parser.add_argument("--limit", nargs="+", metavar="NAME=S", default=[], help="other time limits, in seconds")
    parser.add_argument("--total", type=float, metavar="S", help="seconds for all parts; default 450, --quick 1200")
    parser.add_argument("--jobs", type=int, help="parts at the same time; default 1, with --quick and no GPU 2")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.out = arguments.out.absolute()
    arguments.limit = dict(limit_of(text, parser) for text in arguments.limit)
    return arguments


def limit_of(text: str, parser: argparse.ArgumentParser) -> tuple[str, float]:
    """`pairs=200` -> ("pairs", 200.0); ends the program with a line on what is wrong."""
    name, _, seconds = text.partition("=")
    if name not in PARTS:
        parser.error(f"--limit {text}: {name} is no part; the parts are {', '.join(PARTS)}")
    try:
        return name, float(seconds)
    except ValueError:
        parser.error(f"--limit {text}: {seconds!r} is no number of seconds; write it as {name}=60")


def main() -> int:
    arguments = parse()
    if arguments.child:
        return run_child(arguments)
    import torch

    is_gpu = torch.cuda.is_available()
    if not is_gpu and not arguments.quick:
        print("gpu.py: torch sees no GPU here; give --quick to see whether every part runs", file=sys.stderr)
        return 2
    arguments.total = arguments.total or (1200.0 if arguments.quick else 450.0)
    arguments.jobs = arguments.jobs or (2 if arguments.quick and not is_gpu else 1)
    report = run_all(arguments)
    print(report.summary(), flush=True)
    return 0 if all(result.status == "ok" for result in report.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
