"""A request of a client as JSON, checked."""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from distributed_rerank.config.serving import ServeConfig
from distributed_rerank.errors import BadInput

Item = str | bytes
"""An id of the cache, or the bytes of an image."""
_FIELDS = ("query", "documents", "top_n", "distances", "model", "return_documents")
_DATA = re.compile(r"data:[\w/+.-]*;base64,")


@dataclass(frozen=True)
class RerankRequest:
    """What a client asks."""

    query: Item
    documents: tuple[Item, ...]
    distances: tuple[float, ...] | None
    """Of the first stage, one for each document."""
    top_n: int | None
    """How many results are wanted; None = all."""


def read_request(body: bytes, limits: ServeConfig) -> RerankRequest:
    """The request in a body of JSON. Raises BadInput, in one line, for whatever else it is."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput('the body is no JSON; send {"query": ..., "documents": [...]}') from None
    if not isinstance(content, dict) or not {"query", "documents"} <= content.keys():
        raise BadInput("the body must be an object with the fields query and documents")
    unknown = sorted(content.keys() - set(_FIELDS))
    if unknown:
        raise BadInput(f"there is no field {_short(unknown[0])}; fields are {', '.join(_FIELDS)}")
    if content.get("return_documents"):
        raise BadInput("return_documents is not supported; results carry the index of each document")
    documents, top_n = content["documents"], content.get("top_n")
    if not isinstance(documents, list) or not documents:
        raise BadInput("documents must be a list of at least one document")
    if len(documents) > limits.max_documents:
        raise BadInput(f"{len(documents)} documents exceed the limit of {limits.max_documents}")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise BadInput(f"top_n={_short(top_n)} must be a whole number of at least 1")
    return RerankRequest(
        _item(content["query"], "the query"),
        tuple(_item(document, f"document {index}") for index, document in enumerate(documents)),
        _distances(content.get("distances")),
        None if top_n is None else min(top_n, len(documents)),
    )


def _item(value: Any, what: str) -> Item:
    if isinstance(value, dict) and len(value) == 1:
        kind, content = next(iter(value.items()))
        if isinstance(content, str) and kind in ("id", "image"):
            return content if kind == "id" else _image(content, what)
    if not isinstance(value, str):
        raise BadInput(f'{what} must be an id, {{"id": ...}} or {{"image": BASE64}}')
    return _image(value, what) if _DATA.match(value) else value


def _image(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(_DATA.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError):
        raise BadInput(f"{what} is no base64; addresses and paths are not opened, send the bytes") from None


def _distances(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise BadInput("distances must be a list of numbers, one for each document")
    try:
        return tuple(float(value) for value in values)
    except OverflowError:
        raise BadInput("a distance is too large for a number of 64 bits") from None


def _short(value: Any) -> str:
    return repr(value)[:60]
