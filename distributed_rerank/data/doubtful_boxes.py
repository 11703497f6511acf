"""Boxes that are no corners in pixels of their files: the sizes of some pictures tell it."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float64

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage, read_size
from distributed_rerank.errors import Outage

logger = logging.getLogger(__name__)

_LOOKED_AT, _THREADS = 200, 4
_SLACK = 0.02
"""Share of a side by which boxes may miss: a detector's reach a little out of the picture."""
_ENOUGH = 20
"""Sides of different boxes that must agree: by chance they do once in a million tables."""


def tell_of_doubtful_boxes(refs: Sequence[ImageRef]) -> None:
    """Warn where boxes reach out of their pictures, or look like left, top, width and height.

    Looks at the sizes of some pictures, evenly spaced. What is read as two corners may be a corner and a size where
    every box would then lie in its picture: of two corners it says that all boxes have their centre in the upper left
    quarter.
    """
    places = np.unique(np.linspace(0, len(refs) - 1, _LOOKED_AT).astype(int)).tolist() if len(refs) else []
    chosen = [ref for ref in (refs[place] for place in places) if ref.box is not None]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(_size, chosen))
    read = [(ref, size) for ref, size in zip(chosen, sizes, strict=True) if size is not None]
    if not read:
        return
    side = np.array([size for _, size in read], np.float64)
    boxes = np.array([ref.box for ref, _ in read], np.float64)
    outside = (boxes[:, 2:] > side * (1 + _SLACK) + 1).any(axis=1)
    if outside.any():
        ref, size = read[int(outside.argmax())]
        logger.warning(
            "%d OF %d BOXES REACH OUT OF THEIR PICTURES and are cut off there, first that of %r: %s in %d x %d pixels; "
            "boxes are left, top, right, bottom in pixels of the file",
            outside.sum(), len(read), ref.id, ref.box, *size,
        )  # fmt: skip
    elif _are_corner_and_size(boxes, side):
        logger.warning(
            "BOXES LOOK LIKE LEFT, TOP, WIDTH, HEIGHT: as corners all %d looked at have their centre in the upper left "
            "quarter of the picture; if so, add x_1 to x_2 and y_1 to y_2. Or they count pixels of smaller pictures",
            len(read),
        )


def _are_corner_and_size(boxes: Float64[np.ndarray, "image 4"], side: Float64[np.ndarray, "image 2"]) -> bool:
    free = side - boxes[:, :2] - boxes[:, 2:]
    # Where the box begins at the edge, or lies in the middle, both readings are as good.
    says = (boxes[:, :2] > 0) & (free > _SLACK * side)
    distinct = np.unique(boxes[says.any(axis=1)], axis=0, return_index=True)[1]
    return bool((free >= 0).all() and says[says.any(axis=1)][distinct].sum() >= _ENOUGH)


def _size(ref: ImageRef) -> tuple[int, int] | None:
    try:
        return read_size(ref)
    except (UnreadableImage, Outage):
        return None  # a reject, or told, when its pixels are read
