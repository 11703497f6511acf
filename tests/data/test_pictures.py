"""Large pictures: the bytes of the whole one, strip by strip, in little memory."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.data import images, pictures
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.pictures import Box
from distributed_rerank.data.transforms import InferenceTransform, TrainingTransform

MODES = ["RGB", "RGBA", "LA", "L", "1", "P", "PA", "CMYK", "I;16", "I"]
SIZES = [(157, 83), (40, 210)]


def _content(mode: str, orientation: int, size: tuple[int, int] = SIZES[0]) -> bytes:
    generator = np.random.default_rng(3)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 4), np.uint8), "RGBA")
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            generator.integers(0, 2**16, (size[1], size[0])).astype("u2" if mode == "I;16" else "i4")
        )
    elif mode == "P":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = bytes(generator.integers(0, 256, 256, np.uint8))
    elif mode == "PA":
        image = image.quantize(16)
    else:
        image = image.convert(mode)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "TIFF" if mode in ("CMYK", "I") else "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "orientation", "size"),
    [("RGB", orientation, size) for orientation in range(1, 9) for size in SIZES]
    + [(mode, 6, SIZES[0]) for mode in MODES[1:]],
)
def test_large_picture_gives_the_bytes_of_the_whole_one(
    mode: str, orientation: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _content(mode, orientation, size)
    boxes: list[Box | None] = [None, (5, 7, 61, 80), (-3, 20, 999, 39)]
    square, crop, thin = (
        InferenceTransform(size=(24, 32), interpolation="bicubic"),
        InferenceTransform(size=(24, 24), resize="crop"),
        InferenceTransform(size=(150, 150), resize="crop", interpolation="nearest"),
    )

    def all_of(box: Box | None) -> list[torch.Tensor]:
        made = [images.decode(content, box, then=transform) for transform in (square, crop, thin)]
        for scale in (0.3, 1.0):
            train = TrainingTransform(Augmentation(min_scale=scale), (16, 20))
            made.append(images.decode(content, box, then=lambda picture, t=train: t(picture, torch.Generator())))
        return [*made, torch.from_numpy(np.array(images.decode(content, box)))]

    expected = [all_of(box) for box in boxes]
    monkeypatch.setattr(images, "LARGE", 0)
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 700)
    assert isinstance(images.decode(content, then=lambda picture: picture), pictures.Picture)
    for box, whole in zip(boxes, expected, strict=True):
        for ours, theirs in zip(all_of(box), whole, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_over_white_by_strips_are_pillows(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _content(mode, 1)
    colours = Image.open(io.BytesIO(content)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 700)
    assert images.decode(content).tobytes() == expected.tobytes()


MEMORY = """
import re, sys
from pathlib import Path
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.decoding import decode
from distributed_rerank.data.transforms import InferenceTransform
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
found = decode([ImageRef(str(n), path) for n, path in enumerate(sys.argv[1:])], InferenceTransform((64, 64)), threads=4)
print(len(found.kept), peak() - before)
"""


def test_large_pictures_on_several_threads_take_the_memory_of_one(tmp_path: Path) -> None:
    """9,000 x 9,000 pixels of one bit are 77 MiB as Pillow decodes them, and 309 more as RGB."""
    for number in range(4):
        Image.new("1", (9_000, 9_000), number % 2).save(tmp_path / f"{number}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    kept, mebibytes = done.stdout.split()
    assert int(kept) == 4
    assert 77 < float(mebibytes) < 160


def test_a_line_of_pixels_is_refused_for_its_length() -> None:
    """Resized to 224 columns, 1 x 10,000,000 pixels would be 9 GB before the rows are made fewer."""
    for size in ((1, 200_000), (200_000, 1)):
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, "PNG")
        with pytest.raises(images.UnreadableImage, match=f"a side of {size[0]} x {size[1]} pixels exceeds .* 100000"):
            images.decode(buffer.getvalue())


def test_large_files_are_not_read_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On slow storage 64 files are read ahead; of files as large as a quarter of the bound, four."""
    from distributed_rerank.data import decoding

    refs = [ImageRef(str(number), str(number)) for number in range(40)]
    asked: list[str] = []

    def slow(ref: ImageRef) -> bytes:
        asked.append(ref.id)
        return bytes(100)

    monkeypatch.setattr(decoding, "read_content", slow)
    monkeypatch.setattr(decoding, "PATIENCE_S", 0)
    monkeypatch.setattr(decoding, "MOST_AHEAD", 400)
    for taken, _ in enumerate(decoding.read_ahead(refs), 1):
        assert len(asked) <= taken + 4
    assert len(asked) == 40
    asked.clear()
    decode(refs, InferenceTransform((8, 8)), threads=16)
    assert len(asked) == 40
