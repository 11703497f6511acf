"""Reading ahead of decoding: order, rejects, as many requests under way as the storage is slow."""

import time
from pathlib import Path

import pytest
import torch
from s3_server import Server, put_folder
from small_catalogue import make_catalogue

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode, read_ahead
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import Outage
from distributed_rerank.storage import object_store

TRANSFORM = InferenceTransform(size=(32, 32))


@pytest.fixture
def refs(s3: Server, tmp_path: Path) -> list[ImageRef]:
    """64 images in a bucket, of which number 5 is no picture."""
    catalogue = make_catalogue(tmp_path / "photos", 64, broken=(5,))
    put_folder(tmp_path / "photos", f"{s3.bucket}/photos")
    s3.requests()
    names = [Path(ref.path).name for ref in catalogue.images()]
    return [ImageRef(str(number), f"{s3.bucket}/photos/{name}", None) for number, name in enumerate(names)]


def test_block_from_a_bucket_is_that_from_disk_by_one_request_an_image(
    s3: Server, refs: list[ImageRef], tmp_path: Path
) -> None:
    local = [ImageRef(ref.id, str(tmp_path / "photos" / Path(ref.path).name), None) for ref in refs]
    expected = decode(local, TRANSFORM)
    for threads in (1, 3):
        s3.faults(latency_s=0.002 * threads)
        found = decode(refs, TRANSFORM, threads=threads)
        assert found.kept == expected.kept == [number for number in range(64) if number != 5]
        assert torch.equal(found.pixels, expected.pixels)
        assert [reject.id for reject in found.rejects] == ["5"]
        assert sorted(s3.requests()) == sorted(("GET", "/" + ref.path.partition("://")[2]) for ref in refs)


def test_slow_storage_is_asked_for_many_files_at_a_time(s3: Server, refs: list[ImageRef]) -> None:
    s3.faults(latency_s=0.1)
    began = time.monotonic()
    contents = list(read_ahead(refs))
    assert time.monotonic() - began < 64 * 0.1 / 3, "1 + 2 + 4 + 8 + 16 + 32 requests at a time: six waits and a bit"
    assert len(contents) == 64


def test_image_refused_is_a_reject_and_a_store_that_is_out_stops_the_block(
    s3: Server, refs: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.faults(status=403, times=1, only="picture_007")
    (broken, refused) = decode(refs, TRANSFORM).rejects
    assert (broken.id, refused.id) == ("5", "7")
    assert "the store refuses access (403" in refused.reason
    monkeypatch.setitem(object_store._RETRIES, "max_retries", 1)
    object_store._store.cache_clear()
    s3.faults(status=503, times=10_000)
    with pytest.raises(Outage):
        decode(refs, TRANSFORM)
    object_store._store.cache_clear()
