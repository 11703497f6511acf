"""The manifest of a finished folder: what made it, and the digest of every file in it.

`manifest.json` is written last and holds size, modification time and sha256 of every other file. A file that still has
its size and time, and that was not touched after the manifest was written, is taken as unchanged; any other is hashed.
So a second look costs a few `stat` calls. A check with `full` hashes everything.
"""

import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_rerank import __version__
from distributed_rerank.errors import BadInput
from distributed_rerank.storage.files import OWN_DIGEST, file_digests, has_its_digest, with_digest, write_json

SCHEMA_VERSION = 2
"""Of manifest.json. 1 had no digests of files, and a code version in the fingerprint."""
MANIFEST = "manifest.json"
_OWN_KEYS = {"fingerprint", "files", "versions", OWN_DIGEST}
_FIX = "restore it, or run the job that wrote it again, with --overwrite or after you have deleted the folder"
Entry = dict[str, Any]
"""Of a file: sha256, size, mtime_ns."""


def write_manifest(folder: Path, content: Mapping[str, Any], *, without: Iterable[str] = ()) -> None:
    """Write the manifest of `folder`: `content`, the versions, and an entry for every file but those in `without`.

    `content` has a `fingerprint` (JSON). Digests in the manifests of folders inside are taken over where their files
    are untouched; all other files are hashed, several at a time.
    """
    files = _entries(folder, set(without))
    _write(folder, {**content, "schema_version": SCHEMA_VERSION, "versions": versions(), "files": files})


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that its networks come from, in this environment."""
    import torch  # here: who only reads a manifest need not wait for it; its own version names the CUDA it is built for

    timm = importlib.metadata.version("timm")
    return {"distributed_rerank": __version__, "torch": str(torch.__version__), "timm": timm}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished output folder.

    Raises BadInput where there is none, where it is not ours, and where it has changed since it was written.
    """
    path = Path(folder) / MANIFEST
    manifest = _parse(path)
    if manifest is None:
        raise BadInput(f"{folder} holds no {MANIFEST}: it is not a complete output of this tool")
    if not isinstance(manifest.get("fingerprint"), dict):
        raise BadInput(f"{path} has no fingerprint: it is not an output of this tool; choose another folder")
    return manifest


def check_folder(folder: str | Path, *, full: bool = False) -> None:
    """Raises BadInput for the first file of a finished folder that is gone or has changed; it names file and fix.

    Files that the manifest does not list are not looked at. `full` hashes every file, whatever its times say; that
    also finds bytes that changed on the disk itself.
    """
    _check(Path(folder), read_manifest(folder).get("files", {}), full)


def check_files(folder: str | Path, names: Iterable[str]) -> None:
    """As `check_folder` for these files, as far as a manifest lists them."""
    files = _files_of(Path(folder))
    _check(Path(folder), {name: files[name] for name in names if name in files}, full=False)


def check_paths(paths: Sequence[Path]) -> None:
    """As `check_folder` for files of one folder that are about to be read, where its manifest or the next one lists it.

    Nothing happens where neither does.
    """
    parent = paths[0].parent
    for folder in (parent, parent.parent):
        check_files(folder, [path.relative_to(folder).as_posix() for path in paths])


def has_other_size(path: Path) -> bool:
    """Whether the file is there and has another size than the manifest beside it says."""
    entry = _files_of(path.parent).get(path.name)
    return entry is not None and path.is_file() and path.stat().st_size != entry["size"]


@contextmanager
def rewriting(path: Path) -> Iterator[None]:
    """The file of a finished folder may be replaced inside the block; then the manifest gets its new digest.

    The folder is checked before; without a manifest nothing else happens. A run killed inside the block leaves the
    file without a digest, never with a wrong one. Raises BadInput as `check_folder` does.
    """
    folder = path.parent
    if not _files_of(folder):
        yield
        return
    check_folder(folder)
    manifest = read_manifest(folder)
    others = {name: entry for name, entry in manifest["files"].items() if name != path.name}
    _write(folder, manifest | {"files": others})
    yield
    _write(folder, manifest | {"files": others | {path.name: _entry(path, file_digests([path])[0])}})


def _parse(path: Path) -> dict[str, Any] | None:
    """The manifest at `path` where it is one and unchanged, {} where it is another program's; None: no file."""
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); delete the folder or choose another folder") from None
    if not isinstance(manifest, dict):
        return {}
    if _has_digests(manifest) and not has_its_digest(manifest, text):
        raise BadInput(f"{path} has changed since it was written; {_FIX}")
    return manifest


def _has_digests(manifest: dict[str, Any]) -> bool:
    """Whether it is ours. Two keys tell, so that a damaged one does not hide it; schema 1 had the fingerprint alone."""
    return len(_OWN_KEYS & manifest.keys()) > 1


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, with_digest(manifest))


def _entries(folder: Path, without: set[str]) -> dict[str, Entry]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.relative_to(folder).as_posix() not in {MANIFEST, *without}]
    known: dict[Path, str] = {}
    for inner in [path.parent for path in paths if path.name == MANIFEST]:
        written = (inner / MANIFEST).stat().st_mtime_ns
        files = _files_of(inner).items()
        known |= {inner / name: entry["sha256"] for name, entry in files if _is_untouched(inner / name, entry, written)}
    todo = [path for path in paths if path not in known]
    known |= dict(zip(todo, file_digests(todo), strict=True))
    return {path.relative_to(folder).as_posix(): _entry(path, known[path]) for path in paths}


def _entry(path: Path, digest: str) -> Entry:
    found = path.stat()
    return {"sha256": digest, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _files_of(folder: Path) -> dict[str, Entry]:
    """What the manifest of `folder` says about its files; {} where there is none, or one of another program."""
    manifest = _parse(folder / MANIFEST) or {}
    return manifest["files"] if _has_digests(manifest) else {}


def _check(folder: Path, files: Mapping[str, Entry], full: bool) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path} is gone from a finished folder; {_FIX}")
        if path.stat().st_size != entry["size"]:
            raise BadInput(f"{path} has {path.stat().st_size} bytes, {entry['size']} were written; {_fix(path)}")
    written = (folder / MANIFEST).stat().st_mtime_ns if files else 0
    names = [name for name, entry in files.items() if full or not _is_untouched(folder / name, entry, written)]
    for name, digest in zip(names, file_digests([folder / name for name in names]), strict=True):
        expected = files[name]["sha256"]
        if digest != expected:
            change = f"sha256 {digest[:12]} instead of {expected[:12]}"
            raise BadInput(f"{folder / name} has changed since it was written ({change}); {_fix(folder / name)}")


def _fix(path: Path) -> str:
    """What to do about a file that has changed; without a manifest a table is read like one of another program."""
    return f"{_FIX}, or delete {MANIFEST} beside it where the change is yours" if path.suffix == ".parquet" else _FIX


def _is_untouched(path: Path, entry: Entry, written: int) -> bool:
    """Whether the file has its size and time, and was last touched before the manifest was written, at `written` (ns).

    No program can set the change time, so an edit that restores the modification time counts as a touch, and so does
    a copy. Within one tick of the file system's clock before and after cannot be told apart: that is a touch as well.
    """
    found = os.stat(path) if path.is_file() else None
    if found is None or (found.st_size, found.st_mtime_ns) != (entry["size"], entry["mtime_ns"]):
        return False
    return max(found.st_mtime_ns, found.st_ctime_ns) < written <= time.time_ns()
