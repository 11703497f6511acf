"""A cluster that starts with no workers, by Ray's fake autoscaler: the job waits, runs, and leaves no request."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_files import descendants, kill_by_pid
from ray_head import free_ports

from distributed_rerank.cluster.growth import wanted_bundles
from distributed_rerank.config.cluster import ClusterConfig

HEAD = "f" * 51 + "00000"
ROOT = Path(__file__).resolve().parents[2]
GPU, CPU = {"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0}


@pytest.mark.parametrize(
    ("config", "present", "expected"),
    [
        (ClusterConfig(), {}, [[GPU], [CPU]]),
        (ClusterConfig(), {"CPU": 8.0, "GPU": 1.0}, []),
        (ClusterConfig(), {"CPU": 1.0}, []),
        (ClusterConfig(num_workers=2), {"CPU": 1.0, "GPU": 1.0}, [[GPU] * 2, [CPU] * 2]),
        (ClusterConfig(use_gpu=True), {"CPU": 8.0}, [[GPU]]),
        (ClusterConfig(use_gpu=False, cpus_per_worker=2, num_workers=3), {}, [[{"CPU": 2.0}] * 3]),
    ],
)
def test_what_is_asked_for(config: ClusterConfig, present: dict, expected: list) -> None:
    assert wanted_bundles(config, present) == expected


def autoscaling_config(port: int) -> dict[str, Any]:
    """Up to 2 workers of 4 CPUs on request, by Ray's fake provider; the head listens on `port`."""
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            # Ray's fake provider, named as if it were not Ray's: its own defaults are not in the wheel.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": HEAD,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 4, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        **{f"{part}_commands": [] for part in ("setup", "head_setup", "worker_setup", "initialization")},
        **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")},
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment that reaches a cluster of a head without CPUs and up to 2 workers of 4 CPUs, which come on
    request."""
    folder = Path(tempfile.mkdtemp(prefix="rerank-test-", dir="/tmp"))
    port, dashboard, agent, grpc, client = free_ports(5)
    (folder / "cluster.json").write_text(json.dumps(autoscaling_config(port)))
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    own |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), HEAD)
    own |= {"RAY_NODE_TYPE_NAME": "ray.head.default"}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [f"--autoscaling-config={folder / 'cluster.json'}"]
    with open(folder / "start.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=base | own, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "start.log").read_text():
            assert process.poll() is None, (folder / "start.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield (
            base
            | {key: own[key] for key in own if key.startswith("RAY_AUTH")}
            | {
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "PYTHONPATH": os.pathsep.join([str(ROOT), base.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
            }
        )
    finally:
        started = list(descendants(process.pid))
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kill_by_pid(started, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


STATUS = """
import os, sys, ray
from ray.autoscaler.v2.sdk import get_cluster_status
ray.init(logging_level="ERROR")
status = get_cluster_status(os.environ["RAY_ADDRESS"])
standing = [b.count for d in status.resource_demands.cluster_constraint_demand for b in d.bundles_by_count]
print("requests", sum(standing))
print("nodes", sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))
"""


def status(environment: dict[str, str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", STATUS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_job_waits_for_workers_runs_and_leaves_no_request(
    cluster: dict[str, str], catalogue_path: Path, tmp_path: Path
) -> None:
    job = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--catalogue", str(catalogue_path), "--image-size", "32"]
    job += ["--extractor", "test_resnet", "--extractor-weights", "none", "--out", str(tmp_path / "embeddings")]
    assert status(cluster) == ["requests", "0", "nodes", "0"]
    too_many = subprocess.run([*job, "--num-workers", "9"], env=cluster, capture_output=True, text=True, timeout=200)
    assert too_many.returncode == 2, too_many.stderr
    assert "9 workers need 9 CPUs, which this cluster cannot grow to" in too_many.stderr

    interrupted = subprocess.Popen([*job, "--num-workers", "8"], env=cluster, stderr=subprocess.PIPE, text=True)
    assert interrupted.stderr is not None
    for line in interrupted.stderr:
        if "nodes with 8 CPUs" in line:
            break
    interrupted.send_signal(signal.SIGTERM)
    interrupted.communicate(timeout=100)
    assert interrupted.returncode == 130
    assert status(cluster)[:2] == ["requests", "0"], "a job that is stopped takes its request back"

    done = subprocess.run(job, env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "embeddings" / "manifest.json").is_file()
    assert status(cluster)[:2] == ["requests", "0"]
    deadline = time.monotonic() + 90
    while status(cluster)[3] != "0":
        assert time.monotonic() < deadline, "idle nodes stay after the job"
        time.sleep(2)
