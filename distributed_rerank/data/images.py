"""Image files to RGB pictures, or the reason why not.

Only JPEG, PNG, WebP, BMP, GIF, TIFF and, where this Pillow decodes it, AVIF are opened, and the size in the header is
checked before anything is decoded. With these limits an image costs 40 seconds of one CPU at the worst (run-length BMP
of 200 MB; 100 million pixels take 1 to 8 seconds in every other format), so there is no clock. Only the scans of a
progressive JPEG could take hours; they are counted first. No process-wide setting of Pillow is read or changed, except
that Pillow itself refuses images above twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels as shipped), whatever
`max_pixels` says.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from distributed_rerank.data import locations
from distributed_rerank.data.catalogue import Box, ImageRef
from distributed_rerank.data.locations import StoreUnreachable, read_bytes
from distributed_rerank.errors import BadInput

__all__ = ["MAX_PIXELS", "UnreadableImage", "decode", "read_bytes", "read_content", "read_image", "to_rgb"]

MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000
"""Of a file, checked before it is read."""
OUTAGE = "the store does not answer"
"""How the reason begins where the store was at fault and not the image."""
MAX_SCANS = 100
"""Of a progressive JPEG, as libtiff has it; encoders write a dozen, and each costs a pass over the picture."""
HAS_AVIF = "avif" in features.modules and features.check_module("avif")
"""Pillow decodes it from 11.3 on."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if HAS_AVIF else ()))
_STRIP_ROWS = 256
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers raise on damaged files. MemoryError and our own assertions are not among them.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


class UnreadableImage(Exception):
    """An image that cannot be used; `reason` is one line for the rejects table."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_image(ref: ImageRef, max_pixels: int = MAX_PIXELS, schemes: frozenset[str] = locations.SCHEMES) -> Image.Image:
    """The picture of `ref` as mode RGB, cut to its box; whatever is wrong with the file: UnreadableImage."""
    return decode(read_content(ref, schemes), ref.box, max_pixels)


def read_content(ref: ImageRef, schemes: frozenset[str] = locations.SCHEMES) -> bytes:
    """The bytes of the file of `ref`. Raises UnreadableImage, and Outage where a store does not answer."""
    problem = ref.roots.problem(ref.path)
    if problem:
        raise UnreadableImage(problem)
    try:
        return read_bytes(ref.path, schemes, MAX_BYTES)
    except FileNotFoundError:
        raise UnreadableImage("file not found") from None
    except StoreUnreachable as error:
        raise UnreadableImage(_line(OUTAGE, error)) from error
    except OSError as error:
        raise UnreadableImage(_line("cannot be read", error)) from error
    except BadInput as error:
        raise UnreadableImage(str(error)) from error


def decode(content: bytes, box: Box | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame in a file's bytes, upright (EXIF), as mode RGB, cut to `box`.

    Transparent parts become white; 16-bit grey is scaled, not clipped. `box` (left, top, right, bottom)
    counts pixels of the upright picture, as an annotator sees it, and is clipped to it. Raises
    UnreadableImage.
    """
    if not content:
        raise UnreadableImage("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise UnreadableImage(f"{size} pixels exceed the limit of {max_pixels} (decompression bomb?)")
            # In compressed data 0xFF is never followed by the byte of a scan's marker.
            n_scans = content.count(b"\xff\xda") if image.format == "JPEG" else 0
            if n_scans > MAX_SCANS:
                raise UnreadableImage(
                    f"{n_scans} scans of a JPEG exceed the limit of {MAX_SCANS} (decompression bomb?)"
                )
            image.load()
            return _crop(to_rgb(image), box)
    except UnidentifiedImageError:
        if content[4:12] in (b"ftypavif", b"ftypavis") and not HAS_AVIF:
            raise UnreadableImage("AVIF, which this Pillow cannot decode; install Pillow 11.3 or later") from None
        raise UnreadableImage(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_line("too many pixels", error)) from error
    except DAMAGE as error:
        raise UnreadableImage(_line("damaged or truncated", error)) from error
    except MemoryError:
        raise UnreadableImage("needs more memory than there is") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture upright (EXIF), as mode RGB. Raises UnreadableImage for pixels without a known range."""
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except DAMAGE:
        return image  # broken metadata beside good pixels: cameras write it, and viewers ignore it
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no known range; store 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """The image over white; by strips, since a whole one would be held three times, at four bytes a pixel."""
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by v / 257, rounded. Mode I has 32 bits; what fits in 16 is taken for 16-bit grey."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0:
        raise UnreadableImage("negative pixel values; store unsigned 8 or 16 bits")
    scale = 257 if values.max(initial=0) < 1 << 16 else 16_843_009
    return Image.fromarray(((values + scale // 2) // scale).astype(np.uint8))


def _crop(image: Image.Image, box: Box | None) -> Image.Image:
    if box is None:
        return image
    left, top, right, bottom = (
        max(box[0], 0),
        max(box[1], 0),
        min(box[2], image.width),
        min(box[3], image.height),
    )
    if left >= right or top >= bottom:
        raise UnreadableImage(f"box {box} lies outside the image of {image.width} x {image.height}")
    return image.crop((left, top, right, bottom))


def _line(what: str, error: BaseException) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"{what}: {detail[:200]}"
