"""Folders in a bucket: never half there, checked when fetched, continued on another machine, one writer at a time."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from s3_server import Server

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import artifacts, leases, object_store, remote_folders
from distributed_rerank.storage.leases import Lease
from distributed_rerank.storage.remote_folders import RemoteFolder, fetch

PRINT = artifacts.make_fingerprint("embed", config=1)


def finish(folder: Path, content: str, fingerprint: dict = PRINT, overwrite: bool = False) -> None:
    with artifacts.stage(folder, fingerprint, overwrite) as staging:
        (staging.path / "part").mkdir(exist_ok=True)
        (staging.path / "part" / "a.txt").write_text(content)
        (staging.path / "b.txt").write_text("b")
        staging.finish()


def test_finished_folder_is_published_with_its_manifest_last_and_fetched_once(s3: Server, tmp_path: Path) -> None:
    uri = f"{s3.bucket}/deep/results"
    with RemoteFolder(uri, tmp_path / "one" / "results") as remote:
        finish(remote.folder, "content")
        (remote.folder / "comparison.json").write_text("{}")
    puts = [path for method, path in s3.requests() if method == "PUT" and "/results/" in path]
    assert puts[-1].endswith("/results/manifest.json")
    assert set(object_store.sizes(f"{s3.bucket}/deep")) == {
        f"results/{name}" for name in ("part/a.txt", "b.txt", "manifest.json", "comparison.json")
    }, "neither lock nor unfinished work is left"
    found = fetch(uri, tmp_path / "copy")
    assert (found / "part" / "a.txt").read_text() == "content"
    s3.requests()
    fetch(uri, tmp_path / "copy")
    assert s3.requests() == [("GET", f"/{uri.removeprefix('s3://')}/manifest.json")], "what is there is not read again"


def test_other_bytes_than_were_written_and_a_place_without_anything_are_refused(s3: Server, tmp_path: Path) -> None:
    with RemoteFolder(f"{s3.bucket}/results", tmp_path / "results") as remote:
        finish(remote.folder, "content")
    object_store.write(f"{s3.bucket}/results/part/a.txt", b"contemt")
    with pytest.raises(BadInput, match=r"results/part/a.txt has changed since it was written \(sha256"):
        fetch(f"{s3.bucket}/results", tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists(), "a copy that is not whole is no finished folder"
    object_store.write(f"{s3.bucket}/results/b.txt", b"B")
    with pytest.raises(BadInput, match=r"b.txt has changed"):
        fetch(f"{s3.bucket}/results/b.txt", tmp_path / "b.txt")
    with pytest.raises(BadInput, match="absent does not exist"):
        fetch(f"{s3.bucket}/absent", tmp_path / "absent")
    with pytest.raises(BadInput, match="is a whole bucket; name a folder in it"):
        RemoteFolder(s3.bucket, tmp_path / "x")


def test_folder_without_manifest_and_single_object_are_fetched(s3: Server, tmp_path: Path) -> None:
    for name in ("parts/1.parquet", "parts/2.parquet", "list.csv"):
        object_store.write(f"{s3.bucket}/{name}", name.encode())
    parts = fetch(f"{s3.bucket}/parts", tmp_path / "parts")
    assert sorted(path.name for path in parts.iterdir()) == ["1.parquet", "2.parquet"]
    assert fetch(f"{s3.bucket}/list.csv", tmp_path / "list.csv").read_text() == "list.csv"


def test_reader_meets_no_half_folder_while_another_result_replaces_it(s3: Server, tmp_path: Path) -> None:
    uri, other = f"{s3.bucket}/results", artifacts.make_fingerprint("embed", config=2)
    with RemoteFolder(uri, tmp_path / "results") as remote:
        finish(remote.folder, "old")
    met: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            try:
                found = fetch(uri, tmp_path / "reader")
            except BadInput:
                met.add("none")
            else:
                if (found / "manifest.json").is_file():
                    met.add((found / "part" / "a.txt").read_text() + (found / "b.txt").read_text())

    reader = threading.Thread(target=look)
    reader.start()
    s3.faults(latency_s=0.02)
    with RemoteFolder(uri, tmp_path / "results") as remote:
        finish(remote.folder, "new", other, overwrite=True)
    time.sleep(0.3)
    is_over.set()
    reader.join()
    assert "newb" in met
    assert met <= {"oldb", "newb", "none"}


def test_unfinished_work_goes_on_on_another_machine(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folders, "PUSH_SECONDS", 0.1)
    uri = f"{s3.bucket}/results"
    with pytest.raises(KeyboardInterrupt):
        interrupted(uri, tmp_path / "one" / "results")
    assert object_store.sizes(f"{s3.bucket}/results") == {}
    assert not any("tmp" in name for name in object_store.sizes(f"{s3.bucket}/.results.unfinished"))
    with RemoteFolder(uri, tmp_path / "two" / "results") as remote:
        with artifacts.stage(remote.folder, PRINT) as staging:
            store = staging.blocks("blocks")
            assert store.done() == {0, 1, 2, 3}
            assert [number for table in store.tables() for number in table["x"].to_pylist()] == [0, 1, 2, 3]
            staging.finish()
    assert {*object_store.sizes(s3.bucket)} == {"results/manifest.json"}
    # The first machine's own copy is older than the bucket's and counts no more.
    with RemoteFolder(uri, tmp_path / "one" / "results") as remote:
        assert not list((tmp_path / "one").glob(".results.*/blocks"))
        manifest = json.loads((remote.folder / "manifest.json").read_text())
        assert manifest["blocks"] == {"computed": 0, "reused": 4}


def test_results_deleted_from_the_bucket_are_gone_here_too(s3: Server, tmp_path: Path) -> None:
    uri, folder = f"{s3.bucket}/results", tmp_path / "results"
    with RemoteFolder(uri, folder) as remote:
        finish(remote.folder, "x")
    object_store.delete(uri, list(object_store.sizes(uri)))
    with RemoteFolder(uri, folder):
        assert not folder.exists()


def test_second_writer_is_refused_while_the_first_lives_and_takes_over_once_it_is_dead(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 1.0)
    monkeypatch.setattr(leases, "_LOOK_S", 0.1)
    monkeypatch.setattr(remote_folders, "PUSH_SECONDS", 0.2)
    uri = f"{s3.bucket}/results"
    with RemoteFolder(uri, tmp_path / "one" / "results"):
        with pytest.raises(BadInput, match=r"results is in use by process \d+ on .*; wait for it or choose another"):
            RemoteFolder(uri, tmp_path / "two" / "results").__enter__()
    dead = Lease(f"{s3.bucket}/.results.lock", uri)
    dead.take()
    with RemoteFolder(uri, tmp_path / "two" / "results") as remote:
        with pytest.raises(BadInput, match="was taken over by"):
            dead.renew()
        finish(remote.folder, "x")
    assert "results/manifest.json" in object_store.sizes(s3.bucket)


def test_outage_during_work_is_outlasted_and_a_refusal_names_the_bucket(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folders, "PUSH_SECONDS", 0.1)
    with RemoteFolder(f"{s3.bucket}/results", tmp_path / "results") as remote:
        s3.faults(status=503, times=6)
        finish(remote.folder, "x")
        time.sleep(0.5)
    shutil.rmtree(tmp_path / "results")
    assert (fetch(f"{s3.bucket}/results", tmp_path / "results") / "part" / "a.txt").read_text() == "x"
    s3.faults(status=403, times=1000)
    with pytest.raises(BadInput, match=rf"{s3.bucket}/.*: the store refuses access \(403"):
        RemoteFolder(f"{s3.bucket}/results", tmp_path / "results").__enter__()


def interrupted(uri: str, folder: Path) -> None:
    """Four blocks; three of them and an unfinished file were there when the work was copied the last time but one."""
    with RemoteFolder(uri, folder), artifacts.stage(folder, PRINT) as staging:
        store = staging.blocks("blocks")
        for number in range(3):
            store.write(number, artifacts.pa.table({"x": [number]}))
        (staging.path / "half.tmp").write_text("no")
        wait_for(lambda: len(object_store.sizes(f"{uri.rpartition('/')[0]}/.results.unfinished")) >= 4)
        store.write(3, artifacts.pa.table({"x": [3]}))
        raise KeyboardInterrupt


def wait_for(is_so: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():  # pyright: ignore
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
