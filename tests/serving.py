"""A `serve` of its own for tests: started as a process, asked over HTTP, ended by a signal."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN = "a token of the tests".replace(" ", "-")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Service:
    """A running service."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def ask(
        self, body: Any, *, path: str = "/rerank", method: str = "POST", seconds: float = 60, **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON of one request; bytes are sent as they are, an iterator in chunks, all else as JSON."""
        sent = body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            standard = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
            connection.request(method, path, sent, standard | named, encode_chunked=hasattr(body, "__next__"))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def stop(self, number: int = signal.SIGINT) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(
    folder: Path, *words: str, token: str | None = TOKEN, environment: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """`distributed-rerank serve` with these words, on a free port, once /health is good."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    variables.pop("DISTRIBUTED_RERANK_TOKEN", None)
    if token is not None:
        variables["DISTRIBUTED_RERANK_TOKEN"] = token
    log = folder / "serve.log"
    command = [sys.executable, "-m", "distributed_rerank", "serve", *words, "--port", "0"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=file, stdout=file, text=True)
    try:
        deadline = time.monotonic() + 150
        while not (found := re.search(r"serving http://[^ ]+:(\d+)/rerank", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Service(process, int(found[1]), log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def replicas_of(pid: int) -> list[int]:
    """The processes of Serve's replicas among all that `pid` has started."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue

    def is_below(number: int) -> bool:
        while number in parents and number != pid:
            number = parents[number]
        return number == pid

    return [number for number, name in names.items() if b"ServeReplica:" in name and is_below(number)]
