"""A night that is killed at each of its stages, and at random moments, and started again by the same command."""

import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from _chaos_jobs import Fault, Jobs, finish, killed_at_random, results, start, until

REGRESSION = 3
NIGHT = "2"
MOMENTS: Mapping[str, str] = {
    "embedding": "runs/.2.*/**/blocks/embeddings/block-*",
    "retrieving": "runs/.2.*/**/blocks/candidates/block-*",
    "scoring": "runs/.2.*/**/blocks/pair_distances/block-*",
    "measuring": "runs/.2.*/pair_distances/manifest.json",
    "evaluated": "runs/2/manifest.json",
    "compared": "runs/2/verdict.json",
    "in the history": "runs/2/trend.svg",
}
"""What is there when a night is in this stage, or past the one before."""
QUICK = ("scoring", "evaluated", "in the history")


def killed_nights(jobs: Jobs, is_quick: bool) -> list[Fault]:
    """The second night is a regression; it must say so by its exit code, however often it was killed before."""
    first, whole = jobs.root / "nights-first", jobs.root / "nights-whole"
    finish(_start(jobs, first, "1", []))
    began = time.monotonic()
    shutil.copytree(first, whole)
    finish(_second(jobs, whole), code=REGRESSION)
    undisturbed = time.monotonic() - began
    expected = _written(whole)
    found: list[Fault] = []
    for number, moment in enumerate(QUICK if is_quick else MOMENTS):
        kind = signal.SIGTERM if number % 2 else signal.SIGKILL
        folder = jobs.root / f"nights-{number}"
        shutil.copytree(first, folder)
        began = time.monotonic()
        process = _second(jobs, folder)
        until(process, lambda folder=folder, moment=moment: any(folder.glob(MOMENTS[moment])), moment)
        process.send_signal(kind)
        process.communicate()
        assert process.returncode in (-kind, 130, REGRESSION), process.returncode
        finish(_second(jobs, folder), code=REGRESSION)
        extra = time.monotonic() - began - undisturbed
        fault = f"one process: {kind.name} of a night, {moment}, then the same command"
        again = "0" if process.returncode == REGRESSION else "at most 1"
        found.append(Fault(fault, "what was in flight", again, extra, _written(folder) == expected))
    return found if is_quick else [*found, _at_random(jobs, first, undisturbed, expected)]


def _at_random(jobs: Jobs, first: Path, undisturbed: float, expected: Mapping[str, bytes]) -> Fault:
    def begin(folder: Path) -> subprocess.Popen[str]:
        if not folder.exists():
            shutil.copytree(first, folder)
        return _second(jobs, folder)

    folder, kills, code, seconds = killed_at_random(begin, jobs.root / "nights-random", undisturbed, seed=5)
    assert code == REGRESSION, code
    extra = seconds - undisturbed
    fault = f"one process: kill -9 of a night at {kills} random moments"
    return Fault(fault, "what was in flight", "at most 1 each", extra, _written(folder) == expected)


def _second(jobs: Jobs, folder: Path) -> subprocess.Popen[str]:
    model = ["--model", str(jobs.root / "model"), "--chain", "replace", "--top-n", "40", "--metrics-file"]
    return _start(jobs, folder, NIGHT, [*model, str(folder / "night.prom")])


def _start(jobs: Jobs, folder: Path, run_id: str, more: list[str]) -> subprocess.Popen[str]:
    night = ["--history", str(folder / "history.parquet"), "--runs", str(folder / "runs"), "--run-id", run_id]
    blocks = ["--images-per-block", "8", "--queries-per-block", "4", "--no-baselines"]
    words = ["scheduled-evaluation", "--catalogue", str(jobs.catalogue), *jobs.extractor, *night, *blocks, *more]
    return start([*words, "--num-workers", "0"])


def _written(folder: Path) -> dict[str, bytes]:
    """The files of the night, the history and its page, and the exit code that other programs are told."""
    files = {f"runs/{name}": content for name, content in results(folder / "runs" / NIGHT).items()}
    lines = (folder / "night.prom").read_text().splitlines()
    files["exit code"] = next(line for line in lines if line.startswith("rerank_run_exit_code ")).encode()
    return files | {name: (folder / name).read_bytes() for name in ("history.parquet", "history.html")}
