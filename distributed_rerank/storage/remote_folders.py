"""Folders that lie in a bucket: fetched whole and checked, written so that no reader sees half of one.

A job works in a local folder. Its unfinished work is copied to `.NAME.unfinished/` beside the bucket's folder while the
job runs, so another machine can go on with it. The finished folder is published without its manifest first and with it
last: without a manifest it is not there, and with it every file is compared with its digest.
"""

import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from distributed_rerank.errors import BadInput, Outage
from distributed_rerank.storage import object_store
from distributed_rerank.storage.files import bytes_digest, file_digest, write_bytes
from distributed_rerank.storage.leases import Lease
from distributed_rerank.storage.manifests import MANIFEST

logger = logging.getLogger(__name__)

PUSH_SECONDS = 10.0
"""Between two copies of unfinished work."""
_TRANSFERS = 16
_GENERATION = ".generation"
"""In an unfinished folder: a random name of the job that wrote it last."""


def fetch(uri: str, place: Path) -> Path:
    """A local copy of a finished folder, of a folder without a manifest, or of a single object; returns its path.

    Only what the copy at `place` lacks is fetched. Files that a manifest lists, in the folder or beside the object, are
    compared with their digests. Raises BadInput for a URI with nothing behind it and for other bytes than were written.
    """
    manifest = _read_if_there(f"{uri}/{MANIFEST}")
    if manifest is not None:
        _fetch_finished(uri, place, manifest)
        return place
    content = _read_if_there(uri)
    if content is not None:
        folder, _, name = uri.rpartition("/")
        beside = _read_if_there(f"{folder}/{MANIFEST}")
        entry = {} if beside is None else _files_of(beside).get(name, {})
        _check(uri, content, entry.get("sha256"))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place, content)
        return place
    names = list(object_store.sizes(uri))
    if not names:
        raise BadInput(f"{uri} does not exist; check the bucket and the name")
    _download(uri, place, {name: None for name in names})
    return place


class RemoteFolder:
    """The output folder at `uri`, worked on at the local path `folder` while the block lasts.

    Entering takes the bucket's lock and fetches what is there, finished or not. Leaving publishes the folder if it is
    finished, and otherwise copies the unfinished work a last time. Raises BadInput where another job is at it.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri.rstrip("/"), folder
        parent, _, name = self.uri.rpartition("/")
        if not object_store.is_object(parent):
            raise BadInput(f"{uri} is a whole bucket; name a folder in it, such as {self.uri}/results")
        self._unfinished = f"{parent}/.{name}.unfinished"
        self._lease = Lease(f"{parent}/.{name}.lock", self.uri)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._published: bytes | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._push_regularly, daemon=True)

    def __enter__(self) -> "RemoteFolder":
        self._lease.take()
        try:
            self._restore()
        except BaseException:
            self._lease.release()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._lease.renew()
            self._publish_or_push()
        except Outage as outage:
            if error is None:
                raise
            logger.warning("%s", outage)
        finally:
            self._lease.release()

    def _publish_or_push(self) -> None:
        if (self.folder / MANIFEST).is_file():
            self._publish()
        left = self._unfinished_files()
        if left:
            self._push(left)
        elif self._pushed:
            object_store.delete(self._unfinished, list(object_store.sizes(self._unfinished)))

    def _restore(self) -> None:
        """Make the local folder and the unfinished work beside it what the bucket holds."""
        manifest = _read_if_there(f"{self.uri}/{MANIFEST}")
        if manifest is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            _fetch_finished(self.uri, self.folder, manifest)
        self._published = manifest
        local = self.folder.parent / _GENERATION
        remote = _read_if_there(f"{self._unfinished}/{_GENERATION}")
        if remote is None or not local.is_file() or local.read_bytes() != remote:
            for path in self._hidden():
                shutil.rmtree(path)
            if remote is not None:
                names = object_store.sizes(self._unfinished).keys() - {_GENERATION}
                _download(self._unfinished, self.folder.parent, dict.fromkeys(names))
                logger.info("%s: %d files of unfinished work fetched", self.uri, len(names))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._pushed = {} if remote is None else _stamps(self.folder.parent, self._unfinished_files())

    def _push_regularly(self) -> None:
        seen: dict[str, tuple[int, int]] = {}
        while not self._ended.wait(PUSH_SECONDS):
            try:
                self._lease.renew()
                now = _stamps(self.folder.parent, self._unfinished_files())
                # A file that is still being written changes from one look to the next.
                self._push([name for name, stamp in now.items() if seen.get(name) == stamp])
                seen = now
            except BadInput as error:
                logger.error("%s", error)
                return
            except (Outage, OSError) as error:
                logger.warning("unfinished work is not copied now: %s", error)

    def _push(self, names: Iterable[str]) -> None:
        """Copy these unfinished files where they have changed, oldest first; then remove what is gone from the copy."""
        root = self.folder.parent
        changed = {name: stamp for name, stamp in _stamps(root, names).items() if self._pushed.get(name) != stamp}
        if (changed and not (root / _GENERATION).is_file()) or not self._pushed:
            write_bytes(root / _GENERATION, secrets.token_hex(8).encode())
            object_store.write(f"{self._unfinished}/{_GENERATION}", root / _GENERATION)
        # Oldest first, as a file may name those written before it.
        for name in sorted(changed, key=lambda name: (changed[name][1], name)):
            try:
                object_store.write(f"{self._unfinished}/{name}", root / name)
            except FileNotFoundError:
                continue
            self._pushed[name] = changed[name]
        gone = [name for name in self._pushed if not (root / name).is_file()]
        object_store.delete(self._unfinished, gone)
        for name in gone:
            del self._pushed[name]

    def _publish(self) -> None:
        content = (self.folder / MANIFEST).read_bytes()
        files = _files_of(content)
        # What a job adds to a finished folder, such as comparison.json, is in no manifest.
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix not in (".tmp", ".lock"))
        names = {path.relative_to(self.folder).as_posix() for path in paths}
        for name in sorted(names - files.keys() - {MANIFEST}):
            object_store.write(f"{self.uri}/{name}", self.folder / name)
        if content == self._published:
            return
        before = {} if self._published is None else _files_of(self._published)
        changed = [name for name in files if before.get(name, {}).get("sha256") != files[name]["sha256"]]
        object_store.delete(self.uri, [MANIFEST])
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lambda name: object_store.write(f"{self.uri}/{name}", self.folder / name), changed))
        object_store.write(f"{self.uri}/{MANIFEST}", content)
        object_store.delete(self.uri, [name for name in before if name not in files])
        self._published = content
        logger.info("published: %s", self.uri)

    def _hidden(self) -> list[Path]:
        """The unfinished folders beside the local folder."""
        return [path for path in self.folder.parent.glob(f".{self.folder.name}.*") if path.is_dir()]

    def _unfinished_files(self) -> list[str]:
        paths = (path for hidden in self._hidden() for path in hidden.rglob("*") if path.is_file())
        kept = (path for path in paths if path.suffix not in (".tmp", ".lock"))
        return [path.relative_to(self.folder.parent).as_posix() for path in kept]


def _fetch_finished(uri: str, place: Path, manifest: bytes) -> None:
    files = _files_of(manifest)
    missing = {name: e["sha256"] for name, e in files.items() if not _is_same(place / name, e["sha256"])}
    (place / MANIFEST).unlink(missing_ok=True)
    _download(uri, place, missing)
    for path in [path for path in place.rglob("*") if path.is_file()]:
        if path.relative_to(place).as_posix() not in files:
            path.unlink()
    # With their times and before the manifest, as they were written: later looks need not hash them again.
    for name, entry in files.items():
        os.utime(place / name, ns=(entry["mtime_ns"], entry["mtime_ns"]))
    place.mkdir(parents=True, exist_ok=True)
    write_bytes(place / MANIFEST, manifest)


def _download(uri: str, place: Path, digests: dict[str, str | None]) -> None:
    """Fetch the objects of a folder by name, and compare each with its digest where it has one."""

    def one(name: str) -> None:
        if name.startswith("/") or ".." in Path(name).parts:
            raise BadInput(f"{uri}/{name} leaves its folder; delete it")
        content = object_store.read(f"{uri}/{name}")
        _check(f"{uri}/{name}", content, digests[name])
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(place / name, content)

    with ThreadPoolExecutor(_TRANSFERS) as pool:
        list(pool.map(one, digests))


def _check(uri: str, content: bytes, digest: str | None) -> None:
    if digest is not None and bytes_digest(content) != digest:
        found = f"sha256 {bytes_digest(content)[:12]} instead of {digest[:12]}"
        raise BadInput(
            f"{uri} has changed since it was written ({found}); run the job that wrote it again, with --overwrite or "
            "after you have deleted the folder"
        )


def _is_same(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _files_of(manifest: bytes) -> dict[str, dict[str, Any]]:
    content = json.loads(manifest)
    return content.get("files", {}) if isinstance(content, dict) else {}


def _stamps(root: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and modification time of these files, as far as they are there."""
    found = {}
    for name in names:
        try:
            status = (root / name).stat()
        except FileNotFoundError:
            continue
        found[name] = (status.st_size, status.st_mtime_ns)
    return found


def _read_if_there(uri: str) -> bytes | None:
    try:
        return object_store.read(uri)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise BadInput(str(error)) from error
