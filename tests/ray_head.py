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
def started_head(**environment: str) -> Iterator[Head]:
    """A Ray head with a dashboard, own ports, own folder, own token; ended by its process group."""
    # pytest's own temporary folder is too long for Ray's socket paths
    folder = Path(tempfile.mkdtemp(prefix="rerank-test-", dir="/tmp"))
    port, dashboard, agent, grpc, client = free_ports(5)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    log = open(folder / "start.log", "w", encoding="utf-8")
    process = subprocess.Popen(command, env=base | own | environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_agent(f"http://127.0.0.1:{dashboard}", own, process)
        yield Head(f"http://127.0.0.1:{dashboard}", own)
    finally:
        process.terminate()
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
