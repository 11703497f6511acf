"""The jobs that chaos.py disturbs, how they are started, watched and compared, and the rows that come of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _measuring import ROOT, descendants

from distributed_rerank.config.extractor import ExtractorConfig
from distributed_rerank.config.pairwise import ConcatSiameseConfig
from distributed_rerank.demo.catalogue import write_demo_catalogue
from distributed_rerank.models.concat_siamese import ConcatSiamese
from distributed_rerank.models.saving import save_model

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

    def start(
        self, stage: str, folder: Path, on_ray: bool, more: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """The job, with `more` options, as a process that writes to `folder`/out."""
        folder.mkdir(parents=True, exist_ok=True)
        words = [*self.command(stage, folder / "out"), "--num-workers", str(ON_RAY[stage] if on_ray else 0)]
        return start([*words, *more], **environment)

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
    said = "".join(part or "" for part in process.communicate(timeout=1200))
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
    deadline = time.monotonic() + 600
    while True:
        with suppress(FileNotFoundError):  # a folder that goes while it is looked through
            if is_true():
                return
        assert process.poll() is None, f"the job ended before {what}:\n{process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.002)


def workers_of(stage: str, pids: Sequence[int]) -> list[int]:
    """Those of the processes that compute for a job on Ray."""
    found = []
    for pid in pids:
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


def killed_at_random(
    start: Callable[[Path], subprocess.Popen[str]], folder: Path, seconds: float, seed: int
) -> tuple[Path, int, int | None, float]:
    """Kill a job at random moments, starting it again each time, until it ends by itself, in a folder below `folder`.

    `seconds` is what the job takes undisturbed. Where fewer than three kills hit, all is done again, sooner. Returns
    the folder, the kills, the exit code and the seconds from the first start.
    """
    generator = np.random.default_rng(seed)
    for number in range(5):
        kills, began = 0, time.monotonic()
        while True:
            process = start(folder / str(number))
            try:
                # Later and later, so that there is an end.
                moment = float(generator.uniform(0.4, 0.9)) * (1 + kills / 3) * 0.6**number
                process.communicate(timeout=moment * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        if kills >= 3:
            return folder / str(number), kills, process.returncode, time.monotonic() - began
    raise AssertionError("the job ended before it was killed three times")
