import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from distributed_rerank.config.augmentation import Augmentation
from distributed_rerank.data import transforms as transforms_module
from distributed_rerank.data.transforms import InferenceTransform, TrainingTransform
from distributed_rerank.errors import BadInput


def _photo(width: int = 150, height: int = 90) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 15, 3), np.uint8))
    noise = rng.integers(0, 40, (height, width, 3))
    return Image.fromarray((np.asarray(small.resize((width, height))) * 0.8 + noise).astype(np.uint8))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 60), (90, 150)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_square_equals_torchvision_resize_bit_for_bit(size: tuple[int, int], interpolation: str) -> None:
    ours = InferenceTransform(size=size, interpolation=interpolation)(_photo())  # type: ignore[arg-type]
    oml = transforms.Resize(size, transforms.InterpolationMode(interpolation))
    if interpolation == "bilinear":
        oml = transforms.Resize(size)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert torch.equal(ours, transforms.PILToTensor()(oml(_photo())))


@pytest.mark.parametrize("size", [(64, 64), (56, 72)])
@pytest.mark.parametrize("photo", [(150, 90), (90, 150), (30, 20)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.95])
def test_crop_equals_timms_evaluation_transform(size: tuple[int, int], photo: tuple[int, int], crop_pct: float) -> None:
    ours = InferenceTransform(size=size, resize="crop", crop_pct=crop_pct, interpolation="bicubic")
    timms = create_transform((3, *size), is_training=False, crop_pct=crop_pct, interpolation="bicubic")
    pixels = ours(_photo(*photo)).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (ours.mean, ours.std))
    assert torch.allclose((pixels - mean) / std, timms(_photo(*photo)), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (56, 72)])
@pytest.mark.parametrize("photo", [(300, 20), (20, 300), (90, 150)])
def test_thin_picture_is_cropped_before_it_is_resized(
    size: tuple[int, int], photo: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = InferenceTransform(size=size, resize="crop", crop_pct=0.9)
    whole = transform(_photo(*photo)).int()
    monkeypatch.setattr(transforms_module, "_LARGEST_RESIZED", 0)
    assert (transform(_photo(*photo)).int() - whole).abs().max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (200, 224)])
def test_picture_of_one_line_needs_little_memory(size: tuple[int, int]) -> None:
    """Enlarged whole, a line of 1 x 60,000 would have 256 x 15,000,000 pixels."""
    transform = InferenceTransform(size=size, resize="crop")
    line = Image.fromarray(np.arange(60_000, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    assert transform(line).shape == (3, *size)
    assert transform(line.rotate(90, expand=True)).shape == (3, *size)


def transform_of(size: tuple[int, int], **settings: float) -> TrainingTransform:
    return TrainingTransform(Augmentation(**settings), size)


def test_augmentation_same_seed_same_bytes_and_no_global_randomness() -> None:
    augment = transform_of((48, 48), min_scale=0.5)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [augment(_photo(), generator) for generator in [_generator(3)] for _ in range(4)]
    torch.manual_seed(2)
    second = [augment(_photo(), generator) for generator in [_generator(3)] for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], augment(_photo(), _generator(4)))
    torch.manual_seed(1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


def test_augmentation_with_everything_off_is_the_squash_resize() -> None:
    still = transform_of((40, 56), flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    plain = InferenceTransform(size=(40, 56))(_photo())
    assert torch.equal(still(_photo(), _generator()), plain)
    mirrored = transform_of((40, 56), flip=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)(
        _photo(), _generator()
    )
    assert torch.equal(mirrored, plain.flip(2))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_every_jitter_alone_changes_pixels(name: str) -> None:
    off = {"flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    strength = {"hue": 0.2}.get(name, 0.5)
    still = transform_of((48, 48), **off)(_photo(), _generator()).float()  # type: ignore[arg-type]
    jittered = transform_of((48, 48), **{**off, name: strength})(_photo(), _generator()).float()  # type: ignore[arg-type]
    assert (still - jittered).abs().mean() > 1


def test_default_jitter_is_on_and_about_neutral_on_average() -> None:
    still = InferenceTransform(size=(32, 32))(_photo()).float()
    augment = transform_of((32, 32), flip=0.0)
    generator = _generator()
    many = torch.stack([augment(_photo(), generator).float() for _ in range(200)])
    assert all(not torch.equal(one, still) for one in many)
    assert (many.mean(0) - still).abs().mean() < 12
    assert many.mean((1, 2, 3)).std() > 5


def test_random_crop_keeps_at_least_the_asked_share() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    augment = transform_of((50, 50), min_scale=0.3, flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    generator = _generator()
    widths = []
    for _ in range(100):
        row = augment(Image.fromarray(ramp.copy()), generator)[0, 25].int()
        widths.append((row[-1] - row[0]).item() / 200)
    assert min(widths) > np.sqrt(0.3) * (3 / 4) ** 0.5 - 0.05
    assert max(widths) > 0.9
    assert len(set(widths)) > 20


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (InferenceTransform, {"size": (0, 5)}, "size"),
        (InferenceTransform, {"resize": "stretch"}, "'stretch'"),
        (InferenceTransform, {"crop_pct": 1.5}, "1.5"),
        (InferenceTransform, {"interpolation": "cubic"}, "'cubic'"),
        (Augmentation, {"min_scale": 0.0}, "min_scale=0.0"),
        (Augmentation, {"hue": 0.7}, "hue=0.7"),
        (Augmentation, {"flip": -0.1}, "flip=-0.1"),
    ],
)
def test_bad_settings_are_named(kind: type, options: dict, expected: str) -> None:
    if "resize" in options or options.get("interpolation") == "cubic":
        with pytest.raises(Exception, match=expected):
            kind(**options)
    else:
        with pytest.raises(BadInput, match=expected):
            kind(**options)
