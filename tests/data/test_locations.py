import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distributed_rerank.data import locations
from distributed_rerank.errors import BadInput

OBJECTS = {"/bucket/shop/a%20b.png": b"picture", "/bucket/shop/df.csv": b"path\na b.png\n"}


class _Bucket(BaseHTTPRequestHandler):
    """Enough of S3 to read objects: HEAD and GET, with ranges."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        content = OBJECTS.get(self.path.partition("?")[0])
        body = content or b""
        asked = self.headers.get("Range")
        if content is not None and asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            body = content[int(start) : int(end) + 1 if end else None]
        self.send_response(404 if content is None else 206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("x-amz-bucket-region", "us-east-1")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    locations._arrow_filesystem.cache_clear()
    yield
    locations._arrow_filesystem.cache_clear()
    server.shutdown()
    server.server_close()


def test_s3_objects_are_read_by_pyarrow_even_with_spaces_in_their_names(s3: None) -> None:
    table = "s3://bucket/shop/df.csv"
    assert locations.read_bytes(table) == OBJECTS["/bucket/shop/df.csv"]
    assert locations.read_bytes(locations.join(locations.folder_of(table), "a b.png")) == b"picture"
    with pytest.raises(FileNotFoundError):
        locations.read_bytes("s3://bucket/shop/absent.png")


def test_store_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(locations.time, "sleep", pauses.append)
    answers: list[Exception | bytes] = [
        OSError("When reading: AWS Error SLOW_DOWN during GetObject"),
        TimeoutError("read timed out"),
        b"picture",
    ]

    def read() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert locations.read_with_patience(read, "s3://bucket/a.png") == b"picture"
    assert pauses == list(locations.PAUSES_S)


def test_store_that_stays_away_is_told_apart_from_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(locations.time, "sleep", pauses.append)
    monkeypatch.setattr(locations, "_FAILED", set())
    tries: list[str] = []

    def fail(error: Exception) -> bytes:
        tries.append(str(error))
        raise error

    for error in (FileNotFoundError("x"), PermissionError("x"), OSError("AWS Error ACCESS_DENIED"), ValueError("x")):
        with pytest.raises(type(error)):
            locations.read_with_patience(lambda error=error: fail(error), "s3://bucket/a.png")
    assert (len(tries), pauses) == (4, [])
    away = OSError("AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7, Couldn't connect to server")
    with pytest.raises(locations.StoreUnreachable, match="curlCode"):
        locations.read_with_patience(lambda: fail(away), "s3://bucket/a.png")
    assert pauses == list(locations.PAUSES_S)
    with pytest.raises(locations.StoreUnreachable):
        locations.read_with_patience(lambda: fail(away), "s3://bucket/b.png")
    assert len(pauses) == len(locations.PAUSES_S), "the next images of a store that is away cost one try each"


def test_join_and_folder_keep_what_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locations.folder_of("df.csv") == str(tmp_path)
    assert locations.folder_of("/df.csv") == ""
    assert locations.folder_of("s3://bucket/df.csv") == "s3://bucket"
    assert locations.join("s3://bucket", "a/b.jpg") == "s3://bucket/a/b.jpg"
    assert locations.join("", "a.jpg") == "/a.jpg"
    for path in ("/a.jpg", "gs://other/a.jpg"):
        assert locations.join("s3://bucket", path) == path


def test_scheme_without_a_driver_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cannot open scheme 'nosuch'"):
        locations.read_bytes("nosuch://x/y", locations.SCHEMES | {"nosuch"})
    with pytest.raises(BadInput, match="scheme 'https' is not allowed"):
        locations.read_bytes("HTTPS://x/y")
