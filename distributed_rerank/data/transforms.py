"""Pictures to uint8 tensors: the fixed transform of inference and the random one of training.

Normalising ((x / 255 - mean) / std) is left to the models, on their device: uint8 is a quarter of the bytes
to move.

Pictures are resized by PIL itself, bit for bit as torchvision and timm have PIL do it: importing those takes 2.5 s of a
core and 150 MB, which every process that decodes would pay.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageEnhance
from torch import Tensor

from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.config.extractor import Interpolation
from distributed_rerank.data.pictures import Picture
from distributed_rerank.errors import BadInput

_MODES = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
_LARGEST_RESIZED = 2**24
"""Pixels of a resized picture that is then cropped; above, the crop alone is resized."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InferenceTransform:
    """What a model sees of a picture, without chance.

    `size` is (height, width). `resize="square"` squashes the whole picture to it, as OML does (bit for bit
    torchvision's `Resize(size)` on PIL). `resize="crop"` is timm's evaluation transform: the short side to
    size / crop_pct, then the centre. `mean` and `std` are what the model normalises with; they are not
    applied here.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["square", "crop"] = "square"
    crop_pct: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_size_and_interpolation(self.size, self.interpolation)
        if self.resize not in ("square", "crop"):
            raise BadInput(f"resize={self.resize!r} is unknown; use 'square' or 'crop'")
        if not 0 < self.crop_pct <= 1:
            raise BadInput(f"crop_pct={self.crop_pct} is not in (0, 1]; 0.875 is usual")

    def __call__(self, image: Image.Image | Picture) -> UInt8[Tensor, "3 height width"]:
        """The tensor of an RGB picture, channels first."""
        if self.resize == "square":
            return _to_tensor(_squash(image, self.size, self.interpolation))
        whole = _size_before_crop(image.size, self.size, self.crop_pct)
        if whole[0] * whole[1] > _LARGEST_RESIZED:
            return _to_tensor(_resize_centre(image, whole, self.size, self.interpolation))
        resized = _squash(image, (whole[1], whole[0]), self.interpolation)
        return _to_tensor(_crop_centre(resized, self.size))


@dataclass(frozen=True)
class TrainingTransform:
    """The random transform of training: crop, squash to `size`, mirror, then colour changes in random order."""

    augmentation: Augmentation
    size: tuple[int, int] = (224, 224)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_size_and_interpolation(self.size, self.interpolation)

    def __call__(self, image: Image.Image | Picture, generator: torch.Generator) -> UInt8[Tensor, "3 height width"]:
        """The tensor of an RGB picture; the same state of `generator` gives the same bytes.

        Always draws the same count of numbers, so that the next picture's draw does not depend on this one's
        settings.
        """
        draws = torch.rand(13, generator=generator, dtype=torch.float64).tolist()
        if self.augmentation.min_scale < 1:
            image = image.crop(_random_box(image.size, self.augmentation.min_scale, draws[:4]))
        image = _squash(image, self.size, self.interpolation)
        if draws[4] < self.augmentation.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(self._jitter(image, draws[5:9], draws[9:13]))

    def _jitter(self, image: Image.Image, strengths: list[float], order: list[float]) -> Image.Image:
        limits = (
            self.augmentation.brightness,
            self.augmentation.contrast,
            self.augmentation.saturation,
            self.augmentation.hue,
        )
        changes = [limit * (2 * strength - 1) for limit, strength in zip(limits, strengths, strict=True)]
        steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for position in sorted(range(len(limits)), key=order.__getitem__):
            if limits[position] == 0:
                continue
            if position < len(steps):
                image = steps[position](image).enhance(1 + changes[position])
            else:
                image = _turn_hue(image, changes[position])
        return image


def _squash(image: Image.Image | Picture, size: tuple[int, int], interpolation: str) -> Image.Image:
    height, width = size
    return image.resize((width, height), _MODES[interpolation])


def _size_before_crop(source: tuple[int, int], size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """(width, height) that timm resizes a picture of (width, height) `source` to before it cuts (height, width) `size`.

    Square: the shorter side to side / crop_pct, the longer one in proportion, rounded down (torchvision's Resize).
    Else both sides by the smaller of the two ratios, rounded (timm's ResizeKeepRatio).
    """
    height, width = (math.floor(side / crop_pct) for side in size)
    if height == width:
        short, long = sorted(source)
        other = int(height * long / short)
        return (height, other) if source[0] <= source[1] else (other, height)
    ratio = min(source[0] / width, source[1] / height)
    return round(source[0] / ratio), round(source[1] / ratio)


def _resize_centre(
    image: Image.Image | Picture, whole: tuple[int, int], size: tuple[int, int], interpolation: str
) -> Image.Image:
    """The centre of the resized picture without the rest of it: a thin picture would become too large for memory."""
    height, width = size
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    x, y = image.width / whole[0], image.height / whole[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), _MODES[interpolation], box=box)


def _crop_centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Of a picture that is at least as large; halves are rounded to even."""
    height, width = size
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _turn_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + round(turns * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def _to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _random_box(size: tuple[int, int], min_scale: float, draws: list[float]) -> tuple[int, int, int, int]:
    """A box of a share in [min_scale, 1] of the area, its shape near the picture's, clipped to it."""
    area = min_scale + (1 - min_scale) * draws[0]
    stretch = (4 / 3) ** (draws[1] - 0.5)
    width = max(1, min(size[0], round(size[0] * math.sqrt(area) * stretch)))
    height = max(1, min(size[1], round(size[1] * math.sqrt(area) / stretch)))
    left = int(draws[2] * (size[0] - width + 1))
    top = int(draws[3] * (size[1] - height + 1))
    return left, top, left + width, top + height


def _check_size_and_interpolation(size: tuple[int, int], interpolation: str) -> None:
    if min(size) < 1:
        raise BadInput(f"size={size} is not a picture's size; give (height, width) of at least 1")
    if interpolation not in _MODES:
        raise BadInput(f"interpolation={interpolation!r} is unknown; use one of {', '.join(_MODES)}")
