"""Output folders that are complete or absent: staging, resumable blocks, manifests, digests (layer 2).

A stage works in a hidden sibling of its output folder, named by the digest of its fingerprint. A killed run
leaves that staging folder; the next run with the same fingerprint continues it, one with another fingerprint
does not touch it. Nothing written here carries a time stamp, so equal work gives equal bytes.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distributed_rerank import __version__
from distributed_rerank.errors import BadInput

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_LOCK = ".lock"


def make_fingerprint(stage: str, **parts: Any) -> dict[str, Any]:
    """All that decides a stage's result as plain JSON: versions, its name, `parts` (config, digests)."""
    return _plain({"schema_version": SCHEMA_VERSION, "code_version": __version__, "stage": stage, **parts})


def json_digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`. At the end it replaces `path`; on an error it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys, atomically. NaN and infinity raise ValueError."""
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete output folder. Raises BadInput where there is none or it is not ours."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder} holds no {MANIFEST}: it is not a complete output of this tool") from None
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); delete the folder or choose another --out") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("fingerprint"), dict):
        raise BadInput(f"{path} has no fingerprint: it is not an output of this tool; choose another --out")
    return manifest


def is_complete(folder: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> bool:
    """True: `folder` was made with this fingerprint, skip the stage. False: there is work to do.

    Nothing is removed here; with `overwrite` the old folder stays until `Staging.finish` replaces it. Raises
    BadInput for a folder made with another fingerprint (first differing key, both values) and, even with
    `overwrite`, for a folder that this tool did not make.
    """
    folder = Path(folder).absolute()
    is_absent = _is_absent(folder)
    staged = _staging_path(folder, fingerprint)
    if (is_absent or overwrite) and (staged / MANIFEST).is_file():
        _publish(staged, folder)  # a run was killed after its last block, before or between the renames
        return True
    if is_absent or overwrite:
        return False
    difference = _first_difference(read_manifest(folder)["fingerprint"], _plain(fingerprint))
    if difference is None:
        return True
    key, old, new = difference
    raise BadInput(
        f"{folder} was made with {key}={old}, this run has {key}={new}; "
        "pass --overwrite to recompute it or choose another --out"
    )


def stage(folder: str | Path, fingerprint: dict[str, Any]) -> "Staging":
    """Open the staging folder of this fingerprint beside `folder`, continuing what a killed run left there.

    Raises BadInput when another live process is working in it.
    """
    folder = Path(folder).absolute()
    fingerprint = _plain(fingerprint)
    path = _staging_path(folder, fingerprint)
    path.mkdir(parents=True, exist_ok=True)
    return Staging(folder, path, fingerprint)


class Staging:
    """A hidden working folder, `path`, that becomes the output folder when it is complete."""

    def __init__(self, folder: Path, path: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self.path = path
        self.fingerprint = fingerprint
        self._stores: dict[str, BlockStore] = {}
        self._lock = _acquire(path / _LOCK)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process work here. The folder stays as it is, to be continued."""
        self._lock.close()

    def blocks(self, name: str, keep: bool = False) -> "BlockStore":
        """The block results called `name`. They are removed by `finish`, unless `keep`: then they stay as the
        folder `name` of Parquet files in the output."""
        if name not in self._stores:
            self._stores[name] = BlockStore(self.path / name if keep else self.path / "blocks" / name)
        return self._stores[name]

    def finish(self, manifest_extra: dict[str, Any] | None = None, rows: int | None = None) -> None:
        """Write the manifest and rename the staging folder to the output folder, replacing an older output.

        The old output is moved aside, the new one takes its place, then the old one is deleted: at every
        moment one complete folder exists. Raises BadInput where something that is not an output of this tool
        is in the way.
        """
        blocks = {
            "computed": sum(store.computed for store in self._stores.values()),
            "reused": sum(store.reused for store in self._stores.values()),
        }
        manifest = {"rows": rows, **(manifest_extra or {}), "blocks": blocks, "fingerprint": self.fingerprint}
        for key in ("schema_version", "code_version"):
            manifest[key] = self.fingerprint.get(key)
        shutil.rmtree(self.path / "blocks", ignore_errors=True)
        write_json(self.path / MANIFEST, manifest)
        _publish(self.path, self.folder)
        self.close()


class BlockStore:
    """Results of numbered blocks, one Parquet file each, written atomically.

    `reused` counts the blocks found when it was opened, `computed` those written since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.reused = len(self.done())

    def done(self) -> set[int]:
        """Numbers of the blocks that are complete on disk."""
        return {int(path.stem.removeprefix("block-")) for path in self.folder.glob("block-*.parquet")}

    def write(self, number: int, table: pa.Table) -> None:
        """Store the result of one block; a block written twice keeps the last."""
        assert number >= 0, f"block number {number} is negative"
        with atomic_path(self._path(number)) as temporary:
            pq.write_table(table, temporary)
        self.computed += 1

    def read(self, number: int) -> pa.Table:
        """The result of one block."""
        return pq.ParquetFile(self._path(number)).read()

    def table(self) -> pa.Table:
        """All blocks in number order as one table."""
        numbers = sorted(self.done())
        assert numbers, f"no block has been written to {self.folder}"
        return pa.concat_tables([self.read(number) for number in numbers])

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:08d}.parquet"


def _plain(value: Any) -> Any:
    """As it comes back from JSON (tuples become lists), so that fingerprints compare equal to stored ones."""
    return json.loads(json.dumps(value, allow_nan=False))


def _staging_path(folder: Path, fingerprint: dict[str, Any]) -> Path:
    return folder.with_name(f".{folder.name}.{json_digest(fingerprint)[:16]}")


def _is_absent(folder: Path) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder} exists and is not an output of this tool (no {MANIFEST}); choose another --out")
    return False


def _publish(staged: Path, folder: Path) -> None:
    is_absent = _is_absent(folder)
    (staged / _LOCK).unlink(missing_ok=True)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if not is_absent:
        os.rename(folder, replaced)
    os.rename(staged, folder)
    shutil.rmtree(replaced, ignore_errors=True)


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


def _acquire(path: Path) -> Any:
    """Lock `path` for this process. The kernel frees the lock of a dead process, so a stale one needs no
    clean-up.

    POSIX record locks: they hold over NFS, and data-loading processes forked later do not inherit them.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise BadInput(
                f"{path.parent}: this file system cannot lock files ({error}); choose another --out"
            ) from None
        raise BadInput(
            f"{path.parent} is in use by {holder or 'another process'}; wait for it or choose another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
