"""An S3 server for tests: moto's, as a process of its own, with latency and faults on request.

`python s3_server.py PORT` serves it. `PUT /_faults` with JSON sets what it does from then on, `GET /_requests` tells
the methods and paths of all requests since the last time.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "no_proxy": "127.0.0.1",
}


class Server:
    """The address of a running server, and what can be asked of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.bucket = ""
        """URI of the bucket made last."""

    def faults(self, **settings: Any) -> None:
        """latency_s; status, times and only (a regular part of the path): so many requests are answered so; abort and
        times: so many bodies break off in the middle."""
        self._ask("PUT", "/_faults", json.dumps(settings).encode())

    def requests(self) -> list[tuple[str, str]]:
        return [tuple(one) for one in json.loads(self._ask("GET", "/_requests"))]

    def make_bucket(self, name: str) -> None:
        self._ask("PUT", f"/{name}")
        self.bucket = f"s3://{name}"

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, data=body, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return answer.read()


@contextmanager
def started() -> Iterator[Server]:
    """A server in a process of its own, ended with the block."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        port = any_free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, str(port)], stderr=subprocess.DEVNULL, env=dict(os.environ))
    server = Server(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the S3 server ended"
            try:
                server.requests()
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


class _Faulty:
    """A WSGI application around S3's that is slow, refuses or breaks off as it was told."""

    def __init__(self, s3: Callable[..., Iterable[bytes]]) -> None:
        self._s3, self._faults, self._seen = s3, {}, []
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/_faults":
            self._faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start_response("200 OK", [("Content-Length", "0")])
            return []
        if path == "/_requests":
            with self._lock:
                seen, self._seen = self._seen, []
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(seen).encode()]
        with self._lock:
            self._seen.append((method, path))
            is_due = self._faults.get("times", 0) > 0 and self._faults.get("only", "") in path
            self._faults["times"] = self._faults.get("times", 0) - is_due
        time.sleep(self._faults.get("latency_s", 0))
        if is_due and "status" in self._faults:
            start_response(f"{self._faults['status']} Fault", [("Content-Length", "0")])
            return []
        if is_due and self._faults.get("abort") and method == "GET":
            return self._broken_off(environ, start_response)
        return self._s3(environ, start_response)

    def _broken_off(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        body = b"".join(self._s3(environ, start_response))
        yield body[: len(body) // 2]
        raise ConnectionAbortedError("as asked")


def serve(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    application = _Faulty(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", port, application, threaded=True).serve_forever()


def put_folder(folder: Path, uri: str) -> None:
    """Copy the files of a local folder into a bucket, by the product's own client."""
    from distributed_rerank.storage import object_store

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            object_store.write(f"{uri}/{path.relative_to(folder).as_posix()}", path)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
