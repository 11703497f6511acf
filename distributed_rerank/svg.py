"""Parts of plots as SVG, shared by the report, the trend page and the training curves.

Written by hand rather than with a plotting library, so the bytes are the same everywhere and text stays text. Colours
are attributes, which any viewer shows and which the CSS classes of a page override.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Number = float | int


def element(name: str, *content: str, **attributes: object) -> Markup:
    """One element with its text and attribute values escaped; `content` that is Markup already stays as it is.

    `class_` becomes class, `stroke_width` stroke-width; a float is written with one decimal.
    """
    written = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
    ]
    inside = Markup("").join(content)
    end = f">{inside}</{name}>" if inside else "/>"
    return Markup(f"<{name}{''.join(written)}{end}")


def line(x1: Number, y1: Number, x2: Number, y2: Number, **style: object) -> Markup:
    """A straight line in the colour of the text."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **{"stroke": "currentColor", **style})


def text(x: Number, y: Number, content: str, anchor: str = "start", **style: object) -> Markup:
    """Words that begin (`start`), are centred (`middle`) or end (`end`) at x."""
    return element("text", content, x=x, y=y, text_anchor=anchor, **{"fill": "currentColor", **style})


def polyline(points: Iterable[tuple[Number, Number]], **style: object) -> Markup:
    """A line through points that are picture coordinates."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=path, **{"fill": "none", "stroke": "currentColor", **style})


def picture(parts: Iterable[str], width: Number, height: Number, description: str, **attributes: object) -> Markup:
    """The whole picture; `description` is read out in its place by screen readers."""
    return element(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:g} {height:g}", role="img",
        aria_label=description, font_family="system-ui, sans-serif", font_size=13, **attributes,
    )  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Turns data into picture coordinates: the two ranges fill what the margins leave of the picture."""

    x_range: tuple[Number, Number]
    y_range: tuple[Number, Number]
    width: Number
    height: Number
    left: Number
    right: Number
    top: Number
    bottom: Number
    pad: Number = 0
    """Space between the margins and the smallest and largest x."""

    def x(self, value: Number) -> float:
        """From the left edge; the smallest x where the range is a single value."""
        low, high = self.x_range
        inside = self.width - self.left - self.right - 2 * self.pad
        return self.left + self.pad + inside * (value - low) / ((high - low) or 1.0)

    def y(self, value: Number) -> float:
        """From the top edge; larger values are higher up."""
        low, high = self.y_range
        return self.top + (self.height - self.top - self.bottom) * (high - value) / (high - low)

    def points(self, xs: Iterable[Number], ys: Iterable[Number]) -> list[tuple[float, float]]:
        """Picture coordinates of data points."""
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]

    def level(self, value: Number, **style: object) -> Markup:
        """A horizontal line at y = `value` over the whole width."""
        return line(self.left, self.y(value), self.width - self.right, self.y(value), **style)

    def grid(self, values: Sequence[Number]) -> list[Markup]:
        """A faint level for each value, with the value on its left; whole numbers where they go beyond 10."""
        parts = []
        decimals = 0 if max(values) >= 10 else 3
        for value in values:
            parts.append(self.level(value, class_="grid", stroke_opacity="0.2"))
            parts.append(text(self.left - 6, self.y(value) + 4, f"{value:.{decimals}f}", "end", class_="muted"))
        return parts


def ticks(low: Number, high: Number) -> list[float]:
    """Three to eight round values that enclose [low, high]."""
    span = max(high - low, 0.004)
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 2) + 1)]
