"""Images that are there twice: files of the same bytes among queries and gallery, or in train and validation.

Sizes are compared first, so that only files with a twin in size are read. Images in object stores are not looked at.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from stat import S_ISREG

import numpy as np
from jaxtyping import Int32, UInt64

from distributed_rerank.data.catalogue import Catalogue
from distributed_rerank.data.texts import parts_of
from distributed_rerank.storage import paths
from distributed_rerank.storage.files import bytes_digest, file_digest
from distributed_rerank.tensors import sharding

_THREADS = 16
_NO_FILE = -1
_ITEMS_PER_PART = 1 << 12


def count_same_bytes(measured: Catalogue, train: Catalogue | None = None) -> dict[str, int]:
    """Counts of images that are there twice, each with the same bytes and the same box.

    `queries_in_gallery`: queries with another gallery item of the same bytes; `queries_under_two_labels`: those of them
    where that item has another label; `measured_in_train`: measured images with one in `train`; `not_compared`: images
    that cannot be read here.
    """
    sides = [measured] if train is None else [measured, train]
    sizes = [_sizes(side) for side in sides]
    shared = _repeated(np.concatenate([own[own != _NO_FILE] for own in sizes]))
    (items, contents), *of_train = (_read(side, own, shared) for side, own in zip(sides, sizes, strict=True))
    is_read = contents != 0
    is_twin = np.isin(contents, _repeated(contents[is_read]))
    is_query, is_gallery = (measured.table[name].to_numpy(dtype=bool)[items] for name in ("is_query", "is_gallery"))
    gallery: dict[int, set[int]] = {}
    for item, content in zip(
        items[is_twin & is_gallery].tolist(), contents[is_twin & is_gallery].tolist(), strict=True
    ):
        gallery.setdefault(content, set()).add(item)
    queries = zip(items[is_twin & is_query].tolist(), contents[is_twin & is_query].tolist(), strict=True)
    twins = {item: gallery.get(content, set()) - {item} for item, content in queries}
    labels = measured.labels
    return {
        "queries_in_gallery": sum(bool(items) for items in twins.values()),
        "queries_under_two_labels": sum(
            bool(items) and bool(np.any(labels[list(items)] != labels[item])) for item, items in twins.items()
        ),
        "measured_in_train": int(np.isin(contents[is_read], of_train[0][1]).sum()) if of_train else 0,
        "not_compared": int((sizes[0] == _NO_FILE).sum() + (~is_read).sum()),
    }


def _repeated(values: np.ndarray) -> np.ndarray:
    """The distinct values that are there more than once, ascending."""
    ordered = np.sort(values)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _sizes(catalogue: Catalogue) -> Int32[np.ndarray, " item"]:
    """Bytes of each image's file, from 2 GiB on no longer told apart; `_NO_FILE` for what is no local file."""
    sizes = np.empty(len(catalogue), np.int32)
    start = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for paths in parts_of(catalogue.texts("path"), _ITEMS_PER_PART):
            found = np.fromiter(pool.map(_size, paths.to_pylist()), np.int64, len(paths))
            sizes[start : start + len(paths)] = found.clip(max=np.iinfo(np.int32).max)
            start += len(paths)
    return sizes


def _read(
    catalogue: Catalogue, sizes: Int32[np.ndarray, " item"], shared: Int32[np.ndarray, " size"]
) -> tuple[Int32[np.ndarray, " twin"], UInt64[np.ndarray, " twin"]]:
    """The items whose file has a `shared` size, and a number for each, the same for the same bytes and box; 0 = unread.

    One path in several rows, a shelf with boxes, is read once where its rows follow each other.
    """
    items = np.flatnonzero(np.isin(sizes, shared)).astype(np.int32)
    contents = np.zeros(len(items), np.uint64)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start, stop in sharding.blocks(len(items), _ITEMS_PER_PART):
            refs = catalogue.images(items[start:stop])
            paths = list(dict.fromkeys(ref.path for ref in refs))
            digests = dict(zip(paths, pool.map(_digest, paths), strict=True))
            for place, ref in enumerate(refs, start):
                if digests[ref.path]:
                    text = f"{digests[ref.path]} {ref.box}"
                    contents[place] = int(bytes_digest(text.encode())[:16], 16) or 1
    return items, contents


def _size(path: str) -> int:
    """Bytes of a local file; -1 for what is none."""
    if paths.scheme_of(path) not in (None, "file"):
        return -1
    try:
        found = os.stat(paths.absolute(path))
    except (OSError, ValueError):
        return -1
    return found.st_size if S_ISREG(found.st_mode) else -1


def _digest(path: str) -> str:
    try:
        return file_digest(paths.absolute(path))
    except OSError:
        return ""
