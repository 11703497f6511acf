"""Where bytes lie: local paths and URIs, read in one way for tables and images.

Paths come from tables that somebody else may have written. So only listed URI schemes are opened, and nothing in a URI
can change the server or the credentials that are used.
"""

import functools
import io
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fsspec

from distributed_rerank.errors import BadInput
from distributed_rerank.storage import object_store
from distributed_rerank.storage.paths import absolute, scheme_of

SCHEMES = frozenset({"file", "hf"}) | object_store.SCHEMES
_HOSTS = {
    "s3": re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE),
    "abfs": re.compile(r"[a-z0-9$-]+(@[a-z0-9]+\.(dfs|blob)\.core\.windows\.net)?", re.IGNORECASE),
    "hf": re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE),
}
"""What may stand between :// and the next slash, by scheme: a bucket's name, without server, user or query string."""
_HOSTS |= {"gs": _HOSTS["s3"], "gcs": _HOSTS["s3"], "az": _HOSTS["abfs"]}
PAUSES_S = (0.5, 2.0)
"""Seconds between the tries of a store that does not answer."""
_FAILED: set[str] = set()
_OUTAGE = re.compile(
    r"NETWORK_CONNECTION|curlCode|time[d-]? ?out|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|HTTP (status )?5\d\d"
    r"|\b50[0-4]\b|Connect(ion)?Error|ServerError|OfflineMode|LocalEntryNotFound|resolve host|getaddrinfo",
    re.IGNORECASE,
)


class StoreUnreachable(OSError):
    """A store that does not answer, or fails by its own account; that says nothing about the file."""


def read_bytes(location: str, schemes: frozenset[str] = SCHEMES, max_bytes: int | None = None) -> bytes:
    """All bytes at a local path or URI: of a regular file, and of no more than `max_bytes`.

    A scheme outside `schemes` (http and https must be asked for) or one whose driver is not installed raises
    BadInput; a missing, unreadable or larger file raises OSError. A bucket that does not answer raises Outage, the hub
    StoreUnreachable, after some more tries.
    """
    scheme = _allowed_scheme(location, schemes)
    if scheme in (None, "file"):
        return _read_local(absolute(location), max_bytes)
    if scheme in object_store.SCHEMES:
        return object_store.read(location, max_bytes)
    try:
        return read_with_patience(lambda: _read_remote(location, scheme, max_bytes), location)
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
    if scheme not in (None, "file"):
        _check_host(location, scheme)
    return scheme


def _check_host(location: str, scheme: str) -> None:
    """Raises BadInput for a URI that names more than a bucket and a path in it.

    `s3://b?endpoint_override=HOST` would send credentials to HOST, `s3://user:word@b` use others, and `hf://x::http://y`
    open a second URI.
    """
    rest = location.partition("://")[2]
    host = rest.partition("/")[0]
    known = _HOSTS.get(scheme)
    if known is not None and not known.fullmatch(host):
        raise BadInput(
            f"{location}: {host!r} is no name of a bucket; servers, credentials and options are taken from the "
            "environment (such as AWS_ENDPOINT_URL) and never from a path"
        )
    if scheme not in object_store.SCHEMES and ("::" in rest or "?" in rest):
        raise BadInput(f"{location}: a URI with '::' or '?' may point elsewhere; name the file itself")


def _read_local(path: str, max_bytes: int | None) -> bytes:
    """The bytes of a regular file. Nothing else is opened: a pipe would block for ever, a device has no end."""
    try:
        _check_regular(os.stat(path), max_bytes)
        # Without waiting, should it have become a pipe since.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(found, max_bytes)
            # Memory is taken for as much as is asked for, so not for `max_bytes`.
            content = file.read() if max_bytes is None else file.read(found.st_size + 1)
    except ValueError as error:  # a NUL, or what no file name can hold
        raise OSError(f"no path of a file ({error})") from error
    _check_size(len(content), max_bytes)
    return content


def _check_regular(found: os.stat_result, max_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise OSError(f"no regular file but a {kinds.get(stat.S_IFMT(found.st_mode), 'device')}")
    _check_size(found.st_size, max_bytes)


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OSError(f"{size} bytes or more exceed the limit of {max_bytes}")


def _read_remote(location: str, scheme: str | None, max_bytes: int | None) -> bytes:
    if scheme == "hf" and not hub_answers():
        raise StoreUnreachable("the Hugging Face hub does not answer")
    filesystem, path = fsspec.url_to_fs(location)
    _check_size(int(filesystem.size(path) or 0), max_bytes)
    return filesystem.cat_file(path)


def read_with_patience(read: Callable[[], bytes], location: str) -> bytes:
    """What `read` returns; again after `PAUSES_S` where the store is at fault, then StoreUnreachable.

    Once a store has failed for good, its next reads are tried once each until one succeeds.
    """
    store = "/".join(location.split("/")[:3])
    for pause in (*(() if store in _FAILED else PAUSES_S), None):
        try:
            content = read()
        except Exception as error:
            if not is_outage(error):
                raise error if isinstance(error, OSError | ImportError | ValueError) else OSError(str(error)) from error
            if pause is None:
                _FAILED.add(store)
                kind = "" if isinstance(error, StoreUnreachable) else f"{type(error).__name__}: "
                raise StoreUnreachable(" ".join(f"{kind}{error}".split())[:200]) from error
            time.sleep(pause)
        else:
            _FAILED.discard(store)
            return content
    raise AssertionError("the last try has no pause behind it")


def is_outage(error: Exception) -> bool:
    """Whether an error of a read speaks of the store or the network, and not of the file."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return isinstance(error, StoreUnreachable | ConnectionError | TimeoutError) or bool(
        _OUTAGE.search(f"{type(error).__name__}: {error}")
    )


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, asked at most once a minute; its own client asks for 47 seconds."""
    return _hub_answers(int(time.monotonic() // 60))


@contextmanager
def asking_hub() -> Iterator[None]:
    """Inside, the hub's client looks in its cache alone where the hub does not answer, and so fails at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.lru_cache(maxsize=1)
def _hub_answers(minute: int) -> bool:
    del minute  # only to ask again in the next one
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # that is an answer
    except OSError:
        return False
    return True
