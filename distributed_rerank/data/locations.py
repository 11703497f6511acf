"""Where bytes lie: local paths and URIs, joined and read in one way for tables and images (layer 2).

Only listed URI schemes are opened, because paths come from tables that somebody else may have written.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import fsspec

from distributed_rerank.data import object_store
from distributed_rerank.errors import BadInput

SCHEMES = frozenset({"file", "hf"}) | object_store.SCHEMES
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(location: str) -> str | None:
    """The URI scheme in lower case, or None for a plain path."""
    found = _SCHEME.match(location)
    return found.group(1).lower() if found else None


def absolute(location: str) -> str:
    """A plain path or `file://` URI as an absolute path (workers run elsewhere); other URIs unchanged."""
    scheme = scheme_of(location)
    if scheme is None:
        return str(Path(location).absolute())
    if scheme == "file":
        return unquote(re.sub(r"^file://(localhost(?=/))?", "", location, flags=re.IGNORECASE))
    return location


def folder_of(location: str) -> str:
    """Where relative paths of the table at `location` start from, without a final slash."""
    return absolute(location).rpartition("/")[0]


def join(folder: str, path: str) -> str:
    """`path` below `folder`; an absolute path or a URI is kept as it is."""
    if path.startswith("/") or scheme_of(path):
        return path
    return f"{folder}/{path}"


def read_bytes(location: str, schemes: frozenset[str] = SCHEMES) -> bytes:
    """All bytes at a local path or URI.

    A scheme outside `schemes` (http and https must be asked for) or one whose driver is not installed raises
    BadInput; a missing or unreadable file raises OSError, a store that does not
    answer Outage.
    """
    scheme = _allowed_scheme(location, schemes)
    if scheme in (None, "file"):
        return Path(absolute(location)).read_bytes()
    if scheme in object_store.SCHEMES:
        return object_store.read(location)
    try:
        return _read_remote(location)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{location}: cannot open scheme {scheme!r} ({error}); install its fsspec driver") from error


def opener(location: str, schemes: frozenset[str] = SCHEMES) -> Callable[[], io.BufferedIOBase]:
    """Opens the file at a local path or URI anew with each call; a remote one is fetched here, once.

    Raises as `read_bytes` does: OSError for a local file only when it is opened.
    """
    if _allowed_scheme(location, schemes) in (None, "file"):
        path = absolute(location)
        return lambda: open(path, "rb")
    content = read_bytes(location, schemes)
    return lambda: io.BytesIO(content)


def _allowed_scheme(location: str, schemes: frozenset[str]) -> str | None:
    scheme = scheme_of(location)
    if scheme is not None and scheme not in schemes:
        allowed = ", ".join(sorted(schemes))
        raise BadInput(f"{location}: scheme {scheme!r} is not allowed; use a local path or one of {allowed}")
    return scheme


def _read_remote(location: str) -> bytes:
    filesystem, path = fsspec.url_to_fs(location)
    return filesystem.cat_file(path)
