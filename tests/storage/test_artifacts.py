import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import artifacts, manifests
from distributed_rerank.storage.files import atomic_path, file_digest, write_json

HOLD = """
import sys
from distributed_rerank.storage import artifacts, manifests
staging = artifacts.stage(sys.argv[1], {"seed": 1})
store = staging.blocks("rows")
store.write(0, __import__("pyarrow").table({"x": [0]}))
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""

PUBLISH = """
import sys
from distributed_rerank.storage import artifacts, manifests
from distributed_rerank.errors import BadInput
out, seed = sys.argv[1], int(sys.argv[2])
with artifacts.stage(out, {"seed": seed}) as staging:
    (staging.path / "result.txt").write_text(str(seed))
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    try:
        staging.finish()
    except BadInput as error:
        sys.exit(str(error))
"""


def _make(folder: Path, fingerprint: dict, text: str = "result") -> None:
    with artifacts.stage(folder, fingerprint) as staging:
        (staging.path / "result.txt").write_text(text)
        staging.finish(rows=1)


def _write_unwritable(path: Path) -> None:
    with atomic_path(path) as temporary:
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
    files = [_bytes(tmp_path / name) for name in ("a", "b")]
    written = [json.loads(found.pop("manifest.json")) for found in files]
    assert files[0] == files[1]
    for found in written:
        found.pop("sha256")
        assert [entry.pop("mtime_ns") > 0 for entry in found["files"].values()] == [True]
    assert written[0] == written[1]
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
    staging = artifacts.stage(out, {"seed": 2}, overwrite=True)
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
    assert not artifacts.is_complete(out, {"seed": 2}), "a question moves nothing"
    assert not out.exists()
    assert artifacts.recover(out, {"seed": 2})
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
        assert pa.concat_tables(store.tables())["x"].to_pylist() == [0, 10, 11, 20]
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
    write_json(path, {"b": 1, "a": [1]})
    with pytest.raises(pa.ArrowNotImplementedError):
        _write_unwritable(path)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": [1], "b": 1}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_digests_follow_content_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()
    assert artifacts.json_digest({"a": 1, "b": [1, 2]}) == artifacts.json_digest({"b": [1, 2], "a": 1})
    assert artifacts.json_digest({"b": [1, 2]}) != artifacts.json_digest({"b": [2, 1]})


def _damage(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("change", ["flip", "shorten", "empty"])
def test_damaged_block_is_set_aside_by_name_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    out = tmp_path / "out"
    tables = [pa.table({"x": [number, number + 1]}) for number in range(3)]
    with artifacts.stage(out, {"seed": 1}) as killed:
        for number, table in enumerate(tables):
            killed.blocks("rows").write(number, table)
        whole = _bytes(killed.path / "blocks")
    (path,) = (killed.path / "blocks" / "rows").glob("block-00000001.*")
    if change == "flip":
        _damage(path, len(path.read_bytes()) // 2)
    else:
        path.write_bytes(path.read_bytes()[: 0 if change == "empty" else -1])
    with caplog.at_level(logging.WARNING), artifacts.stage(out, {"seed": 1}) as again:
        store = again.blocks("rows")
        assert store.done() == {0, 2}
        assert f"{path} is damaged" in caplog.text
        assert path.with_name(f"{path.name}.damaged").is_file()
        store.write(1, tables[1])
        found = _bytes(again.path / "blocks")
        assert {name: content for name, content in found.items() if not name.endswith(".damaged")} == whole
        again.finish()
    assert artifacts.read_manifest(out)["blocks"] == {"computed": 1, "reused": 2}
    assert not list(out.rglob("*damaged*"))


def test_block_written_twice_keeps_the_last(tmp_path: Path) -> None:
    with artifacts.stage(tmp_path / "out", {"seed": 1}) as staging:
        for value in (1, 2):
            staging.blocks("rows").write(0, pa.table({"x": [value]}))
    with artifacts.stage(tmp_path / "out", {"seed": 1}) as again:
        assert pa.concat_tables(again.blocks("rows").tables())["x"].to_pylist() == [2]


@pytest.mark.parametrize("change", ["edit", "no manifest"])
def test_damaged_stage_of_an_unfinished_run_is_set_aside_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    with artifacts.stage(tmp_path / "out", {"stage": "outer"}) as outer:
        inner = outer.path / "inner"
        _make(inner, {"stage": "inner"}, "right")
        assert not artifacts.recover(inner, {"stage": "inner"})
        assert artifacts.is_complete(inner, {"stage": "inner"})
        if change == "edit":
            (inner / "result.txt").write_text("wrong")
        else:
            (inner / "manifest.json").unlink()
        with caplog.at_level(logging.WARNING):
            assert not artifacts.recover(inner, {"stage": "inner"})
        assert f"{inner} is damaged and is computed again; it is kept as inner.damaged" in caplog.text
        assert not artifacts.is_complete(inner, {"stage": "inner"})
        _make(inner, {"stage": "inner"}, "right")
        assert artifacts.is_complete(inner, {"stage": "inner"})
        outer.finish()
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert names == {"manifest.json", "inner", "inner/manifest.json", "inner/result.txt"}


def test_damaged_finished_folder_is_refused_and_kept_until_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(out, {"seed": 1}, "right!")
    (out / "result.txt").write_text("wrong!")
    assert not artifacts.recover(out, {"seed": 1})
    with pytest.raises(BadInput, match=r"result\.txt has changed .*--overwrite"):
        artifacts.is_complete(out, {"seed": 1})
    assert (out / "result.txt").read_text() == "wrong!"
    assert not artifacts.is_complete(out, {"seed": 1}, overwrite=True)


def test_damaged_result_of_a_killed_run_is_not_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(tmp_path / "elsewhere", {"seed": 1})
    staged = tmp_path / f".out.{artifacts.json_digest({'seed': 1})[:16]}"
    os.rename(tmp_path / "elsewhere", staged)
    _damage(staged / "result.txt")
    assert not artifacts.recover(out, {"seed": 1})
    assert not out.exists()
    assert staged.with_name(f"{staged.name}.damaged").is_dir()


def test_two_configurations_in_two_processes_finish_at_once_and_only_one_is_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", PUBLISH, str(out)]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, str(seed)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) for seed in (1, 2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], errors
    winner, loser = (codes.index(code) + 1 for code in (0, 1))
    assert (out / "result.txt").read_text() == str(winner)
    assert f"{out} was finished meanwhile with seed={winner}, this run has seed={loser}" in errors[loser - 1]
    assert "--overwrite" in errors[loser - 1]
    # what the other has computed is kept: --overwrite publishes it without work
    assert not artifacts.recover(out, {"seed": loser})
    assert artifacts.recover(out, {"seed": loser}, overwrite=True)
    assert (out / "result.txt").read_text() == str(loser)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_configurations_in_threads_publish_one(tmp_path: Path) -> None:
    out, barrier = tmp_path / "out", threading.Barrier(8)

    def run(seed: int) -> str:
        with artifacts.stage(out, {"seed": seed}) as staging:
            (staging.path / "result.txt").write_text(str(seed))
            barrier.wait()
            try:
                staging.finish()
            except BadInput as error:
                return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(run, range(8)))
    (winner,) = [seed for seed, error in enumerate(errors) if not error]
    assert (out / "result.txt").read_text() == str(winner)
    assert all(f"was finished meanwhile with seed={winner}" in error for error in errors if error)


def _overwrite(out: Path) -> None:
    """A run of two blocks that replaces what stands at `out`, or finishes what a killed one left."""
    if artifacts.recover(out, {"seed": 2}, overwrite=True):
        return
    with artifacts.stage(out, {"seed": 2}, overwrite=True) as staging:
        store = staging.blocks("rows")
        for number in sorted({0, 1} - store.done()):
            store.write(number, pa.table({"x": [number]}))
        write_json(staging.path / "result.json", pa.concat_tables(store.tables())["x"].to_pylist())
        staging.finish()


def _is_killed(out: Path, n_changes: int) -> bool:
    """Whether SIGKILL met `_overwrite`, in a child of this process, after so many changes of names on disk."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"
        return status != 0
    left = n_changes

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **named)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))
    try:
        _overwrite(out)
        os._exit(0)
    finally:
        os._exit(1)


def _is_intact(folder: Path) -> bool:
    try:
        manifests.check_folder(folder, full=True)
    except BadInput:
        return False
    return True


def test_kill_before_any_change_of_a_name_leaves_an_intact_folder_and_the_next_run_finishes(tmp_path: Path) -> None:
    for n_changes in range(100):
        folder = tmp_path / str(n_changes)
        folder.mkdir()
        _make(folder / "out", {"seed": 1}, "old")
        is_killed = _is_killed(folder / "out", n_changes)
        assert any(_is_intact(path) for path in folder.iterdir()), "the old output or the new one"
        _overwrite(folder / "out")
        assert artifacts.is_complete(folder / "out", {"seed": 2})
        assert json.loads((folder / "out" / "result.json").read_text()) == [0, 1]
        left = {path.name for path in folder.iterdir()} - {"out"}
        assert all(name.endswith(".lock") for name in left), left
        if not is_killed:
            break
    assert not is_killed
    assert n_changes > 15


def test_block_found_and_written_anew_counts_as_computed(tmp_path: Path) -> None:
    """A run killed between the two tables of a block leaves one of them, and its block is computed again."""
    artifacts.BlockStore(tmp_path).write(0, pa.table({"x": [1]}))
    store = artifacts.BlockStore(tmp_path)
    assert (store.reused, store.computed) == (1, 0)
    store.write(0, pa.table({"x": [2]}))
    store.write(1, pa.table({"x": [3]}))
    assert (store.reused, store.computed) == (0, 2)


def test_lock_that_a_kill_left_inside_is_not_published(tmp_path: Path) -> None:
    fingerprint = {"seed": 1}
    with artifacts.stage(tmp_path / "out", fingerprint) as staging:
        (staging.path / "inner").mkdir()
        (staging.path / ".inner.0123456789abcdef.lock").write_text("killed")
        (staging.path / "inner" / "kept.txt").write_text("kept")
        staging.finish()
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["inner", "kept.txt", "manifest.json"]
