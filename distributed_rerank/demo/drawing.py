"""Draws one design of the demo catalogue, flat and evenly lit, as an RGBA picture.

Everything is Pillow's own: polygons, discs and the scalable font built into it, so no font file is needed.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

KINDS = ("bottle", "carton", "can", "jar", "pouch", "tin")
PATTERNS = ("plain", "stripes", "diagonals", "spots", "checks", "hoops")
EMBLEMS = ("star", "heart", "drop", "moon", "cross", "bolt", "triangle", "ring")
BANDS = ((214, 48, 49), (39, 134, 71), (37, 99, 201), (244, 196, 48))
CORNERS = ((0.12, 0.30), (0.88, 0.30), (0.12, 0.62), (0.88, 0.62))
SIDE = 224
OVERSAMPLING = 2

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# The part of each body, as fractions of the picture, that carries the label.
LABELS: dict[str, Box] = {
    "bottle": (0.20, 0.33, 0.80, 0.95),
    "carton": (0.15, 0.27, 0.85, 0.95),
    "can": (0.15, 0.13, 0.85, 0.87),
    "jar": (0.13, 0.25, 0.87, 0.93),
    "pouch": (0.15, 0.13, 0.85, 0.87),
    "tin": (0.19, 0.16, 0.81, 0.84),
}


@dataclass(frozen=True)
class Design:
    """What is printed on one product. The last five fields are those in which look-alikes may differ."""

    kind: str
    hue: float
    accent_hue: float
    is_dark: bool
    pattern: str
    word: str
    is_upside_down: bool
    emblem: str
    n_dots: int
    band: int
    corner: int
    size_code: str


def draw_design(design: Design) -> Image.Image:
    """The product as RGBA of 224 x 224 pixels; transparent outside of its outline."""
    side = SIDE * OVERSAMPLING
    outline = Image.new("L", (side, side), 0)
    _draw_outline(ImageDraw.Draw(outline), design.kind, side)
    body = _hsv(design.hue, 0.62, 0.42 if design.is_dark else 0.82)
    picture = Image.new("RGB", (side, side), body)
    canvas = ImageDraw.Draw(picture)
    _draw_pattern(canvas, design, side)
    _draw_cap(canvas, design, side)
    _draw_label(canvas, design, [side * value for value in LABELS[design.kind]])
    picture = _round_off(picture, is_round=design.kind in ("bottle", "can", "jar"))
    picture.putalpha(outline)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_outline(canvas: ImageDraw.ImageDraw, kind: str, side: int) -> None:
    def box(left: float, top: float, right: float, bottom: float) -> Box:
        return left * side, top * side, right * side, bottom * side

    if kind == "bottle":
        canvas.rounded_rectangle(box(0.17, 0.28, 0.83, 0.98), 0.07 * side, fill=255)
        canvas.polygon(_scaled([(0.20, 0.31), (0.38, 0.17), (0.62, 0.17), (0.80, 0.31)], side), fill=255)
        canvas.rounded_rectangle(box(0.38, 0.02, 0.62, 0.24), 0.02 * side, fill=255)
    elif kind == "carton":
        canvas.polygon(_scaled([(0.10, 0.24), (0.22, 0.10), (0.78, 0.10), (0.90, 0.24)], side), fill=255)
        canvas.rectangle(box(0.10, 0.24, 0.90, 0.98), fill=255)
        canvas.rectangle(box(0.22, 0.03, 0.78, 0.12), fill=255)
    elif kind == "can":
        canvas.rounded_rectangle(box(0.11, 0.03, 0.89, 0.97), 0.09 * side, fill=255)
    elif kind == "jar":
        canvas.rounded_rectangle(box(0.08, 0.18, 0.92, 0.98), 0.11 * side, fill=255)
        canvas.rounded_rectangle(box(0.15, 0.03, 0.85, 0.20), 0.03 * side, fill=255)
    elif kind == "pouch":
        teeth = [(0.10 + 0.05 * i, 0.03 + 0.03 * (i % 2)) for i in range(17)]
        feet = [(0.90 - 0.05 * i, 0.97 - 0.03 * (i % 2)) for i in range(17)]
        canvas.polygon(_scaled([*teeth, (0.88, 0.5), *feet, (0.12, 0.5)], side), fill=255)
    else:
        canvas.ellipse(box(0.03, 0.03, 0.97, 0.97), fill=255)


def _scaled(points: Sequence[tuple[float, float]], side: int) -> list[tuple[float, float]]:
    return [(x * side, y * side) for x, y in points]


def _draw_pattern(canvas: ImageDraw.ImageDraw, design: Design, side: int) -> None:
    ink = _hsv(design.hue + 0.04, 0.70, 0.60)
    step = side // 14
    for i in range(-14, 28):
        at = i * step
        if design.pattern == "stripes" and i % 2:
            canvas.rectangle((at, 0, at + step, side), fill=ink)
        elif design.pattern == "hoops" and i % 2:
            canvas.rectangle((0, at, side, at + step), fill=ink)
        elif design.pattern == "diagonals" and i % 2:
            canvas.polygon([(at, 0), (at + step, 0), (at + step + side, side), (at + side, side)], fill=ink)
        elif design.pattern in ("spots", "checks"):
            for j in range(14):
                left, top = at, j * step
                if design.pattern == "checks" and (i + j) % 2:
                    canvas.rectangle((left, top, left + step, top + step), fill=ink)
                elif design.pattern == "spots" and (i + j) % 2:
                    canvas.ellipse((left + 4, top + 4, left + step + 2, top + step + 2), fill=ink)


def _draw_cap(canvas: ImageDraw.ImageDraw, design: Design, side: int) -> None:
    """Lid, cap or rim in the accent colour."""
    accent = _hsv(design.accent_hue, 0.55, 0.70)
    if design.kind in ("bottle", "carton", "jar"):
        bottom = {"bottle": 0.13, "carton": 0.11, "jar": 0.185}[design.kind]
        canvas.rectangle((0, 0, side, bottom * side), fill=accent)
    elif design.kind == "tin":
        canvas.ellipse((0.03 * side, 0.03 * side, 0.97 * side, 0.97 * side), outline=accent, width=side // 18)
    else:
        canvas.rectangle((0, 0, side, 0.075 * side), fill=accent)
        canvas.rectangle((0, 0.925 * side, side, side), fill=accent)


def _draw_label(canvas: ImageDraw.ImageDraw, design: Design, box: Sequence[float]) -> None:
    """Name, emblem, seal, dots, size code and band on a pale label; a family may have the name below."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    hue = design.accent_hue
    paper, ink, disc = _hsv(hue, 0.22, 0.97), _hsv(hue, 0.80, 0.32), _hsv(hue, 0.60, 0.68)

    def x(u: float) -> float:
        return left + u * width

    def y(v: float) -> float:
        return top + (1 - v if design.is_upside_down else v) * height

    canvas.rounded_rectangle((left, top, right, bottom), 0.05 * width, fill=paper)
    canvas.text((x(0.5), y(0.105)), design.word, fill=ink, font=ImageFont.load_default(0.18 * height), anchor="mm")
    centre, radius = (x(0.5), y(0.48)), 0.28 * height
    canvas.ellipse(_disc(*centre, radius), fill=disc)
    _draw_emblem(canvas, design.emblem, centre, 0.82 * radius, (paper, disc))
    u, v = CORNERS[design.corner]
    canvas.ellipse(_disc(x(u), y(v), 0.11 * height), fill=_hsv(design.hue + 0.5, 0.75, 0.50))
    for i in range(design.n_dots):
        canvas.ellipse(_disc(x(0.10 + 0.145 * i), y(0.805), 0.062 * height), fill=ink)
    font = ImageFont.load_default(0.23 * height)
    canvas.text((x(0.85), y(0.80)), design.size_code, fill=ink, font=font, anchor="mm")
    low, high = sorted((y(0.895), y(1.0)))
    canvas.rectangle((left, low, right, high), fill=BANDS[design.band])


def _disc(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _draw_emblem(
    canvas: ImageDraw.ImageDraw,
    name: str,
    centre: tuple[float, float],
    radius: float,
    colours: tuple[Colour, Colour],
) -> None:
    """`colours` are the emblem's own and that of the disc it lies on."""
    (cx, cy), (ink, disc) = centre, colours

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        canvas.polygon([(cx + radius * px, cy + radius * py) for px, py in points], fill=ink)

    if name == "star":
        corners = [(1.0 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
        polygon([(length * math.cos(angle), length * math.sin(angle)) for length, angle in corners])
    elif name == "heart":
        canvas.ellipse(_disc(cx - 0.40 * radius, cy - 0.28 * radius, 0.45 * radius), fill=ink)
        canvas.ellipse(_disc(cx + 0.40 * radius, cy - 0.28 * radius, 0.45 * radius), fill=ink)
        polygon([(-0.80, -0.08), (0.80, -0.08), (0.0, 0.88)])
    elif name == "drop":
        canvas.ellipse(_disc(cx, cy + 0.30 * radius, 0.58 * radius), fill=ink)
        polygon([(-0.54, 0.10), (0.54, 0.10), (0.0, -0.95)])
    elif name == "moon":
        canvas.ellipse(_disc(cx, cy, 0.85 * radius), fill=ink)
        canvas.ellipse(_disc(cx + 0.42 * radius, cy - 0.15 * radius, 0.72 * radius), fill=disc)
    elif name == "cross":
        polygon([(-0.28, -0.9), (0.28, -0.9), (0.28, 0.9), (-0.28, 0.9)])
        polygon([(-0.9, -0.28), (0.9, -0.28), (0.9, 0.28), (-0.9, 0.28)])
    elif name == "bolt":
        polygon([(0.25, -1.0), (-0.60, 0.15), (-0.05, 0.15), (-0.25, 1.0), (0.60, -0.20), (0.05, -0.20)])
    elif name == "triangle":
        polygon([(0.0, -0.9), (0.85, 0.65), (-0.85, 0.65)])
    else:
        canvas.ellipse(_disc(cx, cy, 0.80 * radius), outline=ink, width=max(1, round(0.28 * radius)))


def _round_off(picture: Image.Image, *, is_round: bool) -> Image.Image:
    """Darker towards the sides: a cylinder more than a flat box."""
    across = np.linspace(-1, 1, picture.width)
    shade = 1 - (0.42 if is_round else 0.12) * across**4
    row = np.round(255 * shade).astype(np.uint8)
    mask = Image.fromarray(np.ascontiguousarray(np.broadcast_to(row, (picture.height, picture.width))))
    return ImageChops.multiply(picture, mask.convert("RGB"))
