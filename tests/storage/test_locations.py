from pathlib import Path

import pytest
from s3_server import Server

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import locations, object_store, paths


def test_s3_objects_are_read_even_with_spaces_in_their_names(s3: Server) -> None:
    table = f"{s3.bucket}/shop/df.csv"
    object_store.write(table, b"path\na b.png\n")
    object_store.write(f"{s3.bucket}/shop/a b.png", b"picture")
    assert locations.read_bytes(table) == b"path\na b.png\n"
    assert locations.read_bytes(paths.join(paths.folder_of(table), "a b.png")) == b"picture"
    with pytest.raises(FileNotFoundError):
        locations.read_bytes(f"{s3.bucket}/shop/absent.png")


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
    assert paths.folder_of("df.csv") == str(tmp_path)
    assert paths.folder_of("/df.csv") == ""
    assert paths.folder_of("s3://bucket/df.csv") == "s3://bucket"
    assert paths.join("s3://bucket", "a/b.jpg") == "s3://bucket/a/b.jpg"
    assert paths.join("", "a.jpg") == "/a.jpg"
    for path in ("/a.jpg", "gs://other/a.jpg"):
        assert paths.join("s3://bucket", path) == path


def test_scheme_without_a_driver_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cannot open scheme 'nosuch'"):
        locations.read_bytes("nosuch://x/y", locations.SCHEMES | {"nosuch"})
    with pytest.raises(BadInput, match="scheme 'https' is not allowed"):
        locations.read_bytes("HTTPS://x/y")
