"""Ray nodes as `ray start` makes them, with a dashboard and a token, for jobs that are submitted."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Head(NamedTuple):
    address: str
    environment: dict[str, str]


@contextmanager
def started_head(n_others: int = 0, **environment: str) -> Iterator[Head]:
    """A Ray head with a dashboard, and so many other nodes of a CPU: own ports, own folder, own token; ended by group.

    With others the head itself has one CPU for work, so that work goes to all.
    """
    # pytest's own temporary folder is too long for Ray's socket paths
    folder = Path(tempfile.mkdtemp(prefix="rerank-test-", dir="/tmp"))
    port, dashboard, agent, grpc, client, *agents = free_ports(5 + n_others)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    ray.append("--object-store-memory=100000000")
    head = ["--head", f"--num-cpus={1 if n_others else 4}", f"--port={port}", f"--dashboard-port={dashboard}"]
    head += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
    head += [f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    log = open(folder / "start.log", "w", encoding="utf-8")

    def start(words: list[str]) -> subprocess.Popen[bytes]:
        given = base | own | environment
        return subprocess.Popen([*ray, *words], env=given, stdout=log, stderr=log, start_new_session=True)

    nodes = [start(head)]
    try:
        wait_for_agent(f"http://127.0.0.1:{dashboard}", own, nodes[0])
        for listen in agents:
            words = [f"--address=127.0.0.1:{port}", "--num-cpus=1", f"--dashboard-agent-listen-port={listen}"]
            nodes.append(start(words))
        wait_for_nodes(f"http://127.0.0.1:{dashboard}", own, len(nodes))
        yield Head(f"http://127.0.0.1:{dashboard}", own)
    finally:
        for process in nodes:
            process.terminate()
        for process in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(address: str, environment: dict[str, str], path: str, method: str = "GET") -> Any:
    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(
        urllib.request.Request(address + path, headers=headers, method=method), timeout=20
    ) as answer:
        return json.loads(answer.read())


def wait_for_agent(address: str, environment: dict[str, str], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        try:
            ask(address, environment, "/api/jobs/")
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    pytest.fail("the dashboard does not answer")


def wait_for_nodes(address: str, environment: dict[str, str], n_nodes: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        nodes = ask(address, environment, "/nodes?view=summary")["data"]["summary"]
        if sum(node["raylet"].get("state") == "ALIVE" for node in nodes) == n_nodes:
            return
        time.sleep(0.5)
    pytest.fail(f"{n_nodes} nodes do not come up")
