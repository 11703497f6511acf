"""The first half of extraction on Ray Data: blocks of image references as rows, decoded.

A module of its own, since nothing of the models is imported here: a process that only decodes starts in half the time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.rejects import reject_table
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.runtime import logs
from distributed_rerank.storage.paths import ImageRoots

_BLOCKS_PER_PART = 64
_BOX = pa.list_(pa.int64())


def manifest(blocks: Sequence[tuple[int, Sequence[ImageRef]]]) -> list[pa.Table]:
    """One row per block, in parts small enough to be objects of their own."""
    texts = pa.list_(pa.string())
    schema = pa.schema(
        {"block": pa.int64(), "ids": texts, "paths": texts, "boxes": pa.list_(_BOX), "roots": pa.string()}
    )
    parts = [blocks[start : start + _BLOCKS_PER_PART] for start in range(0, len(blocks), _BLOCKS_PER_PART)]
    return [pa.Table.from_pylist([_row(number, list(refs)) for number, refs in part], schema=schema) for part in parts]


def _row(number: int, refs: list[ImageRef]) -> dict[str, Any]:
    return {
        "block": number,
        "ids": [ref.id for ref in refs],
        "paths": [ref.path for ref in refs],
        "boxes": [None if ref.box is None else list(ref.box) for ref in refs],
        "roots": json.dumps(asdict(refs[0].roots if refs else ImageRoots())),
    }


def decode_row(row: pa.Table, *, transform: InferenceTransform, threads: int, about: dict[str, Any]) -> pa.Table:
    """The row of a block with its pixels [image, 3, height, width] as bytes, and what could not be read."""
    refs = _refs(row)
    logs.configure_worker()
    with logs.about(**about, block=row["block"][0].as_py()):
        decoded = decode(refs, transform, threads=threads)
    pixels = decoded.pixels.numpy()
    rejects = reject_table(decoded.rejects, "embed")
    return pa.table(
        {
            "block": row["block"],
            "ids": pa.array([[refs[position].id for position in decoded.kept]], pa.list_(pa.string())),
            "rejects": pa.array([rejects.to_pylist()], pa.list_(pa.struct(rejects.schema))),
            "shape": [list(pixels.shape)],
            "pixels": as_binary(pixels),
        }
    )


def _refs(row: pa.Table) -> list[ImageRef]:
    ids, paths, boxes, roots = (row[name][0].as_py() for name in ("ids", "paths", "boxes", "roots"))
    boxes = [None if box is None else tuple(box) for box in boxes]
    image_roots = ImageRoots(**{name: tuple(places) for name, places in json.loads(roots).items()})
    return [ImageRef(*image, image_roots) for image in zip(ids, paths, boxes, strict=True)]


def as_binary(array: np.ndarray) -> pa.Array:
    """The bytes of an array as one binary value, without a copy."""
    data = np.ascontiguousarray(array)
    offsets = np.array([0, data.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
