"""Objects of a bucket: read, write, list, delete, each by URI and with one request an object.

s3://bucket/key, gs://bucket/key, az://container/key and abfs://container@account.dfs.core.windows.net/key. Credentials,
region and endpoint come from the environment (AWS_..., GOOGLE_..., AZURE_...) or from the machine's role, never from a
URI: a key is sent as it is, whatever it holds. Failed requests are repeated for up to half a minute; what is still
unanswered then is an Outage.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from distributed_rerank.errors import BadInput, Outage

SCHEMES = frozenset({"s3", "gs", "gcs", "az", "abfs"})
_URI = re.compile(r"(s3|gs|gcs|az|abfs)://([A-Za-z0-9][\w.@-]*)(?:/(.*))?", re.DOTALL | re.IGNORECASE)
_RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
_CLIENT: Any = {
    "connect_timeout": timedelta(seconds=10),
    "timeout": timedelta(seconds=60),
    "pool_max_idle_per_host": "64",
}
_BODY_ATTEMPTS = 5
"""A body that breaks off is asked for again; the client itself repeats requests without an answer only."""
Tag = Mapping[str, Any]
"""What a store calls one version of an object."""


class Conflict(Exception):
    """The object was written by somebody else since it was read, or is there although it should not be."""


def is_object(location: str) -> bool:
    """Whether this is the URI of an object or of a folder of objects."""
    return _URI.fullmatch(location) is not None


def read(uri: str, max_bytes: int | None = None) -> bytes:
    """All bytes of an object, by one GET.

    Raises FileNotFoundError, PermissionError and Outage, and OSError for more than `max_bytes`, before they are read.
    """
    return read_tagged(uri, max_bytes)[0]


def read_tagged(uri: str, max_bytes: int | None = None) -> tuple[bytes, Tag]:
    """The bytes of an object, and the tag of this version for `write`; raises as `read` does."""
    import obstore

    store, key = _place(uri)
    for attempt in range(_BODY_ATTEMPTS):
        with _translated(uri):
            answer = obstore.get(store, key)
            size = answer.meta["size"]
            if max_bytes is not None and size > max_bytes:
                raise OSError(f"{size} bytes exceed the limit of {max_bytes}")
            try:
                content = bytes(answer.bytes())
            except Exception:
                if attempt == _BODY_ATTEMPTS - 1:
                    raise
                continue
            return content, _tag(answer.meta)
    raise AssertionError("the last attempt returns or raises")


def write(uri: str, content: bytes | Path, *, replaces: Tag | str | None = "anything") -> Tag:
    """Write an object whole, in parts where it is large; returns the tag of the new version.

    With `replaces` None it must not be there yet, with a tag it must still have that tag, or Conflict is raised.
    """
    import obstore

    store, key = _place(uri)
    mode: Any = "create" if replaces is None else "overwrite" if isinstance(replaces, str) else replaces
    with _translated(uri):
        # A conditional request cannot be made in parts.
        parts = None if mode == "overwrite" else False
        return _tag(obstore.put(store, key, content, mode=mode, use_multipart=parts))


def sizes(folder: str) -> dict[str, int]:
    """The objects below a folder's URI: their sizes by their name within it, however many there are."""
    import obstore

    store, key = _place(folder)
    prefix = key.rstrip("/") + "/" if key else ""
    with _translated(folder):
        found = [meta for batch in obstore.list(store, prefix or None) for meta in batch]
    return {meta["path"].removeprefix(prefix): meta["size"] for meta in found}


def delete(folder: str, names: list[str]) -> None:
    """Delete these objects of a folder; absent ones are no error."""
    import obstore

    store, key = _place(folder)
    prefix = key.rstrip("/") + "/" if key else ""
    for name in names:
        with _translated(f"{folder}/{name}"):
            try:
                obstore.delete(store, prefix + name)
            except FileNotFoundError:
                continue


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """The client's errors as the built-in ones, Conflict and Outage."""
    from obstore import exceptions as client

    try:
        yield
    except (client.AlreadyExistsError, client.PreconditionError) as error:
        raise Conflict(f"{uri} was written by another process") from error
    except (client.PermissionDeniedError, client.UnauthenticatedError) as error:
        raise PermissionError(
            f"{uri}: the store refuses access ({_status(error)}); check keys, role and bucket"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{uri} does not exist") from error
    except client.NotSupportedError as error:
        raise BadInput(f"{uri}: the store cannot do this ({_status(error)}); use another store") from error
    except client.BaseError as error:
        raise Outage(f"{uri}: the store does not answer ({_status(error)}); the same command goes on later") from error


def _status(error: BaseException) -> str:
    """The informative part of the client's message, on one line."""
    text = " ".join(str(error).split())
    found = re.search(r"non-2xx status code: (\d{3} [A-Za-z ]+)", text)
    return found.group(1).strip() if found else text[:200]


def _tag(answer: Mapping[str, Any]) -> Tag:
    return {name: answer[name] for name in ("e_tag", "version") if answer[name] is not None}


def _place(uri: str) -> tuple[Any, str]:
    found = _URI.fullmatch(uri)
    if found is None:
        raise BadInput(f"{uri} is no URI of a bucket; write it as s3://bucket/folder")
    scheme, host, key = found.groups()
    return _store(scheme.lower(), host), (key or "").strip("/")


@functools.lru_cache(maxsize=64)
def _store(scheme: str, host: str) -> Any:
    """One client a bucket and process."""
    from obstore.store import AzureStore, GCSStore, S3Store

    options: dict[str, Any] = {"retry_config": _RETRIES}
    if scheme in ("gs", "gcs"):
        return GCSStore(host, client_options=_CLIENT, **options)
    if scheme in ("az", "abfs"):
        container, _, account = host.partition("@")
        named = {"account_name": account.split(".")[0]} if account else {}
        return AzureStore(container, client_options=_CLIENT, **named, **options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["endpoint"] = endpoint
    elif not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        from pyarrow.fs import resolve_s3_region

        with _translated_region(host):
            options["region"] = resolve_s3_region(host)
    allow_http = bool(endpoint) and endpoint.startswith("http://")  # pyright: ignore[reportOptionalMemberAccess]
    return S3Store(host, client_options=_CLIENT | {"allow_http": allow_http}, **_profile(), **options)


@contextmanager
def _translated_region(bucket: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"s3://{bucket}: its region cannot be found ({error}); check the name, or set AWS_REGION"
        raise BadInput(message) from error


def _profile() -> dict[str, Any]:
    """Credentials of an AWS profile or of a login, which boto3 knows; the client itself knows keys and roles."""
    is_login = "AWS_PROFILE" in os.environ or Path("~/.aws/config").expanduser().is_file()
    if "AWS_ACCESS_KEY_ID" in os.environ or not is_login:
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise BadInput(
            "an AWS profile needs boto3; install distributed_rerank[aws], or set AWS_ACCESS_KEY_ID"
        ) from error
    return {"credential_provider": Boto3CredentialProvider()}
