"""`serve` in one process: the answers of `Reranker`, and every request that must be refused."""

import asyncio
import base64
import gzip
import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from online.examples import N_IMAGES, save_example, write_photos
from PIL import Image
from serving import ROOT, TOKEN, Service, serving

from distributed_rerank import Reranker
from distributed_rerank.config.serving import ServeConfig
from distributed_rerank.errors import BadInput
from distributed_rerank.jobs.serve import _listen
from distributed_rerank.online.front import Backend, Front, _is_this_machine

IDS = [f"id {n:02d}" for n in (40, 3, 12, 31, 7, 22, 9, 18, 30, 26, 11, 35)]
"""id 31 cannot be read; more than the chain's top_n."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_example("token", tmp_path_factory.mktemp("token"))


@pytest.fixture(scope="module")
def service(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    limits = ["--max-documents", "20", "--max-body-mb", "0.5", "--max-megapixels", "1", "--timeout-s", "3"]
    words = [str(model), "--catalogue", str(photos), "--cache", str(folder / "cache"), "--num-workers", "0", *limits]
    with serving(folder, *words) as found:
        yield found


@pytest.fixture(scope="module")
def reranker(model: Path, photos: Path) -> Reranker:
    made = Reranker.from_pretrained(model)
    made.add([f"id {n:02d}" for n in range(N_IMAGES)], [photos.parent / f"{n}.png" for n in range(N_IMAGES)])
    return made


def image(photos: Path, number: int) -> str:
    return base64.b64encode((photos.parent / f"{number}.png").read_bytes()).decode()


def test_answers_are_those_of_the_reranker(service: Service, reranker: Reranker, photos: Path) -> None:
    """To the last bit, for ids and images, with distances and without, whole and cut."""
    distances = [0.5 + (place * 5 % 12) / 7 for place in range(len(IDS))]
    status, found = service.ask({"query": "id 01", "documents": IDS, "distances": distances})
    assert status == 200
    expected = reranker.rank(photos.parent / "1.png", IDS, distances, None)
    assert [IDS[row["index"]] for row in found["results"]] == [match.id for match in expected]
    assert "id 31" not in {match.id for match in expected}
    assert [row["distance"] for row in found["results"]] == [match.distance for match in expected]
    assert [row["relevance_score"] for row in found["results"]] == [match.probability or 0 for match in expected]
    scores = [row["relevance_score"] for row in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] == 0.0
    assert scores[0] > 0.0
    sent = [{"image": image(photos, int(id[3:]))} if place % 3 == 2 else id for place, id in enumerate(IDS)]
    sent[1] = {"id": IDS[1]}
    whole = {"query": f"data:image/png;base64,{image(photos, 1)}", "documents": sent, "model": "any", "top_n": 4}
    status, mixed = service.ask(whole | {"distances": distances}, path="/v1/rerank")
    assert status == 200
    assert mixed["results"] == found["results"][:4]
    status, computed = service.ask({"query": "id 01", "documents": [id for id in IDS if id != "id 31"]})
    own = reranker.rank(photos.parent / "1.png", [id for id in IDS if id != "id 31"], None, None)
    assert [row["distance"] for row in computed["results"]] == [match.distance for match in own]


def bomb(side: int) -> str:
    """A PNG of side x side pixels in a few kilobytes."""
    raw = zlib.compress(b"\0" * (side // 8 + 1) * side, 9)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", raw), (b"IEND", b"")]
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def half() -> str:
    """A PNG cut off in its middle."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return base64.b64encode(file.getvalue()[:1000]).decode()


ONE = {"query": "id 01", "documents": ["id 02"]}
REFUSED: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "wrong token": (ONE, {"Authorization": "Bearer wrong"}, 401, "right token"),
    "a part of the token": (ONE, {"Authorization": f"Bearer {TOKEN[:-1]}"}, 401, "right token"),
    "no token": (ONE, {"Authorization": ""}, 401, "right token"),
    "not JSON": (b"query=1", {}, 400, "no JSON"),
    "not UTF-8": (b'{"query": "\xff"}', {}, 400, "no JSON"),
    "deep JSON": (b"[" * 100_000, {}, 400, "no JSON"),
    "a form": (ONE, {"Content-Type": "text/plain"}, 415, "application/json"),
    "compressed": (gzip.compress(b"0" * 10**7), {"Content-Encoding": "gzip"}, 415, "not compressed"),
    "a list": ([1], {}, 400, "fields query and documents"),
    "a typo": ({**ONE, "topn": 3}, {}, 400, "no field 'topn'"),
    "no documents": ({"query": "id 01", "documents": []}, {}, 400, "at least one document"),
    "too many documents": ({"query": "id 01", "documents": ["id 02"] * 21}, {}, 400, "21 documents exceed the limit"),
    "a document twice": ({"query": "id 01", "documents": ["id 02"] * 2}, {}, 400, "comes twice"),
    "top_n of 0": ({**ONE, "top_n": 0}, {}, 400, "top_n=0"),
    "top_n of yes": ({**ONE, "top_n": True}, {}, 400, "top_n=True"),
    "a number": ({"query": 5, "documents": ["id 02"]}, {}, 400, "the query must be an id"),
    "distances of words": ({**ONE, "distances": ["near"]}, {}, 400, "list of numbers"),
    "distance NaN": ({**ONE, "distances": [float("nan")]}, {}, 400, "a distance is nan"),
    "huge distance": ({**ONE, "distances": [10**400]}, {}, 400, "too large"),
    "other distances": ({**ONE, "distances": [1, 2]}, {}, 400, "1 candidates but distances"),
    "unknown id": ({"query": "nobody", "documents": ["id 02"]}, {}, 400, "not in the cache"),
    "unreadable id": ({"query": "id 05", "documents": ["id 02"]}, {}, 400, "cannot be read"),
    "file path": ({"query": "/etc/passwd", "documents": ["id 02"]}, {}, 400, "not in the cache"),
    "file URI": ({"query": "id 01", "documents": ["file:///etc/passwd"]}, {}, 400, "not in the cache"),
    "file as image": ({"query": {"image": "../1.png"}, "documents": ["id 02"]}, {}, 400, "no base64"),
    "internal address": (
        {"query": {"image": "http://169.254.169.254/latest"}, "documents": ["id 02"]}, {}, 400, "addresses and paths"
    ),
    "loopback address": (
        {"query": "id 01", "documents": ["http://127.0.0.1:8265/api/jobs/"]}, {}, 400, "not in the cache"
    ),
    "zip bomb": ({"query": {"image": bomb(16_000)}, "documents": ["id 02"]}, {}, 400, "decompression bomb"),
    "zip bomb as document": (
        {"query": "id 01", "documents": ["id 02", {"image": bomb(2_000)}]}, {}, 400, "document 1: the photo cannot be"
    ),
    "damaged image": ({"query": {"image": half()}, "documents": ["id 02"]}, {}, 400, "damaged or truncated"),
    "no image": ({"query": {"image": "QUJD"}, "documents": ["id 02"]}, {}, 400, "not an image"),
    "large body": (b"0" * 600_000, {}, 413, "exceeds the limit of 500000 bytes"),
    "large body in chunks": (iter([b"0" * 100_000] * 20), {}, 413, "exceeds the limit"),
    "another method": (ONE, {"method": "GET"}, 405, "Method Not Allowed"),
    "another path": (ONE, {"path": "/../../etc/passwd"}, 404, "Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line_and_the_next_request_is_answered(name: str, service: Service) -> None:
    body, changed, expected, words = REFUSED[name]
    began = time.monotonic()
    try:
        status, found = service.ask(body, **changed)
    except (BrokenPipeError, ConnectionResetError):
        # The server answers while the body is still being sent, and closes.
        assert name == "large body in chunks"
        status, found = expected, {"message": words}
    assert time.monotonic() - began < 3
    assert (status, list(found)) == (expected, ["message"]), found
    assert words in found["message"]
    assert len(found["message"].splitlines()) == 1
    assert service.ask(ONE)[0] == 200


def test_slow_body_is_given_up(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as sender:
        head = (
            f"POST /rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        )
        sender.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        began = time.monotonic()
        assert sender.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert 2 < time.monotonic() - began < 10


def test_health_asked_twice_at_once_waits_for_one_answer() -> None:
    n_asked = 0

    async def count_ready() -> int:
        nonlocal n_asked
        n_asked += 1
        await asyncio.sleep(0.05)
        return 2

    async def both() -> list[int]:
        backend = Backend(lambda request: asyncio.sleep(0, []), count_ready, lambda status, seconds: None)
        front = Front(backend, ServeConfig(), None, "model")
        request = make_mocked_request("GET", "/health")
        return [answer.status for answer in await asyncio.gather(front._health(request), front._health(request))]

    assert asyncio.run(both()) == [200, 200]
    assert n_asked == 1


def test_health_needs_no_token(service: Service) -> None:
    assert service.ask(b"", path="/health", method="GET", Authorization="") == (200, {"status": "ok", "replicas": 1})


def test_interrupted_answers_what_is_under_way_and_the_cache_stays(model: Path, photos: Path, tmp_path: Path) -> None:
    """Without a token here: other host names are refused, as a web page that rebinds its name would send them."""
    words = [str(model), "--catalogue", str(photos), "--cache", str(tmp_path / "cache"), "--num-workers", "0"]
    with serving(tmp_path, *words, token=None) as service:
        assert service.ask(ONE, Host="example.org")[0] == 403
        answers: list[tuple[int, Any]] = []
        content = {"query": "id 01", "documents": [{"image": image(photos, 2)}] * 100}
        asking = threading.Thread(target=lambda: answers.append(service.ask(content)))
        asking.start()
        time.sleep(0.3)
        assert service.stop(signal.SIGTERM) == 0, service.log.read_text()
        asking.join()
        assert [status for status, _ in answers] == [200]
        assert len(answers[0][1]["results"]) == 100
        assert "Traceback" not in service.log.read_text()
    with Reranker.from_pretrained(model, cache=tmp_path / "cache") as again:
        assert len(again) == N_IMAGES - 2


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from distributed_rerank.command_line import main; sys.argv[0] = 'x'\n"
    program += environment.pop("before", "") + "main(['serve', *sys.argv[1:]])"
    return subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


def test_missing_extra_is_one_line(model: Path) -> None:
    hidden = "import importlib.util as u; real = u.find_spec\n"
    hidden += "u.find_spec = lambda name, *rest: None if name == 'fastapi' else real(name, *rest)\n"
    done = command(str(model), before=hidden)
    assert done.returncode == 2
    assert "pip install 'distributed-rerank[serve]'" in done.stderr
    assert "fastapi" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wrong_settings_are_one_line(model: Path, photos: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in {
            (str(model), "--host", "0.0.0.0"): "--host 0.0.0.0 is reached by others; give --token-file",
            (str(model), "--catalogue", str(photos)): "--catalogue and --cache go together",
            (str(model), "--catalogue", "nowhere.csv", "--cache", "c"): "nowhere.csv does not exist",
            (str(tmp_path),): "is no saved pairwise model",
            (str(model), "--port", port): f"--port {port} cannot be used",
        }.items():
            done = command(*words, "--num-workers", "0")
            assert done.returncode == 2, done.stderr
            assert message in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_listens_on_this_machine_alone() -> None:
    for config, expected in ((ServeConfig(port=0), "127.0.0.1"), (ServeConfig(host="::1", port=0), "::1")):
        with _listen(config) as listening:
            assert listening.getsockname()[0] == expected


def test_token_is_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert ServeConfig(host="0.0.0.0", token_file=file).token() == TOKEN
    assert ServeConfig(host="::1").token() is None
    monkeypatch.setenv("DISTRIBUTED_RERANK_TOKEN", "short")
    for config in (ServeConfig(), ServeConfig(token_file=tmp_path / "nowhere")):
        with pytest.raises(BadInput, match=r"needs 16 ASCII letters|cannot be read"):
            config.token()
    for host in ("localhost", "192.168.0.1.example.org"):
        monkeypatch.delenv("DISTRIBUTED_RERANK_TOKEN", raising=False)
        assert ServeConfig(host=host).is_local is (host == "localhost")
    with pytest.raises(BadInput, match="is reached by others; give --token-file"):
        ServeConfig(host="0.0.0.0").token()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1:80", True), ("localhost", True), ("[::1]:80", True), ("[::1]", True), ("127.0.0.2", True),
        ("localhost.example.org:80", False), ("127.0.0.1.example.org", False), ("", False), ("10.0.0.1:80", False),
    ],
)  # fmt: skip
def test_hosts_of_this_machine(host: str, is_local: bool) -> None:
    assert _is_this_machine(host) is is_local
