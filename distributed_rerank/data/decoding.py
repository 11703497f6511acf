"""Image references to pixels, with a reason for every image that cannot be read. Layer 3.

Both extraction and scoring decode here, so that an image is accepted or rejected by one rule.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_image
from distributed_rerank.data.rejects import Reject
from distributed_rerank.data.transforms import InferenceTransform

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


def readable_ids(refs: Sequence[ImageRef]) -> set[str]:
    """Ids of the images that can be read now: some may have been repaired since they were rejected."""

    def is_readable(ref: ImageRef) -> bool:
        try:
            read_image(ref)
        except UnreadableImage:
            return False
        return True

    with ThreadPoolExecutor(_REJECT_THREADS) as pool:
        return {ref.id for ref, found in zip(refs, pool.map(is_readable, refs), strict=True) if found}


def _decode_one(ref: ImageRef, transform: InferenceTransform) -> Tensor | Reject:
    try:
        return transform(read_image(ref))
    except UnreadableImage as error:
        return Reject(ref.id, ref.path, error.reason)
