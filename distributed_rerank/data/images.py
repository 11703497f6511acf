"""Image files to RGB pictures, or the reason why not.

Only JPEG, PNG, WebP, BMP, GIF, TIFF and, where this Pillow decodes it, AVIF are opened, and the size in the header is
checked before anything is decoded. With these limits an image costs 40 seconds of one CPU at the worst (run-length BMP
of 200 MB; 100 million pixels take 1 to 8 seconds in every other format), so there is no clock. Only the scans of a
progressive JPEG could take hours; they are counted first. No process-wide setting of Pillow is read or changed, except
that libtiff writes nothing to standard error, and that Pillow itself refuses images above twice
`PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels as shipped), whatever `max_pixels` says.
"""

import ctypes
import functools
import io
import os
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError, features

from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.image_warnings import warnings_of
from distributed_rerank.data.pictures import DAMAGE, Box, Picture, UnreadableImage, orientation_of
from distributed_rerank.data.rejects import OUTAGE
from distributed_rerank.errors import BadInput
from distributed_rerank.runtime.memory import give_back_memory
from distributed_rerank.storage import locations, paths
from distributed_rerank.storage.locations import StoreUnreachable, read_bytes

__all__ = ["MAX_PIXELS", "UnreadableImage", "decode", "read_bytes", "read_content", "read_image", "to_rgb"]

MAX_PIXELS = 100_000_000
MAX_SIDE = 100_000
"""Pixels: rows are resized before columns, and all of them are held in between."""
LARGE = 2**24
"""Pixels; pictures with more are decoded one at a time and never held as a whole."""
MAX_BYTES = 200_000_000
"""Of a file, checked before it is read."""
MAX_SCANS = 100
"""Of a progressive JPEG, as libtiff has it; encoders write a dozen, and each costs a pass over the picture."""
MAPS = Path("/proc/self/maps")
"""The libraries of this process."""
_one_at_a_time = threading.Lock()
HAS_AVIF = "avif" in features.modules and features.check_module("avif")
"""Pillow decodes it from 11.3 on."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if HAS_AVIF else ()))


def whole(picture: Image.Image | Picture) -> Image.Image:
    """A picture of any size as Pillow's."""
    return picture.whole() if isinstance(picture, Picture) else picture


def read_image(
    ref: ImageRef,
    max_pixels: int = MAX_PIXELS,
    schemes: frozenset[str] = locations.SCHEMES,
    then: Callable[[Any], Any] = whole,
) -> Any:
    """The picture of `ref` as mode RGB, cut to its box, or what `then` makes of it, as in `decode`.

    Whatever is wrong with the file: UnreadableImage.
    """
    return decode(read_content(ref, schemes), ref.box, max_pixels, then, ref.path)


def read_size(ref: ImageRef) -> tuple[int, int]:
    """Width and height of the whole upright picture, whose pixels are not decoded. Raises as `read_content` does."""
    content = read_content(ref)
    with warnings_of(ref.path), _explained(content), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return Picture(image, orientation_of(image)).size


def read_content(ref: ImageRef, schemes: frozenset[str] = locations.SCHEMES) -> bytes:
    """The bytes of the file of `ref`. Raises UnreadableImage, and Outage where a store does not answer."""
    problem = ref.roots.problem(ref.path)
    if problem:
        raise UnreadableImage(problem)
    try:
        return read_bytes(ref.path, schemes, MAX_BYTES)
    except FileNotFoundError:
        raise UnreadableImage(f"file not found{_other_spelling(ref)}") from None
    except StoreUnreachable as error:
        raise UnreadableImage(_line(OUTAGE, error)) from error
    except OSError as error:
        raise UnreadableImage(_line("cannot be read", error)) from error
    except BadInput as error:
        raise UnreadableImage(str(error)) from error


def _other_spelling(ref: ImageRef) -> str:
    """Names a file that is there under another spelling of a path that is not."""
    if paths.scheme_of(ref.path) is not None:
        return ""
    forms = [ref.path.replace("\\", "/"), unquote(ref.path), ref.path.strip()]
    forms += [unicodedata.normalize(form, ref.path) for form in ("NFC", "NFD")]
    there = (form for form in forms if form != ref.path and not ref.roots.problem(form) and os.path.isfile(form))
    return next((f"; there is {os.path.basename(form)!a}, write the path so" for form in there), "")


def decode(
    content: bytes,
    box: Box | None = None,
    max_pixels: int = MAX_PIXELS,
    then: Callable[[Any], Any] = whole,
    name: str = "an image given as bytes",
) -> Any:
    """The first frame in a file's bytes, upright (EXIF), as mode RGB, cut to `box`; or what `then` makes of it.

    Transparent parts become white; 16-bit grey is scaled, not clipped. `box` (left, top, right, bottom)
    counts pixels of the upright picture, as an annotator sees it, and is clipped to it. `then` gets a Pillow image or,
    where there are more than `LARGE` pixels, a `Picture`, good until `then` returns, one at a time in a process. Log
    lines call it `name`. Raises UnreadableImage, also where there is not enough memory for that many.
    """
    if not content:
        raise UnreadableImage("empty file (0 bytes)")
    with warnings_of(name):
        return _decode(content, box, max_pixels, then)


def _decode(content: bytes, box: Box | None, max_pixels: int, then: Callable[[Any], Any]) -> Any:
    image = None
    try:
        with _explained(content):
            _mute_libtiff()
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        with image:
            _check_size(image, content, max_pixels)
            if image.width * image.height <= LARGE:
                return then(_loaded(image, content, box))
            with _one_at_a_time:
                try:
                    return then(_loaded(image, content, box))
                finally:
                    image.close()
                    # Else each thread keeps some of what it has freed, up to a picture's worth.
                    give_back_memory()
    except MemoryError:
        if image is None or image.width * image.height <= LARGE:
            raise  # no fault of this image
        raise UnreadableImage("needs more memory than there is") from None


def _loaded(image: Image.Image, content: bytes, box: Box | None) -> Image.Image | Picture:
    with _explained(content):
        image.load()
        picture = Picture(image, orientation_of(image), box)
        return picture if image.width * image.height > LARGE else picture.whole()


def _check_size(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Raises UnreadableImage for what the header shows to be too much work."""
    size = f"{image.width} x {image.height}"
    if image.width * image.height > max_pixels:
        raise UnreadableImage(f"{size} pixels exceed the limit of {max_pixels} (decompression bomb?)")
    if max(image.size) > MAX_SIDE:
        raise UnreadableImage(f"a side of {size} pixels exceeds the limit of {MAX_SIDE}")
    # In compressed data 0xFF is never followed by the byte of a scan's marker.
    n_scans = content.count(b"\xff\xda") if image.format == "JPEG" else 0
    if n_scans > MAX_SCANS:
        raise UnreadableImage(f"{n_scans} scans of a JPEG exceed the limit of {MAX_SCANS} (decompression bomb?)")


@contextmanager
def _explained(content: bytes) -> Iterator[None]:
    """Inside, what Pillow raises on a file becomes UnreadableImage."""
    try:
        yield
    except UnidentifiedImageError:
        if content[4:12] in (b"ftypavif", b"ftypavis") and not HAS_AVIF:
            raise UnreadableImage("AVIF, which this Pillow cannot decode; install Pillow 11.3 or later") from None
        raise UnreadableImage(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_line("too many pixels", error)) from error
    except DAMAGE as error:
        raise UnreadableImage(_line("damaged or truncated", error)) from error


@functools.cache
def _mute_libtiff() -> None:
    """Leave out what libtiff writes to standard error: it names no image, whose reason Pillow raises anyway."""
    if path := next((line.split()[-1] for line in MAPS.read_text().splitlines() if "libtiff" in line), None):
        ctypes.CDLL(path).TIFFSetErrorHandler(None)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture upright (EXIF), as mode RGB. Raises UnreadableImage for pixels without a known range."""
    return Picture(image, orientation_of(image)).whole()


def _line(what: str, error: BaseException) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{what}: {detail[:200]}"
