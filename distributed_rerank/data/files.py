"""Files: their digests, and writing them so that they appear whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HASHING_THREADS = 8
"""More do not help: one thread hashes about as fast as one disk reads."""


def json_digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def json_text(value: Any) -> str:
    """The text of a JSON file: sorted keys, two spaces. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Write `json_text` of `value` atomically. NaN and infinity raise ValueError."""
    write_bytes(path, json_text(value).encode())
