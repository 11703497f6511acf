"""Paths and URIs, joined and made absolute, and the folders in which the images of a table may lie."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from distributed_rerank.errors import BadInput

_PSEUDO = ("/proc", "/sys", "/dev")
"""Folders whose files are no files: memory, devices, settings of the kernel."""
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


@dataclass(frozen=True)
class ImageRoots:
    """Where the images of a table may lie."""

    folders: tuple[str, ...] = ()
    """Those of the tables themselves, absolute; a relative path must not leave its table's folder."""
    given: tuple[str, ...] = ()
    """Folders and URIs of --image-root: all images lie below one of them, links followed. None: also where the table's
    absolute paths and URIs point to; but a table in an object store names no local file."""

    def problem(self, path: str) -> str:
        """Why an image at `path`, absolute or a URI, is not read; "" where it may be."""
        try:
            if b"\0" in os.fsencode(path):
                return "no path of a file: it holds a NUL"
        except UnicodeEncodeError:
            return "no path of a file: it holds half a character"
        is_local = scheme_of(path) in (None, "file")
        local = os.path.normpath(absolute(path)) if is_local else ""
        if is_local and _is_below(os.path.realpath(local), _PSEUDO):
            return "no image file, but a device or a file of the kernel"
        if self.given:
            is_inside = _is_below(os.path.realpath(local), map(os.path.realpath, self.given)) if is_local else False
            is_inside |= not is_local and ".." not in path.split("/") and _is_below(path, self.given)
            return "" if is_inside else "outside --image-root"
        if not is_local:
            return "'..' in a URI" if ".." in path.split("/") else ""
        if self.folders and all(scheme_of(folder) for folder in self.folders):
            return "a local path in a table that is not local; allow it with --image-root"
        leaves = [folder for folder in self.folders if path.startswith(f"{folder}/")]
        if ".." in path.split("/") and leaves and not _is_below(local, map(os.path.normpath, leaves)):
            return "the path leaves the folder of the table; allow it with --image-root"
        return ""


def make_roots(folders: Sequence[str], given: Sequence[str]) -> ImageRoots:
    """The roots of tables in these folders. Raises BadInput for one of `given` that is no folder."""
    roots = tuple(absolute(root).rstrip("/") or "/" for root in given)
    for root in roots:
        if scheme_of(root) is None and not os.path.isdir(root):
            raise BadInput(f"--image-root {root} is no folder; check the path")
    return ImageRoots(tuple(folders), roots)


def _is_below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in roots)


def folder_of(location: str) -> str:
    """Where relative paths of the table at `location` start from, without a final slash."""
    return absolute(location).rpartition("/")[0]


def join(folder: str, path: str) -> str:
    """`path` below `folder`; an absolute path or a URI is kept as it is."""
    if path.startswith("/") or scheme_of(path):
        return path
    return f"{folder}/{path}"
