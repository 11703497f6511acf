import copy
import io
import os
import pickle
import resource
import shutil
import socket
import struct
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from distributed_rerank.data import images
from distributed_rerank.data.catalogue import ImageRef
from distributed_rerank.data.images import UnreadableImage
from distributed_rerank.storage import locations
from distributed_rerank.storage.paths import ImageRoots

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


def _photo(width: int = 40, height: int = 24) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)).resize((width, height))


def _bytes(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _pixels(content: bytes, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    image = images.decode(content, box)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def _reason(content: bytes, **options: object) -> str:
    with pytest.raises(UnreadableImage) as caught:
        images.decode(content, **options)  # type: ignore[arg-type]
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    difference = np.abs(_pixels(_bytes(_photo(), format, **options)) - np.asarray(_photo()).astype(int))
    assert difference.mean() < (12 if format in ("JPEG", "GIF") else 0.001)


def test_gif_and_tiff_give_the_first_frame() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        content = _bytes(first, format, save_all=True, append_images=[second])
        assert _pixels(content)[4, 4, 0] > 200 > 60 > _pixels(content)[4, 4, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_agrees_with_pillow(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _bytes(_photo(), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(_pixels(content), np.asarray(expected))
    assert images.decode(content).size == ((24, 40) if orientation > 4 else (40, 24))


def test_box_counts_pixels_of_the_upright_picture_and_is_clipped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = _bytes(_photo(40, 24), "PNG", exif=exif)
    upright = _pixels(content)
    assert np.array_equal(_pixels(content, (2, 30, 10, 36)), upright[30:36, 2:10])
    assert np.array_equal(_pixels(content, (-5, 35, 99, 99)), upright[35:, :])
    assert _reason(content, box=(24, 0, 30, 10)) == "box (24, 0, 30, 10) lies outside the image of 24 x 40"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_beside_good_pixels_is_ignored() -> None:
    for exif in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00",
    ):
        assert _pixels(_bytes(_photo(), "JPEG", exif=exif)).shape == (24, 40, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_become_white(mode: str) -> None:
    grey = np.full((4, 4), 100, np.uint8)
    alpha = np.array([[0, 255, 128, 0]] * 4, np.uint8)
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    content = _bytes(image.convert("RGBA") if mode != "LA" else image)
    if mode == "PA":
        content = _bytes(image.convert("RGBA").quantize(8), "PNG")
    assert _pixels(content)[0, :, 0].tolist() == pytest.approx([255, 100, 177, 255], abs=1)


def test_palette_and_colour_key_transparency_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        assert _pixels(_bytes(palette, format, transparency=0))[0].tolist() == [[255] * 3, [10, 20, 30]]
    assert _pixels(_bytes(palette))[0].tolist() == [[0] * 3, [10, 20, 30]]
    rgb = Image.fromarray(np.array([[[0, 0, 0], [10, 20, 30]]], np.uint8))
    assert _pixels(_bytes(rgb, "PNG", transparency=(0, 0, 0)))[0].tolist() == [[255] * 3, [10, 20, 30]]
    grey = Image.fromarray(np.array([[0, 90]], np.uint8))
    assert _pixels(_bytes(grey, "PNG", transparency=0))[0].tolist() == [[255] * 3, [90] * 3]


def test_one_bit_grey_and_cmyk_become_rgb() -> None:
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert _pixels(_bytes(bits))[0].tolist() == [[0] * 3, [255] * 3]
    grey = Image.fromarray(np.array([[0, 77]], np.uint8))
    assert _pixels(_bytes(grey))[0].tolist() == [[0] * 3, [77] * 3]
    for format in ("JPEG", "TIFF"):
        cmyk = _pixels(_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format))
        assert cmyk[8, 8].tolist() == pytest.approx([255, 0, 0], abs=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [round(int(value) / 257) for value in values[0]]
    assert _pixels(_bytes(Image.fromarray(values), format))[0, :, 0].tolist() == expected
    wide = Image.fromarray(values.astype(np.int32))
    assert _pixels(_bytes(wide, "TIFF"))[0, :, 0].tolist() == expected
    assert "floating-point" in _reason(_bytes(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_file_is_named_so(format: str) -> None:
    content = _bytes(_photo(400, 300), format)
    assert "truncated" in _reason(content[: len(content) // 2])


@pytest.mark.skipif(not images.HAS_AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read_upright_and_damaged_files_are_named() -> None:
    content = _bytes(_photo(), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(_pixels(content) - np.asarray(_photo()).astype(int)).mean() < 6
    assert np.array_equal(_pixels(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(_bytes(_photo(), "AVIF", exif=exif)).size == (24, 40)
    assert _reason(content[: len(content) // 2])
    assert "exceed the limit of 900" in _reason(content, max_pixels=900)


def test_avif_without_a_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "HAS_AVIF", False)
    monkeypatch.setattr(images, "FORMATS", ("JPEG", "PNG"))
    content = struct.pack(">I", 28) + b"ftypavif" + bytes(80)
    assert _reason(content) == "AVIF, which this Pillow cannot decode; install Pillow 11.3 or later"


def _progressive_jpeg(width: int, height: int, n_scans: int) -> bytes:
    """A grey JPEG whose scans say "nothing new" of all blocks in a few bytes each."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    n_blocks = -(-width // 8) * -(-height // 8)
    tables = segment(0xDB, bytes([0] + [1] * 64)) + segment(
        0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    )
    tables += segment(0xC4, bytes([0, 1] + [0] * 15) + b"\0") + segment(0xC4, bytes([16, 1] + [0] * 15) + b"\xe0")
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-n_blocks // 8))
    runs = "".join("0" + "0" * 14 for _ in range(-(-n_blocks // 16384)))  # 16,384 blocks a run
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + int(runs, 2).to_bytes(-(-len(runs) // 8), "big")
    return b"\xff\xd8" + tables + first + scan * (n_scans - 1) + b"\xff\xd9"


def test_jpeg_of_ten_thousand_scans_is_refused_before_it_is_decoded() -> None:
    """Of 20 bytes each: half a minute for 4 million pixels, hours for a file of 200 MB."""
    content = _progressive_jpeg(2000, 2000, 10_000)
    assert len(content) < 400_000
    started = time.process_time()
    assert _reason(content) == "10000 scans of a JPEG exceed the limit of 100 (decompression bomb?)"
    assert time.process_time() - started < 0.5
    assert images.decode(_progressive_jpeg(200, 200, 100)).size == (200, 200)
    assert _bytes(_photo(400, 300), "JPEG", progressive=True).count(b"\xff\xda") == 10


@pytest.mark.parametrize(
    ("there", "written"),
    [("a b.png", "a%20b.png"), ("sub/a.png", "sub\\a.png"), ("a.png", "a.png "), ("\xe9.png", "e\u0301.png"),
     ("e\u0301.png", "\xe9.png")],
)  # fmt: skip
def test_file_under_another_spelling_is_named(there: str, written: str, tmp_path: Path) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(_bytes(_photo()))
    ref = ImageRef("a", f"{tmp_path}/{written}")
    with pytest.raises(UnreadableImage) as error:
        images.read_image(ref)
    assert error.value.reason == f"file not found; there is {Path(there).name!a}, write the path so"
    outside = ImageRef("a", ref.path, None, ImageRoots((), (str(tmp_path / "root"),)))
    with pytest.raises(UnreadableImage) as error:
        images.read_image(outside)
    assert error.value.reason == "outside --image-root"
    escape = ImageRef("a", f"{tmp_path}/in/%2e%2e/{there}", None, ImageRoots((f"{tmp_path}/in",)))
    with pytest.raises(UnreadableImage) as error:
        images.read_image(escape)
    assert error.value.reason == "file not found", "what lies outside the root is not told"


def test_files_that_are_no_images_say_what_they_are_not(tmp_path: Path) -> None:
    assert _reason(b"") == "empty file (0 bytes)"
    assert "not an image in one of the formats JPEG, PNG" in _reason(b"%PDF-1.7 " * 50)
    assert "not an image" in _reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "damaged or truncated" in _reason(_bytes(_photo())[:30]) or "not an image" in _reason(_bytes(_photo())[:30])
    with pytest.raises(UnreadableImage, match="file not found"):
        images.read_image(ImageRef("a", str(tmp_path / "a.jpg")))
    with pytest.raises(UnreadableImage, match=r"cannot be read: .*directory"):
        images.read_image(ImageRef("a", str(tmp_path)))


def _png_header_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_from_the_header() -> None:
    assert "12000 x 9000 pixels exceed the limit of 100000000" in _reason(_png_header_claiming(12000, 9000))
    assert "too many pixels" in _reason(_png_header_claiming(60000, 60000))
    assert "40 x 24 pixels exceed the limit of 900" in _reason(_bytes(_photo()), max_pixels=900)
    assert images.decode(_bytes(_photo()), max_pixels=960).size == (40, 24)


def test_pillows_process_wide_settings_are_left_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    assert images.decode(_bytes(_photo()), max_pixels=10**12).size == (40, 24)
    assert _reason(_bytes(_photo(), "JPEG")[:200])
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_reason_never_another_error(format: str) -> None:
    rng = np.random.default_rng(FORMATS.index(format))
    original = np.frombuffer(
        _bytes(_photo(64, 48), format, **({"exif": Image.Exif()} if format == "JPEG" else {})), np.uint8
    )
    outcomes = set()
    for _ in range(300):
        damaged = original.copy()
        reach = rng.choice([40, 200, len(damaged)])
        places = rng.integers(0, min(reach, len(damaged)), rng.integers(1, 12))
        damaged[places] = rng.integers(0, 256, len(places))
        damaged = damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)]
        try:
            outcomes.add(images.decode(damaged.tobytes()).mode)
        except UnreadableImage as error:
            outcomes.add("reason" if 0 < len(error.reason) < 300 and "\n" not in error.reason else error.reason)
    assert outcomes <= {"RGB", "reason"}
    assert "reason" in outcomes


def test_unreadable_image_survives_pickle_and_copy() -> None:
    error = UnreadableImage("file not found")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert isinstance(twin, UnreadableImage)
        assert twin.reason == str(twin) == "file not found"


def test_uris_are_read_through_fsspec_and_the_allow_list(tmp_path: Path) -> None:
    content = _bytes(_photo())
    fsspec.filesystem("memory").pipe("/photos/a b.png", content)
    (tmp_path / "a b.png").write_bytes(content)
    allowed = locations.SCHEMES | {"memory"}
    ref = ImageRef("a", "memory://photos/a b.png")
    assert images.read_image(ref, schemes=allowed).size == (40, 24)
    for uri in (
        f"file://{tmp_path}/a%20b.png",
        f"file://localhost{tmp_path}/a%20b.png",
        str(tmp_path / "a b.png"),
    ):
        assert images.read_bytes(uri) == content
    with pytest.raises(UnreadableImage, match="file not found"):
        images.read_image(ImageRef("b", "memory://photos/b.png"), schemes=allowed)
    for path in (
        "http://example.com/a.png",
        "https://example.com/a.png",
        "memory://photos/a.png",
        "ftp://x/a",
    ):
        with pytest.raises(UnreadableImage, match="is not allowed; use a local path or one of"):
            images.read_image(ImageRef("c", path))


def test_real_photos_and_drawings_are_read(shared_data: Path) -> None:
    for name in ("grocery", "omniglot"):
        path = next(iter(sorted((shared_data / name / "images").rglob("*.*g"))))
        image = images.read_image(ImageRef("a", str(path)))
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


@pytest.fixture
def no_images(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Paths that are no regular file or too large, and words of the reason."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(3_000_000_000)
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    sock = socket.socket(socket.AF_UNIX)
    # The name of a socket may have a hundred characters.
    short = tempfile.mkdtemp(dir="/tmp")
    sock.bind(f"{short}/s.jpg")
    yield {
        str(tmp_path / "pipe.jpg"): "no regular file but a pipe", str(tmp_path / "folder.jpg"): "but a directory",
        str(tmp_path / "sparse.jpg"): "3000000000 bytes or more exceed the limit", "/dev/zero": "a device",
        str(tmp_path / "link.jpg"): "a device", f"{short}/s.jpg": "but a socket", "/proc/self/mem": "of the kernel",
        str(tmp_path / "a\0b.jpg"): "no path of a file", str(tmp_path / "a\ud800.jpg"): "no path of a file",
        str(tmp_path / ("x" * 300)): "name too long",
    }  # fmt: skip
    sock.close()
    shutil.rmtree(short)


def test_what_is_no_image_file_is_refused_at_once_and_unread(no_images: dict[str, str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    for path, words in no_images.items():
        with pytest.raises(UnreadableImage) as caught:
            images.read_image(ImageRef("a", path))
        assert words.lower() in caught.value.reason.lower(), path
        assert "\n" not in caught.value.reason
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB: the file was read"


def test_file_that_becomes_a_pipe_or_device_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write the folder may put a link in the file's place between the look and the opening."""
    open_file = os.open
    path = tmp_path / "photo.jpg"

    targets = [tmp_path / "pipe", Path("/dev/zero")]

    def swapped(name: str, *flags: int) -> int:
        path.unlink()
        path.symlink_to(targets.pop(0))
        return open_file(name, *flags)

    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(locations.os, "open", swapped)
    for kind in ("pipe", "device"):
        path.unlink(missing_ok=True)
        path.write_bytes(_bytes(_photo()))
        with pytest.raises(UnreadableImage, match=f"no regular file but a {kind}"):
            images.read_image(ImageRef("a", str(path)))


def test_hub_that_is_away_is_told_at_once_and_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(request: urllib.request.Request, **options: object) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(locations.time, "sleep", lambda seconds: None)
    locations._hub_answers.cache_clear()
    for name in ("a", "b"):
        with pytest.raises(UnreadableImage, match=f"^{images.OUTAGE}: .*hub does not answer"):
            images.read_image(ImageRef(name, f"hf://datasets/owner/name/{name}.jpg"))
    assert len(asked) <= 2
    locations._hub_answers.cache_clear()


def test_image_that_needs_more_memory_than_there_is_is_a_reject_only_where_it_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_loaded", fail)
    with pytest.raises(MemoryError):
        images.decode(_bytes(_photo()))
    monkeypatch.setattr(images, "LARGE", 900)
    assert _reason(_bytes(_photo())) == "needs more memory than there is"
