"""SIGKILL of a worker, SIGKILL and Ctrl-C of the driver, each in the middle of scoring."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job_files import EXTRACTOR, bytes_of, descendants, is_running, kill_by_pid, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
N_BLOCKS = 36
ONE_BY_ONE = ["--queries-per-block", "1", "--pairs-per-batch", "1", "--chain", "replace", "--top-n", "30"]


@pytest.fixture
def arguments(
    catalogue_path: Path, models: dict[str, Path], run_job: Callable, tmp_path: Path
) -> Callable[[str], list[object]]:
    """Arguments of an evaluation into a folder of this name: 36 score blocks of 30 pairs, embeddings at hand."""
    outcome = run_job("embed", "--catalogue", catalogue_path, "--out", tmp_path / "embeddings", *EXTRACTOR)
    assert outcome.code == 0, outcome.errors
    given = ["--catalogue", catalogue_path, "--embeddings", tmp_path / "embeddings", "--model", models["concat"]]
    return lambda name: [*given, *ONE_BY_ONE, "--out", tmp_path / name]


@pytest.fixture
def expected(arguments: Callable[[str], list[object]], run_job: Callable, tmp_path: Path) -> dict[str, bytes]:
    outcome = run_job("evaluate", *arguments("undisturbed"))
    assert outcome.code == 0, outcome.errors
    return bytes_of(tmp_path / "undisturbed")


@pytest.fixture
def leftovers() -> Iterator[list[int]]:
    """Processes of a killed driver: whatever of them still runs at the end is ended, by pid."""
    pids: list[int] = []
    yield pids
    kill_by_pid(pids, signal.SIGKILL)


def blocks_on_disk(folder: Path, name: str) -> int:
    pattern = f".{name}.*/.pair_distances.*/blocks/pair_distances/block-*.parquet"
    return len(list(folder.glob(pattern)))


def wait_for_blocks(process: subprocess.Popen[str], folder: Path, name: str, count: int) -> None:
    is_there = wait_until(lambda: process.poll() is not None or blocks_on_disk(folder, name) >= count)
    assert is_there, "no score block in time"
    assert process.poll() is None, process.communicate()[1]
    assert blocks_on_disk(folder, name) < N_BLOCKS, "too late: everything is scored"


def test_killed_worker_changes_nothing(
    arguments: Callable, expected: dict[str, bytes], start_job: Callable, tmp_path: Path
) -> None:
    process = start_job("evaluate", *arguments("out"), "--num-workers", 2)
    wait_for_blocks(process, tmp_path, "out", 1)
    workers = [pid for pid, title in descendants(process.pid).items() if title.startswith("ray::_Host")]
    assert workers, descendants(process.pid)
    kill_by_pid(workers[:1], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert bytes_of(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out" / "pair_distances" / "manifest.json").read_text())
    assert manifest["blocks"] == {"computed": 2 * N_BLOCKS, "reused": 0}  # logits and rejects


def test_interrupted_then_killed_driver_continues(
    arguments: Callable, expected: dict[str, bytes], start_job: Callable, leftovers: list[int], tmp_path: Path
) -> None:
    process = start_job("evaluate", *arguments("out"), "--num-workers", 1)
    wait_for_blocks(process, tmp_path, "out", 1)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith("interrupted: finished blocks are kept")
    assert "Traceback" not in said

    done = blocks_on_disk(tmp_path, "out")
    assert 1 <= done < N_BLOCKS
    process = start_job("evaluate", *arguments("out"), "--num-workers", 1)
    wait_for_blocks(process, tmp_path, "out", done + 1)
    titles = descendants(process.pid)
    leftovers.extend(titles)
    process.kill()
    process.wait()
    done = blocks_on_disk(tmp_path, "out")

    process = start_job("evaluate", *arguments("out"), "--num-workers", 2)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert bytes_of(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out" / "pair_distances" / "manifest.json").read_text())
    assert manifest["blocks"]["reused"] >= 2 * done
    assert manifest["blocks"]["computed"] + manifest["blocks"]["reused"] == 2 * N_BLOCKS
    assert not list(tmp_path.glob(".out.*")), "a finished run leaves no staging folder"
    # the agents of Ray's dashboard ask every half minute whether their node is still there; all else ends at once
    computing = [pid for pid, title in titles.items() if not title.endswith("Agent")]
    assert wait_until(lambda: not any(map(is_running, computing)), 60), "processes of a killed driver stay"
