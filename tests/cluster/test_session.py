import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import ray
from job_files import descendants, is_running, wait_until

from distributed_rerank.cluster import session as sessions
from distributed_rerank.cluster.session import connect, make_session
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locks

ROOT = Path(__file__).resolve().parents[2]


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=without | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_session_without_gpu_has_a_worker_per_real_core() -> None:
    session = make_session(ClusterConfig(), {"CPU": 8.0, "object_store_memory": 1e9}, cores=2)
    assert (session.num_workers, session.use_gpu, session.decode_workers) == (2, False, 2)


def test_session_with_gpus_has_a_worker_per_gpu() -> None:
    session = make_session(ClusterConfig(cpus_per_worker=4), {"CPU": 32.0, "GPU": 4.0})
    assert (session.num_workers, session.use_gpu, session.decode_workers) == (4, True, 32)


def test_session_with_gpus_can_be_told_not_to_use_them() -> None:
    session = make_session(ClusterConfig(use_gpu=False, num_workers=5), {"CPU": 8.0, "GPU": 2.0})
    assert (session.num_workers, session.use_gpu) == (5, False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClusterConfig(num_workers=9), "9 workers with 1 CPU and 1 GPU each .* 8 CPUs and 1 GPUs"),
        (ClusterConfig(num_workers=2), "2 workers with 1 CPU and 1 GPU each"),
        (ClusterConfig(num_workers=3, cpus_per_worker=3, use_gpu=False), "3 workers with 3 CPU each"),
    ],
)
def test_session_that_does_not_fit_is_bad_input(config: ClusterConfig, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_session(config, {"CPU": 8.0, "GPU": 1.0 if config.use_gpu is None else 0.0})


def test_session_on_a_cluster_without_cpus_is_bad_input() -> None:
    with pytest.raises(BadInput, match="0 CPUs"):
        make_session(ClusterConfig(), {})


@pytest.mark.parametrize(
    "values", [{"num_workers": -1}, {"cpus_per_worker": 0}, {"wait_s": -1.0}, {"object_store_gb": 0.0}]
)
def test_cluster_config_impossible_value_is_named(values: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(values))):
        ClusterConfig(**values)  # pyright: ignore


@pytest.mark.ray
def test_connect_running_ray_is_used_and_left_running(ray_cluster: str) -> None:
    with connect(ClusterConfig(num_workers=3)) as session:
        assert (session.num_workers, session.num_cpus) == (3, 8)
        with pytest.raises(FrozenInstanceError):
            session.num_workers = 4  # pyright: ignore
    assert ray.is_initialized()


@pytest.mark.ray
def test_connect_sigterm_interrupts_and_the_old_handler_comes_back(ray_cluster: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), connect():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.ray
def test_connect_ray_address_attaches_to_that_cluster(ray_cluster: str) -> None:
    code = """
import os, ray
from distributed_rerank.cluster.session import connect
with connect() as session:
    print(session.num_workers, ray.get_runtime_context().gcs_address == os.environ["RAY_ADDRESS"])
print(ray.is_initialized())
"""
    token = os.environ["RAY_AUTH_TOKEN"]
    done = _run(code, RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert done.stdout.split() == ["8", "True", "False"], done.stderr
    refused = _run(code, RAY_ADDRESS=ray_cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another")
    assert f"BadInput: RAY_ADDRESS={ray_cluster} cannot be used" in refused.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_connect_local_starts_a_private_ray_twice_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
import os, pathlib, ray, time
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.cluster.session import connect
for num_workers in (12, 3):
    with connect(ClusterConfig(num_workers=num_workers, object_store_gb=0.2)) as session:
        folder = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
        private = folder.parents[1]
        assert private.parent == pathlib.Path("/tmp"), private
        assert private.stat().st_mode & 0o777 == 0o700, "others may enter Ray's folder"
        ports = list(folder.glob("metrics_export_port_*"))
        deadline = time.monotonic() + 60
        while not ports and time.monotonic() < deadline:
            time.sleep(0.2)
            ports = list(folder.glob("metrics_export_port_*"))
        assert [port.read_text() for port in ports] == ["-1"], "metrics are open to the network without a token"
        print(session.num_workers, session.num_cpus >= 14, os.environ["RAY_AUTH_MODE"], folder.exists())
    print(ray.is_initialized(), folder.exists())
"""
    done = _run(code, HOME=str(tmp_path))
    first, second = "12 True token True False False", "3 False token True False False"
    assert done.stdout.split() == [*first.split(), *second.split()], done.stderr
    assert not list(tmp_path.rglob("auth_token"))
    assert "Token authentication is enabled" not in done.stderr, "what we asked for is no news"


START = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.cluster import session
print("imported", flush=True)
with session.connect(ClusterConfig(num_workers=1, object_store_gb=0.2)):
    print("went on", flush=True)
    threading.Event().wait(60)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.05, 1.0, 2.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_ray_starts_ends_it_and_leaves_no_process_and_no_folder(
    after_s: float, number: signal.Signals
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    before = set(Path("/tmp").glob("rerank-ray-*"))
    process = subprocess.Popen(
        [sys.executable, "-c", START], env=environment | {"PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    time.sleep(after_s)
    started = descendants(process.pid)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors or process.returncode == -number, errors
    # The agents of a node ask every half minute whether it is still there; all else ends at once.
    left = [pid for pid, title in started.items() if "agent" not in title.lower()]
    assert wait_until(lambda: not any(map(is_running, left)), 30), [started[pid] for pid in left if is_running(pid)]
    assert set(Path("/tmp").glob("rerank-ray-*")) <= before | _in_use()


def _in_use() -> set[Path]:
    """Folders of Rays that other processes of this machine have started meanwhile."""
    found = set()
    for folder in Path("/tmp").glob("rerank-ray-*"):
        lock = locks.take(folder / "lock") if (folder / "lock").is_file() else None
        if lock is None:
            found.add(folder)
        else:
            lock.release()
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_ray_that_cannot_be_started_is_one_line_that_says_how_to_go_on() -> None:
    code = """
from distributed_rerank.config.cluster import ClusterConfig
from distributed_rerank.cluster.session import connect
with connect(ClusterConfig(num_workers=1, object_store_gb=900_000)):
    pass
"""
    done = _run(code)
    line = done.stderr.strip().splitlines()[-1]
    assert "BadInput: Ray cannot be started here (" in line
    assert "--num-workers 0 computes in this process without it" in line


def test_folder_of_a_killed_driver_is_removed_and_that_of_a_living_one_kept() -> None:
    left = Path(tempfile.mkdtemp(prefix="rerank-ray-", dir="/tmp"))
    used = Path(tempfile.mkdtemp(prefix="rerank-ray-", dir="/tmp"))
    begun = Path(tempfile.mkdtemp(prefix="rerank-ray-", dir="/tmp"))  # its driver has no lock yet
    (left / "lock").touch()
    with open(used / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sessions._remove_left_behind()
        assert not left.exists()
        assert used.exists()
    sessions._remove_left_behind()
    assert not used.exists()
    assert begun.exists()
    begun.rmdir()
