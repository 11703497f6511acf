import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.data import artifacts
from distributed_rerank.errors import BadInput

HOLD = """
import sys
from distributed_rerank.data import artifacts
staging = artifacts.stage(sys.argv[1], {"seed": 1})
store = staging.blocks("rows")
store.write(0, __import__("pyarrow").table({"x": [0]}))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def _make(folder: Path, fingerprint: dict, text: str = "result") -> None:
    with artifacts.stage(folder, fingerprint) as staging:
        (staging.path / "result.txt").write_text(text)
        staging.finish(rows=1)


def _write_unwritable(path: Path) -> None:
    with artifacts.atomic_path(path) as temporary:
        temporary.write_text("half")
        pq.write_table(pa.table({"x": pa.array([{}], pa.struct([]))}), temporary)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_stage_finished_is_complete_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not artifacts.is_complete(out, {"seed": 1})
    _make(out, {"seed": 1, "size": (2, 3)})
    assert artifacts.is_complete(out, {"size": [2, 3], "seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "result.txt"]


def test_same_work_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with artifacts.stage(tmp_path / name, artifacts.make_fingerprint("embed", seed=1)) as staging:
            staging.blocks("rows", keep=True).write(0, pa.table({"x": [1, 2]}))
            staging.finish({"notes": {"b": 1, "a": 2}}, rows=2)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    manifest = artifacts.read_manifest(tmp_path / "a")
    assert manifest["rows"] == 2
    assert manifest["blocks"] == {"computed": 1, "reused": 0}
    assert manifest["schema_version"] == artifacts.SCHEMA_VERSION
    assert {"stage": "embed", "seed": 1}.items() <= manifest["fingerprint"].items()


def test_other_fingerprint_names_first_differing_key_both_values_and_fix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, {"config": {"image_size": 160, "z": 1}, "seed": 1})
    with pytest.raises(
        BadInput, match=r"config\.image_size=160, this run has config\.image_size=224; pass --overwrite"
    ):
        artifacts.is_complete(out, {"config": {"image_size": 224, "z": 2}, "seed": 1})
    with pytest.raises(BadInput, match=r'made with model=\(absent\), this run has model="m"'):
        artifacts.is_complete(out, {"config": {"image_size": 160, "z": 1}, "seed": 1, "model": "m"})


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, {"seed": 1}, "old")
    assert not artifacts.is_complete(out, {"seed": 2}, overwrite=True)
    staging = artifacts.stage(out, {"seed": 2})
    (staging.path / "result.txt").write_text("new")
    assert (out / "result.txt").read_text() == "old"
    assert artifacts.is_complete(out, {"seed": 1})
    staging.finish()
    assert (out / "result.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_the_user_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    assert not artifacts.is_complete(tmp_path / "out", {"seed": 1}, overwrite)
    staging = artifacts.stage(tmp_path / "out", {"seed": 1})
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    with pytest.raises(BadInput, match="not an output of this tool"):
        artifacts.is_complete(tmp_path / "out", {"seed": 1}, overwrite)
    with pytest.raises(BadInput, match="not an output of this tool"):
        staging.finish()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "ten years"


def test_broken_manifest_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        artifacts.is_complete(tmp_path, {"seed": 1})


def test_kill_between_the_two_renames_is_completed_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, {"seed": 1}, "old")
    _make(tmp_path / "elsewhere", {"seed": 2}, "new")
    digest = artifacts.json_digest({"seed": 2})[:16]
    os.rename(out, tmp_path / ".out.replaced")
    os.rename(tmp_path / "elsewhere", tmp_path / f".out.{digest}")
    assert artifacts.is_complete(out, {"seed": 2})
    assert (out / "result.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_run_is_continued_by_the_same_fingerprint_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with artifacts.stage(out, {"seed": 1}) as killed:
        killed.blocks("rows").write(1, pa.table({"x": [10, 11]}))
        killed.blocks("rows").write(0, pa.table({"x": [0]}))
        (killed.path / "blocks" / "rows" / ".block-00000002.parquet.9.tmp").write_bytes(b"half")
    with artifacts.stage(out, {"seed": 2}) as other:
        assert other.blocks("rows").done() == set()
    with artifacts.stage(out, {"seed": 1}) as again:
        store = again.blocks("rows")
        assert store.done() == {0, 1}
        store.write(2, pa.table({"x": [20]}))
        assert store.table()["x"].to_pylist() == [0, 10, 11, 20]
        again.finish()
    assert artifacts.read_manifest(out)["blocks"] == {"computed": 1, "reused": 2}
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json"]
    assert other.path.is_dir()


def test_second_process_is_refused_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(BadInput, match=rf"in use by process {holder.pid} on \S+; wait") as refused:
            artifacts.stage(out, {"seed": 1})
        assert "\n" not in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        for pipe in (holder.stdin, holder.stdout):
            assert pipe is not None
            pipe.close()
    with artifacts.stage(out, {"seed": 1}) as staging:
        assert staging.blocks("rows").reused == 1


def test_atomic_path_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"b": 1, "a": [1]})
    with pytest.raises(pa.ArrowNotImplementedError):
        _write_unwritable(path)
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": [1], "b": 1}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_digests_follow_content_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert artifacts.file_digest(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()
    assert artifacts.json_digest({"a": 1, "b": [1, 2]}) == artifacts.json_digest({"b": [1, 2], "a": 1})
    assert artifacts.json_digest({"b": [1, 2]}) != artifacts.json_digest({"b": [2, 1]})
