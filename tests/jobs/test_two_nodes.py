"""A cluster of two nodes on this machine, and the job sent to it by `ray job submit`."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from job_files import EXTRACTOR, SMALL_BLOCKS, bytes_of, descendants, kill_by_pid, wait_until
from ray_head import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """Address for jobs, and the environment that knows the token, of a head with 2 CPUs and a node with 3."""
    # pytest's own temporary folder is too long for Ray's socket paths
    folder = Path(tempfile.mkdtemp(prefix="rerank-nodes-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = own | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    port, dashboard, *agents = free_ports(4)
    # another Ray of the machine holds the agents' usual port; without one of its own, no job is taken
    common = ["--object-store-memory=150000000", "--block"]
    head = [
        "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
        f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agents[0]}", *common,
    ]  # fmt: skip
    nodes = [start_node(head, environment)]
    try:
        address = f"http://127.0.0.1:{dashboard}"
        assert wait_until(lambda: answers(address)), "the dashboard does not answer"
        node = [
            "start", f"--address=127.0.0.1:{port}", "--num-cpus=3",
            f"--dashboard-agent-listen-port={agents[1]}", *common,
        ]  # fmt: skip
        nodes.append(start_node(node, environment))
        yield address, environment
    finally:
        pids = [pid for node in nodes for pid in (node.pid, *descendants(node.pid))]
        kill_by_pid(pids, signal.SIGKILL)
        for node in nodes:
            node.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def start_node(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(RAY), *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def answers(address: str) -> bool:
    """Whether the dashboard is there; it refuses whoever has no token, and that is an answer."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_submitted_job_gives_the_same_bytes(
    cluster: tuple[str, dict[str, str]],
    catalogue_path: Path,
    models: dict[str, Path],
    run_job: Callable,
    tmp_path: Path,
) -> None:
    address, environment = cluster
    arguments = [
        "--catalogue", catalogue_path, *EXTRACTOR, *SMALL_BLOCKS, "--model", models["concat"], "--out",
    ]  # fmt: skip
    assert run_job("evaluate", *arguments, tmp_path / "one process").code == 0
    job = [sys.executable, ROOT / "jobs" / "evaluate.py", *arguments, tmp_path / "two nodes"]
    # three workers do not fit on the head: --wait-s lets the second node arrive
    sent = [RAY, "job", "submit", "--address", address, "--", *job, "--num-workers", "3", "--wait-s", "60"]
    done = send(sent, environment)
    for _ in range(20):
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)  # the agent that takes jobs comes up after the dashboard
        done = send(sent, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bytes_of(tmp_path / "two nodes") == bytes_of(tmp_path / "one process")
    (tmp_path / "token").write_text(secrets.token_hex(32))
    stranger = environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = send([*sent[:6], "true"], stranger)
    assert refused.returncode != 0, "a client with another token is let in"
    assert "token" in (refused.stdout + refused.stderr).lower()


def send(words: list[object], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
