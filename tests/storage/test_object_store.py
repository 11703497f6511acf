"""Objects of a real S3 server, with its faults."""

from pathlib import Path

import pytest
from s3_server import Server

from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.storage import object_store
from distributed_rerank.storage.object_store import Conflict, delete, read, read_tagged, sizes, write

NAMES = ["a b.png", "ü/ß.jpg", "100%.txt", "what?x=1#y", "a+b&c=d.csv", "deep/er/est", "~tilde", "a:b"]


def test_every_name_comes_back_as_it_was_written(s3: Server) -> None:
    for number, name in enumerate(NAMES):
        write(f"{s3.bucket}/folder/{name}", bytes([number]) * number)
    assert sizes(f"{s3.bucket}/folder") == {name: number for number, name in enumerate(NAMES)}
    assert sizes(f"{s3.bucket}/fold") == {}, "a folder is no prefix"
    for number, name in enumerate(NAMES):
        assert read(f"{s3.bucket}/folder/{name}") == bytes([number]) * number
    delete(f"{s3.bucket}/folder", [*NAMES[1:], "absent"])
    assert sizes(s3.bucket) == {f"folder/{NAMES[0]}": 0}


def test_a_read_is_one_request(s3: Server) -> None:
    write(f"{s3.bucket}/a.jpg", b"content")
    s3.requests()
    assert read(f"{s3.bucket}/a.jpg") == b"content"
    assert [method for method, _ in s3.requests()] == ["GET"]


def test_more_than_a_thousand_objects_are_listed(s3: Server, tmp_path: Path) -> None:
    for number in range(1100):
        write(f"{s3.bucket}/many/{number}", b"")
    assert set(sizes(f"{s3.bucket}/many")) == {str(number) for number in range(1100)}


def test_large_file_is_written_whole(s3: Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * 100_000
    (tmp_path / "large").write_bytes(content)
    write(f"{s3.bucket}/large", tmp_path / "large")
    assert read(f"{s3.bucket}/large") == content


def test_conditional_writes_let_one_writer_through(s3: Server) -> None:
    place = f"{s3.bucket}/history"
    write(place, b"first", replaces=None)
    with pytest.raises(Conflict):
        write(place, b"late", replaces=None)
    content, tag = read_tagged(place)
    assert content == b"first"
    write(place, b"second", replaces=tag)
    with pytest.raises(Conflict):
        write(place, b"third", replaces=tag)
    assert read(place) == b"second"


@pytest.mark.parametrize("fault", [{"status": 503, "times": 3}, {"abort": True, "times": 2}])
def test_short_outage_is_outlasted(s3: Server, fault: dict[str, object]) -> None:
    write(f"{s3.bucket}/a", b"0123456789" * 10_000)
    s3.faults(**fault)
    assert read(f"{s3.bucket}/a") == b"0123456789" * 10_000
    assert len(s3.requests()) == 1 + int(str(fault["times"])) + 1


def test_long_outage_refusal_and_absence_are_told_apart(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{s3.bucket}/a", b"1")
    monkeypatch.setitem(object_store._RETRIES, "max_retries", 1)
    object_store._store.cache_clear()
    s3.faults(status=503, times=100)
    with pytest.raises(Outage, match=r"does not answer .*503.*; the same command goes on later"):
        read(f"{s3.bucket}/a")
    s3.faults(status=403, times=1)
    with pytest.raises(PermissionError, match=r"s3://bucket-.*/a: the store refuses access \(403 .*; check keys, role"):
        read(f"{s3.bucket}/a")
    s3.faults()
    with pytest.raises(FileNotFoundError, match="/b does not exist"):
        read(f"{s3.bucket}/b")
    object_store._store.cache_clear()


@pytest.mark.parametrize("uri", ["s3://b?endpoint_override=127.0.0.1:9&scheme=http/x", "s3://", "/local", "s3://@/x"])
def test_what_is_no_bucket_is_asked_for_nowhere(uri: str) -> None:
    with pytest.raises(BadInput, match="no URI of a bucket"):
        read(uri)
