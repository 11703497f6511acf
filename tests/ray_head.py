"""A Ray head as `ray start` makes it, with a dashboard and a token, for jobs that are submitted."""

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
def started_head(n_others: int = 0, home: Path | None = None, **environment: str) -> Iterator[Head]:
    """A Ray head with a dashboard, own ports, own folder, own token; ended by its process group.

    It declares 4 CPUs, or none where there are other nodes, as cluster.yaml's does; each of those declares 1. Every
    node has a folder of its own for Ray and, within `home`, one for its user, in which jobs begin.
    """
    # pytest's own temporary folder is too long for Ray's socket paths
    folder = Path(tempfile.mkdtemp(prefix="rerank-test-", dir="/tmp"))
    port, dashboard, client = free_ports(3)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own | environment
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    words = [[*head, f"--num-cpus={0 if n_others else 4}"]]
    words += [[f"--address=127.0.0.1:{port}", "--num-cpus=1"] for _ in range(n_others)]
    address, nodes = f"http://127.0.0.1:{dashboard}", []
    try:
        for number, own_words in enumerate(words):
            own_home = None if home is None else home / str(number)
            nodes.append(_start_node(own_words, folder / str(number), base, own_home))
            if number in (0, n_others):  # the others come up at the same time
                wait_for_nodes(address, own, nodes, folder)
        yield Head(address, own)
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start_node(
    words: list[str], folder: Path, environment: dict[str, str], home: Path | None
) -> subprocess.Popen[bytes]:
    folder.mkdir()
    if home is not None:
        home.mkdir(parents=True)
        environment = environment | {"HOME": str(home)}
    agent, grpc = free_ports(2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words, f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    with open(folder / "start.log", "wb") as log:
        return subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)


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


def wait_for_nodes(
    address: str, environment: dict[str, str], nodes: list[subprocess.Popen[bytes]], folder: Path
) -> None:
    """Until the dashboard takes jobs and knows so many nodes; what Ray has said is shown if they do not come up."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and all(node.poll() is None for node in nodes):
        try:
            ask(address, environment, "/api/jobs/")
            known = ask(address, environment, "/api/v0/nodes")["data"]["result"]["result"]
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            known = []
        if sum(node["state"] == "ALIVE" for node in known) == len(nodes):
            return
        time.sleep(0.5)
    said = "".join(log.read_text()[-1000:] for log in sorted(folder.glob("*/start.log")))
    pytest.fail(f"{len(nodes)} nodes do not come up:\n{said}")
