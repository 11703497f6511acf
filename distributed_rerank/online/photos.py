"""Photos in any of the forms that a program has them: a path, the bytes of a file, a Pillow image, a box in a file."""

import hashlib
import os
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from distributed_rerank.data import images
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.transforms import InferenceTransform
from distributed_rerank.errors import BadInput
from distributed_rerank.storage.paths import scheme_of

Photo = str | Path | bytes | Image.Image | ImageRef


def source_of(photo: Photo) -> tuple[Any, ...]:
    """What tells this photo from others: where it is, its box, size and time of change; or the digest of its bytes."""
    if isinstance(photo, ImageRef):
        return (*source_of(photo.path), *(photo.box or ()))
    if isinstance(photo, str | Path):
        path = str(photo)
        if scheme_of(path) is not None:
            return ("file", path)
        try:
            found = os.stat(path)
        except OSError:
            return ("file", os.path.abspath(path), None, None)
        return ("file", os.path.abspath(path), found.st_size, found.st_mtime_ns)
    if isinstance(photo, bytes):
        return ("bytes", hashlib.sha256(photo).hexdigest())
    return ("picture", *photo.size, photo.mode, hashlib.sha256(photo.tobytes()).hexdigest())


def photo_of(source: tuple[Any, ...]) -> Photo | None:
    """The photo of a source, if it can be opened again; None = it was given as bytes or as a picture."""
    if source[0] != "file":
        return None
    is_remote = scheme_of(source[1]) is not None
    box = source[2:] if is_remote else source[4:]
    return ImageRef("", source[1], box or None)


def pixels_of(
    photo: Photo, transform: InferenceTransform, max_pixels: int = images.MAX_PIXELS
) -> UInt8[Tensor, "3 height width"]:
    """The pixels for a model. Raises UnreadableImage with the reason, and BadInput for what is no photo."""
    if isinstance(photo, str | Path):
        photo = ImageRef("", str(photo))
    if isinstance(photo, ImageRef):
        return images.read_image(photo, max_pixels, then=transform)
    if isinstance(photo, bytes):
        return images.decode(photo, max_pixels=max_pixels, then=transform)
    if isinstance(photo, Image.Image):
        return transform(images.to_rgb(photo))
    raise BadInput(f"{type(photo).__name__} is no photo; give a path, the bytes of a file, or a Pillow image")
