"""`serve` on Ray Serve: the answers of `Reranker`, and none lost with a replica that is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import grpc
import pytest
from online.examples import N_IMAGES, save_example, write_photos
from serving import replicas_of, serving

from distributed_rerank import Reranker

pytest.importorskip("fastapi", reason="Ray Serve is absent: pip install 'distributed-rerank[serve]'")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
IDS = [f"id {n:02d}" for n in (40, 3, 12, 7, 22, 9, 18, 30, 26, 11, 35)]
N_KILLS, N_THREADS = 6, 6


def ports_of(pid: int) -> set[int]:
    """The TCP ports that a process listens on."""
    sockets = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in sockets}


def refusals(port: int) -> set[str]:
    """How a port answers Serve's calls without Ray's token."""
    found = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("HandleRequest", "HandleRequestWithRejection"):
            call = channel.unary_unary(f"/ray.serve.ASGIService/{method}")
            try:
                call(b"", timeout=10)
            except grpc.RpcError as error:
                found.add(error.code().name)  # pyright: ignore
            else:
                found.add("answered")
    return found


def test_killed_replica_loses_no_request_and_the_answers_stay_right(tmp_path: Path) -> None:
    """Kills until one hit a replica that was computing; every request of every thread is answered, and right."""
    model, photos = save_example("token", tmp_path / "model"), write_photos(tmp_path / "photos")
    reranker = Reranker.from_pretrained(model)
    reranker.add([f"id {n:02d}" for n in range(N_IMAGES)], [photos.parent / f"{n}.png" for n in range(N_IMAGES)])
    expected = [reranker.rank(photos.parent / f"{n}.png", IDS, top_k=None) for n in range(5)]
    words = [str(model), "--catalogue", str(photos), "--cache", str(tmp_path / "cache"), "--num-workers", "2"]
    with serving(tmp_path, *words) as service:
        assert service.ask(b"", path="/health", method="GET") == (200, {"status": "ok", "replicas": 2})
        status, refused = service.ask({"query": "nobody", "documents": IDS})
        assert (status, refused["message"].splitlines()) == (400, [refused["message"]])
        first = replicas_of(service.process.pid)
        assert len(first) == 2
        answers = {port: refusals(port) for port in ports_of(first[0])}
        assert any("UNAUTHENTICATED" in found for found in answers.values()), answers
        assert all(found <= {"UNAUTHENTICATED", "UNIMPLEMENTED"} for found in answers.values()), answers
        done, wrong, is_over = [0] * N_THREADS, [], threading.Event()

        def ask(thread: int) -> None:
            while not is_over.is_set():
                n = done[thread] % 5
                status, found = service.ask({"query": f"id {n:02d}", "documents": IDS})
                same = status == 200 and [
                    (IDS[row["index"]], row["relevance_score"], row["distance"]) for row in found["results"]
                ] == [(match.id, match.probability or 0, match.distance) for match in expected[n]]
                if not same:
                    wrong.append((status, found))
                done[thread] += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for _ in range(N_KILLS):
            before, deadline = sum(done), time.monotonic() + 60
            while sum(done) < before + 40 and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(replicas_of(service.process.pid)[0], signal.SIGKILL)
            time.sleep(1)
            if "a replica died under a request" in service.log.read_text():
                break
        before, deadline = sum(done), time.monotonic() + 60
        while sum(done) < before + 40 and time.monotonic() < deadline:
            time.sleep(0.05)
        is_over.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert min(done) > 5
        assert "a replica died under a request" in service.log.read_text(), "no kill hit a request"
        assert service.stop() == 0
        assert "Traceback" not in service.log.read_text()
    assert len(Reranker.from_pretrained(model, cache=tmp_path / "cache")) == N_IMAGES - 2
