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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from _chaos_damage import Damaged, damage_finished, damage_unfinished
from _measuring import ROOT, descendants, describe_machine, say

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.demo.catalogue import write_demo_catalogue
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.saving import save_model

SMALL_DISK, FILE_LIMIT = "300k", 20_000
PATIENCE_S = 30.0
"""For a stopped worker, instead of the product's two minutes."""
MAIN = f"""
import sys
from distributed_rerank.cluster import fan_out
from distributed_rerank.command_line import main
fan_out._LEAST_S = {PATIENCE_S}
main(sys.argv[1:])
"""
ON_RAY = {"embed": 2, "retrieve": 2, "score": 2, "train": 1}
"""Workers; a training on two has the bits of one only up to rounding, as README says."""
BLOCKS = {
    "embed": ".out.*/blocks/embeddings/block-*",
    "retrieve": ".out.*/.candidates.*/blocks/candidates/block-*",
    "score": ".out.*/.pair_distances.*/blocks/pair_distances/block-*",
    "train": ".out.*/work/images-*/run/checkpoints/epoch-*.pt",
}
"""Finished work of a job that is not finished, seen from the folder of its --out."""
TITLES = {"embed": "ray::MapBatches", "retrieve": "ray::_Host", "score": "ray::_Host", "train": "RayTrainWorker"}
"""How Ray calls the processes that compute."""
NOT_COMPARED = ("manifest.json", "timings.json", "report.html", "events.out")
"""They hold times."""


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    fault: str
    lost: str
    again: str
    """Blocks computed again, or what that means for this fault."""
    extra_s: float
    equal: bool

    def line(self) -> str:
        """As a row of Markdown."""
        cells = (self.fault, self.lost, self.again, f"{self.extra_s:.1f}", "yes" if self.equal else "NO")
        return f"| {' | '.join(cells)} |"


class Jobs:
    """The four jobs on one catalogue, and their undisturbed results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.extractor = ["--extractor", "test_resnet", "--extractor-weights", "none", "--image-size", "32"]
        self.catalogue = write_demo_catalogue(root / "catalogue", n_designs=48, n_images=4, size=48)
        backbone = ExtractorConfig(name="test_resnet", weights="none", image_size=32, resize="square")
        save_model(ConcatSiamese(ConcatSiameseConfig(extractor=backbone, hidden_dims=(8,))), root / "model")
        self.seconds: dict[tuple[str, bool], float] = {}
        self.expected: dict[str, dict[str, bytes]] = {}

    def command(self, stage: str, out: Path) -> list[str]:
        """The job that has this stage as its long part."""
        catalogue = ["--catalogue", str(self.catalogue), "--out", str(out)]
        ready = ["--embeddings", str(self.root / "undisturbed-embed" / "out"), "--no-baselines"]
        if stage == "embed":
            return ["embed", *catalogue, *self.extractor, "--split", "validation", "--images-per-block", "2"]
        if stage == "retrieve":
            return ["evaluate", *catalogue, *ready, "--queries-per-block", "1"]
        if stage == "score":
            one = ["--queries-per-block", "1", "--pairs-per-batch", "1", "--chain", "replace", "--top-n", "8"]
            return ["evaluate", *catalogue, *ready, "--model", str(self.root / "model"), *one]
        steps = ["--epochs", "12", "--patience", "0", "--steps-per-epoch", "8", "--n-items", "20", "--top-n", "20"]
        return ["train", *catalogue, *self.extractor, *steps, "--encode-block", "32"]

    def start(self, stage: str, folder: Path, on_ray: bool, **environment: str) -> subprocess.Popen[str]:
        """The job as a process that writes to `folder`/out."""
        folder.mkdir(parents=True, exist_ok=True)
        words = [*self.command(stage, folder / "out"), "--num-workers", str(ON_RAY[stage] if on_ray else 0)]
        return start(words, **environment)

    def undisturbed(self, stage: str, on_ray: bool) -> None:
        """Run the job once; its results are what others are compared with, its time what theirs is."""
        folder = self.root / f"undisturbed-{stage}{'-ray' if on_ray else ''}"
        began = time.monotonic()
        finish(self.start(stage, folder, on_ray))
        self.seconds[stage, on_ray] = time.monotonic() - began
        found = results(folder / "out")
        assert found == self.expected.setdefault(stage, found), f"{stage} on Ray gives other bytes"


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        env=own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process said; it must end with this code."""
    said = "".join(part or "" for part in process.communicate(timeout=300))
    assert process.returncode == code, f"ended with {process.returncode} instead of {code}:\n{said[-3000:]}"
    return said


def results(folder: Path) -> dict[str, bytes]:
    """Every file of an output that must not depend on a fault."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path.read_bytes() for name, path in files.items() if not path.name.startswith(NOT_COMPARED)}
    assert kept, f"{folder} is empty"
    return kept


def done(stage: str, folder: Path) -> int:
    """Blocks of the unfinished job on disk; for a training the last epoch."""
    found = [path.name for path in folder.glob(BLOCKS[stage])]
    return max((int(name[6:11]) for name in found), default=0) if stage == "train" else len(found)


def until(process: subprocess.Popen[str], is_true: Callable[[], object], what: str) -> None:
    """Wait; ends the program where the process ends or nothing comes."""
    deadline = time.monotonic() + 120
    while not is_true():
        assert process.poll() is None, f"the job ended before {what}:\n{process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.002)


def workers_of(stage: str, process: subprocess.Popen[str]) -> list[int]:
    """The computing processes of a job on Ray."""
    found = []
    for pid in descendants(process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if TITLES[stage] in title:
            found.append(pid)
    return found


def end_with_children(process: subprocess.Popen[str]) -> None:
    """kill -9 of a driver; what it leaves ends by itself, and is waited for."""
    pids = [pid for pid in descendants(process.pid) if pid != process.pid]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/fd").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        if Path(f"/proc/{pid}/fd").exists():
            os.kill(pid, signal.SIGKILL)


def middle(stage: str) -> int:
    """So many blocks (epochs) are finished when the fault comes."""
    return 4 if stage == "train" else 12


def blocks_of(folder: Path) -> dict[str, int]:
    """The manifests' counts of the blocks of the stage that was disturbed."""
    inner = next((path for path in (folder / "pair_distances", folder / "candidates") if path.is_dir()), folder)
    return json.loads((inner / "manifest.json").read_text())["blocks"]


def worker_fault(jobs: Jobs, stage: str, number: signal.Signals) -> Fault:
    """A signal to one computing process of a job on Ray."""
    folder = jobs.root / f"{number.name}-worker-{stage}"
    began = time.monotonic()
    process = jobs.start(stage, folder, on_ray=True)
    found: list[int] = []
    # A process of Ray Data has its title only while it computes.
    until(
        process,
        lambda: (done(stage, folder) >= middle(stage) and found.extend(workers_of(stage, process))) or found,
        "its middle",
    )
    os.kill(found[0], number)
    before = done(stage, folder)
    finish(process)
    extra = time.monotonic() - began - jobs.seconds[stage, True]
    name = "kill -9" if number == signal.SIGKILL else f"SIGSTOP (replaced after {PATIENCE_S:.0f} s instead of 120)"
    unit = "epoch that was being trained" if stage == "train" else "calls of that worker, at most 2 blocks"
    again = "1 epoch" if stage == "train" else "at most 2"
    fault = f"Ray: {name} of a worker, {stage}, {before} {'epochs' if stage == 'train' else 'blocks'} done"
    return Fault(fault, unit, again, extra, results(folder / "out") == jobs.expected[stage])


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
    return "".join(part or "" for part in process.communicate(timeout=300))


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
    folder, generator, kills = jobs.root / "random", np.random.default_rng(seed), 0
    began = time.monotonic()
    while True:
        process = jobs.start("score", folder, False)
        try:
            # Later and later, so that there is an end.
            process.communicate(timeout=float(generator.uniform(0.5, 1.0)) * (1 + kills) * jobs.seconds["score", False])
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0
    extra = time.monotonic() - began - jobs.seconds["score", False]
    equal = results(folder / "out") == jobs.expected["score"]
    return Fault(f"one process: kill -9 at {kills} random moments, score", "what was in flight", "0", extra, equal)


def in_one_process(jobs: Jobs, damages: list[Damaged], times: int, is_quick: bool) -> Iterator[Callable[[], Any]]:
    """Each fault without Ray as a call that gives its row or rows."""
    for stage in ("embed", "score", "train") if is_quick else ON_RAY:
        yield partial(jobs.undisturbed, stage, False)
        yield partial(driver_fault, jobs, stage, False, damages, times)
    for stage in ("embed",) if is_quick else ("embed", "train"):
        yield partial(disk_full, jobs, stage)
    yield partial(two_at_once, jobs)
    if not is_quick:
        yield partial(store_away, jobs)
        yield partial(random_kills, jobs, 3)


def on_ray(jobs: Jobs, times: int) -> Iterator[Callable[[], Any]]:
    """Each fault on Ray as a call that gives its row."""
    for stage in ON_RAY:
        if stage not in jobs.expected:
            yield partial(jobs.undisturbed, stage, False)
    for stage in ON_RAY:
        yield partial(jobs.undisturbed, stage, True)
        yield partial(worker_fault, jobs, stage, signal.SIGKILL)
        yield partial(driver_fault, jobs, stage, True, None, times)
    yield partial(worker_fault, jobs, "score", signal.SIGSTOP)


def show(faults: list[Fault], damages: list[Damaged]) -> str:
    """Both tables as Markdown."""
    lines = ["| fault | lost | computed again | extra seconds | bytes equal |", "|---|---|---|---|---|"]
    lines += [row.line() for row in faults]
    lines += ["", "| file | a changed bit found | a cut found |", "|---|---|---|"]
    for damaged in damages:
        cut = f"{damaged.cut_found} of {damaged.tried}" if damaged.cut_found is not None else "is no record"
        lines.append(f"| {damaged.kind} | {damaged.found} of {damaged.tried} | {cut} |")
    return "\n".join(lines)


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
            found = call()
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
