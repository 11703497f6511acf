"""The report's plots as inline SVG. Layer 3.

Written by hand rather than by a plotting library: the same bytes everywhere, text that stays text, and
colours that follow the page's light or dark theme through its CSS classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from distributed_rerank.report.query_examples import values_of

WIDTH, HEIGHT = 380.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 16.0, 40.0
BUCKETS = ((10, math.inf, "10 or more"), (4, 9, "4 to 9"), (2, 3, "2 or 3"), (1, 1, "1"))


def rank_changes(per_query: pd.DataFrame) -> list[tuple[str, int]]:
    """How many queries' first relevant candidate moved how far: from lost, over places down and up, to found.

    A relevant candidate that is in the list on one side only counts as lost or found; the unchanged, and
    those in neither list, are the bucket "same".
    """
    before, after = values_of(per_query, "first_hit_before"), values_of(per_query, "first_hit_after")
    places_up = before - after
    counts = [("lost", int(np.sum(~np.isnan(before) & np.isnan(after))))]
    for low, high, name in BUCKETS:
        counts.append((f"down {name}", int(np.sum((-places_up >= low) & (-places_up <= high)))))
    counts.append(("same", int(np.sum((places_up == 0) | (np.isnan(before) & np.isnan(after))))))
    for low, high, name in reversed(BUCKETS):
        counts.append((f"up {name}", int(np.sum((places_up >= low) & (places_up <= high)))))
    counts.append(("found", int(np.sum(np.isnan(before) & ~np.isnan(after)))))
    return counts


def histogram(counts: Sequence[tuple[str, int]], description: str) -> Markup:
    """Bars of the moved queries, best at the top; "same" is not drawn, for it would dwarf the others."""
    moved = [(name, count) for name, count in reversed(counts) if name != "same"]
    highest = max([count for _, count in moved] + [1])
    step, start = (HEIGHT - 8) / len(moved), 112.0
    parts = [_line(start, 2.0, start, HEIGHT - 4, "axis")]
    for position, (name, count) in enumerate(moved):
        y, length = 4 + position * step, (WIDTH - start - 52) * count / highest
        kind = "worse" if name == "lost" or name.startswith("down") else "better"
        size = f'width="{length:.1f}" height="{step - 6:.1f}"'
        parts.append(f'<rect class="{kind}" x="{start}" y="{y + 3:.1f}" {size}/>')
        parts.append(_text(start - 8, y + step / 2 + 4, name, "end"))
        parts.append(_text(start + length + 6, y + step / 2 + 4, f"{count:,}", "value"))
    return _svg(parts, description)


class Point(NamedTuple):
    """A place on a curve; `label` is written below it."""

    x: float
    y: float
    label: str


def curve(
    points: Sequence[Point], base: float, axis: str, description: str, *, is_log: bool = True, marked: str | None = None
) -> Markup:
    """y against x (logarithmic, or linear), with the first stage as a dashed line and a ring around one label's point.

    Points are ascending in x; a label that would run into the one before it is left out, the last one never.
    """
    scaled = [math.log(point.x) if is_log else point.x for point in points]
    values = [point.y for point in points]
    ticks = _ticks(min([*values, base]), max([*values, base]))
    span = (scaled[-1] - scaled[0]) or 1.0

    def x(place: float) -> float:
        return LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * (place - scaled[0]) / span

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        parts += [
            _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            _text(LEFT - 6, y(tick) + 4, f"{tick:.3f}", "end muted"),
        ]
    parts += [
        _line(LEFT, y(base), WIDTH - RIGHT, y(base), "base"),
        _base_label(abs(values[0] - base) > abs(values[-1] - base), y(base)),
    ]
    path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in zip(scaled, values, strict=True))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    shown = _room_for_labels([x(place) for place in scaled], [point.label for point in points])
    for number, (place, point) in enumerate(zip(scaled, points, strict=True)):
        parts.append(f'<circle class="point" cx="{x(place):.1f}" cy="{y(point.y):.1f}" r="4"/>')
        if point.label == marked:
            parts.append(f'<circle class="ring" cx="{x(place):.1f}" cy="{y(point.y):.1f}" r="9"/>')
        if number in shown:
            parts.append(_text(x(place), HEIGHT - 23, point.label, "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, axis, "middle muted"))
    return _svg(parts, description)


def _base_label(is_left: bool, y: float) -> str:
    """The words on the dashed line, on the side where the curve is further from it."""
    return _text(LEFT + 4 if is_left else WIDTH - RIGHT, y - 5, "first stage", "muted" if is_left else "end muted")


def _room_for_labels(places: Sequence[float], labels: Sequence[str]) -> set[int]:
    """Which labels fit side by side, from the last one back."""
    shown: set[int] = set()
    free = math.inf
    for number in range(len(places) - 1, -1, -1):
        half = 4 + 3.8 * len(labels[number])
        if places[number] + half < free:
            shown.add(number)
            free = places[number] - half
    return shown


def distances(found: Mapping[str, Any], description: str) -> Markup:
    """Distances of correct candidates (filled) and wrong ones (line), each as shares of their own number."""
    edges = [float(edge) for edge in found["edges"]]
    shares = {name: _shares(found[name]) for name in ("relevant", "other")}
    highest = max(max(column) for column in shares.values()) or 1.0

    def x(edge: float) -> float:
        return 8 + (WIDTH - 16) * (edge - edges[0]) / (edges[-1] - edges[0])

    def y(share: float) -> float:
        return TOP + 20 + (HEIGHT - TOP - 20 - BOTTOM) * (1 - share / highest)

    parts = []
    for name, kind in (("relevant", "better"), ("other", "wrong")):
        steps = [(x(edges[0]), y(0.0))]
        for place, share in enumerate(shares[name]):
            steps += [(x(edges[place]), y(share)), (x(edges[place + 1]), y(share))]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in [*steps, (x(edges[-1]), y(0.0))])
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    parts.append(_line(8.0, y(0.0), WIDTH - 8, y(0.0), "axis"))
    parts += [_text(8.0, HEIGHT - 23, f"{edges[0]:.3g}", ""), _text(WIDTH - 8, HEIGHT - 23, f"{edges[-1]:.3g}", "end")]
    parts.append(_text(WIDTH / 2, HEIGHT - 5, "distance", "middle muted"))
    parts += ['<rect class="better" x="8" y="4" width="14" height="12"/>', _text(28.0, 14.0, "correct", "")]
    parts += [_line(100.0, 10.0, 122.0, 10.0, "wrong"), _text(128.0, 14.0, "wrong", "")]
    return _svg(parts, description)


def overlap(found: Mapping[str, Any]) -> float:
    """Area that the two histograms share: 0 where a threshold tells all correct candidates from all wrong ones."""
    both = zip(_shares(found["relevant"]), _shares(found["other"]), strict=True)
    return sum(min(pair) for pair in both)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round values that enclose [low, high]."""
    span = max(high - low, 0.004)
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 2) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def _svg(parts: Sequence[str], description: str) -> Markup:
    name = escape(description)
    head = f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{name}">'
    # Safe to pass the template's escaping by: every text in `parts` went through escape.
    return Markup(head + "".join(parts) + "</svg>")
