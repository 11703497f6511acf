"""Output folders that are complete or absent: fingerprints, unfinished folders, resumable blocks, publishing.

A stage works in a hidden folder beside its output folder, named by the digest of its fingerprint, and renames it when
it is complete. A killed run leaves the hidden folder; the next run with the same fingerprint goes on in it, one with
another fingerprint does not touch it. Only manifests hold times, so equal work gives equal bytes in all other files.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distributed_rerank.errors import BadInput, TakenFolder
from distributed_rerank.runtime import logs
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage import begun, locks
from distributed_rerank.storage.begun import BEGUN, ComputedWith
from distributed_rerank.storage.files import (
    bytes_digest,
    file_digests,
    json_digest,
    write_bytes,
)
from distributed_rerank.storage.manifests import MANIFEST, SCHEMA_VERSION, check_folder, read_manifest, write_manifest

logger = logging.getLogger(__name__)

_REMEDY = "pass --overwrite to recompute it or choose another --out"
RESULT_VERSIONS = {"embed": 1, "retrieve": 1, "score": 2, "train": 14, "evaluate": 6, "rerank": 2, "compare": 2}
"""Raise a stage's number by hand when its results change; folders made before are then refused, not continued."""
SCRATCH = "blocks"
"""Folder in a hidden folder for what `Staging.finish` removes."""
_RUNS = {
    "train": ("embed", "retrieve", "score"),
    "evaluate": ("embed", "retrieve", "score"),
    "rerank": ("embed", "retrieve", "score"),
}
"""Stages that another one runs: its result changes with theirs."""
_BLOCK = re.compile(r"block-(\d{8})\.([0-9a-f]{16})\.parquet")


def make_fingerprint(stage: str, **parts: Any) -> dict[str, Any]:
    """All that decides a stage's result as plain JSON: result versions, its name, `parts` (config, digests)."""
    versions = {name: RESULT_VERSIONS[name] for name in (stage, *_RUNS.get(stage, ()))}
    return _plain({"schema_version": SCHEMA_VERSION, "result_version": versions, "stage": stage, **parts})


def is_complete(folder: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> bool:
    """True: `folder` was made with this fingerprint and is intact, skip the stage. False: there is work to do.

    A question: nothing on disk is changed. With `overwrite` the answer is False where `folder` may be replaced. Raises
    BadInput for a folder made with another fingerprint (first differing key, both values), for a file that is gone or
    has changed, and, even with `overwrite`, for a folder that this tool did not make.
    """
    folder = Path(folder).absolute()
    if _is_absent(folder) or overwrite:
        return False
    difference = _first_difference(read_manifest(folder)["fingerprint"], _plain(fingerprint))
    if difference is None:
        check_folder(folder)
        return True
    key, old, new = difference
    raise TakenFolder(f"{folder} was made with {key}={old}, this run has {key}={new}", _REMEDY)


def recover(folder: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> bool:
    """Put in order what a killed run of this fingerprint left. True: that has made `folder` complete.

    A hidden folder that was finished but not renamed is published. A damaged output folder inside a run that is itself
    unfinished is renamed to `*.damaged`, so that it is computed again. Raises BadInput where another process is at it.
    """
    folder = Path(folder).absolute()
    if begun.unfinished_around(folder) and folder.is_dir() and any(folder.iterdir()):
        _set_aside_if_damaged(folder)
    staged = _staging_path(folder, fingerprint)
    if not (staged / MANIFEST).is_file() or not (overwrite or _may_be_replaced(folder, fingerprint)):
        return False
    with _take_over(folder, fingerprint):
        _set_aside_if_damaged(staged)
        if not (staged / MANIFEST).is_file():
            return False
        _publish(staged, folder, _plain(fingerprint), overwrite)
        return True


def stage(folder: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> "Staging":
    """Open the hidden folder of this fingerprint beside `folder`, and go on with what a killed run left there.

    With `overwrite`, `finish` replaces whatever output of this tool stands at `folder` then. Raises BadInput when
    another live process is working in it.
    """
    folder = Path(folder).absolute()
    fingerprint = _plain(fingerprint)
    lock = _take_over(folder, fingerprint)
    path = _staging_path(folder, fingerprint)
    begun.begin(path)
    (path / MANIFEST).unlink(missing_ok=True)
    return Staging(folder, path, fingerprint, lock, overwrite)


class Staging:
    """A hidden working folder, `path`, that becomes the output folder when it is complete."""

    def __init__(
        self, folder: Path, path: Path, fingerprint: dict[str, Any], lock: locks.Lock, overwrite: bool
    ) -> None:
        self.folder = folder
        self.path = path
        self.fingerprint = fingerprint
        self._stores: dict[str, BlockStore] = {}
        self._lock = lock
        self._overwrite = overwrite
        self._remembered: set[ComputedWith] = set()
        self._told = ExitStack()

    def __enter__(self) -> "Staging":
        self._told.enter_context(logs.about(stage=self.fingerprint.get("stage", self.folder.name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._told.close()
        self.close()

    def close(self) -> None:
        """Let another process work here, and give back memory. The folder stays as it is, to be continued."""
        self._lock.release()
        give_back_memory()

    def blocks(self, name: str, keep: bool = False) -> "BlockStore":
        """The block results called `name`; damaged ones are set aside.

        `finish` removes them, unless `keep`: then they stay as the folder `name` of Parquet files in the output.
        """
        if name not in self._stores:
            self._stores[name] = BlockStore(self.path / name if keep else self.path / SCRATCH / name)
        return self._stores[name]

    def remember(self, found: ComputedWith) -> None:
        """Note what a worker computed with; it is in the manifest of the finished folder.

        Raises BadInput where this folder was begun with another device or precision, where a run around it was, and
        where the output folder, whose results would be taken over, was.
        """
        if found not in self._remembered:
            difference = begun.difference(self._earlier(), found)
            if difference:
                raise TakenFolder(f"{self.folder} was made {difference}", _REMEDY)
            begun.remember(self.path, found)
            self._remembered.add(found)

    def remember_from(self, folder: Path) -> None:
        """Note what `begun.remember` has noted in another folder."""
        known = begun.join(begun.recall(self.path), begun.recall(folder))
        begun.note(self.path, known)

    def finish(self, manifest_extra: dict[str, Any] | None = None, rows: int | None = None) -> None:
        """Write the manifest and rename this folder to the output folder, replacing an older output.

        The old output is moved aside, the new one takes its place, then the old one is deleted: at every moment one
        complete folder exists. Raises BadInput where something that is not an output of this tool is in the way, or,
        without `overwrite`, an output that another configuration has finished meanwhile; this one is then kept in its
        hidden folder.
        """
        blocks = {
            "computed": sum(store.computed for store in self._stores.values()),
            "reused": sum(store.reused for store in self._stores.values()),
        }
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        # A kill between the end of an inner stage and the release of its lock leaves the lock's file.
        for left in [*self.path.rglob("*.damaged"), *self.path.rglob(".*.lock")]:
            _remove(left)
        content = {"rows": rows, **(manifest_extra or {}), "blocks": blocks, "fingerprint": self.fingerprint}
        # What no worker computed, this process did, on its CPU.
        content["computed_with"] = begun.join(self._earlier(), begun.recall(self.path)) or {"device": "cpu"}
        inner = {path.parent.name: path.parent for path in self.path.glob(f"*/{MANIFEST}")}
        content["stages"] = {name: read_manifest(path).get("computed_with") for name, path in inner.items()}
        write_manifest(self.path, content, without=[BEGUN])
        _publish(self.path, self.folder, self.fingerprint, self._overwrite)
        self.close()

    def _earlier(self) -> dict[str, Any]:
        """What the output folder was computed with, if this run adds to it; else {}."""
        if self._overwrite or not (self.folder / MANIFEST).is_file():
            return {}
        return read_manifest(self.folder).get("computed_with", {})


class BlockStore:
    """Results of numbered blocks, one Parquet file each, written atomically and named by number and digest.

    Opening it compares each file with the digest in its name; a damaged one is renamed to `*.damaged` and counts as
    not there. `reused` counts the blocks found then and not written anew, `computed` those written since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed = 0
        folder.mkdir(parents=True, exist_ok=True)
        found = {path: match for path in sorted(folder.iterdir()) if (match := _BLOCK.fullmatch(path.name))}
        self._digests: dict[int, str] = {}
        for (path, match), digest in zip(found.items(), file_digests(list(found)), strict=True):
            if digest.startswith(match[2]):
                self._digests[int(match[1])] = match[2]
            else:
                set_aside(path, "its bytes have changed since it was written")
        self._found = set(self._digests)

    @property
    def reused(self) -> int:
        """Blocks of an earlier run that still count."""
        return len(self._found)

    def done(self) -> set[int]:
        """Numbers of the blocks that are complete on disk."""
        return set(self._digests)

    def write(self, number: int, table: pa.Table, **layout: Any) -> None:
        """Store the result of one block; a block written twice keeps the last. `layout` is for the Parquet writer."""
        assert number >= 0, f"block number {number} is negative"
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **layout)
        content = sink.getvalue().to_pybytes()
        if number in self._digests:
            # Removed first: a run killed in between has no block of this number, never two.
            self._path(number).unlink()
            del self._digests[number]
        digest = bytes_digest(content)[:16]
        write_bytes(self._path_of(number, digest), content)
        self._digests[number] = digest
        self._found.discard(number)
        self.computed += 1

    def read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The result of one block, or some of its columns."""
        # Each thread would keep memory of its own, for what one reads as fast.
        return pq.ParquetFile(self._path(number)).read(columns, use_threads=False)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The results of all blocks in number order."""
        return (self.read(number, columns) for number in sorted(self.done()))

    def _path(self, number: int) -> Path:
        return self._path_of(number, self._digests[number])

    def _path_of(self, number: int, digest: str) -> Path:
        return self.folder / f"block-{number:08d}.{digest}.parquet"


def _plain(value: Any) -> Any:
    """As it comes back from JSON (tuples become lists), so that fingerprints compare equal to stored ones."""
    return json.loads(json.dumps(value, allow_nan=False))


def _staging_path(folder: Path, fingerprint: dict[str, Any]) -> Path:
    return folder.with_name(f".{folder.name}.{json_digest(fingerprint)[:16]}")


def _take_over(folder: Path, fingerprint: dict[str, Any]) -> locks.Lock:
    """The lock of the hidden folder of this fingerprint. Raises BadInput where it is held or cannot be."""
    staged = _staging_path(folder, fingerprint)
    path = staged.with_name(f"{staged.name}.lock")
    try:
        lock = locks.take(path)
    except OSError as error:
        raise _no_lock(path, error) from None
    if lock is None:
        raise BadInput(f"{folder} is in use by {locks.holder_of(path)}; wait for it or choose another folder")
    return lock


def _no_lock(path: Path, error: OSError) -> BadInput:
    return BadInput(f"{path.parent}: no file can be locked here ({error}); choose another folder")


def _is_absent(folder: Path) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    if not (folder / MANIFEST).is_file():
        raise TakenFolder(f"{folder} exists and is not an output of this tool (no {MANIFEST})", "choose another --out")
    return False


def _may_be_replaced(folder: Path, fingerprint: dict[str, Any]) -> bool:
    return _is_absent(folder) or read_manifest(folder)["fingerprint"] == _plain(fingerprint)


def _publish(staged: Path, folder: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
    """Rename `staged` to `folder`. Looks again, under a lock that all configurations share, at what stands there."""
    with locks.wait_for(folder.with_name(f".{folder.name}.lock")):
        is_absent = _is_absent(folder)
        if not is_absent and not overwrite:
            difference = _first_difference(read_manifest(folder)["fingerprint"], fingerprint)
            if difference is not None:
                key, old, new = difference
                raise TakenFolder(
                    f"{folder} was finished meanwhile with {key}={old}, this run has {key}={new} and its result is in "
                    f"{staged}", "pass --overwrite to replace the other or choose another --out"
                )  # fmt: skip
        (staged / BEGUN).unlink(missing_ok=True)
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if not is_absent:
            os.rename(folder, replaced)
        os.rename(staged, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def _set_aside_if_damaged(folder: Path) -> None:
    try:
        check_folder(folder)
    except BadInput as error:
        set_aside(folder, str(error))


def set_aside(path: Path, reason: str) -> None:
    """Rename what is damaged in an unfinished run, so that it is computed again, and say so."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        _remove(aside)
    os.rename(path, aside)
    logger.warning("%s is damaged and is computed again; it is kept as %s (%s)", path, aside.name, reason)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                return inner, _shown(old, name), _shown(new, name)
            difference = _first_difference(old[name], new[name], inner)
            if difference is not None:
                return difference
        return None
    return None if old == new else (key, json.dumps(old), json.dumps(new))


def _shown(side: dict[str, Any], name: str) -> str:
    return json.dumps(side[name]) if name in side else "(absent)"
