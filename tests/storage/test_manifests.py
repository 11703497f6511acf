"""Every changed byte of a finished folder is found, cheaply where nothing was touched."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.data.embeddings import read_embeddings
from distributed_rerank.errors import BadInput
from distributed_rerank.storage import files, manifests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and a folder inside that is finished as well, older than a tick of the file system's clock."""
    inner = tmp_path / "out" / "inner"
    inner.mkdir(parents=True)
    (inner / "rows.bin").write_bytes(b"rows" * 100)
    time.sleep(0.02)
    manifests.write_manifest(inner, {"fingerprint": {"stage": "inner"}})
    (tmp_path / "out" / "metrics.json").write_text('{"map": 0.5}\n')
    (tmp_path / "out" / "report.html").write_text("<p>words</p>\n")
    time.sleep(0.02)
    manifests.write_manifest(tmp_path / "out", {"fingerprint": {"stage": "outer", "sizes": (1, 2)}, "rows": 3})
    return tmp_path / "out"


def _count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []

    def spy(paths: list[Path]) -> list[str]:
        hashed.extend(paths)
        return files.file_digests(paths)

    monkeypatch.setattr(manifests, "file_digests", spy)
    return hashed


def test_manifest_has_digests_sizes_and_versions_of_everything_else(folder: Path) -> None:
    manifest = manifests.read_manifest(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == files.bytes_digest((folder / name).read_bytes())
        assert entry["size"] == (folder / name).stat().st_size
    assert manifest["fingerprint"] == {"stage": "outer", "sizes": [1, 2]}
    import timm
    import torch

    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["versions"]["timm"] == timm.__version__


def test_every_flipped_bit_position_of_every_file_is_found(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(flipped))
            with pytest.raises(BadInput, match=path.name) as found:
                manifests.check_folder(folder)
            assert str(path) in str(found.value)
            assert "\n" not in str(found.value)
        path.write_bytes(whole)
    manifests.check_folder(folder, full=True)


def test_second_look_hashes_only_what_was_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = _count_hashes(monkeypatch)
    manifests.check_folder(folder)
    assert hashed == []
    os.utime(folder / "metrics.json")
    manifests.check_folder(folder)
    assert hashed == [folder / "metrics.json"]
    manifests.check_folder(folder, full=True)
    assert len(hashed) == 1 + len(manifests.read_manifest(folder)["files"])


def test_edit_that_restores_size_and_times_is_found(folder: Path) -> None:
    path = folder / "metrics.json"
    before = path.stat()
    path.write_text('{"map": 0.9}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(BadInput, match=r"metrics\.json has changed"):
        manifests.check_folder(folder)


def test_copies_are_intact_and_their_damage_is_found(folder: Path, tmp_path: Path) -> None:
    for copy in (shutil.copy, shutil.copy2):
        shutil.copytree(folder, tmp_path / copy.__name__, copy_function=copy)
        manifests.check_folder(tmp_path / copy.__name__)
    rows = folder / "inner" / "rows.bin"
    rows.write_bytes(b"Rows" + rows.read_bytes()[4:])
    for copy in (shutil.copy, shutil.copy2):
        shutil.copytree(folder, tmp_path / f"{copy.__name__} damaged", copy_function=copy)
        with pytest.raises(BadInput, match=r"rows\.bin has changed"):
            manifests.check_folder(tmp_path / f"{copy.__name__} damaged")


@pytest.mark.parametrize("name", ["metrics.json", "inner/rows.bin", "inner/manifest.json"])
def test_missing_and_shorter_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(
        BadInput, match=rf"{Path(name).name} has \d+ bytes, \d+ were written; restore it, or .*--overwrite"
    ):
        manifests.check_folder(folder)
    (folder / name).unlink()
    with pytest.raises(BadInput, match=f"{Path(name).name} is gone"):
        manifests.check_folder(folder)


def test_table_that_another_program_has_rewritten_is_read_once_its_manifest_is_gone(tmp_path: Path) -> None:
    def write(vector: list[float]) -> None:
        table = {"id": ["a"], "embedding": pa.array([vector], pa.list_(pa.float32(), 2))}
        pq.write_table(pa.table(table), tmp_path / "embeddings.parquet")

    write([1.0, 0.0])
    time.sleep(0.02)
    manifests.write_manifest(tmp_path, {"fingerprint": {"stage": "embed"}})
    write([0.0, 1.0])
    with pytest.raises(BadInput, match=r"or delete manifest\.json beside it where the change is yours"):
        read_embeddings(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert read_embeddings(tmp_path).matrix.tolist() == [[0.0, 1.0]]


def test_files_without_a_manifest_or_beside_another_programs_are_not_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    manifests.check_paths([tmp_path / "a.txt"])
    (tmp_path / "manifest.json").write_text('{"name": "an app", "files": {"a.txt": 1}}')
    manifests.check_paths([tmp_path / "a.txt"])
    with pytest.raises(BadInput, match="not an output of this tool"):
        manifests.read_manifest(tmp_path)
    manifests.check_paths([Path("no folder.txt")])


def test_rewriting_gives_the_file_its_new_digest_and_refuses_a_damaged_folder(folder: Path) -> None:
    with manifests.rewriting(folder / "report.html"):
        (folder / "report.html").write_text("<p>words and a plot</p>\n")
    manifests.check_folder(folder, full=True)
    (folder / "metrics.json").write_text('{"map": 0.9}\n')
    with pytest.raises(BadInput, match=r"metrics\.json"), manifests.rewriting(folder / "report.html"):
        pytest.fail("a damaged folder is not signed anew")


def test_rewriting_interrupted_leaves_no_wrong_digest(folder: Path) -> None:
    def interrupted() -> None:
        with manifests.rewriting(folder / "report.html"):
            (folder / "report.html").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    manifests.check_folder(folder, full=True)
    with manifests.rewriting(folder / "report.html"):
        (folder / "report.html").write_text("whole")
    assert "report.html" in json.loads((folder / "manifest.json").read_text())["files"]


def test_digests_of_a_folder_inside_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.bin").write_bytes(b"a")
    (inner / "b.bin").write_bytes(b"b")
    time.sleep(0.02)
    manifests.write_manifest(inner, {"fingerprint": {}})
    (inner / "b.bin").write_bytes(b"c")
    hashed = _count_hashes(monkeypatch)
    manifests.write_manifest(tmp_path, {"fingerprint": {}})
    assert set(hashed) == {inner / "b.bin", inner / "manifest.json"}
    entries = manifests.read_manifest(tmp_path)["files"]
    assert entries["inner/a.bin"]["sha256"] == files.bytes_digest(b"a")
    assert entries["inner/b.bin"]["sha256"] == files.bytes_digest(b"c")
