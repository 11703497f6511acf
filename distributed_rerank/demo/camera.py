"""Photographs a flat drawing of the demo catalogue: viewpoint, background, light, occlusion."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFilter

Pixels = Float[np.ndarray, "height width 3"]


def take_photo(flat: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, int]:
    """One photo of an RGBA drawing: RGB, `size` x `size`, and the JPEG quality (35 to 92) to store it with.

    Every choice comes from `rng`; one state of it gives one photo.
    """
    scene = _background(size, rng)
    product, outline = _seen_from_somewhere(flat, size, rng)
    scene = _with_shadow(scene, outline, rng)
    scene.paste(product, mask=outline)
    if rng.random() < 0.4:
        _occlude(scene, outline, rng)
    if rng.random() < 0.4:
        scene = scene.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.008 * size))))
    pixels = _lit(np.asarray(scene, dtype=np.float64), rng)
    pixels += rng.normal(0.0, rng.uniform(1.0, 6.0), pixels.shape)
    photo = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    return photo, int(rng.integers(35, 93))


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    paint: Callable[[int, np.random.Generator], Image.Image] = (_cloth, _planks, _tiles, _clutter)[int(rng.integers(4))]
    return paint(size, rng)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour of rooms rather than of packages: near grey, any brightness."""
    return np.clip(rng.uniform(80, 200) + rng.uniform(-22, 22, 3), 0, 255)


def _smooth_noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255 - 0.5


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _cloth(size: int, rng: np.random.Generator) -> Image.Image:
    folds = 70 * _smooth_noise(size, int(rng.integers(3, 7)), rng)
    weave = 25 * _smooth_noise(size, size // 3, rng)
    return _to_image(_muted(rng) + (folds + weave)[..., None])


def _planks(size: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (size, size))
    canvas = ImageDraw.Draw(image)
    wood = np.array([165, 120, 80]) * rng.uniform(0.5, 1.3)
    height = int(rng.integers(size // 6, size // 3))
    for top in range(-int(rng.integers(height)), size, height):
        plank = _colour(wood * rng.uniform(0.85, 1.15))
        canvas.rectangle((0, top, size, top + height - 2), fill=plank)
    grain = _smooth_noise(size, 12, rng)[:, : size // 8].repeat(8, axis=1)[:, :size]
    pixels = np.asarray(image, dtype=np.float64)
    return _to_image(pixels + 35 * np.pad(grain, ((0, 0), (0, size - grain.shape[1])), mode="edge")[..., None])


def _tiles(size: int, rng: np.random.Generator) -> Image.Image:
    grout, tile = _muted(rng), _muted(rng)
    image = Image.new("RGB", (size, size), _colour(grout))
    canvas = ImageDraw.Draw(image)
    step = int(rng.integers(size // 6, size // 3))
    shift = int(rng.integers(step))
    for left in range(-shift, size, step):
        for top in range(-shift, size, step):
            shade = _colour(tile * rng.uniform(0.9, 1.1))
            canvas.rectangle((left, top, left + step - 3, top + step - 3), fill=shade)
    return image


def _clutter(size: int, rng: np.random.Generator) -> Image.Image:
    """Blurred boxes and discs in muted colours: a shelf with other things on it."""
    image = Image.new("RGB", (size, size), _colour(_muted(rng)))
    canvas = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(6, 14))):
        left, top = rng.uniform(-0.2, 0.9, 2) * size
        width, height = rng.uniform(0.1, 0.45, 2) * size
        draw = canvas.rectangle if rng.random() < 0.6 else canvas.ellipse
        draw((left, top, left + width, top + height), fill=_colour(_muted(rng)))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue


def _seen_from_somewhere(flat: Image.Image, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The drawing under a random homography (turn, tilt, distance, place), and its outline as a mask."""
    angle, scale = rng.uniform(-0.15, 0.15), rng.uniform(0.84, 1.0)
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * [rng.uniform(0.88, 1.0), 1.0]
    corners = corners + rng.uniform(-0.04, 0.04, (4, 2))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    seen = (scale * corners @ turn + 0.5 + rng.uniform(-0.04, 0.04, 2)) * size
    drawn = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]) * [flat.width, flat.height]
    product = flat.transform(
        (2 * size, 2 * size),
        Image.Transform.PERSPECTIVE,
        _homography(2 * seen, drawn),
        Image.Resampling.BILINEAR,
    ).reduce(2)
    return product.convert("RGB"), product.getchannel("A")


def _homography(seen: Float[np.ndarray, "4 2"], drawn: Float[np.ndarray, "4 2"]) -> list[float]:
    """Pillow's eight coefficients that map a point of the photo to a point of the drawing."""
    rows, right = [], []
    for (x, y), (u, v) in zip(seen, drawn, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    # Rounding hides the last bits of the solver, which may differ between machines.
    return [round(value, 9) for value in np.linalg.solve(np.array(rows), np.array(right)).tolist()]


def _with_shadow(scene: Image.Image, outline: Image.Image, rng: np.random.Generator) -> Image.Image:
    size = scene.width
    across, down = (rng.uniform(-0.05, 0.05, 2) * size).astype(int)
    shadow = Image.new("L", scene.size)
    shadow.paste(outline, (int(across), int(abs(down)) + 1))
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.03 * size)).point(lambda value: 0.55 * value)
    return Image.composite(Image.new("RGB", scene.size, (15, 15, 20)), scene, shadow)


def _occlude(scene: Image.Image, outline: Image.Image, rng: np.random.Generator) -> None:
    """Something in front of the product's edge: a finger, a leaf, a price tag. Drawn into `scene`."""
    size = scene.width
    left, top, right, bottom = outline.getbbox() or (0, 0, size, size)
    angle = rng.uniform(0, 2 * np.pi)
    x = (left + right) / 2 + 0.52 * (right - left) * np.cos(angle)
    y = (top + bottom) / 2 + 0.52 * (bottom - top) * np.sin(angle)
    length, thickness = rng.uniform(0.16, 0.26) * size, rng.uniform(0.07, 0.13) * size
    lean = angle + rng.uniform(-0.6, 0.6)
    along = np.array([np.cos(lean), np.sin(lean)])
    points = [
        (
            x + length * np.cos(t) * along[0] - thickness * np.sin(t) * along[1],
            y + length * np.cos(t) * along[1] + thickness * np.sin(t) * along[0],
        )
        for t in np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ]
    skin_leaf_tag = ((205, 150, 120), (70, 120, 60), (240, 240, 235))[int(rng.integers(3))]
    ImageDraw.Draw(scene).polygon(points, fill=skin_leaf_tag)


def _lit(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Gain, colour cast, a gradient across the picture, and now and then a bright reflection."""
    size = pixels.shape[0]
    grid = np.linspace(-0.5, 0.5, size)
    slope = rng.uniform(-0.35, 0.35, 2)
    light = rng.uniform(0.72, 1.15) * (1 + slope[0] * grid[None, :] + slope[1] * grid[:, None])
    pixels = pixels * light[..., None] * rng.uniform(0.93, 1.07, 3)
    if rng.random() < 0.3:
        x, y = rng.uniform(-0.35, 0.35, 2)
        distance = ((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / rng.uniform(0.01, 0.04)
        pixels = pixels + 80 * np.maximum(0.0, 1 - distance)[..., None]
    return pixels
