"""The cache: what survives a restart, a kill, damage and a small budget."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from online.examples import save_example
from small_catalogue import save_picture

from distributed_rerank import Reranker
from distributed_rerank.errors import BadInput
from distributed_rerank.online.cache import EncodingCache

IDENTITY = {"model": "m", "device": "cpu"}


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, 100, dtype=np.uint8)


def test_what_was_written_is_read_after_a_restart(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    for number in range(5):
        cache.write(f"é {number}", ("bytes", str(number)), content(number))
    cache.reject("bad", ("bytes", "x"), "file not found")
    cache.close()
    again = EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    rows, absent = again.read(["é 3", "bad", "é 0", "unknown"])
    assert absent == ["bad", "unknown"]
    np.testing.assert_array_equal(rows[[0, 2]], [content(3), content(0)])
    bad = again.entry("bad")
    assert bad is not None
    assert bad.reason == "file not found"
    assert len(again) == 5
    again.close()


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, IDENTITY, 100, 399)  # three slots
    for number in range(3):
        cache.write(str(number), ("file", str(number)), content(number))
    cache.read(["0"])
    cache.write("3", ("file", "3"), content(3))
    cache.write("0", ("file", "other"), content(7))  # in place of itself
    rows, absent = cache.read(["0", "1", "2", "3"])
    assert absent == ["1"]
    np.testing.assert_array_equal(rows[[0, 2, 3]], [content(7), content(2), content(3)])
    one = cache.entry("1")
    assert one is not None
    assert one.source == ("file", "1")
    assert (tmp_path / "encodings.bin").stat().st_size == 300
    cache.close()
    smaller = EncodingCache(tmp_path, IDENTITY, 100, 200)
    assert len(smaller) == 2
    smaller.close()


def test_a_damaged_slot_and_a_cut_index_are_no_encodings(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    for number in range(3):
        cache.write(str(number), ("file", str(number)), content(number))
    cache.close()
    with open(tmp_path / "encodings.bin", "r+b") as file:
        file.seek(130)
        byte = file.read(1)[0]
        file.seek(130)
        file.write(bytes([byte ^ 1]))
    index = (tmp_path / "ids.jsonl").read_bytes()
    (tmp_path / "ids.jsonl").write_bytes(index[:-20])
    again = EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    rows, absent = again.read(["0", "1", "2"])
    assert absent == ["1", "2"]
    np.testing.assert_array_equal(rows[0], content(0))
    again.write("1", ("file", "1"), content(1))
    assert again.read(["1"])[1] == []
    again.close()


def test_another_model_a_second_process_and_too_small_a_budget_are_refused(tmp_path: Path) -> None:
    cache = EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    with pytest.raises(BadInput, match=f"is open in process {os.getpid()} "):
        EncodingCache(tmp_path, IDENTITY, 100, 10_000)
    cache.close()
    with pytest.raises(BadInput, match="was made with device cpu, this is cuda"):
        EncodingCache(tmp_path, {"model": "m", "device": "cuda"}, 100, 10_000)
    with pytest.raises(BadInput, match="holds no two encodings"):
        EncodingCache(tmp_path / "b", IDENTITY, 100, 150)
    EncodingCache(tmp_path, IDENTITY, 100, 10_000).close()


def test_a_killed_process_leaves_a_good_cache(tmp_path: Path) -> None:
    """Killed while it writes; what the next process finds is what was written."""
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from distributed_rerank.online.cache import EncodingCache
        cache = EncodingCache(Path(sys.argv[1]), {"model": "m", "device": "cpu"}, 100, 3000)
        for number in range(10**9):
            pixels = np.random.default_rng(number).integers(0, 256, 100, dtype=np.uint8)
            cache.write(str(number), ("bytes", str(number)), pixels)
            if number == 200:
                print("ready", flush=True)
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cache = EncodingCache(tmp_path, IDENTITY, 100, 3000)
    ids = [str(number) for number in range(2000)]
    rows, absent = cache.read(ids)
    found = [id for id in ids if id not in set(absent)]
    assert 28 <= len(found) <= 30
    for id in found:
        np.testing.assert_array_equal(rows[int(id)], content(int(id)))
    cache.close()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for number in range(12):
        save_picture(tmp_path / f"{number}.png", number)
    return [tmp_path / f"{number}.png" for number in range(12)]


def test_a_second_start_encodes_nothing_and_a_changed_photo_again(photos: list[Path], tmp_path: Path) -> None:
    folder = save_example("token", tmp_path / "model")
    ids = [str(number) for number in range(12)]
    with Reranker.from_pretrained(folder, cache=tmp_path / "cache", cache_gb=0.01) as reranker:
        assert reranker.add(ids, photos) == {}
        expected = reranker.rank(photos[0], ids[1:])
    before = (tmp_path / "cache" / "ids.jsonl").read_bytes()
    with Reranker.from_pretrained(folder, cache=tmp_path / "cache", cache_gb=0.01) as reranker:
        assert reranker.add(ids, photos) == {}
        assert (tmp_path / "cache" / "ids.jsonl").read_bytes() == before
        assert reranker.rank(photos[0], ids[1:]) == expected
        save_picture(photos[4], 99)
        os.utime(photos[4], ns=(1, 1))
        reranker.add(["4"], [photos[4]])
        changed = {match.id: match.distance for match in reranker.rank(photos[0], ids[1:])}
        assert {match.id for match in expected if match.distance != changed.get(match.id)} >= {"4"}
    other = save_example("token of a ViT", tmp_path / "other")
    with pytest.raises(BadInput, match="another cache"):
        Reranker.from_pretrained(other, cache=tmp_path / "cache")


def test_what_made_room_is_encoded_again_from_its_file(photos: list[Path], tmp_path: Path) -> None:
    folder = save_example("token", tmp_path / "model")
    ids = [str(number) for number in range(12)]
    whole = Reranker.from_pretrained(folder)
    slot = whole._encoder.cache.slot_bytes
    whole.add(ids, photos)
    small = Reranker.from_pretrained(folder, cache_gb=slot * 5.5 / 10**9)
    small.add(ids, photos)
    assert len(small) == 5
    assert small.rank(photos[0], ids) == whole.rank(photos[0], ids)
    small.add(ids, [photo.read_bytes() for photo in photos])
    with pytest.raises(BadInput, match="had to make room in the cache, and it came from no file"):
        small.rank(photos[0], ids)
    photos[3].unlink()
    again = Reranker.from_pretrained(folder, cache_gb=slot * 5.5 / 10**9)
    assert again.add(ids, photos) == {"3": "file not found"}
    assert [match.id for match in again.rank(photos[0], ids, top_k=None)] == [
        match.id for match in whole.rank(photos[0], [id for id in ids if id != "3"], top_k=None)
    ]


def test_shared_by_several_it_is_read_and_what_is_added_stays_with_each(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no cache; make it with add"):
        EncodingCache(tmp_path, IDENTITY, 100, 400, shared=True)
    assert not list(tmp_path.iterdir())
    cache = EncodingCache(tmp_path, IDENTITY, 100, 400)
    for number in range(3):
        cache.write(str(number), ("bytes", str(number)), content(number))
    with pytest.raises(BadInput, match="is open in process"):
        EncodingCache(tmp_path, IDENTITY, 100, 400, shared=True)
    cache.close()
    before = {name: (tmp_path / name).read_bytes() for name in ("encodings.bin", "ids.jsonl", "cache.json")}
    one, two = (EncodingCache(tmp_path, IDENTITY, 100, 99_999, shared=True) for _ in range(2))
    for number in (3, 4):  # the second of them takes the place of another id
        one.write(str(number), ("bytes", str(number)), content(number))
    one.reject("1", ("bytes", "1"), "gone")
    rows, absent = one.read(["2", "3", "4", "1", "0"])
    assert absent == ["1", "0"]
    np.testing.assert_array_equal(rows[:3], [content(2), content(3), content(4)])
    rows, absent = two.read(["0", "1", "2", "3"])
    assert absent == ["3"]
    np.testing.assert_array_equal(rows[:3], [content(0), content(1), content(2)])
    with pytest.raises(BadInput, match="is open in"):
        EncodingCache(tmp_path, IDENTITY, 100, 400)
    one.close()
    with pytest.raises(BadInput, match="is open in"):
        EncodingCache(tmp_path, IDENTITY, 100, 400)
    two.close()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    alone = EncodingCache(tmp_path, IDENTITY, 100, 400)
    assert len(alone) == 3
    alone.close()
