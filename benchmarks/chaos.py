"""Faults in the middle of real jobs: what was lost, what it cost, and are the bytes those of an undisturbed run?

    make chaos
    python benchmarks/chaos.py [--quick] [--parts process ray] [--json FILE]

A generated catalogue of small pictures, an untrained network, jobs as processes of their own with a Ray of their own or
without one. Every row is one fault; its output is compared, file by file, with that of a run which nothing has
disturbed. Then a random bit of every kind of file that the jobs have left, finished or not, is turned round, a hundred
times, and the file is cut off at a random byte a hundred times. The exit code is 1 where bytes differ or damage is not
found. `--quick` leaves Ray and the store out, and damages ten times.
"""

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from _chaos_damage import Damaged, damage_finished, damage_unfinished
from _chaos_jobs import (
    BLOCKS,
    ON_RAY,
    PATIENCE_S,
    Fault,
    Jobs,
    blocks_of,
    done,
    end_with_children,
    finish,
    killed_at_random,
    middle,
    results,
    start,
    until,
    workers_of,
)
from _chaos_nights import killed_nights
from _chaos_nodes import two_nodes
from _measuring import ROOT, descendants, describe_machine, say

SMALL_DISK, FILE_LIMIT = "300k", 20_000


def computing(jobs: Jobs, stage: str, folder: Path, n_blocks: int) -> tuple[subprocess.Popen[str], int, int]:
    """A job on Ray that has done so many blocks, the process id of a worker of it, and how many blocks are done."""
    process = jobs.start(stage, folder, on_ray=True)
    found: list[int] = []
    # A process of Ray Data has its title only while it computes.
    until(
        process,
        lambda: (
            (done(stage, folder) >= n_blocks and found.extend(workers_of(stage, descendants(process.pid)))) or found
        ),
        f"{n_blocks} blocks",
    )
    return process, found[0], done(stage, folder)


def worker_fault(jobs: Jobs, stage: str, number: signal.Signals) -> Fault:
    """A signal to one computing process of a job on Ray."""
    folder = jobs.root / f"{number.name}-worker-{stage}"
    began = time.monotonic()
    process, worker, before = computing(jobs, stage, folder, middle(stage))
    os.kill(worker, number)
    finish(process)
    extra = time.monotonic() - began - jobs.seconds[stage, True]
    name = "kill -9" if number == signal.SIGKILL else f"SIGSTOP (replaced after {PATIENCE_S:.0f} s instead of 120)"
    unit = "epoch that was being trained" if stage == "train" else "calls of that worker, at most 2 blocks"
    again = "1 epoch" if stage == "train" else "at most 2"
    fault = f"Ray: {name} of a worker, {stage}, {before} {'epochs' if stage == 'train' else 'blocks'} done"
    return Fault(fault, unit, again, extra, results(folder / "out") == jobs.expected[stage])


def slow_worker(jobs: Jobs, stage: str) -> Fault:
    """One computing process stands still for most of the time: half a second of every 0.6."""
    folder = jobs.root / f"slow-worker-{stage}"
    began = time.monotonic()
    process, worker, before = computing(jobs, stage, folder, 4)
    while process.poll() is None and Path(f"/proc/{worker}/fd").exists():
        for number, pause_s in ((signal.SIGSTOP, 0.5), (signal.SIGCONT, 0.1)):
            with suppress(ProcessLookupError):
                os.kill(worker, number)
            time.sleep(pause_s)
    finish(process)
    extra = time.monotonic() - began - jobs.seconds[stage, True]
    fault = f"Ray: a worker is slowed down six times (SIGSTOP and SIGCONT in turns), {stage}, {before} blocks done"
    return Fault(fault, "nothing", "0", extra, results(folder / "out") == jobs.expected[stage])


def node_fault(jobs: Jobs, stage: str, how: str) -> Fault:
    """The second of two nodes is drained or killed while it computes."""
    folder = jobs.root / f"{how}-{stage}"
    with two_nodes() as nodes:
        began = time.monotonic()
        # More than fit on the head, so that some are on the second node; what is left holds fewer.
        process = jobs.start(stage, folder, True, ["--num-workers", "4"], **nodes.environment)
        until(
            process,
            lambda: done(stage, folder) >= middle(stage) and workers_of(stage, nodes.pids_of_second()),
            "work on the second node",
        )
        before = done(stage, folder)
        if how == "drain":
            nodes.drain(deadline_s=10)
        else:
            nodes.kill()
        finish(process)
        extra = time.monotonic() - began - jobs.seconds[stage, True]
    name = "drained with 10 s notice, then killed" if how == "drain" else "killed (-9) with its raylet"
    fault = f"Ray: the second of two nodes is {name}, {stage}, {before} blocks done"
    return Fault(fault, "calls on that node", "at most 4", extra, results(folder / "out") == jobs.expected[stage])


LARGE_BLOCKS = ["--image-size", "448", "--images-per-batch", "32", "--images-per-block"]


def small_store(jobs: Jobs) -> Fault:
    """A block of pixels is larger than the whole object store."""
    more, seconds = [*LARGE_BLOCKS, "192"], []
    for on_ray in (False, True):
        began = time.monotonic()
        limit = ["--object-store-gb", "0.1"] if on_ray else []
        finish(jobs.start("embed", jobs.root / f"small-store-{on_ray}", on_ray, [*more, *limit]))
        seconds.append(time.monotonic() - began)
    outputs = [results(jobs.root / f"small-store-{on_ray}" / "out") for on_ray in (False, True)]
    fault = "Ray: an object store of 100 MB, embed with blocks of 116 MB"
    return Fault(fault, "nothing; Ray moves them to disk", "0", seconds[1] - seconds[0], outputs[0] == outputs[1])


def little_memory(jobs: Jobs) -> Fault:
    """In the middle the process may have no more memory than it has, and 32 MB; then the same command without limit."""
    more, folders = [*LARGE_BLOCKS, "32"], [jobs.root / name for name in ("much-memory", "little-memory")]
    began = time.monotonic()
    finish(jobs.start("embed", folders[0], False, more))
    seconds, began = time.monotonic() - began, time.monotonic()
    process = jobs.start("embed", folders[1], False, more)
    sizes: list[int] = []
    until(process, lambda: done("embed", folders[1]) >= 1, "its first block")

    def is_third_block() -> bool:
        words = Path(f"/proc/{process.pid}/statm").read_text().split()
        sizes.append(int(words[0]) * resource.getpagesize())
        return done("embed", folders[1]) >= 2

    until(process, is_third_block, "its second block")
    limit = min(sizes) + 32 * 2**20
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    said = finish(process, code=2).strip().splitlines()[-1]
    assert said.startswith("error: there is not enough memory"), said
    kept = done("embed", folders[1])
    finish(jobs.start("embed", folders[1], False, more))
    extra = time.monotonic() - began - seconds
    fault = f"one process: no more memory (RLIMIT_AS), embed, {kept} blocks done"
    equal = results(folders[0] / "out") == results(folders[1] / "out")
    return Fault(fault, "the block that was computed; one line and exit code 2", "0", extra, equal)


def driver_fault(jobs: Jobs, stage: str, on_ray: bool, damages: list[Damaged] | None, times: int) -> Fault:
    """kill -9 of the driver, then the same command; with `damages` one file of each kind is damaged in between."""
    folder = jobs.root / f"driver-{stage}-{on_ray}-{damages is not None}"
    began = time.monotonic()
    process = jobs.start(stage, folder, on_ray)
    until(process, lambda: done(stage, folder) >= middle(stage), "its middle")
    end_with_children(process)
    kept, where = done(stage, folder), "Ray" if on_ray else "one process"
    spent = time.monotonic() - began
    name, again = "kill -9 of the driver", 0
    if damages is not None:
        (unfinished,) = folder.glob(".out.????????????????")
        damages += damage_unfinished(unfinished, folder, times, np.random.default_rng(1))
        name, again = f"{name}, and a damaged byte in the last {'state' if stage == 'train' else 'block'}", 1
        last = max(folder.glob(BLOCKS[stage]))
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 4
        last.write_bytes(bytes(content))
    began = time.monotonic()
    said = finish(jobs.start(stage, folder, on_ray))
    extra = spent + time.monotonic() - began - jobs.seconds[stage, on_ray]
    assert (damages is not None) == ("is damaged and is computed again" in said), said
    if stage == "train":
        lost, counted = "epoch that was being trained", f"{1 + again} epochs" if again else "1 epoch"
    else:
        lost = "blocks that were being computed"
        # Blocks lie in two tables, results and rejects; those of a search in one.
        tables = 1 if stage == "retrieve" else 2
        whole, second = (
            blocks_of(path / "out")["computed"] // tables for path in (jobs.root / f"undisturbed-{stage}", folder)
        )
        counted = str(second - (whole - kept))
    fault = f"{where}: {name}, {stage}, {kept} {'epochs' if stage == 'train' else 'blocks'} done"
    return Fault(fault, lost, counted, extra, results(folder / "out") == jobs.expected[stage])


def disk_full(jobs: Jobs, stage: str) -> Fault:
    """The disk is full in the middle, then has room again."""
    folder = jobs.root / f"full-{stage}"
    folder.mkdir()
    began = time.monotonic()
    with small_disk(folder) as enlarge:
        said = finish(jobs.start(stage, folder, False), code=1 if enlarge is None else 2)
        if enlarge is not None:
            assert str(folder) in said.strip().splitlines()[-1], said
            assert "Traceback" not in said, said
            enlarge()
        kept = done(stage, folder)
        finish(jobs.start(stage, folder, False))
        how = "RLIMIT_FSIZE" if enlarge is None else f"a tmpfs of {SMALL_DISK}B, then enlarged"
        fault = f"one process: disk full ({how}), {stage}, {kept} {'epochs' if stage == 'train' else 'blocks'} done"
        equal = results(folder / "out") == jobs.expected[stage]
    return Fault(fault, "the block that was written", "0", time.monotonic() - began - jobs.seconds[stage, False], equal)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None] | None]:
    """A small file system at `folder`, and what gives it room; None where this user may not mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))
        try:
            yield None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=500m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def two_at_once(jobs: Jobs) -> list[Fault]:
    """The same job twice at the same time, and two configurations of it, on one --out."""
    found = []
    # Started together; the other configuration has five times as much to do, so it ends later.
    for kind, other in (("the same command", []), ("another configuration", ["--top-n", "40"])):
        folder = jobs.root / f"two-{bool(other)}"
        began = time.monotonic()
        first = jobs.start("score", folder, False)
        second = start([*jobs.command("score", folder / "out"), *other, "--num-workers", "0"])
        said = [finish_any(process) for process in (first, second)]
        codes = sorted(process.returncode for process in (first, second))
        assert codes == [0, 2], said
        refusal = next(text for text, process in zip(said, (first, second), strict=True) if process.returncode)
        assert ("is in use by process" in refusal) or ("was finished meanwhile" in refusal), refusal
        extra = time.monotonic() - began - jobs.seconds["score", False]
        equal = results(folder / "out") == jobs.expected["score"]
        why = "in use" if "is in use" in refusal else "finished meanwhile, its result kept aside"
        fault = f"one process: {kind} at the same time on one --out"
        found.append(Fault(fault, f"nothing; the second is refused ({why}), exit code 2", "0", extra, equal))
    return found


def finish_any(process: subprocess.Popen[str]) -> str:
    return "".join(part or "" for part in process.communicate(timeout=1200))


def store_away(jobs: Jobs) -> list[Fault]:
    """The bucket with the photos answers 503 for a moment, and for so long that the job ends and is started again."""
    sys.path.insert(0, str(ROOT / "tests"))
    s3 = importlib.import_module("s3_server")
    found: list[Fault] = []
    with s3.started() as server:
        own = {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": server.address}
        os.environ.update(own)
        server.make_bucket("chaos")
        s3.put_folder(jobs.catalogue.parent, f"{server.bucket}/photos")
        table = ["--catalogue", f"{server.bucket}/photos/df.csv", "--num-workers", "0"]
        outputs, seconds = [], []
        for n_refused in (0, 2, 1000):
            folder = jobs.root / f"store-{n_refused}"
            began = time.monotonic()
            process = start([*jobs.command("embed", folder / "out"), *table], **own)
            until(process, lambda folder=folder: done("embed", folder) >= 4, "its first blocks")
            server.faults(status=503, times=n_refused)
            again = "nothing; asked again"
            if n_refused == 1000:
                assert "the same command goes on later" in finish(process, code=75)
                server.faults()
                process = start([*jobs.command("embed", folder / "out"), *table], **own)
                again = "the block that was read; exit code 75, then the same command"
            finish(process)
            seconds.append(time.monotonic() - began)
            outputs.append(results(folder / "out"))
            how = "two requests" if n_refused == 2 else "all requests"
            if n_refused:
                fault = f"one process: the bucket answers {how} with 503, embed"
                found.append(Fault(fault, again, "0", seconds[-1] - seconds[0], outputs[-1] == outputs[0]))
    return found


def random_kills(jobs: Jobs, seed: int) -> Fault:
    """kill -9 of the driver at random moments, each time the same command again, until it ends by itself."""
    usual = jobs.seconds["score", False]
    start = partial(jobs.start, "score", on_ray=False)
    folder, kills, code, seconds = killed_at_random(start, jobs.root / "random", usual, seed)
    assert code == 0, code
    equal = results(folder / "out") == jobs.expected["score"]
    fault = f"one process: kill -9 at {kills} random moments, score"
    return Fault(fault, "what was in flight", "0", seconds - usual, equal)


def in_one_process(jobs: Jobs, damages: list[Damaged], times: int, is_quick: bool) -> Iterator[partial[Any]]:
    """Each fault without Ray as a call that gives its row or rows."""
    for stage in ("embed", "score", "train") if is_quick else ON_RAY:
        yield partial(jobs.undisturbed, stage, False)
        yield partial(driver_fault, jobs, stage, False, damages, times)
    for stage in ("embed",) if is_quick else ("embed", "train"):
        yield partial(disk_full, jobs, stage)
    yield partial(two_at_once, jobs)
    if not is_quick:
        yield partial(store_away, jobs)
        yield partial(little_memory, jobs)
        yield partial(random_kills, jobs, 3)
    yield partial(killed_nights, jobs, is_quick)


def on_ray(jobs: Jobs, times: int) -> Iterator[partial[Any]]:
    """Each fault on Ray as a call that gives its row."""
    for stage in ON_RAY:
        if stage not in jobs.expected:
            yield partial(jobs.undisturbed, stage, False)
    for stage in ON_RAY:
        yield partial(jobs.undisturbed, stage, True)
        yield partial(worker_fault, jobs, stage, signal.SIGKILL)
        yield partial(driver_fault, jobs, stage, True, None, times)
    yield partial(worker_fault, jobs, "score", signal.SIGSTOP)
    yield partial(slow_worker, jobs, "score")
    for how in ("drain", "kill"):
        for stage in ("embed", "score"):
            yield partial(node_fault, jobs, stage, how)
    yield partial(small_store, jobs)


def show(faults: list[Fault], damages: list[Damaged]) -> str:
    """Both tables as Markdown."""
    lines = ["| fault | lost | computed again | extra seconds | bytes equal |", "|---|---|---|---|---|"]
    lines += [row.line() for row in faults]
    lines += ["", "| file | a changed bit found | a cut found |", "|---|---|---|"]
    for damaged in damages:
        cut = f"{damaged.cut_found} of {damaged.tried}" if damaged.cut_found is not None else "is no record"
        lines.append(f"| {damaged.kind} | {damaged.found} of {damaged.tried} | {cut} |")
    return "\n".join(lines)


def tried(call: partial[Any]) -> Any:
    """What the call gives; where it fails, a row that says so, and the others follow."""
    try:
        return call()
    except (AssertionError, subprocess.SubprocessError) as error:
        say(f"{error}")
        words = [str(word) for word in call.args[1:] if isinstance(word, str | signal.Signals)]
        return Fault(f"{call.func.__name__} {' '.join(words)} FAILED", "?", "?", 0.0, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without Ray and store, damage ten times instead of 100")
    parser.add_argument("--parts", nargs="+", choices=("process", "ray"), default=("process", "ray"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write both tables there too")
    arguments = parser.parse_args()
    say(describe_machine())
    times = 10 if arguments.quick else 100
    faults: list[Fault] = []
    damages: list[Damaged] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        jobs = Jobs(Path(folder))
        parts = [in_one_process(jobs, damages, times, arguments.quick)] if "process" in arguments.parts else []
        parts += [on_ray(jobs, times)] if "ray" in arguments.parts and not arguments.quick else []
        for call in chain(*parts):
            found = tried(call)
            rows = found if isinstance(found, list) else [found] if isinstance(found, Fault) else []
            faults += rows
            for row in rows:
                say(f"{time.monotonic() - began:4.0f} s  {row.line()}")
        for stage in jobs.expected:
            out = jobs.root / f"undisturbed-{stage}" / "out"
            damages += damage_finished(out, Path(folder) / f"finished-{stage}", times, np.random.default_rng(2))
    print(show(faults, damages))
    say(f"{time.monotonic() - began:.0f} s")
    if arguments.json is not None:
        content = {"faults": [asdict(row) for row in faults], "damage": [asdict(row) for row in damages]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    is_good = all(row.equal for row in faults) and all(row.is_found for row in damages)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
