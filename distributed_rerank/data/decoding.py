"""Image references to pixels, with a reason for every image that cannot be read.

Both extraction and scoring decode here, so that an image is accepted or rejected by one rule.
"""

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_content, read_image
from distributed_rerank.data.images import decode as decode_content
from distributed_rerank.data.rejects import Reject
from distributed_rerank.data.transforms import InferenceTransform

MOST_READERS = 64
MOST_AHEAD = 2**28
"""Bytes of files that wait to be decoded or are being read, if each is as large as the largest so far."""
PATIENCE_S = 0.002
"""Waiting longer than this for a file that could have been read ahead is storage that is slow."""
_T = TypeVar("_T")
_REJECT_THREADS = 8
"""Rejects that are read again at the same time."""


@dataclass(frozen=True)
class Decoded:
    """The readable images of a block, in the block's order, and the others."""

    kept: list[int]
    """Positions in the block of the images in `pixels`."""
    pixels: UInt8[Tensor, "image 3 height width"]
    rejects: list[Reject]


def decode(refs: Sequence[ImageRef], transform: InferenceTransform, *, threads: int = 1) -> Decoded:
    """Read and resize a block of images. `threads` decode; they change the time only: the order is that of `refs`.

    Files are read ahead by further threads, as many as the storage is slow. Raises Outage where it does not answer.
    """
    contents = read_ahead(refs)
    if threads > 1 and len(refs) > 1:
        images = list(_on_threads(functools.partial(_decode_one, transform), refs, contents, threads))
    else:
        images = [_decode_one(transform, ref, content) for ref, content in zip(refs, contents, strict=True)]
    kept = [position for position, image in enumerate(images) if isinstance(image, Tensor)]
    pixels = [image for image in images if isinstance(image, Tensor)]
    return Decoded(
        kept=kept,
        pixels=torch.stack(pixels) if pixels else torch.empty((0, 3, *transform.size), dtype=torch.uint8),
        rejects=[image for image in images if isinstance(image, Reject)],
    )


def read_ahead(refs: Sequence[ImageRef]) -> Iterator[bytes | Reject]:
    """The contents of the images' files in their order, or why one cannot be read.

    One file is read at a time, as suits a local disk. Whenever the next one is not there in time, twice as many are
    read at a time, up to `MOST_READERS`: the slower the storage answers, the more requests are under way. Of large
    files no more than `MOST_AHEAD` bytes are.
    """
    todo, n_readers, largest = iter(refs), 1, 1
    pending: deque[Future[bytes | Reject]] = deque()
    try:
        while True:
            n_ahead = max(1, min(n_readers, MOST_AHEAD // largest))
            while len(pending) < n_ahead and (ref := next(todo, None)) is not None:
                pending.append(_readers().submit(_read_one, ref))
            if not pending:
                return
            began = time.perf_counter()
            content = pending.popleft().result()
            if time.perf_counter() - began > PATIENCE_S:
                n_readers = min(2 * n_readers, MOST_READERS)
            largest = max(largest, _size(content))
            yield content
    finally:
        for future in pending:
            future.cancel()


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read, kept: starting one waits for ever where the system has no memory for it (CPython)."""
    return ThreadPoolExecutor(MOST_READERS)


# The threads are not there in a forked process.
os.register_at_fork(after_in_child=_readers.cache_clear)


def readable_ids(refs: Sequence[ImageRef]) -> set[str]:
    """Ids of the images that can be read now: some may have been repaired since they were rejected."""

    def is_readable(ref: ImageRef) -> bool:
        try:
            read_image(ref, then=lambda picture: None)
        except UnreadableImage:
            return False
        return True

    with ThreadPoolExecutor(_REJECT_THREADS) as pool:
        return {ref.id for ref, found in zip(refs, pool.map(is_readable, refs), strict=True) if found}


def _on_threads(
    decode_one: Callable[[ImageRef, bytes | Reject], _T],
    refs: Sequence[ImageRef],
    contents: Iterator[bytes | Reject],
    threads: int,
) -> Iterator[_T]:
    """`map` on threads, with the contents taken no further ahead than the threads need or `MOST_AHEAD` allows."""
    pending: deque[tuple[Future[_T], int]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for ref, content in zip(refs, contents, strict=True):
            pending.append((pool.submit(copy_context().run, decode_one, ref, content), _size(content)))
            while len(pending) >= 2 * threads or sum(size for _, size in pending) > MOST_AHEAD:
                yield pending.popleft()[0].result()
        while pending:
            yield pending.popleft()[0].result()


def _size(content: bytes | Reject) -> int:
    return 0 if isinstance(content, Reject) else len(content)


def _read_one(ref: ImageRef) -> bytes | Reject:
    try:
        return read_content(ref)
    except UnreadableImage as error:
        return Reject(ref.id, ref.path, error.reason)


def _decode_one(transform: InferenceTransform, ref: ImageRef, content: bytes | Reject) -> Tensor | Reject:
    if isinstance(content, Reject):
        return content
    try:
        return decode_content(content, ref.box, then=transform, name=ref.path)
    except UnreadableImage as error:
        return Reject(ref.id, ref.path, error.reason)
