"""Trains on a cluster of two nodes of one CPU, takes one of them away and gives it back; writes what it saw.

    python elastic_driver.py FOLDER

FOLDER/seen.json has how many workers there were in each phase, and the epochs of the finished training.
"""

import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from job_files import descendants
from ray.cluster_utils import Cluster
from training_examples import build_task

from distributed_rerank.cluster import training
from distributed_rerank.cluster.session import Session

FAST_DETECTION = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}  # fmt: skip
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 150_000_000}


def main(folder: Path) -> None:
    os.environ |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray counts a node that has just gone for a while, and waits this long for workers on it; by default a minute.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30"
    task = build_task(folder / "task", epochs=100_000, minutes=1.0)
    task = replace(task, runs=task.runs[:1])
    # not pytest's folder, whose name is too long for Ray's socket paths
    with tempfile.TemporaryDirectory(prefix="rerank-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        os.environ["RAY_TMPDIR"] = ray_folder
        (Path(ray_folder) / "ray").mkdir()
        head = {**NODE, "include_dashboard": False, "_system_config": FAST_DETECTION}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            second = cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, logging_level="WARNING")
            seen = train_through_changes(cluster, second, task, folder)
            (folder / "seen.json").write_text(json.dumps(seen))
        finally:
            ray.shutdown()
            cluster.shutdown()


def train_through_changes(cluster: Cluster, second: Any, task: Any, folder: Path) -> dict[str, Any]:
    """2 -> 1 -> 2 workers, an epoch finished with each."""
    retry = training.RetryConfig(min_workers=1, resize_check_s=1.0)
    found: list[dict[str, Any]] = []

    def fit() -> None:
        session = Session(num_workers=2, num_cpus=2, object_store_bytes=150_000_000)
        found.append(training.fit(task, folder / "run", session=session, retry=retry))

    thread = threading.Thread(target=fit)
    thread.start()
    seen = [train_with(2, folder, thread)]
    cluster.remove_node(second, allow_graceful=False)
    seen.append(train_with(1, folder, thread))
    cluster.add_node(**NODE)
    seen.append(train_with(2, folder, thread))
    thread.join(200)
    assert found, "the training did not finish"
    return {"workers": seen, "epochs": found[0]["current"]["epoch"]}


def train_with(number: int, folder: Path, thread: threading.Thread) -> int:
    """Waits until so many workers are there and have written a checkpoint since."""
    wait_for(lambda: n_workers() == number, thread, f"{number} workers")
    before = newest(folder)
    wait_for(lambda: newest(folder) > before, thread, f"a checkpoint of {number} workers")
    return n_workers()


def wait_for(condition: Callable[[], bool], thread: threading.Thread, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert thread.is_alive(), f"training ended before there was {what}"
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.1)


def n_workers() -> int:
    return sum("RayTrainWorker" in title for title in descendants(os.getpid()).values())


def newest(folder: Path) -> str:
    return max((path.name for path in (folder / "run" / training.CHECKPOINTS).glob("epoch-*.pt")), default="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
