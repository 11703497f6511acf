"""A Ray of two nodes on this machine, of which one can be drained or killed."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _measuring import ROOT, descendants

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SECOND = "import json, ray; ray.init(logging_level=40); print(json.dumps(ray.nodes()))"
HEAD_RESOURCE = "node:__internal_head__"


@dataclass(frozen=True)
class Nodes:
    """The cluster, and its second node."""

    environment: dict[str, str]
    """What a job needs to join it."""
    second: subprocess.Popen[bytes]

    def pids_of_second(self) -> list[int]:
        """All processes of the second node."""
        return [self.second.pid, *descendants(self.second.pid)]

    def drain(self, deadline_s: int) -> None:
        """Say that the second node goes away, as a cloud says it of a spot machine; then it does."""
        nodes = json.loads(self._ask([sys.executable, "-c", SECOND]).strip().splitlines()[-1])
        (node,) = [one["NodeID"] for one in nodes if one["Alive"] and HEAD_RESOURCE not in one["Resources"]]
        words = ["drain-node", "--address", self.environment["RAY_ADDRESS"], "--node-id", node, "--reason"]
        words += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        self._ask([*RAY, *words, "--deadline-remaining-seconds", str(deadline_s)])
        time.sleep(deadline_s)
        self.kill()

    def kill(self) -> None:
        """kill -9 of the raylet, and of all that it started, as when a machine loses its power."""
        kill(self.pids_of_second())

    def _ask(self, words: list[str]) -> str:
        environment = os.environ | self.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


@contextmanager
def two_nodes(cpus: int = 3) -> Iterator[Nodes]:
    """A head and a second node with so many CPUs each; both end with the block."""
    # Ray's socket paths must stay short.
    folder = Path(tempfile.mkdtemp(prefix="chaos-ray-", dir="/tmp"))
    port, agent, other_agent, dashboard = _free_ports(4)
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    common = ["--block", f"--num-cpus={cpus}", "--object-store-memory=150000000", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    head += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-port={dashboard}"]
    other = [f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={other_agent}"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        nodes.append(_start([*head, *common], own))
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert nodes[0].poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "ray start does not answer"
            time.sleep(0.2)
        nodes.append(_start([*other, *common], own))
        cluster = Nodes(own, nodes[1])
        while len(json.loads(cluster._ask([sys.executable, "-c", SECOND]).strip().splitlines()[-1])) < 2:
            assert time.monotonic() < deadline, "the second node does not come up"
        yield cluster
    finally:
        kill([pid for node in nodes for pid in (node.pid, *descendants(node.pid))])
        for node in nodes:
            node.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def kill(pids: list[int]) -> None:
    """kill -9 of those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    joined = own | {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*RAY, "start", *words], env=joined, stdin=quiet, stdout=quiet, stderr=quiet)


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
