"""The same work on the same machine, in turn: open-metric-learning 4.0.0 and this project.

    python benchmarks/compare_oml.py [--bench ../shared/bench] [--oml-env DIR] [--rounds 3] [--quick] [--json FILE]

Both sides get the same files, weights, threads and top_n. The folder --bench (or $DISTRIBUTED_RERANK_BENCH) has
make_photos.py, which writes the photos, and oml_peer.py, which runs OML on them. OML gets an environment of its own in
--oml-env, made with pip on the first run and kept. A round runs OML, then ours at fp32 and bf16, then at fp32
and bf16 on two Ray workers; a row has the medians over the rounds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch
from _measuring import ROOT, Child, Row, add_common_flags, compared, describe_machine, finish, run_child

from distributed_rerank.tensors.hardware import bf16_support

PACKAGES = ("open-metric-learning==4.0.0", "omegaconf", "hydra-core", "pytorch-lightning", "matplotlib")
HERE = Path(__file__).resolve().parent


def find_bench(given: Path | None) -> Path:
    """The folder of the peer's scripts, or the end of the program with the ways to name it."""
    folder = given or Path(os.environ.get("DISTRIBUTED_RERANK_BENCH", ROOT.parent / "shared" / "bench"))
    for name in ("make_photos.py", "oml_peer.py"):
        if not (folder / name).is_file():
            sys.exit(f"{folder} has no {name}; name its folder with --bench or $DISTRIBUTED_RERANK_BENCH")
    return folder


def oml_python(folder: Path) -> Path:
    """The interpreter of OML's environment, which is made where it is absent."""
    python = folder / "bin" / "python"
    check = [str(python), "-c", "import oml"]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    print(f"making OML's environment in {folder} (some minutes)", flush=True)
    venv.create(folder, with_pip=True, clear=False)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    subprocess.run(check, check=True)
    return python


def default_environment() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(cache) / "distributed_rerank" / "oml-4.0.0"


class Comparison:
    """One catalogue of photos and the commands of both sides."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.bench = find_bench(arguments.bench)
        self.python = oml_python(arguments.oml_env)
        self.photos = work / "photos"
        sizes = ["--labels", str(arguments.labels), "--per-label", str(arguments.per_label)]
        make = [sys.executable, str(self.bench / "make_photos.py"), str(self.photos), *sizes]
        subprocess.run(make, check=True)
        self.common = ["--top-n", str(arguments.top_n), "--threads", str(arguments.threads)]
        self.common += ["--train-steps", str(arguments.train_steps)]
        self.environment = {"OMP_NUM_THREADS": str(arguments.threads)}

    def theirs(self) -> Child:
        """OML's round; its candidates, weights and pair distances are left for ours."""
        peer = [self.python, self.bench / "oml_peer.py", self.photos, "--out", self.work / "oml", *self.common]
        return run_child(peer, environment=self.environment)

    def ours(self, precision: str, workers: int, is_searching: bool) -> Child:
        """Our round at one precision, in one process or on Ray."""
        name = self.pairs_file(precision, workers)
        command = [sys.executable, HERE / "_ours.py", self.photos, self.work / "oml", "--out", name, *self.common]
        command += ["--precision", precision, "--workers", str(workers)]
        return run_child(command + ["--search"] * is_searching, environment=self.environment)

    def pairs_file(self, precision: str, workers: int) -> Path:
        return self.work / f"{precision}-{workers}.npz"

    def agreement(self, precision: str, workers: int) -> tuple[float, float]:
        """Largest difference of two pair distances, and the share of queries with the same first candidate."""
        with np.load(self.work / "oml" / "candidates.npz") as pairs:
            theirs, queries = pairs["pair_distances"], pairs["query_ids"]
        with np.load(self.pairs_file(precision, workers)) as pairs:
            ours = pairs["pair_distances"]
        same = [np.argmin(ours[queries == q]) == np.argmin(theirs[queries == q]) for q in np.unique(queries)]
        return float(np.abs(ours - theirs).max()), float(np.mean(same))

    def same_ids(self) -> float:
        """Share of the places of the exact neighbour lists at which both name the same item."""
        file = self.work / "oml_ids.npy"
        run_child([self.python, HERE / "_oml_ids.py", file], environment=self.environment)
        with np.load(self.pairs_file("fp32", 0)) as found:
            return float((np.load(file) == found["knn_items"]).mean())


def run_rounds(comparison: Comparison, kinds: list[tuple[str, int]], rounds: int) -> dict[str, list[Child]]:
    """Both sides in turn; what each printed, by side."""
    found: dict[str, list[Child]] = {"oml": [], **{f"{precision}-{workers}": [] for precision, workers in kinds}}
    for number in range(rounds):
        found["oml"].append(comparison.theirs())
        print(f"round {number + 1}: OML {found['oml'][-1].answer}", flush=True)
        for precision, workers in kinds:
            child = comparison.ours(precision, workers, is_searching=(precision, workers) == ("fp32", 0))
            found[f"{precision}-{workers}"].append(child)
            print(f"round {number + 1}: ours {precision}, {place(workers)} {child.answer}", flush=True)
    return found


def place(workers: int) -> str:
    return f"{workers} Ray workers" if workers else "one process"


def rows_of(comparison: Comparison, kinds: list[tuple[str, int]], found: dict[str, list[Child]]) -> list[Row]:
    """The rows: each figure of ours against OML's of the same name."""
    rows = []

    def add(name: str, key: str, figure: str, unit: str) -> None:
        ours, theirs = ([child.answer[figure] for child in found[side]] for side in (key, "oml"))
        rows.append(compared(name, unit, ours, theirs))

    for precision, workers in kinds:
        key, where = f"{precision}-{workers}", f"{precision}, {place(workers)}"
        add(f"re-rank, {where}", key, "rerank_pairs_per_s", "pairs/s")
        difference, same = comparison.agreement(precision, workers)
        rows.append(Row(f"re-rank, {where}: largest difference of pair distances", "distance", difference))
        rows.append(Row(f"re-rank, {where}: queries with the same first candidate", "share", same))
        add(f"embed, {where}", key, "embed_images_per_s", "images/s")
        if workers == 0:
            add(f"train, {where}", key, "train_pairs_per_s", "pairs/s")
            peaks = [[child.peak_mb for child in found[side]] for side in (key, "oml")]
            rows.append(compared(f"peak memory, {where}", "MB", *peaks))
    add("exact kNN 10,000 x 50,000 x 384, 100 neighbours", "fp32-0", "knn_queries_per_s", "queries/s")
    rows.append(Row("exact kNN: places with the same id", "share", comparison.same_ids()))
    add("nine metrics of 10,000 queries", "fp32-0", "metrics_queries_per_s", "queries/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--bench", type=Path, help="folder of make_photos.py and oml_peer.py")
    parser.add_argument("--oml-env", type=Path, default=default_environment(), help="OML's environment, made if absent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="Ray workers of the rows on Ray; 0 leaves them out")
    parser.add_argument("--labels", type=int, default=24)
    parser.add_argument("--per-label", type=int, default=8)
    parser.add_argument("--top-n", type=int, default=10)
    parser.add_argument("--train-steps", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        for name, value in {
            "rounds": 1,
            "labels": 4,
            "per_label": 4,
            "top_n": 2,
            "train_steps": 1,
            "workers": 0,
        }.items():
            setattr(arguments, name, value)
    print(describe_machine(), flush=True)
    has_bf16 = bf16_support(torch.device("cpu")) is not None
    kinds = [("fp32", 0)] + [("bf16", 0)] * has_bf16
    if arguments.workers > 0:
        kinds += [("fp32", arguments.workers)] + [("bf16", arguments.workers)] * has_bf16
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(arguments, Path(work))
        found = run_rounds(comparison, kinds, arguments.rounds)
        finish(rows_of(comparison, kinds, found), arguments.json)


if __name__ == "__main__":
    main()
