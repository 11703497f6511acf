"""Image references to pixels, with a reason for every image that cannot be read. Layer 3.

Both extraction and scoring decode here, so that an image is accepted or rejected by one rule.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import UInt8
from torch import Tensor

from distributed_rerank.data import tables
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput


@dataclass(frozen=True)
class Reject:
    """An image that could not be read, and why."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Decoded:
    """The readable images of a block, in the block's order, and the others."""

    kept: list[int]
    """Positions in the block of the images in `pixels`."""
    pixels: UInt8[Tensor, "image 3 height width"]
    rejects: list[Reject]


def decode(refs: Sequence[ImageRef], transform: InferenceTransform, *, threads: int = 1) -> Decoded:
    """Read and resize a block of images. `threads` changes the time only: the order is that of `refs`."""
    if threads > 1 and len(refs) > 1:
        with ThreadPoolExecutor(min(threads, len(refs))) as pool:
            images = list(pool.map(lambda ref: _decode_one(ref, transform), refs))
    else:
        images = [_decode_one(ref, transform) for ref in refs]
    kept = [position for position, image in enumerate(images) if isinstance(image, Tensor)]
    pixels = [image for image in images if isinstance(image, Tensor)]
    return Decoded(
        kept=kept,
        pixels=torch.stack(pixels) if pixels else torch.empty((0, 3, *transform.size), dtype=torch.uint8),
        rejects=[image for image in images if isinstance(image, Reject)],
    )


def is_readable(ref: ImageRef) -> bool:
    """Whether the image can be read now (it may have been repaired since it was rejected)."""
    try:
        read_image(ref)
    except UnreadableImage:
        return False
    return True


def check_rejects(rejects: Sequence[Reject], n_images: int, max_rejects: float, table: str) -> None:
    """Raise BadInput, naming count, share, first reasons and the `table` with all, when more than the share
    `max_rejects` of `n_images` images could not be read."""
    if len(rejects) <= max_rejects * n_images:
        return
    first = "; ".join(f"{reject.id}: {reject.reason}" for reject in rejects[:3])
    raise BadInput(
        f"{len(rejects)} of {n_images} images ({len(rejects) / n_images:.2%}) cannot be read, more than "
        f"max_rejects={max_rejects:.2%} allows ({first}); all reasons are in {table}; "
        "repair them or raise --max-rejects"
    )


def reject_table(rejects: Sequence[Reject], stage: str) -> pa.Table:
    """The rows of the rejects table for images rejected in `stage`, in the order given."""
    columns = {
        "id": [reject.id for reject in rejects],
        "path": [reject.path for reject in rejects],
        "stage": [stage] * len(rejects),
        "reason": [reject.reason for reject in rejects],
    }
    return pa.table(columns, schema=tables.SCHEMAS["rejects"])


def rejects_of(table: pa.Table) -> list[Reject]:
    """The images of a rejects table."""
    return [Reject(row["id"], row["path"], row["reason"]) for row in table.to_pylist()]


def _decode_one(ref: ImageRef, transform: InferenceTransform) -> Tensor | Reject:
    try:
        return transform(read_image(ref))
    except UnreadableImage as error:
        return Reject(ref.id, ref.path, error.reason)
