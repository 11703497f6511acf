"""Decoded pictures as mode RGB, upright; of large ones only a strip at a time.

Pillow holds an RGB picture at four bytes a pixel, and a copy for each step. So a large picture is kept as its file has
it, and what is wanted of it is turned, converted and made smaller strip by strip. The bytes are those of the whole
picture: all steps but the resizing work on single pixels, and Pillow resizes the rows, each by itself, rounds to 8 bits
and resizes the columns, or the other way round.
"""

import functools
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
_STRIP_PIXELS = 2**20
BILINEAR = Image.Resampling.BILINEAR
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, False, True),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, True, False),
}
"""By EXIF orientation how to turn the stored picture; and whether a box of the upright one, brought back to the stored
one, changes its axes, then counts from the right, and from the bottom."""


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


class Picture:
    """A picture upright and in RGB, as far as it is asked for: `size`, `crop` and `resize` are those of Pillow."""

    def __init__(self, stored: Image.Image, orientation: object = 1, box: Box | None = None) -> None:
        """`box` counts pixels of the upright picture; the result is cut to it. Raises UnreadableImage."""
        self._stored = stored
        self._to_rgb = _conversion(stored)
        self._turn, self._swaps, *self._flips = _UPRIGHT.get(
            orientation if isinstance(orientation, int) else 1, (None, False, False, False)
        )
        width, height = reversed(stored.size) if self._swaps else stored.size
        self._origin = (0, 0)
        self.size = self.width, self.height = width, height
        if box is not None:
            left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
            if left >= right or top >= bottom:
                raise UnreadableImage(f"box {box} lies outside the image of {width} x {height}")
            self._origin = (left, top)
            self.size = self.width, self.height = right - left, bottom - top

    def whole(self) -> Image.Image:
        """All of it."""
        if self._stored.mode == "RGB":
            return self.crop((0, 0, *self.size))
        picture = Image.new("RGB", self.size)
        for box, part in self._parts(self.width, max(1, _STRIP_PIXELS // self.width)):
            picture.paste(part, box)
        return picture

    def crop(self, box: Box) -> Image.Image:
        """The part in `box` (left, top, right, bottom), which lies inside."""
        part = self._to_rgb(self._crop_stored(box))
        return part if self._turn is None else part.transpose(self._turn)

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """The part in `box`, by default all of it, resized to (width, height) `size`."""
        left, top, right, bottom = box or (0, 0, *self.size)
        if _columns_first() and self.height - size[1] > max(0, 2 * (self.width - size[0])):
            low = Image.new("RGB", (self.width, size[1]))
            for (first, _, end, _), part in self._parts(max(1, _STRIP_PIXELS // self.height), self.height):
                low.paste(part.resize((end - first, size[1]), resample, (0, top, end - first, bottom)), (first, 0))
            return low.resize(size, resample, (left, 0, right, size[1]))
        narrow = Image.new("RGB", (size[0], self.height))
        for (_, first, _, end), part in self._parts(self.width, max(1, _STRIP_PIXELS // self.width)):
            narrow.paste(part.resize((size[0], end - first), resample, (left, 0, right, end - first)), (0, first))
        return narrow.resize(size, resample, (0, top, size[0], bottom))

    def _parts(self, width: int, height: int) -> Iterator[tuple[Box, Image.Image]]:
        return ((box, self.crop(box)) for box in _boxes(self.size, width, height))

    def _crop_stored(self, box: Box) -> Image.Image:
        """The part of the stored picture that is in `box` when it is upright, neither turned nor converted."""
        x, y = self._origin
        corners = [[box[0] + x, box[2] + x], [box[1] + y, box[3] + y]]
        if self._swaps:
            corners.reverse()
        for axis, length in enumerate(self._stored.size):
            if self._flips[axis]:
                corners[axis] = [length - corners[axis][1], length - corners[axis][0]]
        (left, right), (top, bottom) = corners
        if (left, top, right, bottom) == (0, 0, *self._stored.size):
            return self._stored
        return self._stored.crop((left, top, right, bottom))


def orientation_of(image: Image.Image) -> object:
    """The EXIF orientation; None where there is none that can be read."""
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except DAMAGE:
        return None  # broken metadata beside good pixels: cameras write it, and viewers ignore it


def _conversion(stored: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of any part of a picture. Raises UnreadableImage for pixels without a known range."""
    if stored.mode == "F":
        raise UnreadableImage("floating-point pixels have no known range; store 8 or 16 bits")
    if stored.mode == "I" or stored.mode.startswith("I;16"):
        strips = _boxes(stored.size, stored.width, max(1, _STRIP_PIXELS // stored.width))
        parts = (np.asarray(stored.crop(box)) for box in strips)
        ranges = [(part.min(), part.max()) for part in parts]
        if min(low for low, _ in ranges) < 0:
            raise UnreadableImage("negative pixel values; store unsigned 8 or 16 bits")
        # Mode I has 32 bits; what fits in 16 is taken for 16-bit grey.
        return functools.partial(_to_8_bits, scale=257 if max(high for _, high in ranges) < 1 << 16 else 16_843_009)
    if stored.has_transparency_data:
        return _on_white
    return functools.partial(Image.Image.convert, mode="RGB")


def _on_white(image: Image.Image) -> Image.Image:
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _to_8_bits(image: Image.Image, scale: int) -> Image.Image:
    """Grey by v / scale, rounded."""
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + scale // 2) // scale).astype(np.uint8)).convert("RGB")


def _boxes(size: tuple[int, int], width: int, height: int) -> Iterator[Box]:
    """Boxes of this width and height, or what is left, that cover a picture of (width, height) `size`."""
    for top in range(0, size[1], height):
        for left in range(0, size[0], width):
            yield left, top, min(left + width, size[0]), min(top + height, size[1])


@functools.cache
def _columns_first() -> bool:
    """Whether this Pillow (13 does) resizes the columns first where the height falls by twice as much as the width."""
    tall = Image.fromarray((np.arange(3 * 64).reshape(64, 3) ** 2 % 251).astype(np.uint8))
    whole, columns = tall.resize((2, 5), BILINEAR), tall.resize((3, 5), BILINEAR).resize((2, 5), BILINEAR)
    rows = tall.resize((2, 64), BILINEAR).resize((2, 5), BILINEAR)
    assert rows.tobytes() != columns.tobytes(), "the picture must tell the orders apart"
    return whole.tobytes() == columns.tobytes()
