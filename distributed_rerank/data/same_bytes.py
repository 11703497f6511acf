"""Images that are there twice: files of the same bytes among queries and gallery, or in train and validation.

Sizes are compared first, so that only files with a twin in size are read. Images in object stores are not looked at.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

import numpy as np

from distributed_rerank.data import locations
from distributed_rerank.data.catalogue import Catalogue, ImageRef
from distributed_rerank.data.files import file_digest

_THREADS = 16


def count_same_bytes(measured: Catalogue, train: Catalogue | None = None) -> dict[str, int]:
    """Counts of images that are there twice, each with the same bytes and the same box.

    `queries_in_gallery`: queries with another gallery item of the same bytes; `queries_under_two_labels`: those of them
    where that item has another label; `measured_in_train`: measured images with one in `train`; `not_compared`: images
    that cannot be read here.
    """
    refs = measured.images()
    digests = _digests([*refs, *([] if train is None else train.images())])
    own, trained = digests[: len(refs)], {digest for digest in digests[len(refs) :] if digest}
    gallery: dict[str, set[int]] = {}
    for item in measured.gallery_items.tolist():
        if own[item]:
            gallery.setdefault(own[item], set()).add(item)
    twins = {item: gallery.get(own[item], set()) - {item} for item in measured.query_items.tolist()}
    labels = measured.labels
    return {
        "queries_in_gallery": sum(bool(items) for items in twins.values()),
        "queries_under_two_labels": sum(
            bool(items) and bool(np.any(labels[list(items)] != labels[item])) for item, items in twins.items()
        ),
        "measured_in_train": sum(digest in trained for digest in own if digest),
        "not_compared": sum(not digest for digest in own),
    }


def _digests(refs: Sequence[ImageRef]) -> list[str]:
    """A text for each image, the same for the same bytes and box; "" for one that cannot be read here."""
    # One path in several rows, a shelf with boxes, is one file.
    paths = list(dict.fromkeys(ref.path for ref in refs))
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(paths, pool.map(_size, paths), strict=True))
        counts: dict[int, int] = {}
        for size in sizes.values():
            counts[size] = counts.get(size, 0) + 1
        twins = [path for path, size in sizes.items() if size >= 0 and counts[size] > 1]
        read = dict(zip(twins, pool.map(_digest, twins), strict=True))
    alone = {
        path: hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest() for path in paths if sizes[path] >= 0
    }
    files = alone | read
    return [f"{files[ref.path]} {ref.box}" if files.get(ref.path) else "" for ref in refs]


def _size(path: str) -> int:
    """Bytes of a local file; -1 for what is none."""
    if locations.scheme_of(path) not in (None, "file"):
        return -1
    try:
        found = Path(locations.absolute(path)).stat()
    except (OSError, ValueError):
        return -1
    return found.st_size if S_ISREG(found.st_mode) else -1


def _digest(path: str) -> str:
    try:
        return file_digest(locations.absolute(path))
    except OSError:
        return ""
