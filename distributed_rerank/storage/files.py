"""Files: their digests, and writing them so that they appear whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OWN_DIGEST = "sha256"
"""Key of a JSON file's own digest."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_HASHING_THREADS = 8
"""More do not help: one thread hashes about as fast as one disk reads."""


def json_digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def text_digest(pieces: Iterable[str]) -> str:
    """sha256 (hex) of a text that comes in pieces."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece.encode())
    return total.hexdigest()


def bytes_digest(content: bytes) -> str:
    """sha256 (hex) of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """`file_digest` of each path, in their order; several files are read at the same time."""
    if len(paths) < 2:
        return [file_digest(path) for path in paths]
    with ThreadPoolExecutor(min(_HASHING_THREADS, len(paths))) as pool:
        return list(pool.map(file_digest, paths))


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`. At the end it replaces `path`; on an error it is removed.

    An OSError without a file's name, as pyarrow and torch raise it on a full disk, gets this one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_problem(error: OSError) -> str | None:
    """One line about a disk that takes no more, with path and advice; None for any other error."""
    if error.errno not in _NO_ROOM:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{os.strerror(error.errno)}; make room there, or choose another --out; finished work is kept, and the "
        "same command goes on with it"
    )


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def sealed_path(path: Path) -> Iterator[Path]:
    """As `atomic_path`; the digest of the file is then beside it, for `is_intact`."""
    with atomic_path(path) as temporary:
        yield temporary
        write_bytes(_seal_of(path), file_digest(temporary).encode())


def is_intact(path: Path) -> bool:
    """Whether the file is there with the bytes that `sealed_path` saw; False where it or its digest has changed."""
    try:
        return _seal_of(path).read_bytes() == file_digest(path).encode()
    except FileNotFoundError:
        return False


def remove_sealed(path: Path) -> None:
    """Remove a file and its digest."""
    for one in (path, _seal_of(path)):
        one.unlink(missing_ok=True)


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def json_text(value: Any) -> str:
    """The text of a JSON file: sorted keys, two spaces. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def with_digest(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object, as it will be read, with its own digest in it."""
    content = json.loads(json_text({name: item for name, item in value.items() if name != OWN_DIGEST}))
    return {**content, OWN_DIGEST: json_digest(content)}


def has_its_digest(value: dict[str, Any], text: str) -> bool:
    """Whether `text` is that of a `value` from `with_digest`, byte for byte."""
    return text == json_text(with_digest(value))


def write_json(path: str | Path, value: Any) -> None:
    """Write `json_text` of `value` atomically. NaN and infinity raise ValueError."""
    write_bytes(path, json_text(value).encode())
